//! What an open image knows in memory, under one short lock that is never held while storage is waited for.

use std::collections::HashMap;
use std::io;

use super::layout::{Backing, Entry, FreeExtent, L2_ENTRIES, ListRef, PAGE_U64, SUBS};
use super::map::{Found, Load, Tree};
use super::space::{Denied, Epochs, Freed, Space};

/// L2 pages that may differ from what is on disk before a commit is made for that alone.
pub(super) const MAX_DIRTY: usize = 2048;

/// Why something cannot be done under the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// A page has to be read first.
    Load(Load),
    /// There is no space.
    Space(Denied),
    /// Too much has changed since the last commit.
    Commit,
    /// A sub-cluster is being given its first data.
    Busy,
}

/// What a piece of a range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Data, from this offset in the file on.
    Data(u64),
    /// Zeroes.
    Zero,
    /// Nothing.
    Absent,
}

/// A piece of a range of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) at: u64,
    pub(super) len: u64,
    pub(super) what: What,
}

/// Sub-clusters that a transfer gives their first data.
#[derive(Debug, Default)]
pub(super) struct Fresh {
    /// The counter that it counts in.
    pub(super) parity: usize,
    /// Cluster of the disk, and which of its sub-clusters.
    pub(super) pieces: Vec<(u64, u16)>,
}

/// What an open image knows.
#[derive(Debug)]
pub(super) struct State {
    pub(super) bits: u8,
    pub(super) tree: Tree,
    pub(super) space: Space,
    pub(super) epochs: Epochs,
    /// Space that the state on disk names and the one in memory does not.
    pub(super) freed: Vec<Freed>,
    /// Sub-clusters that are being given their first data, by cluster of the disk.
    pub(super) busy: HashMap<u64, u16>,
    /// Transfers that give sub-clusters their first data: by ticket.
    pub(super) fresh: Vec<Fresh>,
    pub(super) fresh_unused: Vec<usize>,
    pub(super) generation: u64,
    /// Size of the disk as the next commit writes it.
    pub(super) size: u64,
    pub(super) max_size: u64,
    pub(super) mapped: u64,
    pub(super) backing: Option<Backing>,
    /// How much of the backing is seen.
    pub(super) visible: u64,
    /// The generation is a new one since the image was opened, so that images on this one can tell that it was changed.
    /// What is on disk is not changed before.
    pub(super) marked: bool,
    /// Something that only the superblock says has changed.
    pub(super) super_dirty: bool,
    /// A commit is being written.
    pub(super) committing: bool,
    pub(super) root: ListRef,
    pub(super) free: ListRef,
    /// Where the next root goes, and how long it is: taken beforehand, so that no commit fails for it.
    pub(super) spare_root: Option<FreeExtent>,
    /// Where the next free list goes.
    pub(super) spare_free: Option<u64>,
}

/// Bits `from` to `to`, exclusive.
pub(super) fn mask(from: u32, to: u32) -> u16 {
    let below = |bit: u32| u16::try_from((1_u32 << bit.min(SUBS)) - 1).unwrap_or(u16::MAX);
    below(to) & !below(from)
}

/// The number of the L2 page of a cluster, and the cluster's place in it.
pub(super) fn place(cluster: u64) -> (usize, usize) {
    let index = usize::try_from(cluster % L2_ENTRIES as u64).unwrap_or(0);
    (usize::try_from(cluster / L2_ENTRIES as u64).unwrap_or(usize::MAX), index)
}

impl State {
    pub(super) fn cluster(&self) -> u64 {
        1 << self.bits
    }

    pub(super) fn sub(&self) -> u64 {
        1 << (self.bits - 4)
    }

    /// Sub-clusters of the cluster at `start` that a range touches.
    pub(super) fn touched(&self, start: u64, from: u64, to: u64) -> u16 {
        let bit = |bytes: u64| u32::try_from(bytes / self.sub()).unwrap_or(SUBS);
        mask(bit(from - start), bit((to - start).next_multiple_of(self.sub())))
    }

    /// Sub-clusters of the cluster at `start` whose every byte on the disk is in the range.
    pub(super) fn covered(&self, start: u64, from: u64, to: u64) -> u16 {
        let sub = self.sub();
        let bit = |bytes: u64| u32::try_from(bytes / sub).unwrap_or(SUBS);
        let last = if to == self.size { (to - start).next_multiple_of(sub) } else { to - start };
        mask(bit((from - start).next_multiple_of(sub)), bit(last))
    }

    /// Whether nothing has changed since the last commit, and none is on its way.
    pub(super) fn is_clean(&self) -> bool {
        self.tree.dirty().is_empty() && !self.super_dirty && !self.committing && self.freed.is_empty()
    }

    /// Calls `each` for every piece of a range in order until it gives `false`.
    #[inline]
    pub(super) fn walk(
        &mut self,
        from: u64,
        to: u64,
        mut each: impl FnMut(Piece) -> bool,
    ) -> Result<(), Wait> {
        let (bits, sub_bits) = (self.bits, self.bits - 4);
        let mut at = from;
        while at < to {
            let cluster = at >> bits;
            let entry = match self.tree.find(cluster) {
                Found::Page(page) => page.entries[place(cluster).1],
                Found::Load(load) => return Err(Wait::Load(load)),
                Found::Absent(until) => {
                    let end = until.checked_shl(bits.into()).filter(|end| end >> bits == until);
                    let end = end.map_or(to, |end| end.min(to));
                    if !each(Piece { at, len: end - at, what: What::Absent }) {
                        return Ok(());
                    }
                    at = end;
                    continue;
                }
            };
            let start = cluster << bits;
            let end = to.min(start + (1 << bits));
            let base = u64::from(entry.cluster()) << bits;
            while at < end {
                let bit = u32::try_from((at - start) >> sub_bits).unwrap_or(0);
                let is_data = entry.data() >> bit & 1 != 0;
                let is_zero = entry.zero() >> bit & 1 != 0;
                let (what, alike) = match (is_data, is_zero) {
                    (true, _) => (What::Data(base + (at - start)), entry.data()),
                    (_, true) => (What::Zero, entry.zero()),
                    _ => (What::Absent, !(entry.data() | entry.zero())),
                };
                let run = (alike >> bit).trailing_ones();
                let until = end.min(start + (u64::from(bit + run) << sub_bits));
                if !each(Piece { at, len: until - at, what }) {
                    return Ok(());
                }
                at = until;
            }
        }
        Ok(())
    }

    /// What the tree says of a cluster of the disk.
    pub(super) fn entry(&mut self, cluster: u64) -> Result<Entry, Wait> {
        match self.tree.find(cluster) {
            Found::Page(page) => Ok(page.entries[place(cluster).1]),
            Found::Absent(_) => Ok(Entry::default()),
            Found::Load(load) => Err(Wait::Load(load)),
        }
    }

    /// Whether the tree's page of a cluster may change: a commit has the space to write it. `take` more bytes are to be
    /// taken for data; those leave room for others to be discarded.
    pub(super) fn may_change(&mut self, cluster: u64, take: u64) -> Result<(), Wait> {
        // Of a large disk the root takes more than all else, and in one piece.
        self.take_spares().map_err(Wait::Space)?;
        let number = place(cluster).0;
        let cost = self.tree.cost(number);
        if cost > 0 && self.tree.dirty().len() >= MAX_DIRTY {
            return Err(Wait::Commit);
        }
        let need = (self.tree.need() + cost) as u64 * PAGE_U64;
        // A page that is pinned is written once more after the next commit.
        let need = if take > 0 { need * 2 + self.cluster() } else { need };
        // The first root has none before it, whose place the next one could take.
        let need = if self.root.entries == 0 {
            need + super::layout::list_bytes(self.tree.root.len() as u64)
        } else {
            need
        };
        if self.space.available() < need.saturating_add(take) {
            return Err(Wait::Space(Denied::Quota));
        }
        Ok(())
    }

    /// Sets what the tree says of a cluster of the disk.
    pub(super) fn set(&mut self, cluster: u64, entry: Entry) -> Result<(), Wait> {
        if self.entry(cluster)? == entry {
            return Ok(());
        }
        self.may_change(cluster, 0)?;
        self.set_reserved(cluster, entry);
        Ok(())
    }

    /// As [`set`](Self::set), for a page that is pinned or was found changeable.
    fn set_reserved(&mut self, cluster: u64, entry: Entry) {
        let (number, index) = place(cluster);
        self.tree.make(number);
        if let Some(page) = self.tree.l2(number) {
            page.entries[index] = entry;
        }
        self.tree.touch(number);
    }

    /// Gives a cluster of the disk its place in the file, if it has none. The sub-clusters keep being what they are.
    pub(super) fn reserve(&mut self, cluster: u64) -> Result<Entry, Wait> {
        let entry = self.entry(cluster)?;
        if entry.cluster() != 0 {
            // Its masks will change.
            self.may_change(cluster, 0)?;
            return Ok(entry);
        }
        self.may_change(cluster, self.cluster())?;
        let taken = self.space.take_cluster().map_err(Wait::Space)?;
        let entry = Entry::new(taken, 0, entry.zero());
        self.mapped += 1;
        self.set_reserved(cluster, entry);
        Ok(entry)
    }

    /// Begins to give sub-clusters of a cluster that has its place their first data: until
    /// [`end_fresh`](Self::end_fresh), nobody else does.
    pub(super) fn begin_fresh(&mut self, cluster: u64, subs: u16) {
        *self.busy.entry(cluster).or_default() |= subs;
        self.tree.make(place(cluster).0);
        self.tree.pin(place(cluster).0);
    }

    /// Ends what [`begin_fresh`](Self::begin_fresh) began: `data` have data now, `zero` read as zeroes, all others are as
    /// they were.
    pub(super) fn end_fresh(&mut self, cluster: u64, subs: u16, data: u16, zero: u16) {
        let (number, index) = place(cluster);
        if let Some(left) = self.busy.get_mut(&cluster) {
            *left &= !subs;
            if *left == 0 {
                self.busy.remove(&cluster);
            }
        }
        if data | zero != 0 {
            // The pin keeps it in memory.
            if let Some(page) = self.tree.l2(number) {
                let old = page.entries[index];
                page.entries[index] =
                    Entry::new(old.cluster(), (old.data() | data) & !zero, (old.zero() | zero) & !data);
            }
            self.tree.touch(number);
        }
        self.tree.unpin(number);
    }

    /// Whether sub-clusters are being given their first data.
    pub(super) fn is_busy(&self, cluster: u64, subs: u16) -> bool {
        self.busy.get(&cluster).is_some_and(|busy| busy & subs != 0)
    }

    /// Whether bytes that the state on disk names may change.
    pub(super) fn may_overwrite(&mut self) -> Result<(), Wait> {
        if self.marked {
            return Ok(());
        }
        self.super_dirty = true;
        Err(Wait::Commit)
    }

    /// Makes sub-clusters of a cluster read as zeroes. With `give`, its place is given back if nothing is left in it.
    pub(super) fn clear(&mut self, cluster: u64, subs: u16, give: bool) -> Result<(), Wait> {
        if self.is_busy(cluster, subs) {
            return Err(Wait::Busy);
        }
        let old = self.entry(cluster)?;
        let start = cluster << self.bits;
        let seen = if start >= self.visible {
            0
        } else {
            self.touched(start, start, self.visible.min(start + self.cluster()))
        };
        let data = old.data() & !subs;
        if data != old.data() {
            // What was theirs is written to next.
            self.may_overwrite()?;
        }
        // Where nothing is below, nothing has to be hidden.
        let zero = (old.zero() & !subs) | (subs & seen);
        let empty = data == 0 && give && !self.busy.contains_key(&cluster);
        let new = Entry::new(if empty { 0 } else { old.cluster() }, data, zero);
        self.set(cluster, new)?;
        if empty && old.cluster() != 0 {
            self.mapped = self.mapped.saturating_sub(1);
            let extent = FreeExtent { offset: u64::from(old.cluster()) << self.bits, len: self.cluster() };
            self.freed.push(Freed { extent, punch: true });
        }
        Ok(())
    }

    /// Keeps a transfer until it ends, and gives the number that it is found by.
    pub(super) fn keep_fresh(&mut self, parity: usize) -> usize {
        let index = self.fresh_unused.pop().unwrap_or_else(|| {
            self.fresh.push(Fresh::default());
            self.fresh.len() - 1
        });
        self.fresh[index].parity = parity;
        index
    }

    /// Takes the spare places for root and free list where they are not there yet.
    pub(super) fn take_spares(&mut self) -> Result<(), Denied> {
        let len = super::layout::list_bytes(self.tree.root.len() as u64);
        if let Some(old) = self.spare_root.take_if(|old| old.len != len) {
            self.space.give(old);
        }
        if self.spare_root.is_none() {
            self.spare_root = Some(FreeExtent { offset: self.space.take(len)?, len });
        }
        if self.spare_free.is_none() {
            self.spare_free = Some(self.space.take_page()?);
        }
        Ok(())
    }
}

/// The error of a call that has to wait for space, and would in vain.
pub(super) fn quota() -> io::Error {
    io::Error::new(io::ErrorKind::QuotaExceeded, "the image has reached its max_size")
}
