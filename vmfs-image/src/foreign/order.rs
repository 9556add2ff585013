//! In which order a qcow2 image is written to, so that a crash leaves one that can be used.
//!
//! The library keeps refcounts in memory and writes them and the L2 tables that need them in the right order, but
//!
//! * it enters new L2 tables and refcount blocks at once into the tables above, whose own refcounts are still in memory:
//!   after the end of the process the next one would take their clusters for free, and write into them;
//! * for such a table it takes a cluster that has just been freed, while the table that points to it is still in memory;
//! * it does not wait for the storage in between, which may take writes in any order until it is flushed.
//!
//! So before a new L2 table is needed what is in memory is written ([`Order::needs_table`]), and every write passes here. What
//! a table newly points to gets its refcount in the file first. And there are four kinds of writes, before each of which
//! what it relies on is made stable:
//!
//! | write | relies on |
//! | --- | --- |
//! | header, L1 table, refcount table | everything: what they point to |
//! | refcount blocks | tables: nothing may point to a cluster that becomes free |
//! | L2 tables | refcount blocks, and the data that they point to |
//! | data, new tables | tables: what was in a cluster before must not be looked for there any more |
//!
//! While there is space for what is written, it is all data, and nothing is waited for.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use imago::io_buffers::IoVector;

use super::disk::Plain;
use super::qcow2::{Layout, Tables};

/// See the module.
#[derive(Debug)]
pub(super) struct Order(Mutex<State>);

#[derive(Debug)]
struct State {
    layout: Layout,
    /// Where refcount blocks are.
    blocks: BTreeSet<u64>,
    /// Where L2 tables are.
    l2: BTreeSet<u64>,
    /// What was written, and is not stable.
    late: Late,
}

/// Kinds of writes.
#[derive(Debug, Clone, Copy, Default)]
struct Late {
    counts: bool,
    /// L2 tables, and what is above them.
    tables: bool,
    data: bool,
}

impl Late {
    fn any(self) -> bool {
        self.counts || self.tables || self.data
    }
}

/// Bits of an entry of the L1 table that are an offset.
const L2_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an entry of the refcount table that are an offset.
const BLOCK_OFFSET: u64 = !0x1ff;

impl Order {
    pub(super) fn new(layout: Layout, tables: Tables) -> Self {
        let Tables { blocks, l2 } = tables;
        Self(Mutex::new(State { layout, blocks, l2, late: Late::default() }))
    }

    /// Whether a new L2 table is needed to give space to what is at `offset` of the disk.
    pub(super) fn needs_table(&self, plain: &Plain, offset: u64) -> io::Result<bool> {
        let state = self.lock();
        let at = state.layout.l1.start + 8 * (offset / state.layout.covered());
        if at >= state.layout.l1.end {
            return Ok(true);
        }
        // Without the highest bit it is somebody else's too.
        Ok(plain.bytes(at, 8)?.first().is_none_or(|byte| byte & 0x80 == 0))
    }

    /// How much of the disk an L2 table is for, in bytes.
    pub(super) fn covered(&self) -> u64 {
        self.lock().layout.covered()
    }

    /// Writes `from` to `offset` by `write`.
    pub(super) fn write(
        &self,
        plain: &Plain,
        offset: u64,
        from: &IoVector<'_>,
        write: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let state = self.lock();
        let range = offset..offset.saturating_add(from.len());
        let is_header = range.start < state.layout.cluster();
        if !is_header && !overlap(&range, &state.layout.l1) && !overlap(&range, &state.layout.table) {
            return write_below(state, plain, &range, write);
        }
        let mut bytes = vec![0; usize::try_from(from.len()).map_err(io::Error::other)?];
        from.copy_into_slice(&mut bytes);
        self.write_tables(state, plain, offset, &bytes, write)
    }

    /// Does what changes data.
    pub(super) fn write_data(
        &self,
        plain: &Plain,
        offset: u64,
        len: u64,
        write: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        write_below(self.lock(), plain, &(offset..offset.saturating_add(len)), write)
    }

    /// Everything has been made stable.
    pub(super) fn synced(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        // Before, since others may write meanwhile.
        let before = std::mem::take(&mut self.lock().late);
        let done = sync();
        if done.is_err() && before.any() {
            self.lock().late = Late { counts: true, tables: true, data: true };
        }
        done
    }

    /// Writes to the header, the L1 table or the refcount table.
    fn write_tables(
        &self,
        mut state: MutexGuard<'_, State>,
        plain: &Plain,
        offset: u64,
        bytes: &[u8],
        write: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if offset == 0 {
            state.take_header(plain, bytes)?;
        }
        let (l1, table) = (state.layout.l1.clone(), state.layout.table.clone());
        for (_, old, l2) in new_entries(plain, &l1, offset, bytes, L2_OFFSET)? {
            state.count(plain, l2)?;
            state.l2.remove(&old);
            state.l2.insert(l2);
        }
        for (index, _, block) in new_entries(plain, &table, offset, bytes, BLOCK_OFFSET)? {
            // One that counts itself has been written with that.
            if state.layout.block_of(block) != index {
                state.count(plain, block)?;
            }
            state.blocks.insert(block);
        }
        if state.late.any() {
            plain.sync()?;
            state.late = Late::default();
        }
        write()?;
        state.late.tables = true;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes to refcount blocks, L2 tables or data.
fn write_below(
    mut state: MutexGuard<'_, State>,
    plain: &Plain,
    range: &Range<u64>,
    write: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    let State { blocks, l2, late, .. } = &mut *state;
    let is_among = |places: &BTreeSet<u64>| places.range(range.clone()).next().is_some();
    let (relies, kind) = if is_among(blocks) {
        (late.tables, Late { counts: true, ..Late::default() })
    } else if is_among(l2) {
        (late.counts || late.data, Late { tables: true, ..Late::default() })
    } else {
        (late.tables, Late { data: true, ..Late::default() })
    };
    if relies {
        plain.sync()?;
        *late = Late::default();
    }
    // Before it is done, since a flush may come in between.
    late.counts |= kind.counts;
    late.tables |= kind.tables;
    late.data |= kind.data;
    drop(state);
    write()
}

impl State {
    /// Learns where tables are from a header that is about to be written.
    fn take_header(&mut self, plain: &Plain, bytes: &[u8]) -> io::Result<()> {
        let Some(layout) = self.layout.moved(bytes) else { return Ok(()) };
        let old = std::mem::replace(&mut self.layout, layout);
        if old.table != self.layout.table {
            // The library has written it, and everything that it counts, by now.
            let table = &self.layout.table;
            let len = usize::try_from(table.end - table.start).map_err(io::Error::other)?;
            let table = plain.bytes(table.start, len)?;
            let table = table.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry));
            self.blocks = table.map(|entry| entry & BLOCK_OFFSET).filter(|at| *at > 0).collect();
        }
        if old.l1 != self.layout.l1 {
            let clusters =
                self.layout.l1.clone().step_by(usize::try_from(self.layout.cluster()).unwrap_or(512));
            for cluster in clusters {
                self.count(plain, cluster)?;
            }
        }
        Ok(())
    }

    /// Makes the cluster at `offset` one that is used, in the file.
    fn count(&mut self, plain: &Plain, offset: u64) -> io::Result<()> {
        let (entry, place) = self.layout.refcount_at(offset);
        let block = plain.bytes(entry, 8)?;
        let block = u64::from_be_bytes(block.try_into().unwrap_or_default()) & BLOCK_OFFSET;
        if block == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a new cluster has no refcount"));
        }
        let at = block.saturating_add(place.byte);
        let mut bytes = plain.bytes(at, place.width)?;
        if place.get(&bytes) == 0 {
            place.set_one(&mut bytes);
            plain.set_bytes(at, &bytes)?;
            self.late.counts = true;
        }
        Ok(())
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// Those entries of a table that `bytes`, about to be written to `offset`, make point somewhere else: index, from where, and
/// where to.
fn new_entries(
    plain: &Plain,
    table: &Range<u64>,
    offset: u64,
    bytes: &[u8],
    mask: u64,
) -> io::Result<Vec<(u64, u64, u64)>> {
    let from = offset.max(table.start);
    let to = (offset + bytes.len() as u64).min(table.end);
    if from >= to {
        return Ok(Vec::new());
    }
    let skip = usize::try_from(from - offset).map_err(io::Error::other)?;
    let len = usize::try_from(to - from).map_err(io::Error::other)?;
    let old = plain.bytes(from, len)?;
    let entries = old.as_chunks().0.iter().zip(bytes[skip..skip + len].as_chunks().0);
    Ok(entries
        .zip((from - table.start) / 8..)
        .map(|((old, new), index)| (index, u64::from_be_bytes(*old) & mask, u64::from_be_bytes(*new) & mask))
        .filter(|(_, old, new)| new != old && *new != 0)
        .collect())
}
