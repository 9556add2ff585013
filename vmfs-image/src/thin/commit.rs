//! Commits: how what is in memory becomes what is on disk, as a whole or not at all.
//!
//! ```text
//!  under the lock     copy dirty L2 pages, take places for them; freed space so far belongs to this commit
//!  without            checksums; write L2, L1, root, free list to free space
//!                     sync           ── data and tree stable; the old superblock still counts
//!                     write superblock, sync ── now the new one counts
//!  under the lock     note the new places; the space freed may go (see space.rs)
//! ```
//!
//! What fails before the superblock is written leaves everything as it was. If writing or syncing the superblock itself
//! fails, nobody knows which of the two counts, so the space of neither is used until another commit has succeeded.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::Thin;
use super::layout::{
    self, Entry, FreeExtent, L1_ENTRIES, L2_ENTRIES, ListRef, PAGE, PAGE_U64, PageRef, Superblock,
};
use super::space::{Denied, Freed};
use super::state::{State, quota};

/// Who commits, and for whom.
#[derive(Debug, Default)]
pub(super) struct Committer {
    turn: Mutex<Turn>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Turn {
    running: bool,
    /// Commits begun and ended so far.
    begun: u64,
    ended: u64,
    /// How the last one ended.
    failed: Option<(io::ErrorKind, Option<i32>, String)>,
}

impl Committer {
    /// Returns once a `commit` that began after the call has ended. Calls at the same time share one.
    pub(super) fn run(&self, commit: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut turn = super::lock(&self.turn);
        let wanted = turn.begun + 1;
        loop {
            if turn.ended >= wanted {
                return match &turn.failed {
                    None => Ok(()),
                    Some((_, Some(code), _)) => Err(io::Error::from_raw_os_error(*code)),
                    Some((kind, None, what)) => Err(io::Error::new(*kind, what.clone())),
                };
            }
            if !turn.running {
                break;
            }
            turn = super::wait(&self.ended, turn);
        }
        turn.running = true;
        turn.begun += 1;
        drop(turn);
        let result = commit();
        let mut turn = super::lock(&self.turn);
        turn.running = false;
        turn.ended = turn.begun;
        turn.failed =
            result.as_ref().err().map(|error| (error.kind(), error.raw_os_error(), error.to_string()));
        self.ended.notify_all();
        result
    }
}

/// A commit on its way.
#[derive(Debug)]
struct Plan {
    /// L2 pages: number, place (0 for none, if all is absent), bytes.
    l2: Vec<(usize, u64, Box<[u8; PAGE]>)>,
    /// L1 pages: number, place, entries.
    l1: BTreeMap<usize, (u64, [PageRef; L1_ENTRIES])>,
    /// The root's entries, if it changes.
    root: Option<Vec<PageRef>>,
    block: Superblock,
    listing: Vec<FreeExtent>,
    free_at: u64,
    /// What is free once this commit is stable.
    freed: Vec<Freed>,
}

/// Where a commit failed.
#[derive(Debug)]
enum Failed {
    /// The superblock was not touched.
    Before(io::Error),
    /// It was.
    Within(io::Error),
}

impl Thin {
    /// Makes everything that is done stable.
    pub(super) fn commit(&self) -> io::Result<()> {
        self.committer.run(|| self.commit_alone())
    }

    fn commit_alone(&self) -> io::Result<()> {
        let mut tries = 0;
        let mut plan = loop {
            let mut state = self.state();
            if state.is_clean() {
                drop(state);
                return self.storage.sync();
            }
            let need = (state.tree.need() + 4) as u64 * PAGE_U64 + 2 * state.cluster();
            if state.space.end + need > state.space.file_len && state.space.file_len < state.space.max {
                drop(state);
                self.lengthen(need)?;
                continue;
            }
            match state.plan() {
                Ok(plan) => break plan,
                Err(Denied::File) => {
                    drop(state);
                    self.lengthen(need)?;
                }
                // The pages of the commit before are free as soon as the transfers of then have ended.
                Err(Denied::Quota) if tries < 2000 && self.reclaim(&mut state) => tries += 1,
                Err(Denied::Quota) if tries < 2000 && !state.epochs.is_empty() => {
                    tries += 1;
                    drop(super::wait_for(&self.changed, state, Duration::from_millis(1)));
                }
                Err(Denied::Quota) => return Err(quota()),
            }
        };
        let written = self.write_tree(&mut plan);
        let mut state = self.state();
        state.committing = false;
        match written {
            Ok(()) => {
                state.done(plan);
                drop(state);
                self.give_back();
                Ok(())
            }
            Err(Failed::Before(error)) => {
                state.undo(plan, false);
                Err(error)
            }
            Err(Failed::Within(error)) => {
                state.undo(plan, true);
                Err(error)
            }
        }
    }

    /// Writes what a commit consists of, in its order.
    fn write_tree(&self, plan: &mut Plan) -> Result<(), Failed> {
        let before = Failed::Before;
        let mut pages: BTreeMap<u64, Vec<u8>> = BTreeMap::new();
        for (number, at, bytes) in &plan.l2 {
            let Some((_, refs)) = plan.l1.get_mut(&(number / L1_ENTRIES)) else { continue };
            refs[number % L1_ENTRIES] = reference(*at, &bytes[..]);
            if *at != 0 {
                pages.insert(*at, bytes.to_vec());
            }
        }
        for (index, (at, refs)) in &plan.l1 {
            let bytes = layout::encode_refs(refs.iter().copied());
            if let Some(root) = &mut plan.root {
                root[*index] = reference(*at, &bytes);
            }
            pages.insert(*at, bytes);
        }
        if let Some(root) = &plan.root {
            let bytes = layout::encode_refs(root.iter().copied());
            plan.block.root.crc = layout::checksum(&bytes);
            pages.insert(plan.block.root.offset, bytes);
        }
        if !plan.listing.is_empty() {
            let bytes = layout::encode_free(&plan.listing);
            plan.block.free = ListRef {
                offset: plan.free_at,
                entries: u32::try_from(plan.listing.len()).unwrap_or(0),
                crc: layout::checksum(&bytes),
            };
            pages.insert(plan.free_at, bytes.to_vec());
        }
        // Neighbours are written together.
        let mut piece: Option<(u64, Vec<u8>)> = None;
        for (at, bytes) in pages {
            match &mut piece {
                Some((start, all)) if *start + all.len() as u64 == at => all.extend(bytes),
                _ => {
                    if let Some((start, all)) = piece.replace((at, bytes)) {
                        self.storage.write_at(&all, start).map_err(before)?;
                    }
                }
            }
        }
        if let Some((start, all)) = piece {
            self.storage.write_at(&all, start).map_err(before)?;
        }
        self.storage.sync().map_err(before)?;
        let at = layout::super_offset(plan.block.generation);
        self.storage.write_at(&plan.block.encode(), at).map_err(Failed::Within)?;
        self.storage.sync().map_err(Failed::Within)
    }

    /// Takes space that nobody uses any more as free, without giving it back to the file system.
    pub(super) fn reclaim(&self, state: &mut State) -> bool {
        let released = state.epochs.advance(&self.in_flight);
        let any = !released.is_empty();
        released.into_iter().for_each(|freed| state.space.give(freed.extent));
        any
    }

    /// Gives space that nobody uses any more back to the file system, and takes it as free.
    fn give_back(&self) {
        let mut released = self.state().epochs.advance(&self.in_flight);
        if released.is_empty() {
            return;
        }
        released.sort_unstable_by_key(|freed| freed.extent);
        let mut hole: Option<FreeExtent> = None;
        let punch = |hole: Option<FreeExtent>| {
            let Some(FreeExtent { offset, len }) = hole else { return };
            if let Err(error) = self.storage.punch(offset, len) {
                let path = self.path.display();
                tracing::warn!("{len} bytes of {path} are not given back to its file system: {error}");
            }
        };
        for freed in released.iter().filter(|freed| freed.punch) {
            match &mut hole {
                Some(hole) if hole.offset + hole.len == freed.extent.offset => hole.len += freed.extent.len,
                _ => punch(hole.replace(freed.extent)),
            }
        }
        punch(hole);
        let mut state = self.state();
        released.into_iter().for_each(|freed| state.space.give(freed.extent));
    }
}

fn reference(at: u64, bytes: &[u8]) -> PageRef {
    if at == 0 { PageRef::default() } else { PageRef { offset: at, crc: layout::checksum(bytes) } }
}

fn page(offset: u64) -> Freed {
    Freed { extent: FreeExtent { offset, len: PAGE_U64 }, punch: false }
}

fn list(list: ListRef) -> Option<Freed> {
    let extent = FreeExtent { offset: list.offset, len: layout::list_bytes(list.entries.into()) };
    (list.offset != 0).then_some(Freed { extent, punch: false })
}

impl State {
    /// Takes what a commit writes. An error has changed nothing.
    fn plan(&mut self) -> Result<Plan, Denied> {
        self.take_spares()?;
        let (Some(spare_root), Some(free_at)) = (self.spare_root, self.spare_free) else {
            return Err(Denied::Quota);
        };
        // All places first: what cannot be had is given back.
        let mut indexes: Vec<_> = self.tree.dirty().iter().map(|number| number / L1_ENTRIES).collect();
        indexes.sort_unstable();
        indexes.dedup();
        let count = self.tree.dirty().len() + indexes.len();
        let mut places = Vec::with_capacity(count);
        for _ in 0..count {
            match self.space.take_page() {
                Ok(at) => places.push(at),
                Err(denied) => {
                    places.into_iter().for_each(|at| self.space.give(page(at).extent));
                    return Err(denied);
                }
            }
        }
        places.sort_unstable_by(|one, other| other.cmp(one));

        let mut freed = std::mem::take(&mut self.freed);
        let mut l2 = Vec::with_capacity(count);
        let mut l1 = BTreeMap::new();
        for number in self.tree.take_dirty() {
            self.tree.clean(number);
            let Some(page_in_memory) = self.tree.l2(number) else { continue };
            let mut bytes = Box::new([0; PAGE]);
            layout::encode_l2(&page_in_memory.entries, &mut bytes[..]);
            let empty = page_in_memory.entries == [Entry::default(); L2_ENTRIES];
            let at = if empty { 0 } else { places.pop().unwrap_or(0) };
            l2.push((number, at, bytes));
        }
        for index in indexes {
            let Some(at) = places.pop() else { continue };
            let Some(upper) = self.tree.l1(index) else { continue };
            l1.insert(index, (at, upper.at));
            let old = self.tree.root[index].at.offset;
            if old != 0 {
                freed.push(page(old));
            }
        }
        for (number, ..) in &l2 {
            let old = l1.get(&(number / L1_ENTRIES)).map_or(0, |(_, refs)| refs[number % L1_ENTRIES].offset);
            if old != 0 {
                freed.push(page(old));
            }
        }
        places.into_iter().for_each(|at| self.space.give(page(at).extent));

        let new_root = !l1.is_empty() || self.root.entries as usize != self.tree.root.len();
        let root = new_root.then(|| self.tree.root.iter().map(|slot| slot.at).collect::<Vec<_>>());
        let root_ref = match &root {
            Some(root) => {
                ListRef { offset: spare_root.offset, entries: u32::try_from(root.len()).unwrap_or(0), crc: 0 }
            }
            None => self.root,
        };
        // After a crash nothing is on its way, and what is kept for later commits is free.
        let old_root = list(self.root).filter(|_| new_root).map(|freed| freed.extent);
        let kept_root = (!new_root).then_some(spare_root);
        let old_free = list(self.free).map(|freed| freed.extent);
        let others = freed.iter().map(|freed| freed.extent).chain(self.epochs.waiting());
        let listing = self.space.listing(others.chain(old_root).chain(kept_root).chain(old_free));
        let block = Superblock {
            generation: self.generation + 1,
            size: self.size,
            max_size: self.max_size,
            end: self.space.end,
            root: root_ref,
            free: ListRef::default(),
            mapped: self.mapped,
            backing: self.backing.clone(),
        };
        self.super_dirty = false;
        self.committing = true;
        Ok(Plan { l2, l1, root, block, listing, free_at, freed })
    }

    /// A commit is stable.
    fn done(&mut self, plan: Plan) {
        for (number, ..) in &plan.l2 {
            if let Some(page) = self.tree.l2(*number) {
                page.committing = false;
            }
        }
        for (index, (_, refs)) in plan.l1 {
            if let Some(upper) = self.tree.l1(index) {
                upper.at = refs;
            }
        }
        if let Some(root) = plan.root {
            for (slot, at) in self.tree.root.iter_mut().zip(root) {
                slot.at = at;
            }
            self.spare_root = list(self.root).map(|freed| freed.extent);
        }
        // The old free list's page is the next one's, and nobody ever reads either but who opens the image.
        if plan.block.free.offset != 0 {
            self.spare_free = (self.free.offset != 0).then_some(self.free.offset);
        } else if self.free.offset != 0 {
            self.space.give(page(self.free.offset).extent);
        }
        self.marked = true;
        self.generation = plan.block.generation;
        self.root = plan.block.root;
        self.free = plan.block.free;
        self.epochs.add(plan.freed);
        let _ = self.take_spares();
    }

    /// A commit has failed; if `unknown`, perhaps only after the superblock was written.
    fn undo(&mut self, plan: Plan, unknown: bool) {
        let mut places: Vec<FreeExtent> = Vec::new();
        for (number, at, _) in plan.l2 {
            if let Some(page) = self.tree.l2(number) {
                page.committing = false;
            }
            self.tree.touch(number);
            if at != 0 {
                places.push(page(at).extent);
            }
        }
        places.extend(plan.l1.into_values().map(|(at, _)| page(at).extent));
        // Anything that a commit of the superblock alone was for.
        self.super_dirty = true;
        self.freed.extend(plan.freed);
        if unknown {
            // The superblock may name them.
            if plan.root.is_some() {
                places.extend(self.spare_root.take());
            }
            places.extend(self.spare_free.take().map(|at| page(at).extent));
            self.freed.extend(places.into_iter().map(|extent| Freed { extent, punch: false }));
        } else {
            places.into_iter().for_each(|extent| self.space.give(extent));
        }
    }
}
