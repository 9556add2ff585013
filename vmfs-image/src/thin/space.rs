//! Space of the file: what is free, and in which order freed space becomes free.
//!
//! Space that the state on disk still names, or that a transfer located before may still touch, is not given out:
//!
//! ```text
//!  freed since the last commit ──commit stable──▶ next ──epoch flips──▶ drain ──older epoch empty──▶ free
//! ```
//!
//! Every transfer counts in the epoch in which it was located, so once the older one is empty all that remain were located after
//! the space had left the tree.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::{FREE_ENTRIES, FreeExtent, MAX_CLUSTERS, PAGE_U64};

/// Why there is no space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Denied {
    /// The file has to be made longer first.
    File,
    /// The image may not grow further.
    Quota,
}

/// Space that is no longer used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Freed {
    pub(super) extent: FreeExtent,
    /// It held data, and is to be given back to the file system.
    pub(super) punch: bool,
}

/// What is free.
#[derive(Debug)]
pub(super) struct Space {
    cluster: u64,
    /// Everything from here on is free.
    pub(super) end: u64,
    /// How far `end` may go.
    pub(super) max: u64,
    /// Length of the file: `end` does not pass it either.
    pub(super) file_len: u64,
    /// Free extents below `end` by offset; none touch.
    free: BTreeMap<u64, u64>,
    /// The same as (length, offset).
    by_len: BTreeSet<(u64, u64)>,
    total: u64,
}

impl Space {
    pub(super) fn new(cluster: u64, end: u64, file_len: u64) -> Self {
        let max = Self::limit(cluster, 0);
        Self { cluster, end, max, file_len, free: BTreeMap::new(), by_len: BTreeSet::new(), total: 0 }
    }

    /// How far the end may go with `max_size`, of which 0 is none.
    pub(super) fn limit(cluster: u64, max_size: u64) -> u64 {
        let most = cluster * MAX_CLUSTERS;
        if max_size == 0 { most } else { most.min(max_size / cluster * cluster) }
    }

    /// Free bytes, those that the file may still grow by included.
    pub(super) fn available(&self) -> u64 {
        self.total + self.max.saturating_sub(self.end)
    }

    fn insert(&mut self, offset: u64, len: u64) {
        self.free.insert(offset, len);
        self.by_len.insert((len, offset));
        self.total += len;
    }

    fn remove(&mut self, offset: u64) -> u64 {
        let len = self.free.remove(&offset).unwrap_or(0);
        self.by_len.remove(&(len, offset));
        self.total -= len;
        len
    }

    /// Takes an extent back. What is free already, as only a damaged image makes it, stays so.
    pub(super) fn give(&mut self, extent: FreeExtent) {
        let (mut offset, mut behind) = (extent.offset, extent.offset.saturating_add(extent.len));
        while let Some((&at, &len)) = self.free.range(..=behind).next_back() {
            if at + len < offset {
                break;
            }
            self.remove(at);
            offset = offset.min(at);
            behind = behind.max(at + len);
        }
        if behind > offset {
            self.insert(offset, behind - offset);
        }
    }

    /// Takes `len` bytes at `offset`, which lie in the free extent at `start`.
    fn carve(&mut self, start: u64, offset: u64, len: u64) {
        let old = self.remove(start);
        if offset > start {
            self.insert(start, offset - start);
        }
        let (behind, old) = (offset + len, start + old);
        if old > behind {
            self.insert(behind, old - behind);
        }
    }

    fn bump(&mut self, clusters: u64) -> Result<u64, Denied> {
        let offset = self.end;
        let end = offset.saturating_add(clusters * self.cluster);
        if end > self.max {
            return Err(Denied::Quota);
        }
        if end > self.file_len {
            return Err(Denied::File);
        }
        self.end = end;
        Ok(offset)
    }

    /// `len` bytes in one piece, a multiple of the page, for the tree: from the smallest extent that has them.
    pub(super) fn take(&mut self, len: u64) -> Result<u64, Denied> {
        if let Some(&(_, offset)) = self.by_len.range((len, 0)..).next() {
            self.carve(offset, offset, len);
            return Ok(offset);
        }
        let clusters = len.div_ceil(self.cluster);
        let offset = self.bump(clusters)?;
        let rest = clusters * self.cluster - len;
        if rest > 0 {
            self.give(FreeExtent { offset: offset + len, len: rest });
        }
        Ok(offset)
    }

    /// One page for the tree.
    pub(super) fn take_page(&mut self) -> Result<u64, Denied> {
        self.take(PAGE_U64)
    }

    /// A whole cluster, by its number: from the largest extent, so that clusters asked for one after the other lie so.
    pub(super) fn take_cluster(&mut self) -> Result<u32, Denied> {
        /// Extents looked at before the file grows: one of less than two clusters may have no aligned one in it.
        const TRIES: usize = 16;
        let found = self.find_cluster(TRIES);
        let offset = match found {
            Some((start, offset)) => {
                self.carve(start, offset, self.cluster);
                offset
            }
            None => match self.bump(1) {
                Ok(offset) => offset,
                Err(Denied::File) => return Err(Denied::File),
                Err(Denied::Quota) => {
                    let (start, offset) = self.find_cluster(usize::MAX).ok_or(Denied::Quota)?;
                    self.carve(start, offset, self.cluster);
                    offset
                }
            },
        };
        u32::try_from(offset / self.cluster).map_err(|_| Denied::Quota)
    }

    fn find_cluster(&self, tries: usize) -> Option<(u64, u64)> {
        self.by_len.range((self.cluster, 0)..).rev().take(tries).find_map(|&(len, start)| {
            let offset = start.next_multiple_of(self.cluster);
            (offset + self.cluster <= start + len).then_some((start, offset))
        })
    }

    /// What a free list says: the largest of what is free and of `others`, which will be.
    pub(super) fn listing(&self, others: impl Iterator<Item = FreeExtent>) -> Vec<FreeExtent> {
        let largest = self.by_len.iter().rev().take(FREE_ENTRIES);
        let mut all: Vec<_> =
            largest.map(|&(len, offset)| FreeExtent { offset, len }).chain(others).collect();
        all.sort_unstable();
        let mut merged: Vec<FreeExtent> = Vec::with_capacity(all.len());
        for extent in all {
            match merged.last_mut() {
                Some(last) if last.offset + last.len >= extent.offset => {
                    last.len = last.len.max(extent.offset + extent.len - last.offset);
                }
                _ => merged.push(extent),
            }
        }
        if merged.len() > FREE_ENTRIES {
            merged.sort_unstable_by_key(|extent| std::cmp::Reverse(extent.len));
            merged.truncate(FREE_ENTRIES);
            merged.sort_unstable();
        }
        merged
    }
}

/// Transfers on their way, counted by the epoch in which they were located. Counted in under the lock of the image's state, out at any
/// time.
#[derive(Debug, Default)]
pub(super) struct InFlight([AtomicU64; 2]);

impl InFlight {
    pub(super) fn begin(&self, parity: usize) {
        self.0[parity & 1].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn end(&self, parity: usize) {
        self.0[parity & 1].fetch_sub(1, Ordering::Release);
    }

    fn none(&self, parity: usize) -> bool {
        self.0[parity & 1].load(Ordering::Acquire) == 0
    }
}

/// Space between its commit and its being free.
#[derive(Debug, Default)]
pub(super) struct Epochs {
    /// Which of the two counters transfers count in now.
    pub(super) parity: usize,
    /// Stable, but waiting for the flip.
    next: Vec<Freed>,
    /// Waiting for the end of the transfers of the other counter.
    drain: Vec<Freed>,
}

impl Epochs {
    /// Space that no state on disk names any more.
    pub(super) fn add(&mut self, freed: Vec<Freed>) {
        if self.next.is_empty() {
            self.next = freed;
        } else {
            self.next.extend(freed);
        }
    }

    /// All that waits.
    pub(super) fn waiting(&self) -> impl Iterator<Item = FreeExtent> {
        self.next.iter().chain(&self.drain).map(|freed| freed.extent)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.next.is_empty() && self.drain.is_empty()
    }

    /// Gives what nobody can touch any more.
    pub(super) fn advance(&mut self, in_flight: &InFlight) -> Vec<Freed> {
        let mut released = Vec::new();
        loop {
            if !self.drain.is_empty() {
                if !in_flight.none(self.parity ^ 1) {
                    return released;
                }
                released.append(&mut self.drain);
            }
            if self.next.is_empty() || !in_flight.none(self.parity ^ 1) {
                return released;
            }
            std::mem::swap(&mut self.drain, &mut self.next);
            self.parity ^= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CLUSTER: u64 = 1 << 16;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn space_is_given_out_once_and_nothing_is_lost(
            steps in proptest::collection::vec((0..4_u8, any::<proptest::sample::Index>(), 1_u64..40), 1..200)
        ) {
            let mut space = Space::new(CLUSTER, CLUSTER, 40 * CLUSTER);
            space.max = 30 * CLUSTER;
            let mut taken: Vec<FreeExtent> = Vec::new();
            for (step, index, pages) in steps {
                let got = match step {
                    0 if !taken.is_empty() => {
                        space.give(taken.swap_remove(index.index(taken.len())));
                        continue;
                    }
                    1 => space.take_page().map(|offset| FreeExtent { offset, len: PAGE_U64 }),
                    2 => space.take(pages * PAGE_U64).map(|offset| FreeExtent { offset, len: pages * PAGE_U64 }),
                    _ => space.take_cluster().map(|n| FreeExtent { offset: u64::from(n) * CLUSTER, len: CLUSTER }),
                };
                match got {
                    Ok(extent) => {
                        prop_assert!(extent.offset >= CLUSTER && extent.offset + extent.len <= space.end);
                        let behind = |a: &FreeExtent, b: &FreeExtent| b.offset + b.len <= a.offset;
                        let apart = taken.iter().all(|other| behind(other, &extent) || behind(&extent, other));
                        prop_assert!(apart);
                        taken.push(extent);
                    }
                    Err(denied) => {
                        prop_assert_eq!(denied, Denied::Quota);
                        prop_assert!(step != 1 || space.available() == 0);
                    }
                }
                let used: u64 = taken.iter().map(|extent| extent.len).sum();
                prop_assert_eq!(space.available() + used + CLUSTER, 30 * CLUSTER);
                prop_assert!(space.end <= 30 * CLUSTER);
                let listing = space.listing(std::iter::empty());
                prop_assert!(listing.windows(2).all(|pair| pair[0].offset + pair[0].len < pair[1].offset));
            }
            for extent in taken {
                space.give(extent);
            }
            let all = FreeExtent { offset: CLUSTER, len: space.end - CLUSTER };
            prop_assert_eq!(space.listing(std::iter::empty()), if all.len > 0 { vec![all] } else { vec![] });
        }
    }

    #[test]
    fn space_waits_for_transfers_that_were_located_before_it_was_freed() {
        let (mut epochs, in_flight) = (Epochs::default(), InFlight::default());
        let freed = |offset| Freed { extent: FreeExtent { offset, len: 1 }, punch: false };
        in_flight.begin(epochs.parity);
        let old = epochs.parity;
        epochs.add(vec![freed(1)]);
        assert!(epochs.advance(&in_flight).is_empty());
        let new = epochs.parity;
        assert_ne!(old, new);
        in_flight.begin(new);
        epochs.add(vec![freed(2)]);
        assert!(epochs.advance(&in_flight).is_empty());
        in_flight.end(old);
        assert_eq!(epochs.advance(&in_flight), [freed(1)]);
        in_flight.end(new);
        assert_eq!(epochs.advance(&in_flight), [freed(2)]);
        assert!(epochs.is_empty());
    }

    #[test]
    fn space_that_is_given_twice_is_free_once() {
        let mut space = Space::new(CLUSTER, 10 * CLUSTER, 10 * CLUSTER);
        space.max = 10 * CLUSTER;
        space.give(FreeExtent { offset: 2 * CLUSTER, len: 2 * CLUSTER });
        space.give(FreeExtent { offset: 3 * CLUSTER, len: CLUSTER });
        assert_eq!(space.available(), 2 * CLUSTER);
    }

    #[test]
    fn listing_has_the_largest_extents_merged_with_what_will_be_free() {
        let mut space = Space::new(CLUSTER, 10_000 * CLUSTER, 0);
        for at in 0..1000 {
            let len = PAGE_U64 * (1 + at % 7);
            space.give(FreeExtent { offset: CLUSTER + at * CLUSTER, len });
        }
        let other = FreeExtent { offset: CLUSTER + 6 * CLUSTER + 7 * PAGE_U64, len: PAGE_U64 };
        let listing = space.listing([other].into_iter());
        assert_eq!(listing.len(), FREE_ENTRIES);
        assert!(listing.contains(&FreeExtent { offset: 7 * CLUSTER, len: 8 * PAGE_U64 }));
        assert!(listing.iter().all(|extent| extent.len >= 6 * PAGE_U64));
    }
}
