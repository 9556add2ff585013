//! What a qcow2 image says of itself (QEMU, `docs/interop/qcow2.rst`), examined before the library sees it: that takes some
//! for granted which an image from elsewhere need not have, and knows nothing of encryption.

use std::collections::BTreeSet;
use std::ops::Range;

use super::disk::Plain;
use crate::image::{MAX_SIZE, SECTOR};

/// Most entries of the L1 table, as in QEMU: 32 MiB.
pub(super) const MAX_L1: u64 = 4 << 20;
/// Largest refcount table in bytes, as in QEMU.
const MAX_TABLE: u64 = 8 << 20;
/// Largest that the library makes it: as many entries as the L1 table may have.
const TABLE_LIMIT: u64 = 32 << 20;
/// Longest name of a backing, in bytes.
const MAX_NAME: usize = 1023;

/// Why an image is not used.
#[derive(Debug)]
pub(super) enum Bad {
    /// It is not what it should be.
    Corrupt(String),
    /// It needs what there is not.
    Unsupported(String),
    /// Reading failed.
    Io(std::io::Error),
}

impl From<std::io::Error> for Bad {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

fn corrupt<T>(what: impl Into<String>) -> Result<T, Bad> {
    Err(Bad::Corrupt(what.into()))
}

/// A sound header.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) version: u32,
    /// Size as a disk in bytes, as noted.
    pub(super) size: u64,
    pub(super) layout: Layout,
    pub(super) snapshots: u32,
    pub(super) lazy_refcounts: bool,
    /// Name of the backing, and of its format.
    pub(super) backing: Option<(String, Option<String>)>,
}

/// Where tables are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) cluster_bits: u32,
    pub(super) refcount_order: u32,
    /// The L1 table, in bytes of the file.
    pub(super) l1: Range<u64>,
    /// The refcount table.
    pub(super) table: Range<u64>,
}

/// Where in a refcount block a refcount is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// First byte.
    pub(super) byte: u64,
    /// How many bytes.
    pub(super) width: usize,
    /// First bit and how many, where it is less than a byte.
    bits: (u32, u32),
}

impl Place {
    pub(super) fn get(&self, bytes: &[u8]) -> u64 {
        let all = bytes.iter().fold(0, |all, byte| all << 8 | u64::from(*byte));
        let (shift, bits) = self.bits;
        all >> shift & (u64::MAX >> (64 - bits))
    }

    /// Sets one that is zero.
    pub(super) fn set_one(&self, bytes: &mut [u8]) {
        if let Some(last) = bytes.last_mut() {
            *last |= 1 << self.bits.0;
        }
    }
}

fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    let bytes = bytes.get(at..at + width).unwrap_or_default();
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn short(bytes: &[u8], at: usize) -> u32 {
    u32::try_from(number(bytes, at, 4)).unwrap_or_default()
}

impl Layout {
    pub(super) fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// As a header says that is being written; `None` where it says nothing that could be. That is what a guest has written, whose
    /// image from elsewhere has led it there.
    pub(super) fn moved(&self, header: &[u8]) -> Option<Self> {
        if header.len() < 60 {
            return None;
        }
        let range = |at: u64, len: u64, most: u64| {
            let is_one = len <= most && at.is_multiple_of(self.cluster());
            at.checked_add(len).filter(|end| is_one && *end < 1 << 62).map(|end| at..end)
        };
        Some(Self {
            l1: range(number(header, 40, 8), 8 * number(header, 36, 4), 8 * MAX_L1)?,
            table: range(number(header, 48, 8), number(header, 56, 4) << self.cluster_bits, TABLE_LIMIT)?,
            ..self.clone()
        })
    }

    /// How much of the disk an L2 table is for, in bytes.
    pub(super) fn covered(&self) -> u64 {
        1 << (2 * self.cluster_bits - 3)
    }

    /// How many clusters a refcount block counts, as a power of two.
    fn block_bits(&self) -> u32 {
        self.cluster_bits + 3 - self.refcount_order
    }

    /// Which entry of the refcount table is for the cluster at `offset`.
    pub(super) fn block_of(&self, offset: u64) -> u64 {
        offset >> self.cluster_bits >> self.block_bits()
    }

    /// Offset in the file of the entry that says which refcount block counts the cluster at `offset`, and where in that.
    pub(super) fn refcount_at(&self, offset: u64) -> (u64, Place) {
        let index = (offset >> self.cluster_bits) & ((1 << self.block_bits()) - 1);
        let bits = 1 << self.refcount_order;
        let at = index << self.refcount_order;
        let place = if bits < 8 {
            Place { byte: at / 8, width: 1, bits: (u32::try_from(at % 8).unwrap_or_default(), bits) }
        } else {
            Place { byte: at / 8, width: usize::try_from(bits / 8).unwrap_or(8), bits: (0, bits) }
        };
        (self.table.start + 8 * self.block_of(offset), place)
    }
}

/// The names of incompatible features, and what is to be done about them.
const FEATURES: [&str; 5] = [
    "repair: it is marked dirty (incompatible feature 0), as QEMU leaves an image with lazy refcounts that it did not close; \
     \"qemu-img check -r all\" repairs it",
    "repair: it is marked corrupt (incompatible feature 1); \"qemu-img check -r all\" may repair it",
    "an external data file (incompatible feature 2)",
    "a compression other than deflate (incompatible feature 3)",
    "extended L2 entries, which are subclusters (incompatible feature 4)",
];

impl Header {
    /// Examines the header of the file, which has `len` bytes.
    pub(super) fn read(plain: &Plain, len: u64) -> Result<Self, Bad> {
        let start = plain.bytes(0, 104)?;
        if !start.starts_with(b"QFI\xfb") {
            return corrupt("it does not begin as one does");
        }
        let version = short(&start, 4);
        if !(2..=3).contains(&version) {
            return Err(Bad::Unsupported(format!("version {version} of qcow2 (2 and 3 there are)")));
        }
        let cluster_bits = short(&start, 20);
        if !(9..=21).contains(&cluster_bits) {
            return corrupt(format!(
                "a cluster has from 512 bytes (2 to the power of 9) to 2 MiB (21), not 2 to the power of {cluster_bits}"
            ));
        }
        let cluster = 1_u64 << cluster_bits;
        match short(&start, 32) {
            0 => {}
            1 => return Err(Bad::Unsupported("AES encryption".to_owned())),
            2 => return Err(Bad::Unsupported("LUKS encryption".to_owned())),
            other => return Err(Bad::Unsupported(format!("encryption of an unknown kind ({other})"))),
        }
        let (header_len, refcount_order) =
            if version == 2 { (72, 4) } else { (number(&start, 100, 4), short(&start, 96)) };
        if version == 3 && (!(104..=cluster).contains(&header_len) || !header_len.is_multiple_of(8)) {
            return corrupt(format!(
                "its header has from 104 to {cluster} bytes, a multiple of 8, not {header_len}"
            ));
        }
        let first = plain.bytes(0, usize::try_from(cluster.min(len)).unwrap_or_default())?;
        let extensions = Extensions::read(&first, version, usize::try_from(header_len).unwrap_or(72))?;
        if version == 3 {
            extensions.refuse_features(number(&start, 72, 8))?;
        }
        if refcount_order > 6 {
            return corrupt(format!(
                "a refcount has up to 64 bits (2 to the power of 6), not 2 to the power of {refcount_order}"
            ));
        }
        let layout = layout(&start, cluster_bits, refcount_order, len)?;
        let size = number(&start, 24, 8);
        if size > MAX_SIZE {
            return corrupt(format!("it has {size} bytes as a disk, and {MAX_SIZE} (1 PiB) is the most"));
        }
        if size < SECTOR {
            return corrupt(format!(
                "it has {size} bytes as a disk, which is less than one sector ({SECTOR})"
            ));
        }
        // The L1 table has an entry for each L2 table, which has one of 8 bytes for each cluster.
        let covered = u128::from((layout.l1.end - layout.l1.start) / 8) << (2 * cluster_bits - 3);
        if covered < u128::from(size) {
            return corrupt(format!("its L1 table is for {covered} bytes of disk, and it has {size}"));
        }
        let name = (number(&start, 8, 8), number(&start, 16, 4));
        let backing = match name {
            (0, _) => None,
            (at, len) => Some((backing_name(&first, at, len)?, extensions.backing_format)),
        };
        Ok(Self {
            version,
            size,
            layout,
            snapshots: short(&start, 60),
            lazy_refcounts: version == 3 && number(&start, 80, 8) & 1 != 0,
            backing,
        })
    }
}

/// Where the tables are, which have to lie in the file of `len` bytes.
fn layout(start: &[u8], cluster_bits: u32, refcount_order: u32, len: u64) -> Result<Layout, Bad> {
    let cluster = 1_u64 << cluster_bits;
    let table = |what: &str, at: u64, bytes: u64, most: u64| {
        if bytes > most {
            return corrupt(format!("its {what} has {bytes} bytes, and {most} is the most"));
        }
        if bytes > 0 && (at < cluster || !at.is_multiple_of(cluster)) {
            return corrupt(format!("its {what} lies at byte {at}, which is no place for one"));
        }
        match at.checked_add(bytes).filter(|end| bytes == 0 || *end <= len) {
            Some(end) => Ok(at..end),
            None => corrupt(format!("its {what} of {bytes} bytes at {at} is not in its file of {len}")),
        }
    };
    let l1 = table("L1 table", number(start, 40, 8), 8 * number(start, 36, 4), 8 * MAX_L1)?;
    let clusters = number(start, 56, 4);
    let counts = table("refcount table", number(start, 48, 8), clusters << cluster_bits, MAX_TABLE)?;
    if clusters == 0 {
        return corrupt("it has no refcount table");
    }
    if l1.start < counts.end && counts.start < l1.end {
        return corrupt("its L1 table and its refcount table lie at the same place");
    }
    Ok(Layout { cluster_bits, refcount_order, l1, table: counts })
}

fn backing_name(first: &[u8], at: u64, len: u64) -> Result<String, Bad> {
    let (at, len) = (usize::try_from(at).unwrap_or(usize::MAX), usize::try_from(len).unwrap_or(usize::MAX));
    if !(1..=MAX_NAME).contains(&len) {
        return corrupt(format!("the name of its backing has from 1 to {MAX_NAME} bytes, not {len}"));
    }
    let name = at.checked_add(len).and_then(|end| first.get(at..end));
    match name.map(|name| String::from_utf8(name.to_vec())) {
        Some(Ok(name)) if !name.contains('\0') => Ok(name),
        Some(_) => corrupt("the name of its backing is no text"),
        None => corrupt("the name of its backing is not in its first cluster"),
    }
}

/// What stands behind the header.
#[derive(Debug, Default)]
struct Extensions {
    backing_format: Option<String>,
    /// Bits of incompatible features, and their names.
    names: Vec<(u8, String)>,
}

impl Extensions {
    fn read(first: &[u8], version: u32, header_len: usize) -> Result<Self, Bad> {
        let mut found = Self::default();
        let mut at = header_len;
        loop {
            let (Some(head), true) = (first.get(at..at + 8), at + 8 <= first.len()) else {
                // Those of version 2 need not be there.
                return if version == 2 { Ok(found) } else { corrupt("what follows its header has no end") };
            };
            let (kind, len) = (short(head, 0), usize::try_from(number(head, 4, 4)).unwrap_or(usize::MAX));
            at += 8;
            if kind == 0 {
                return Ok(found);
            }
            let Some(data) = at.checked_add(len).and_then(|end| first.get(at..end)) else {
                return corrupt("what follows its header is longer than its first cluster");
            };
            at += len.next_multiple_of(8);
            match kind {
                0xe279_2aca => match String::from_utf8(data.to_vec()) {
                    Ok(name) => found.backing_format = Some(name),
                    Err(_) => return corrupt("the name of its backing's format is no text"),
                },
                0x6803_f857 => {
                    if !len.is_multiple_of(48) {
                        return corrupt("its table of the names of features is cut off");
                    }
                    let features = data.as_chunks::<48>().0.iter().filter(|feature| feature[0] == 0);
                    found.names.extend(features.map(|feature| {
                        let name = feature[2..].split(|byte| *byte == 0).next().unwrap_or_default();
                        (feature[1], String::from_utf8_lossy(name).escape_debug().to_string())
                    }));
                }
                _ => {}
            }
        }
    }

    fn refuse_features(&self, incompatible: u64) -> Result<(), Bad> {
        let wanted = (0_u8..64).filter(|bit| incompatible >> bit & 1 != 0);
        let wanted: Vec<_> = wanted
            .map(|bit| match FEATURES.get(usize::from(bit)) {
                Some(name) => (*name).to_owned(),
                None => match self.names.iter().find(|named| named.0 == bit) {
                    Some((_, name)) => format!("\"{name}\" (incompatible feature {bit})"),
                    None => format!("the incompatible feature {bit}"),
                },
            })
            .collect();
        if wanted.is_empty() { Ok(()) } else { Err(Bad::Unsupported(wanted.join(" and "))) }
    }
}

/// Where tables are that others point to.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// Refcount blocks.
    pub(super) blocks: BTreeSet<u64>,
    /// L2 tables.
    pub(super) l2: BTreeSet<u64>,
}

/// Examines what an image that is to be written to has of tables, so that nothing new is ever written over them: each L2
/// table and refcount block is in the file of `len` bytes, at a place of its own, and counted as used.
pub(super) fn check_tables(plain: &Plain, layout: &Layout, len: u64) -> Result<Tables, Bad> {
    let cluster = layout.cluster();
    let entries = |range: &Range<u64>| -> Result<Vec<u64>, Bad> {
        let bytes = plain.bytes(range.start, usize::try_from(range.end - range.start).unwrap_or_default())?;
        Ok(bytes.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
    };
    let end = len.next_multiple_of(cluster);
    let mut all = vec![0];
    all.extend((layout.table.start..layout.table.end).step_by(usize::try_from(cluster).unwrap_or(512)));
    all.extend((layout.l1.start..layout.l1.end).step_by(usize::try_from(cluster).unwrap_or(512)));
    let table = entries(&layout.table)?;
    let mut found = Tables::default();
    // One cluster more than there is may be counted: it was given, and not written yet, when a crash came.
    let last = layout.block_of(end);
    for (index, block) in (0_u64..).zip(&table).filter(|entry| *entry.1 != 0) {
        if !block.is_multiple_of(cluster) || *block >= end {
            return corrupt(format!(
                "its refcount block {index} lies at byte {block}, which is no place for one"
            ));
        }
        if index > last {
            return corrupt(format!(
                "its refcount block {index} counts what is not in its file of {len} bytes"
            ));
        }
        found.blocks.insert(*block);
        all.push(*block);
    }
    for (index, entry) in entries(&layout.l1)?.into_iter().enumerate() {
        let l2 = entry & 0x00ff_ffff_ffff_fe00;
        if entry & 0x7f00_0000_0000_01ff != 0 || !l2.is_multiple_of(cluster) || l2 >= end {
            return corrupt(format!(
                "entry {index} of its L1 table is {entry:#x}, which is no place for an L2 table"
            ));
        }
        if l2 != 0 {
            found.l2.insert(l2);
            all.push(l2);
        }
    }
    all.sort_unstable();
    if let Some(twice) = all.windows(2).find(|pair| pair[0] == pair[1]) {
        return corrupt(format!("two of its tables lie at byte {}", twice[0]));
    }
    let mut loaded = (0, Vec::new());
    for at in all {
        let block = usize::try_from(layout.block_of(at)).ok().and_then(|index| table.get(index)).copied();
        let block = block.unwrap_or_default();
        if block != 0 && loaded.0 != block {
            loaded = (block, plain.bytes(block, usize::try_from(cluster).unwrap_or_default())?);
        }
        let (_, place) = layout.refcount_at(at);
        let from = usize::try_from(place.byte).unwrap_or_default();
        let refcount = loaded.1.get(from..from + place.width).map_or(0, |bytes| place.get(bytes));
        if block == 0 || refcount == 0 {
            return corrupt(format!(
                "the cluster of a table at byte {at} counts as free; \"qemu-img check -r all\" may repair it"
            ));
        }
    }
    Ok(found)
}
