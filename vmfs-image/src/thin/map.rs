//! The tree in memory: from a cluster of the disk to where it lies. Pages are loaded when they are needed and forgotten
//! when there are too many, but not while they hold anything that is not on disk.

use std::collections::VecDeque;

use super::layout::{Entry, L1_ENTRIES, L2_ENTRIES, PageRef, ROOT_SPAN};

/// L2 pages kept if nothing pins more: 64 MiB, which is 512 GiB of disk with clusters of 64 KiB.
const L2_KEPT: usize = 16_384;
/// L1 pages kept besides those above L2 pages that are kept.
const L1_KEPT: usize = 1024;

/// An L2 page.
#[derive(Debug)]
pub(super) struct L2 {
    pub(super) entries: [Entry; L2_ENTRIES],
    /// It differs from what is on disk.
    dirty: bool,
    /// A commit is writing it.
    pub(super) committing: bool,
    /// Transfers that will change it when they end.
    pins: u32,
    /// It was looked at since the last search for what to forget.
    used: bool,
}

/// An L1 page.
#[derive(Debug)]
pub(super) struct L1 {
    /// Where the pages below are, as of the last commit.
    pub(super) at: [PageRef; L1_ENTRIES],
    pages: [Option<Box<L2>>; L1_ENTRIES],
    /// How many of `pages` there are.
    kept: usize,
    /// How many of them the commits to come have to write.
    heavy: usize,
}

/// An entry of the root.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) at: PageRef,
    l1: Option<Box<L1>>,
}

/// A page that has to be read first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Load {
    /// Number of the L1 page, or of the L2 page.
    pub(super) number: usize,
    pub(super) is_l2: bool,
    pub(super) at: PageRef,
}

/// What a search for an L2 page comes to.
#[derive(Debug)]
pub(super) enum Found<'a> {
    /// Here it is.
    Page(&'a mut L2),
    /// There is none, nor for any cluster before this one, exclusive.
    Absent(u64),
    /// It is not in memory.
    Load(Load),
}

/// The tree.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) root: Vec<Slot>,
    /// L2 pages that the next commit writes.
    dirty: Vec<usize>,
    /// L2 pages that the commits to come have to write: dirty or pinned.
    heavy_l2: usize,
    /// L1 pages above these.
    heavy_l1: usize,
    /// L2 pages in memory, in the order in which they are looked at for what to forget.
    ring: VecDeque<usize>,
    l1_ring: VecDeque<usize>,
}

impl Tree {
    pub(super) fn new(root: Vec<PageRef>) -> Self {
        let root = root.into_iter().map(|at| Slot { at, l1: None }).collect();
        Self {
            root,
            dirty: Vec::new(),
            heavy_l2: 0,
            heavy_l1: 0,
            ring: VecDeque::new(),
            l1_ring: VecDeque::new(),
        }
    }

    /// Pages of the tree that the commits to come have to write.
    pub(super) fn need(&self) -> usize {
        self.heavy_l2 + self.heavy_l1
    }

    /// L2 pages in memory.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.ring.len()
    }

    /// L2 pages that the next commit writes.
    pub(super) fn dirty(&self) -> &[usize] {
        &self.dirty
    }

    /// Takes the list of [`dirty`](Self::dirty), of which each has to be [`clean`](Self::clean)ed.
    pub(super) fn take_dirty(&mut self) -> Vec<usize> {
        let mut dirty = std::mem::take(&mut self.dirty);
        dirty.sort_unstable();
        dirty
    }

    /// Looks for the L2 page of a cluster of the disk.
    #[inline]
    pub(super) fn find(&mut self, cluster: u64) -> Found<'_> {
        let number = usize::try_from(cluster / L2_ENTRIES as u64).unwrap_or(usize::MAX);
        let index = number / L1_ENTRIES;
        let Some(slot) = self.root.get_mut(index) else { return Found::Absent(u64::MAX) };
        let Some(l1) = slot.l1.as_deref_mut() else {
            return match slot.at.offset {
                0 => Found::Absent((index as u64 + 1) * ROOT_SPAN),
                _ => Found::Load(Load { number: index, is_l2: false, at: slot.at }),
            };
        };
        let below = number % L1_ENTRIES;
        match l1.pages[below].as_deref_mut() {
            Some(page) => {
                page.used = true;
                Found::Page(page)
            }
            None if l1.at[below].offset == 0 => Found::Absent((number as u64 + 1) * L2_ENTRIES as u64),
            None => Found::Load(Load { number, is_l2: true, at: l1.at[below] }),
        }
    }

    /// The L1 page with this number, if it is in memory.
    pub(super) fn l1(&mut self, index: usize) -> Option<&mut L1> {
        self.root.get_mut(index)?.l1.as_deref_mut()
    }

    /// The L2 page with this number, if it is in memory.
    pub(super) fn l2(&mut self, number: usize) -> Option<&mut L2> {
        self.l1(number / L1_ENTRIES)?.pages[number % L1_ENTRIES].as_deref_mut()
    }

    /// Pages that a commit has to write in addition if the L2 page with this number changes.
    pub(super) fn cost(&self, number: usize) -> usize {
        let l1 = self.root.get(number / L1_ENTRIES).and_then(|slot| slot.l1.as_deref());
        let Some(l1) = l1 else { return 2 };
        let heavy = l1.pages[number % L1_ENTRIES].as_deref().is_some_and(|page| page.dirty || page.pins > 0);
        usize::from(!heavy) + usize::from(l1.heavy == 0)
    }

    /// Keeps an L1 page that was loaded.
    pub(super) fn put_l1(&mut self, load: Load, at: &[PageRef]) {
        let mut refs = [PageRef::default(); L1_ENTRIES];
        refs.iter_mut().zip(at).for_each(|(into, at)| *into = *at);
        let Some(slot) = self.root.get_mut(load.number) else { return };
        if slot.at == load.at && slot.l1.is_none() {
            slot.l1 = Some(L1::new(refs));
            self.l1_ring.push_back(load.number);
            self.forget_l1();
        }
    }

    /// Keeps an L2 page that was loaded.
    pub(super) fn put_l2(&mut self, load: Load, entries: [Entry; L2_ENTRIES]) {
        let below = load.number % L1_ENTRIES;
        let Some(l1) = self.l1(load.number / L1_ENTRIES) else { return };
        if l1.at[below] == load.at && l1.pages[below].is_none() {
            l1.pages[below] = Some(L2::new(entries));
            l1.kept += 1;
            self.ring.push_back(load.number);
            self.forget_l2();
        }
    }

    /// Makes the L2 page with this number, and the L1 page above it, where there are none: [`find`](Self::find) has
    /// found them absent.
    pub(super) fn make(&mut self, number: usize) {
        let Some(slot) = self.root.get_mut(number / L1_ENTRIES) else { return };
        if slot.l1.is_none() {
            slot.l1 = Some(L1::new([PageRef::default(); L1_ENTRIES]));
            self.l1_ring.push_back(number / L1_ENTRIES);
        }
        let below = number % L1_ENTRIES;
        let Some(l1) = self.l1(number / L1_ENTRIES) else { return };
        if l1.pages[below].is_none() {
            l1.pages[below] = Some(L2::new([Entry::default(); L2_ENTRIES]));
            l1.kept += 1;
            self.ring.push_back(number);
            self.forget_l2();
        }
    }

    /// Changes an L2 page by `change` and counts it as what it is then.
    fn weigh(&mut self, number: usize, change: impl FnOnce(&mut L2)) {
        let Some(l1) = self.root.get_mut(number / L1_ENTRIES).and_then(|slot| slot.l1.as_deref_mut()) else {
            return;
        };
        let Some(page) = l1.pages[number % L1_ENTRIES].as_deref_mut() else { return };
        let (before, was_dirty) = (page.is_heavy(), page.dirty);
        change(page);
        if page.dirty && !was_dirty {
            self.dirty.push(number);
        }
        match (before, page.is_heavy()) {
            (false, true) => {
                self.heavy_l2 += 1;
                self.heavy_l1 += usize::from(l1.heavy == 0);
                l1.heavy += 1;
            }
            (true, false) => {
                self.heavy_l2 -= 1;
                l1.heavy -= 1;
                self.heavy_l1 -= usize::from(l1.heavy == 0);
            }
            _ => {}
        }
    }

    /// The page has changed.
    pub(super) fn touch(&mut self, number: usize) {
        self.weigh(number, |page| page.dirty = true);
    }

    /// The page will change.
    pub(super) fn pin(&mut self, number: usize) {
        self.weigh(number, |page| page.pins += 1);
    }

    /// Takes back one [`pin`](Self::pin).
    pub(super) fn unpin(&mut self, number: usize) {
        self.weigh(number, |page| page.pins = page.pins.saturating_sub(1));
    }

    /// A commit writes the page.
    pub(super) fn clean(&mut self, number: usize) {
        self.weigh(number, |page| {
            page.dirty = false;
            page.committing = true;
        });
    }

    fn forget_l1(&mut self) {
        for _ in 0..8 {
            if self.l1_ring.len() <= L1_KEPT {
                return;
            }
            let Some(index) = self.l1_ring.pop_front() else { return };
            match self.root.get_mut(index) {
                // The one just loaded is behind all others.
                Some(slot) if slot.l1.as_ref().is_some_and(|l1| l1.kept == 0) => slot.l1 = None,
                Some(slot) if slot.l1.is_some() => self.l1_ring.push_back(index),
                _ => {}
            }
        }
    }

    fn forget_l2(&mut self) {
        for _ in 0..64 {
            if self.ring.len() <= L2_KEPT {
                return;
            }
            let Some(number) = self.ring.pop_front() else { return };
            let Some(l1) = self.l1(number / L1_ENTRIES) else { continue };
            let Some(page) = l1.pages[number % L1_ENTRIES].as_deref_mut() else { continue };
            if page.is_heavy() || page.committing || page.used {
                page.used = false;
                self.ring.push_back(number);
            } else {
                l1.pages[number % L1_ENTRIES] = None;
                l1.kept -= 1;
            }
        }
    }
}

impl L1 {
    fn new(at: [PageRef; L1_ENTRIES]) -> Box<Self> {
        Box::new(Self { at, pages: [const { None }; L1_ENTRIES], kept: 0, heavy: 0 })
    }
}

impl L2 {
    fn new(entries: [Entry; L2_ENTRIES]) -> Box<Self> {
        Box::new(Self { entries, dirty: false, committing: false, pins: 0, used: true })
    }

    fn is_heavy(&self) -> bool {
        self.dirty || self.pins > 0
    }
}
