//! The calls that may wait for storage.

use std::io;
use std::time::Duration;

use vm_memory::VolatileSlice;

use super::Thin;
use super::layout::{self, Entry, L2_ENTRIES, PAGE, SUBS};
use super::map::Load;
use super::space::Denied;
use super::state::{Piece, State, Wait, What, quota};
use crate::image::{Image, RunKind};

/// How far ahead of its end the file is made longer, so that few calls have to.
const AHEAD: u64 = 64 << 20;

/// A transfer that this process makes itself: counted until it is dropped.
#[derive(Debug)]
struct Counted<'a> {
    thin: &'a Thin,
    parity: usize,
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.thin.in_flight.end(self.parity);
    }
}

/// Sub-clusters that are getting their first data, let go whatever happens.
#[derive(Debug)]
struct FreshGuard<'a> {
    thin: &'a Thin,
    cluster: u64,
    subs: u16,
    data: u16,
    zero: u16,
}

impl Drop for FreshGuard<'_> {
    fn drop(&mut self) {
        self.thin.state().end_fresh(self.cluster, self.subs, self.data, self.zero);
        self.thin.changed.notify_all();
    }
}

/// A part of `slices`, which has to be within.
fn part<'a>(slices: &[VolatileSlice<'a>], from: u64, len: u64) -> io::Result<Vec<VolatileSlice<'a>>> {
    let (mut skip, mut left) = (from, len);
    let mut out = Vec::with_capacity(slices.len().min(4));
    for slice in slices {
        let here = slice.len() as u64;
        if skip >= here {
            skip -= here;
            continue;
        }
        let take = left.min(here - skip);
        if take == 0 {
            break;
        }
        let (from, count) = (usize::try_from(skip), usize::try_from(take));
        let (from, count) = (from.map_err(io::Error::other)?, count.map_err(io::Error::other)?);
        out.push(slice.subslice(from, count).map_err(io::Error::other)?);
        skip = 0;
        left -= take;
    }
    if left > 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(out)
}

fn bytes(len: u64) -> io::Result<Vec<u8>> {
    Ok(vec![0; usize::try_from(len).map_err(io::Error::other)?])
}

fn fill_zero(slices: &[VolatileSlice<'_>]) {
    let zeroes = [0_u8; PAGE];
    for slice in slices {
        let mut at = 0;
        while let Ok(rest) = slice.offset(at)
            && !rest.is_empty()
        {
            let len = rest.len().min(PAGE);
            rest.copy_from(&zeroes[..len]);
            at += len;
        }
    }
}

impl Thin {
    fn count(&self, state: &State) -> Counted<'_> {
        let parity = state.epochs.parity;
        self.in_flight.begin(parity);
        Counted { thin: self, parity }
    }

    fn fresh(&self, state: &mut State, cluster: u64, subs: u16) -> FreshGuard<'_> {
        state.begin_fresh(cluster, subs);
        FreshGuard { thin: self, cluster, subs, data: 0, zero: 0 }
    }

    /// Makes the file long enough for `need` more bytes behind the end, and some.
    pub(super) fn lengthen(&self, need: u64) -> io::Result<()> {
        let _alone = super::lock(&self.growing);
        let (end, max, len) = {
            let state = self.state();
            (state.space.end, state.space.max, state.space.file_len)
        };
        let wanted = end.saturating_add(need).saturating_add(AHEAD).min(max);
        if wanted > len {
            self.storage.set_len(wanted)?;
            self.state().space.file_len = wanted;
        }
        Ok(())
    }

    fn corrupt(&self, bad: &layout::Bad) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, format!("{}: {bad}", self.path.display()))
    }

    fn load(&self, load: Load) -> io::Result<()> {
        let (counted, end, size) = {
            let state = self.state();
            (self.count(&state), state.space.end, state.size)
        };
        let what = if load.is_l2 { "L2 page" } else { "L1 page" };
        let mut page = [0; PAGE];
        self.storage.read_at(&mut page, load.at.offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => {
                let path = self.path.display();
                let at = load.at.offset;
                let text = format!("{path} ends before its {what} at {at}: it was cut off");
                io::Error::new(io::ErrorKind::InvalidData, text)
            }
            _ => error,
        })?;
        layout::verify(what, &page, load.at.crc).map_err(|bad| self.corrupt(&bad))?;
        if load.is_l2 {
            let first = load.number as u64 * L2_ENTRIES as u64;
            let within = size.div_ceil(1 << self.bits).saturating_sub(first).min(L2_ENTRIES as u64);
            let mut entries = [Entry::default(); L2_ENTRIES];
            let within = usize::try_from(within).unwrap_or(L2_ENTRIES);
            layout::decode_l2(&page, within, end >> self.bits, &mut entries)
                .map_err(|bad| self.corrupt(&bad))?;
            self.state().tree.put_l2(load, entries);
        } else {
            let refs = layout::decode_refs(what, &page, layout::L1_ENTRIES, self.bits, end)
                .map_err(|bad| self.corrupt(&bad))?;
            self.state().tree.put_l1(load, &refs);
        }
        drop(counted);
        Ok(())
    }

    /// Calls `step` under the lock until it does not have to wait.
    fn until<T>(&self, mut step: impl FnMut(&mut State) -> Result<T, Wait>) -> io::Result<T> {
        let mut tries = 0;
        loop {
            let mut state = self.state();
            let why = match step(&mut state) {
                Ok(done) => return Ok(done),
                Err(why) => why,
            };
            match why {
                Wait::Load(load) => {
                    drop(state);
                    self.load(load)?;
                }
                Wait::Busy => drop(super::wait(&self.changed, state)),
                Wait::Commit => {
                    drop(state);
                    self.commit()?;
                }
                Wait::Space(Denied::File) => {
                    drop(state);
                    self.lengthen(1 << self.bits)?;
                }
                Wait::Space(Denied::Quota) => {
                    if self.reclaim(&mut state) {
                        continue;
                    }
                    tries += 1;
                    if !state.freed.is_empty() || state.committing {
                        drop(state);
                        self.commit()?;
                    } else if !state.epochs.is_empty() && tries < 1000 {
                        drop(super::wait_for(&self.changed, state, Duration::from_millis(1)));
                    } else if !state.tree.dirty().is_empty() && tries < 1000 {
                        // What a commit needs is not needed after it.
                        drop(state);
                        self.commit()?;
                        tries = tries.max(990);
                    } else {
                        return Err(quota());
                    }
                }
            }
        }
    }

    /// The file's own pieces of a range, or as many of them as are known without another load.
    fn pieces(&self, from: u64, to: u64, out: &mut Vec<Piece>) -> io::Result<Counted<'_>> {
        self.until(|state| {
            out.clear();
            match state.walk(from, to, |piece| {
                out.push(piece);
                true
            }) {
                Err(_) if !out.is_empty() => {}
                other => other?,
            }
            Ok(self.count(state))
        })
    }

    /// Fills `into` with what the backing has at `at`, and with zeroes past what is seen of it.
    fn read_below(&self, at: u64, into: &[VolatileSlice<'_>], len: u64) -> io::Result<()> {
        let visible = self.state().visible;
        let seen = visible.saturating_sub(at).min(len);
        if let Some(backing) = self.backing.as_ref().filter(|_| seen > 0) {
            backing.read_at(at, &part(into, 0, seen)?)?;
            fill_zero(&part(into, seen, len - seen)?);
        } else {
            fill_zero(into);
        }
        Ok(())
    }

    pub(super) fn read(&self, offset: u64, len: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        let mut pieces = Vec::new();
        while at < end {
            let counted = self.pieces(at, end, &mut pieces)?;
            for piece in &pieces {
                let slices = part(into, piece.at - offset, piece.len)?;
                match piece.what {
                    What::Data(from) => self.storage.read_slices(&slices, from)?,
                    What::Zero => fill_zero(&slices),
                    What::Absent => self.read_below(piece.at, &slices, piece.len)?,
                }
                at = piece.at + piece.len;
            }
            drop(counted);
        }
        Ok(())
    }

    /// Clusters that a range touches: number, and the part of the range in it.
    fn clusters(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64, u64)> + use<> {
        let bits = self.bits;
        (from >> bits..to.div_ceil(1 << bits)).map(move |cluster| {
            let start = cluster << bits;
            (cluster, from.max(start), to.min(start + (1 << bits)))
        })
    }

    pub(super) fn write(&self, offset: u64, len: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        let end = offset + len;
        // First space for all of it, so that a limit is met before anything has changed.
        for (cluster, from, to) in self.clusters(offset, end) {
            self.until(|state| {
                let subs = state.touched(cluster << state.bits, from, to);
                let entry = state.entry(cluster)?;
                if subs & !entry.data() != 0 {
                    state.reserve(cluster)?;
                }
                Ok(())
            })?;
        }
        for (cluster, at, to) in self.clusters(offset, end) {
            self.write_cluster(cluster, at, to, &part(from, at - offset, to - at)?)?;
        }
        Ok(())
    }

    /// Writes a part of a cluster.
    fn write_cluster(&self, cluster: u64, at: u64, to: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        let start = cluster << self.bits;
        let (entry, covered, mut guard, counted) = self.until(|state| {
            let subs = state.touched(start, at, to);
            let entry = state.entry(cluster)?;
            let fresh = subs & !entry.data();
            if subs & entry.data() != 0 {
                state.may_overwrite()?;
            }
            if fresh == 0 {
                return Ok((entry, subs, None, self.count(state)));
            }
            if state.is_busy(cluster, subs) {
                return Err(Wait::Busy);
            }
            let entry = state.reserve(cluster)?;
            let covered = state.covered(start, at, to);
            Ok((entry, covered, Some(self.fresh(state, cluster, fresh)), self.count(state)))
        })?;
        let place = u64::from(entry.cluster()) << self.bits;
        let fresh = guard.as_ref().map_or(0, |guard| guard.subs);
        let sub = 1_u64 << (self.bits - 4);
        // What is neither there nor written whole is made whole first. That is the first and the last at most; the last of
        // the disk is, too, if the disk ends in it.
        let mut done = at;
        for index in 0..SUBS {
            let (low, high) = (start + u64::from(index) * sub, start + u64::from(index + 1) * sub);
            let is_whole = covered >> index & 1 != 0 && to.min(high) == high;
            if fresh >> index & 1 == 0 || is_whole {
                continue;
            }
            let (low_new, high_new) = (at.max(low), to.min(high));
            if done < low_new {
                let slices = part(from, done - at, low_new - done)?;
                self.storage.write_slices(&slices, place + (done - start))?;
            }
            let mut whole = bytes(sub)?;
            let on_disk = self.size().min(high) - low;
            if entry.zero() >> index & 1 == 0 && covered >> index & 1 == 0 {
                let end = usize::try_from(on_disk).map_err(io::Error::other)?;
                self.read_below(low, &[VolatileSlice::from(&mut whole[..end])], on_disk)?;
            }
            let mut place_of = usize::try_from(low_new - low).map_err(io::Error::other)?;
            for slice in part(from, low_new - at, high_new - low_new)? {
                let len = slice.len();
                slice.copy_to(&mut whole[place_of..place_of + len]);
                place_of += len;
            }
            self.storage.write_at(&whole, place + (low - start))?;
            done = high_new;
        }
        if done < to {
            self.storage.write_slices(&part(from, done - at, to - done)?, place + (done - start))?;
        }
        if let Some(guard) = &mut guard {
            guard.data = guard.subs;
        }
        drop((guard, counted));
        Ok(())
    }

    /// Makes all sub-clusters that lie in a range read as zeroes; what is left at its ends is not touched.
    pub(super) fn clear(&self, from: u64, to: u64, give: bool) -> io::Result<()> {
        let mut at = from;
        while at < to {
            let cluster = at >> self.bits;
            at = self.until(|state| {
                let start = cluster << state.bits;
                let end = to.min(start + state.cluster());
                if start >= state.visible
                    && let super::map::Found::Absent(until) = state.tree.find(cluster)
                {
                    // Nothing there, and nothing to hide.
                    let skip = until.checked_mul(state.cluster()).unwrap_or(to);
                    return Ok(skip.max(end).min(to));
                }
                let subs = state.covered(start, at, end);
                if subs != 0 {
                    state.clear(cluster, subs, give)?;
                }
                Ok(end)
            })?;
        }
        Ok(())
    }

    pub(super) fn zero(&self, from: u64, to: u64, unmap: bool) -> io::Result<()> {
        let sub = 1_u64 << (self.bits - 4);
        let first = from.next_multiple_of(sub).min(to);
        let last = (to / sub * sub).max(first);
        self.zero_part(from, first)?;
        self.clear(first, last, unmap)?;
        self.zero_part(last, to)
    }

    /// Zeroes a part of a sub-cluster.
    fn zero_part(&self, from: u64, to: u64) -> io::Result<()> {
        if from >= to {
            return Ok(());
        }
        let is_zero = self.until(|state| {
            let (mut zero, visible) = (true, state.visible);
            state.walk(from, to, |piece| {
                zero &= match piece.what {
                    What::Data(_) => false,
                    What::Zero => true,
                    What::Absent => piece.at >= visible,
                };
                zero
            })?;
            // Someone may be giving it data at this moment.
            let cluster = from >> state.bits;
            let start = cluster << state.bits;
            Ok(zero && !state.is_busy(cluster, state.touched(start, from, to)))
        })?;
        if is_zero {
            return Ok(());
        }
        let mut zeroes = bytes(to - from)?;
        self.write(from, to - from, &[VolatileSlice::from(&mut zeroes[..])])
    }

    pub(super) fn run_of(&self, from: u64, to: u64) -> io::Result<(u64, RunKind)> {
        // Behind what is seen of the backing, what is absent reads as zeroes whatever that holds.
        let visible = if self.backing.is_some() { self.state().visible } else { u64::MAX };
        let (to, hidden) = if from < visible { (to.min(visible), false) } else { (to, true) };
        let mut found: Option<(u64, RunKind)> = None;
        let mut at = from;
        let mut pieces = Vec::new();
        while at < to {
            drop(self.pieces(at, to, &mut pieces)?);
            for piece in &pieces {
                let kind = match piece.what {
                    What::Data(_) => RunKind::Data,
                    What::Zero => RunKind::Zero,
                    What::Absent if hidden => RunKind::Zero,
                    What::Absent => RunKind::Absent,
                };
                match &mut found {
                    None => found = Some((piece.len, kind)),
                    Some((len, before)) if *before == kind => *len += piece.len,
                    Some(found) => return Ok(*found),
                }
                at = piece.at + piece.len;
            }
        }
        found.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    pub(super) fn pull_range(&self, from: u64, to: u64) -> io::Result<()> {
        let sub = 1_u64 << (self.bits - 4);
        let (from, to) = (from / sub * sub, to.next_multiple_of(sub).min(self.size()));
        for (cluster, at, to) in self.clusters(from, to) {
            self.pull_cluster(cluster, at, to)?;
        }
        Ok(())
    }

    fn pull_cluster(&self, cluster: u64, at: u64, to: u64) -> io::Result<()> {
        let start = cluster << self.bits;
        let guard = self.until(|state| {
            let to = to.min(state.visible);
            if at >= to {
                return Ok(None);
            }
            let entry = state.entry(cluster)?;
            let absent = state.touched(start, at, to) & !(entry.data() | entry.zero());
            if absent == 0 {
                return Ok(None);
            }
            if state.is_busy(cluster, absent) {
                return Err(Wait::Busy);
            }
            state.may_change(cluster, 0)?;
            Ok(Some(self.fresh(state, cluster, absent)))
        })?;
        let Some(mut guard) = guard else { return Ok(()) };
        let sub = 1_usize << (self.bits - 4);
        let size = self.size();
        let mut whole = vec![0; sub * 16];
        let (mut data, mut zero) = (0_u16, 0_u16);
        for index in (0..SUBS).filter(|index| guard.subs >> index & 1 != 0) {
            let from = usize::try_from(index).map_err(io::Error::other)? * sub;
            let low = start + from as u64;
            let end = usize::try_from(size.min(low + sub as u64) - low).map_err(io::Error::other)?;
            let into = &mut whole[from..from + sub];
            self.read_below(low, &[VolatileSlice::from(&mut into[..end])], end as u64)?;
            if into.iter().all(|byte| *byte == 0) { zero |= 1 << index } else { data |= 1 << index }
        }
        if data != 0 {
            let entry = self.until(|state| state.reserve(cluster))?;
            let place = u64::from(entry.cluster()) << self.bits;
            let mut index = 0;
            while index < SUBS {
                let run = (data >> index).trailing_ones();
                if run > 0 {
                    let from = usize::try_from(index).map_err(io::Error::other)? * sub;
                    let len = usize::try_from(run).map_err(io::Error::other)? * sub;
                    self.storage.write_at(&whole[from..from + len], place + from as u64)?;
                }
                index += run.max(1);
            }
        }
        (guard.data, guard.zero) = (data, zero);
        Ok(())
    }
}
