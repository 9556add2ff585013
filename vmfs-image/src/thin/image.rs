//! A thin image as an [`Image`].

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::VolatileSlice;

use super::Thin;
use super::layout::{self, Backing, SUBS};
use super::map::Found;
use super::space::Space;
use super::state::{State, What, place};
use crate::image::{
    Access, Error, Extent, Format, Identity, Image, Info, MAX_SIZE, Place, Run, SECTOR, Ticket,
};
use crate::transfer::total;

/// A ticket that nobody waits for.
const NOTHING: Ticket = Ticket(0);
/// Kinds of tickets, in the lowest two bits: a transfer in place, whose third bit is its counter, and one of
/// [`State::fresh`], whose other bits are its number.
const IN_PLACE: u64 = 1;
const FRESH: u64 = 2;

/// Adds an extent, or makes the last one longer.
#[inline]
fn push(extents: &mut Vec<Extent>, first: usize, len: u64, place: Place) {
    if let Some(last) = extents[first..].last_mut() {
        let joined = match (last.place, place) {
            (Place::Zero, Place::Zero) => true,
            (Place::File { file: a, offset: from }, Place::File { file: b, offset }) => {
                a == b && from + last.len == offset
            }
            _ => false,
        };
        if joined {
            last.len += len;
            return;
        }
    }
    extents.push(Extent { len, place });
}

impl Thin {
    /// The range's end, if it lies in the disk and is aligned.
    fn range(&self, offset: u64, len: u64) -> io::Result<u64> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size());
        let aligned = offset.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR);
        end.filter(|_| aligned).ok_or_else(|| {
            let text =
                format!("{len} bytes at {offset} of {} are not whole sectors within it", self.path.display());
            io::Error::new(io::ErrorKind::InvalidInput, text)
        })
    }

    fn may_write(&self) -> io::Result<()> {
        if self.is_writable() {
            return Ok(());
        }
        let text = format!("{} is open to be read", self.path.display());
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    }

    /// Where a piece that this image has nothing of is read. `false` where that is not known.
    fn locate_below(&self, visible: u64, at: u64, len: u64, first: usize, extents: &mut Vec<Extent>) -> bool {
        let seen = visible.saturating_sub(at).min(len);
        if let Some(backing) = self.backing.as_ref().filter(|_| seen > 0) {
            // Of one that changes, an extent would have to be held by a ticket of its own.
            if backing.is_writable() {
                return false;
            }
            let from = extents.len();
            let Some(ticket) = backing.locate(at, seen, Access::Read, extents) else { return false };
            backing.finish(ticket, true);
            for extent in &mut extents[from..] {
                if let Place::File { file, .. } = &mut extent.place {
                    *file += 1;
                }
            }
        }
        if seen < len {
            push(extents, first, len - seen, Place::Zero);
        }
        true
    }

    fn locate_read(&self, offset: u64, end: u64, extents: &mut Vec<Extent>) -> Option<Ticket> {
        let first = extents.len();
        let mut state = self.state();
        let visible = state.visible;
        let mut known = true;
        let walked = state.walk(offset, end, |piece| {
            match piece.what {
                What::Data(offset) => push(extents, first, piece.len, Place::File { file: 0, offset }),
                What::Zero => push(extents, first, piece.len, Place::Zero),
                What::Absent => known = self.locate_below(visible, piece.at, piece.len, first, extents),
            }
            known
        });
        if walked.is_err() || !known {
            extents.truncate(first);
            return None;
        }
        if !self.writable {
            return Some(NOTHING);
        }
        let parity = state.epochs.parity;
        self.in_flight.begin(parity);
        Some(Ticket(IN_PLACE | (parity as u64) << 2))
    }

    fn locate_write(&self, offset: u64, end: u64, extents: &mut Vec<Extent>) -> Option<Ticket> {
        let first = extents.len();
        let mut state = self.state();
        let parity = state.epochs.parity;
        let mut fresh: Option<usize> = None;
        let mut at = offset;
        while at < end {
            let cluster = at >> self.bits;
            let start = cluster << self.bits;
            let until = end.min(start + (1 << self.bits));
            let entry = match state.tree.find(cluster) {
                Found::Page(page) => page.entries[place(cluster).1],
                Found::Absent(_) => layout::Entry::default(),
                Found::Load(_) => break,
            };
            let subs = state.touched(start, at, until);
            if subs & entry.data() != 0 && state.may_overwrite().is_err() {
                break;
            }
            let new = subs & !entry.data();
            let entry = if new == 0 {
                entry
            } else {
                let Some(entry) = self.locate_fresh(&mut state, cluster, at, until, new) else { break };
                let index = *fresh.get_or_insert_with(|| state.keep_fresh(parity));
                state.fresh[index].pieces.push((cluster, new));
                entry
            };
            let place = (u64::from(entry.cluster()) << self.bits) + (at - start);
            push(extents, first, until - at, Place::File { file: 0, offset: place });
            at = until;
        }
        if at < end {
            extents.truncate(first);
            if let Some(index) = fresh {
                let mut pieces = std::mem::take(&mut state.fresh[index].pieces);
                for (cluster, subs) in pieces.drain(..) {
                    state.end_fresh(cluster, subs, 0, 0);
                }
                state.fresh[index].pieces = pieces;
                state.fresh_unused.push(index);
                self.changed.notify_all();
            }
            return None;
        }
        self.in_flight.begin(parity);
        Some(Ticket(match fresh {
            Some(index) => FRESH | (index as u64) << 2,
            None => IN_PLACE | (parity as u64) << 2,
        }))
    }

    /// Begins a write that gives the sub-clusters `new` of a cluster their first data.
    fn locate_fresh(
        &self,
        state: &mut State,
        cluster: u64,
        at: u64,
        until: u64,
        new: u16,
    ) -> Option<layout::Entry> {
        let start = cluster << self.bits;
        let sub = state.sub();
        // The first and the last may be written in part only: those have to be there.
        let bit = |at: u64| u32::try_from((at - start) / sub).map_or(0, |bit| 1_u16 << bit.min(SUBS - 1));
        let cut_first = !at.is_multiple_of(sub) && new & bit(at) != 0;
        let cut_last = !until.is_multiple_of(sub) && new & bit(until) != 0;
        if cut_first || cut_last || state.is_busy(cluster, new) {
            return None;
        }
        let entry = state.reserve(cluster).ok()?;
        state.begin_fresh(cluster, new);
        Some(entry)
    }

    /// Changes something that only the superblock says, as a whole or not at all.
    fn change<T>(
        &self,
        change: impl FnOnce(&mut State) -> io::Result<T>,
        undo: impl FnOnce(&mut State, T),
    ) -> io::Result<()> {
        self.may_write()?;
        let _alone = super::lock(&self.settings);
        let old = {
            let mut state = self.state();
            let old = change(&mut state)?;
            state.super_dirty = true;
            old
        };
        self.commit().inspect_err(|_| undo(&mut self.state(), old))
    }

    /// Notes another backing, whose bytes are the same wherever this image has none of its own, or none any more, once it has
    /// everything. What is open as its backing stays so.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] for a path of no or too many bytes; that of the storage. Nothing is changed then.
    pub fn set_backing(&self, backing: Option<(&Path, Format, Identity)>) -> io::Result<()> {
        if let Some((path, ..)) = backing {
            super::open::check_path(path)
                .map_err(|what| io::Error::new(io::ErrorKind::InvalidInput, what))?;
        }
        self.change(
            |state| {
                let old = (state.backing.clone(), state.visible);
                state.backing = backing.map(|(path, format, identity)| {
                    let before = old.0.as_ref().map_or(state.size, |old| old.visible);
                    Backing {
                        path: path.to_owned(),
                        format,
                        identity,
                        visible: before.min(identity.size / SECTOR * SECTOR),
                    }
                });
                let noted = state.backing.as_ref().map_or(0, |backing| backing.visible);
                state.visible = if self.backing.is_some() { noted } else { 0 };
                Ok(old)
            },
            |state, (backing, visible)| (state.backing, state.visible) = (backing, visible),
        )
    }

    /// What it notes of its backing.
    #[must_use]
    pub fn noted_backing(&self) -> Option<Backing> {
        self.state().backing.clone()
    }

    /// Sets the most that the file may grow to, in bytes.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] for less than it has; that of the storage. Nothing is changed then.
    pub fn set_max_size(&self, max_size: Option<u64>) -> io::Result<()> {
        self.change(
            |state| {
                let end = state.space.end;
                let least = end.max(super::open::least(state.cluster(), state.size));
                if max_size.is_some_and(|max| max < least) {
                    let text = format!("max_size has to be {least} bytes at least, what the image takes");
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
                }
                let old = state.max_size;
                state.max_size = max_size.unwrap_or(0);
                state.space.max = Space::limit(state.cluster(), state.max_size);
                Ok(old)
            },
            |state, old| {
                state.max_size = old;
                state.space.max = Space::limit(state.cluster(), old);
            },
        )
    }
}

impl Image for Thin {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> Format {
        Format::Thin
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn memory_alignment(&self) -> usize {
        self.memory_alignment
    }

    fn is_writable(&self) -> bool {
        self.unfrozen.load(Ordering::Acquire)
    }

    fn set_writable(&self, writable: bool) -> Result<(), Error> {
        self.freeze(!writable)
    }

    fn as_thin(&self) -> Option<&Thin> {
        Some(self)
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        let len = total(into);
        self.range(offset, len)?;
        self.read(offset, len, into)
    }

    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.may_write()?;
        let len = total(from);
        self.range(offset, len)?;
        self.write(offset, len, from)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.may_write()?;
        let end = self.range(offset, len)?;
        self.zero(offset, end, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.may_write()?;
        let end = self.range(offset, len)?;
        self.clear(offset, end, true)
    }

    fn flush(&self) -> io::Result<()> {
        if self.is_writable() { self.commit() } else { Ok(()) }
    }

    fn flush_is_sync_of(&self) -> Option<u16> {
        (!self.no_flush && self.is_writable() && self.state().is_clean()).then_some(0)
    }

    fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    fn locate(&self, offset: u64, len: u64, access: Access, extents: &mut Vec<Extent>) -> Option<Ticket> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size())?;
        let unaligned = (offset | len) & (u64::from(self.block_size) - 1);
        if len == 0 || unaligned != 0 {
            return None;
        }
        match access {
            Access::Read => self.locate_read(offset, end, extents),
            Access::Write if self.is_writable() => self.locate_write(offset, end, extents),
            Access::Write => None,
        }
    }

    fn finish(&self, ticket: Ticket, ok: bool) {
        match ticket.0 & 3 {
            IN_PLACE => self.in_flight.end(usize::from(ticket.0 & 4 != 0)),
            FRESH => {
                let Ok(index) = usize::try_from(ticket.0 >> 2) else { return };
                let mut state = self.state();
                let Some(fresh) = state.fresh.get_mut(index) else { return };
                let parity = fresh.parity;
                let mut pieces = std::mem::take(&mut fresh.pieces);
                for (cluster, subs) in pieces.drain(..) {
                    state.end_fresh(cluster, subs, if ok { subs } else { 0 }, 0);
                }
                state.fresh[index].pieces = pieces;
                state.fresh_unused.push(index);
                self.in_flight.end(parity);
                self.changed.notify_all();
            }
            _ => {}
        }
    }

    fn run(&self, offset: u64, len: u64) -> io::Result<Run> {
        let end = offset.saturating_add(len).min(self.size());
        let (len, kind) = self.run_of(offset, end)?;
        Ok(Run { len, kind })
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        self.may_write()?;
        if !size.is_multiple_of(SECTOR) || size > MAX_SIZE || size < self.size() {
            let text = format!(
                "{size} bytes is no size for {}; right is a multiple of {SECTOR} from {} to {MAX_SIZE}",
                self.path.display(),
                self.size()
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if size == self.size() {
            return Ok(());
        }
        self.change(
            |state| {
                let old = state.size;
                let entries = layout::root_entries(size, state.bits);
                let roots = 2 * layout::list_bytes(entries);
                let entries = usize::try_from(entries).map_err(io::Error::other)?;
                if entries > state.tree.root.len() && state.space.available() < roots {
                    return Err(super::state::quota());
                }
                state.size = size;
                state.tree.root.resize_with(entries, Default::default);
                Ok(old)
            },
            |state, old| {
                state.size = old;
                let entries = layout::root_entries(old, state.bits);
                state.tree.root.truncate(usize::try_from(entries).unwrap_or(usize::MAX));
            },
        )?;
        self.size.fetch_max(size, Ordering::Relaxed);
        Ok(())
    }

    fn pull(&self, offset: u64, len: u64) -> io::Result<()> {
        self.may_write()?;
        let end = self.range(offset, len)?;
        self.pull_range(offset, end)
    }

    fn info(&self) -> io::Result<Info> {
        let allocated = match self.storage.file() {
            Some(file) => file.metadata()?.blocks() * 512,
            None => self.storage.len()?,
        };
        let state = self.state();
        let free = state.space.available() - state.space.max.saturating_sub(state.space.end);
        let uuid: String = self.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let uuid = [&uuid[..8], &uuid[8..12], &uuid[12..16], &uuid[16..20], &uuid[20..]].join("-");
        Ok(Info {
            path: self.path.clone(),
            format: Format::Thin,
            size: self.size(),
            allocated,
            cluster_size: Some(state.cluster()),
            max_size: (state.max_size != 0).then_some(state.max_size),
            backing: state.backing.as_ref().map(|backing| backing.path.clone()),
            details: vec![
                ("uuid".to_owned(), uuid),
                ("generation".to_owned(), state.generation.to_string()),
                ("clusters".to_owned(), state.mapped.to_string()),
                ("free in file".to_owned(), free.to_string()),
            ],
        })
    }

    fn identity(&self) -> io::Result<Identity> {
        let generation = self.state().generation;
        Ok(Identity { size: self.size(), id: self.uuid, state: generation })
    }
}
