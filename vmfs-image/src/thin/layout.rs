//! The bytes of a thin image, as `docs/image-format.md` describes them: taken apart with every field checked, and put
//! together. Nothing here reads or writes a file.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::image::{Format, Identity, MAX_SIZE, SECTOR};

/// Size of a page, in bytes.
pub(crate) const PAGE: usize = 4096;
/// The same, as an offset.
pub(crate) const PAGE_U64: u64 = 4096;
/// What a header begins with.
pub(crate) const MAGIC: &[u8; 8] = b"VMM-THIN";
/// What a superblock begins with.
const SUPER_MAGIC: &[u8; 8] = b"VMMTSUPR";
/// The only version there is.
const VERSION: u32 = 1;
/// Smallest and largest cluster, as powers of two.
pub(crate) const CLUSTER_BITS: std::ops::RangeInclusive<u8> = 16..=21;
/// Sub-clusters of a cluster.
pub(crate) const SUBS: u32 = 16;
/// Entries of an L2 page: one for each cluster.
pub(crate) const L2_ENTRIES: usize = 512;
/// Entries of an L1 page: one for each L2 page.
pub(crate) const L1_ENTRIES: usize = 256;
/// Clusters below one entry of the root.
pub(crate) const ROOT_SPAN: u64 = (L1_ENTRIES * L2_ENTRIES) as u64;
/// Entries of a full free list.
pub(crate) const FREE_ENTRIES: usize = 256;
/// Longest path of a backing, in bytes.
pub(crate) const MAX_PATH: usize = 1024;
/// The most clusters that a file has, the first included.
pub(crate) const MAX_CLUSTERS: u64 = 1 << 32;

/// Why a structure of an image is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Bad {
    /// It does not begin with its magic.
    #[error("the {0} does not begin with its magic")]
    Magic(&'static str),
    /// A superblock of the other page.
    #[error("the superblock of generation {0} is in the page of those before and after it")]
    Slot(u64),
    /// The checksum is another.
    #[error("the {what} has checksum {found:#010x}, and its bytes come to {right:#010x}")]
    Checksum {
        /// The structure.
        what: &'static str,
        /// The checksum noted.
        found: u32,
        /// The checksum of the bytes.
        right: u32,
    },
    /// What must be zero is not.
    #[error("the {0} has something in a place that is reserved")]
    Reserved(&'static str),
    /// A number that cannot be.
    #[error("the {what} says that {field} is {value}; right is {right}")]
    Field {
        /// The structure.
        what: &'static str,
        /// The field.
        field: &'static str,
        /// What it holds.
        value: u64,
        /// What it may hold.
        right: &'static str,
    },
    /// Something that a later version may have.
    #[error("{0}")]
    Newer(String),
}

/// What is written once, in page 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// The cluster size is 2 to this power.
    pub(crate) cluster_bits: u8,
    /// Compatible features, kept as they are.
    pub(crate) compatible: u64,
    /// Identity of the image.
    pub(crate) uuid: [u8; 16],
}

/// What an overlay notes of the image that it lies on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Its path, from the directory of the image on top.
    pub path: PathBuf,
    /// Its kind.
    pub format: Format,
    /// By what it is known again.
    pub identity: Identity,
    /// How many of its bytes are seen: from there on the image on top reads as zeroes where it has nothing.
    pub visible: u64,
}

/// Offset and checksum of a page that something points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PageRef {
    /// Its offset in the file; 0 for none.
    pub(crate) offset: u64,
    /// CRC32C of its bytes.
    pub(crate) crc: u32,
}

/// A list of entries that a superblock names: the root or the free list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct ListRef {
    /// Its offset in the file; 0 for none.
    pub(crate) offset: u64,
    /// How many entries it has.
    pub(crate) entries: u32,
    /// CRC32C of its pages.
    pub(crate) crc: u32,
}

/// A state of the image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Superblock {
    /// Number of the state.
    pub(crate) generation: u64,
    /// Size of the disk.
    pub(crate) size: u64,
    /// The most that `end` may be; 0 for no limit.
    pub(crate) max_size: u64,
    /// Everything in the file from here on is free.
    pub(crate) end: u64,
    /// The root.
    pub(crate) root: ListRef,
    /// The free list.
    pub(crate) free: ListRef,
    /// Number of clusters that L2 entries name.
    pub(crate) mapped: u64,
    /// The image below.
    pub(crate) backing: Option<Backing>,
}

/// Free space: offset and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FreeExtent {
    /// Where it begins.
    pub(crate) offset: u64,
    /// How long it is.
    pub(crate) len: u64,
}

/// What an L2 page says of a cluster of the disk. As a number it is what the page holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Entry(u64);

impl Entry {
    /// Puts one together.
    pub(crate) fn new(cluster: u32, data: u16, zero: u16) -> Self {
        Self(u64::from(cluster) | u64::from(data) << 32 | u64::from(zero) << 48)
    }

    /// Number of its cluster in the file; 0 for none.
    pub(crate) fn cluster(self) -> u32 {
        let [a, b, c, d, ..] = self.0.to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    /// Sub-clusters with data.
    pub(crate) fn data(self) -> u16 {
        let [.., a, b, _, _] = self.0.to_le_bytes();
        u16::from_le_bytes([a, b])
    }

    /// Sub-clusters that read as zeroes.
    pub(crate) fn zero(self) -> u16 {
        let [.., a, b] = self.0.to_le_bytes();
        u16::from_le_bytes([a, b])
    }
}

/// Entries that the root of a disk of `size` bytes has, if it has any.
pub(crate) fn root_entries(size: u64, cluster_bits: u8) -> u64 {
    size.div_ceil(1 << cluster_bits).div_ceil(ROOT_SPAN)
}

/// Bytes that a list of `entries` entries takes, in whole pages.
pub(crate) fn list_bytes(entries: u64) -> u64 {
    (entries * 16).next_multiple_of(PAGE_U64)
}

/// The page in which a superblock with `generation` stands, as an offset.
pub(crate) fn super_offset(generation: u64) -> u64 {
    PAGE_U64 * (1 + generation % 2)
}

/// The generation that the page of a superblock says.
pub(crate) fn generation(page: &[u8; PAGE]) -> u64 {
    u64_at(page, 8)
}

/// The checksum that everything has.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// Checks bytes against the checksum that what points to them has.
pub(crate) fn verify(what: &'static str, bytes: &[u8], found: u32) -> Result<(), Bad> {
    let right = checksum(bytes);
    if right == found { Ok(()) } else { Err(Bad::Checksum { what, found, right }) }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn reserved(what: &'static str, bytes: &[u8]) -> Result<(), Bad> {
    if bytes.iter().all(|byte| *byte == 0) { Ok(()) } else { Err(Bad::Reserved(what)) }
}

fn field(
    what: &'static str,
    field: &'static str,
    value: u64,
    ok: bool,
    right: &'static str,
) -> Result<(), Bad> {
    if ok { Ok(()) } else { Err(Bad::Field { what, field, value, right }) }
}

/// Puts the checksum at the end of a page that has it there.
fn seal(page: &mut [u8; PAGE]) {
    let crc = checksum(&page[..PAGE - 4]);
    put(page, PAGE - 4, &crc.to_le_bytes());
}

impl Header {
    /// Its page.
    pub(crate) fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        put(&mut page, 0, MAGIC);
        put(&mut page, 8, &VERSION.to_le_bytes());
        put(&mut page, 24, &self.compatible.to_le_bytes());
        page[32] = self.cluster_bits;
        put(&mut page, 40, &self.uuid);
        seal(&mut page);
        page
    }

    /// Takes page 0 apart. What only a later version has is told from damage: the version and the features are looked
    /// at once the checksum is right.
    pub(crate) fn decode(page: &[u8; PAGE]) -> Result<Self, Bad> {
        const WHAT: &str = "header";
        if &page[..8] != MAGIC {
            return Err(Bad::Magic(WHAT));
        }
        verify(WHAT, &page[..PAGE - 4], u32_at(page, PAGE - 4))?;
        let version = u32_at(page, 8);
        if version != VERSION {
            return Err(Bad::Newer(format!("version {version} of the thin image format")));
        }
        let incompatible = u64_at(page, 16);
        if incompatible != 0 {
            return Err(Bad::Newer(format!("features {incompatible:#x} of the thin image format")));
        }
        reserved(WHAT, &page[12..16])?;
        reserved(WHAT, &page[33..40])?;
        reserved(WHAT, &page[56..PAGE - 4])?;
        let bits = page[32];
        field(WHAT, "the power of two of a cluster", bits.into(), CLUSTER_BITS.contains(&bits), "16 to 21")?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&page[40..56]);
        Ok(Self { cluster_bits: bits, compatible: u64_at(page, 24), uuid })
    }
}

fn format_code(format: Format) -> u16 {
    match format {
        Format::Flat => 1,
        Format::Thin => 2,
        Format::Qcow2 => 3,
        Format::Vmdk => 4,
        Format::Vhdx => 5,
    }
}

impl Superblock {
    /// Its page. The path of the backing has to have 1 to [`MAX_PATH`] bytes.
    pub(crate) fn encode(&self) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        put(&mut page, 0, SUPER_MAGIC);
        for (at, value) in [
            (8, self.generation),
            (16, self.size),
            (24, self.max_size),
            (32, self.end),
            (40, self.root.offset),
            (56, self.free.offset),
            (72, self.mapped),
        ] {
            put(&mut page, at, &value.to_le_bytes());
        }
        for (at, value) in
            [(48, self.root.entries), (52, self.root.crc), (64, self.free.entries), (68, self.free.crc)]
        {
            put(&mut page, at, &value.to_le_bytes());
        }
        if let Some(backing) = &self.backing {
            let path = backing.path.as_os_str().as_bytes();
            let path = &path[..path.len().min(MAX_PATH)];
            put(&mut page, 80, &format_code(backing.format).to_le_bytes());
            put(&mut page, 82, &u16::try_from(path.len()).unwrap_or(0).to_le_bytes());
            put(&mut page, 88, &backing.identity.size.to_le_bytes());
            put(&mut page, 96, &backing.identity.id);
            put(&mut page, 112, &backing.identity.state.to_le_bytes());
            put(&mut page, 120, &backing.visible.to_le_bytes());
            put(&mut page, 1024, path);
        }
        seal(&mut page);
        page
    }

    /// Takes the superblock in page `1 + slot` apart. [`Bad::Magic`], [`Bad::Checksum`] and [`Bad::Slot`] are
    /// those of one that was never written, or that a power loss has torn; anything else is damage.
    pub(crate) fn decode(page: &[u8; PAGE], header: &Header, slot: u64) -> Result<Self, Bad> {
        const WHAT: &str = "superblock";
        if &page[..8] != SUPER_MAGIC {
            return Err(Bad::Magic(WHAT));
        }
        verify(WHAT, &page[..PAGE - 4], u32_at(page, PAGE - 4))?;
        let generation = u64_at(page, 8);
        if generation % 2 != slot {
            return Err(Bad::Slot(generation));
        }
        let cluster = 1 << header.cluster_bits;
        let block = Self {
            generation,
            size: u64_at(page, 16),
            max_size: u64_at(page, 24),
            end: u64_at(page, 32),
            root: ListRef { offset: u64_at(page, 40), entries: u32_at(page, 48), crc: u32_at(page, 52) },
            free: ListRef { offset: u64_at(page, 56), entries: u32_at(page, 64), crc: u32_at(page, 68) },
            mapped: u64_at(page, 72),
            backing: decode_backing(page)?,
        };
        field(WHAT, "the generation", block.generation, block.generation < u64::MAX, "less than 2^64 - 1")?;
        let size = block.size;
        field(
            WHAT,
            "the size of the disk",
            size,
            size.is_multiple_of(SECTOR) && (SECTOR..=MAX_SIZE).contains(&size),
            "a multiple of 512 up to 2^50",
        )?;
        let end = block.end;
        field(
            WHAT,
            "the end",
            end,
            end.is_multiple_of(cluster) && end >= cluster && end / cluster <= MAX_CLUSTERS,
            "1 to 2^32 whole clusters",
        )?;
        field(
            WHAT,
            "max_size",
            block.max_size,
            block.max_size == 0 || block.max_size >= end,
            "0, or not below the end",
        )?;
        let entries = u64::from(block.root.entries);
        field(
            WHAT,
            "the number of the root's entries",
            entries,
            entries == 0 || entries == root_entries(size, header.cluster_bits),
            "0, or what the size needs",
        )?;
        check_list("the offset of the root", block.root, cluster, end)?;
        let entries = u64::from(block.free.entries);
        field(
            WHAT,
            "the number of the free list's entries",
            entries,
            entries <= FREE_ENTRIES as u64,
            "at most 256",
        )?;
        check_list("the offset of the free list", block.free, cluster, end)?;
        field(
            WHAT,
            "the number of clusters named",
            block.mapped,
            block.mapped < end / cluster,
            "less than the file has",
        )?;
        reserved(WHAT, &page[84..88])?;
        reserved(WHAT, &page[128..1024])?;
        reserved(WHAT, &page[2048..PAGE - 4])?;
        Ok(block)
    }
}

/// A list has a place if it has entries, and then one in the file behind the first cluster.
fn check_list(name: &'static str, list: ListRef, cluster: u64, end: u64) -> Result<(), Bad> {
    let bytes = list_bytes(list.entries.into());
    let ok = if list.entries == 0 {
        list.offset == 0 && list.crc == 0
    } else {
        list.offset.is_multiple_of(PAGE_U64)
            && list.offset >= cluster
            && list.offset.checked_add(bytes).is_some_and(|behind| behind <= end)
    };
    field("superblock", name, list.offset, ok, "a multiple of 4096 between the first cluster and the end")
}

fn decode_backing(page: &[u8; PAGE]) -> Result<Option<Backing>, Bad> {
    const WHAT: &str = "superblock";
    let code = u16_at(page, 80);
    let len = usize::from(u16_at(page, 82));
    let format = match code {
        0 => {
            reserved(WHAT, &page[82..84])?;
            reserved(WHAT, &page[88..128])?;
            reserved(WHAT, &page[1024..2048])?;
            return Ok(None);
        }
        1 => Format::Flat,
        2 => Format::Thin,
        3 => Format::Qcow2,
        4 => Format::Vmdk,
        5 => Format::Vhdx,
        _ => {
            return Err(Bad::Field {
                what: WHAT,
                field: "the kind of the backing",
                value: code.into(),
                right: "0 to 5",
            });
        }
    };
    let name = "the length of the backing's path";
    field(WHAT, name, len as u64, (1..=MAX_PATH).contains(&len), "1 to 1024")?;
    let (path, padding) = page[1024..2048].split_at(len);
    reserved(WHAT, padding)?;
    field(WHAT, "a byte of the backing's path", 0, !path.contains(&0), "1 to 255")?;
    let size = u64_at(page, 88);
    let ok = size.is_multiple_of(SECTOR) && size <= MAX_SIZE;
    field(WHAT, "the size of the backing", size, ok, "a multiple of 512 up to 2^50")?;
    let visible = u64_at(page, 120);
    let ok = visible.is_multiple_of(SECTOR) && visible <= size;
    field(WHAT, "what is seen of the backing", visible, ok, "a multiple of 512 up to its size")?;
    let mut id = [0; 16];
    id.copy_from_slice(&page[96..112]);
    Ok(Some(Backing {
        path: Path::new(OsStr::from_bytes(path)).to_owned(),
        format,
        identity: Identity { size, id, state: u64_at(page, 112) },
        visible,
    }))
}

/// The pages of a list of pages: the root, or an L1 page.
pub(crate) fn encode_refs(refs: impl ExactSizeIterator<Item = PageRef>) -> Vec<u8> {
    let mut bytes = vec![0; (refs.len() * 16).next_multiple_of(PAGE)];
    for (entry, reference) in bytes.chunks_exact_mut(16).zip(refs) {
        put(entry, 0, &reference.offset.to_le_bytes());
        put(entry, 8, &reference.crc.to_le_bytes());
    }
    bytes
}

/// The first `count` entries of a list of pages, of which all others have to be zero. `what` is its name.
pub(crate) fn decode_refs(
    what: &'static str,
    bytes: &[u8],
    count: usize,
    cluster_bits: u8,
    end: u64,
) -> Result<Vec<PageRef>, Bad> {
    let used = bytes.len().min(count * 16);
    reserved(what, &bytes[used..])?;
    bytes[..used].chunks_exact(16).map(|entry| decode_ref(what, entry, cluster_bits, end)).collect()
}

fn decode_ref(what: &'static str, entry: &[u8], cluster_bits: u8, end: u64) -> Result<PageRef, Bad> {
    let reference = PageRef { offset: u64_at(entry, 0), crc: u32_at(entry, 8) };
    reserved(what, &entry[12..])?;
    let offset = reference.offset;
    let ok = if offset == 0 {
        reference.crc == 0
    } else {
        offset.is_multiple_of(PAGE_U64) && offset >= 1 << cluster_bits && offset < end
    };
    let right = "a multiple of 4096 between the first cluster and the end, or nothing";
    field(what, "the offset of a page", offset, ok, right)?;
    Ok(reference)
}

/// An L2 page.
pub(crate) fn encode_l2(entries: &[Entry; L2_ENTRIES], page: &mut [u8]) {
    for (bytes, entry) in page.chunks_exact_mut(8).zip(entries) {
        bytes.copy_from_slice(&entry.0.to_le_bytes());
    }
}

/// Takes an L2 page apart, of which the first `count` entries are within the disk. The file has `clusters` clusters.
pub(crate) fn decode_l2(
    page: &[u8; PAGE],
    count: usize,
    clusters: u64,
    entries: &mut [Entry; L2_ENTRIES],
) -> Result<(), Bad> {
    const WHAT: &str = "L2 page";
    for (index, (bytes, into)) in page.chunks_exact(8).zip(entries).enumerate() {
        let entry = Entry(u64_at(bytes, 0));
        if index >= count && entry != Entry::default() {
            return Err(Bad::Reserved(WHAT));
        }
        let cluster = entry.cluster().into();
        field(WHAT, "the number of a cluster", cluster, cluster < clusters, "less than the file has")?;
        let both = entry.data() & entry.zero();
        field(WHAT, "what is both data and zeroes", both.into(), both == 0, "0")?;
        let data = entry.data().into();
        field(WHAT, "the data mask of no cluster", data, cluster != 0 || data == 0, "0")?;
        *into = entry;
    }
    Ok(())
}

/// The page of a free list: the first 256 of `extents`, which are in ascending order and do not touch.
pub(crate) fn encode_free(extents: &[FreeExtent]) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (entry, extent) in page.chunks_exact_mut(16).zip(extents) {
        put(entry, 0, &extent.offset.to_le_bytes());
        put(entry, 8, &extent.len.to_le_bytes());
    }
    page
}

/// Takes the page of a free list of `count` entries apart.
pub(crate) fn decode_free(
    page: &[u8; PAGE],
    count: usize,
    cluster_bits: u8,
    end: u64,
) -> Result<Vec<FreeExtent>, Bad> {
    const WHAT: &str = "free list";
    let count = count.min(FREE_ENTRIES);
    reserved(WHAT, &page[count * 16..])?;
    // The first extent may begin right behind the first cluster; every other one behind the end of the one before.
    let mut least = 1 << cluster_bits;
    page[..count * 16]
        .chunks_exact(16)
        .map(|entry| {
            let extent = FreeExtent { offset: u64_at(entry, 0), len: u64_at(entry, 8) };
            let ok = extent.offset.is_multiple_of(PAGE_U64) && extent.offset >= least;
            let right = "a multiple of 4096 behind the end of the one before";
            field(WHAT, "the offset of an extent", extent.offset, ok, right)?;
            let behind = extent.offset.checked_add(extent.len).filter(|behind| *behind <= end);
            let ok = extent.len.is_multiple_of(PAGE_U64) && extent.len > 0 && behind.is_some();
            field(WHAT, "the length of an extent", extent.len, ok, "a multiple of 4096 up to the end")?;
            least = behind.unwrap_or(end).saturating_add(PAGE_U64);
            Ok(extent)
        })
        .collect()
}

#[cfg(test)]
#[path = "layout_tests.rs"]
mod tests;
