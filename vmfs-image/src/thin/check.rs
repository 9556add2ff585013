//! Checking a thin image, and giving back what it has leaked.
//!
//! The format is read here from `docs/image-format.md` alone and with nothing of the code that reads and writes disks: a
//! mistake there is then not made here too.
//!
//! What is used is kept as one bit for each page of the file: 32 MiB for 1 TiB of it. Files larger than [`WINDOW`] are gone
//! through once for each window of that size that something lies in, so that it is never more than 256 MiB; beside it, 1 MiB
//! at most for 1 TiB of disk tell which pages of the tree were seen. Time grows with the tree: 1 TiB of disk has 128 MiB of it.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::Path;

use serde::Serialize;

use super::storage::{FileStorage, Storage};
use crate::image::{Error, Format};
use crate::open::{OpenOptions, Opened};

const PAGE: u64 = 4096;
/// Entries of an L1 page: L2 pages.
const L1_ENTRIES: u64 = 256;
/// Entries of an L2 page: clusters.
const L2_ENTRIES: u64 = 512;
/// So much of the file is looked at at a time, in bytes.
const WINDOW: u64 = 8 << 40;
/// So many errors are told one by one.
const MOST_ERRORS: usize = 100;
/// Entries of a free list.
const MOST_FREE: usize = 256;

/// What a check found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Generation of the superblock that counts.
    pub generation: u64,
    /// Size as a disk in bytes.
    pub size: u64,
    /// Bytes of a cluster.
    pub cluster_size: u64,
    /// What the image says that it takes of its file, in bytes.
    pub end: u64,
    /// Clusters that have a place.
    pub clusters: u64,
    /// Bytes of data in them.
    pub data: u64,
    /// Bytes that are known to be zeroes.
    pub zeroes: u64,
    /// Bytes of the tree and the free list.
    pub tree: u64,
    /// Bytes that the free list names.
    pub free: u64,
    /// Bytes that nothing uses and the free list does not name. They are no error: a crash may leave them.
    pub leaked: u64,
    /// How many pieces these are.
    pub leaks: u64,
    /// Bytes of the file that lie past what the image takes of it. They are no error either.
    pub beyond: u64,
    /// Pieces that the clusters make up when they are read in the disk's order: the fewer the better.
    pub fragments: u64,
    /// What is wrong, the first 100 of it.
    pub errors: Vec<String>,
    /// How much is wrong in all.
    pub error_count: u64,
    /// What was made right, if that was asked for and could be done.
    pub repaired: Option<Repaired>,
}

impl Report {
    fn tell(&mut self, what: impl FnOnce() -> String) {
        self.error_count += 1;
        if self.errors.len() < MOST_ERRORS {
            self.errors.push(what());
        }
    }
}

/// What a repair did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// Bytes of leaked space that can be used again or were given back to the file system.
    pub given_back: u64,
    /// The number of clusters in the superblock was wrong.
    pub count: bool,
    /// The free list named what was in use, or was unreadable; it was made anew.
    pub free_list: bool,
}

fn number(bytes: &[u8], at: usize, width: usize) -> u64 {
    bytes[at..at + width].iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

fn number32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |number, &byte| number << 8 | u32::from(byte))
}

fn number16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

type Page = [u8; 4096];

/// Whether the last four bytes of a page are the checksum of the others.
fn sealed(page: &Page) -> bool {
    crc32c::crc32c(&page[..4092]) == number32(page, 4092)
}

/// A superblock's fields that the walk needs, and the page itself.
#[derive(Debug, Clone)]
struct Superblock {
    page: Page,
    generation: u64,
    size: u64,
    end: u64,
    root: u64,
    root_entries: u64,
    root_sum: u32,
    free: u64,
    free_entries: u64,
    free_sum: u32,
    clusters: u64,
}

impl Superblock {
    fn parse(page: Page) -> Self {
        Self {
            generation: number(&page, 8, 8),
            size: number(&page, 16, 8),
            end: number(&page, 32, 8),
            root: number(&page, 40, 8),
            root_entries: number(&page, 48, 4),
            root_sum: number32(&page, 52),
            free: number(&page, 56, 8),
            free_entries: number(&page, 64, 4),
            free_sum: number32(&page, 68),
            clusters: number(&page, 72, 8),
            page,
        }
    }

    /// Everything that is wrong with it by itself.
    fn wrong(&self, cluster_size: u64) -> Vec<String> {
        let page = &self.page;
        let mut wrong = Vec::new();
        let mut unless = |right: bool, what: &str| {
            if !right {
                wrong.push(format!("superblock: {what}"));
            }
        };
        unless(self.generation < u64::MAX, "the generation is the last there is");
        unless(
            self.size.is_multiple_of(512) && (512..=1 << 50).contains(&self.size),
            "the size is no multiple of 512 up to 1 PiB",
        );
        unless(
            self.end.is_multiple_of(cluster_size) && self.end > 0 && self.end / cluster_size <= 1 << 32,
            "the end is no multiple of the cluster size up to 2^32 clusters",
        );
        let most = number(page, 24, 8);
        unless(most == 0 || most >= self.end, "max_size is less than the end");
        let needed = self.size.div_ceil(cluster_size).div_ceil(L1_ENTRIES * L2_ENTRIES);
        unless(
            self.root_entries == 0 || self.root_entries == needed,
            "the root has another number of entries than the size needs",
        );
        unless(
            (self.root == 0) == (self.root_entries == 0) && (self.root > 0 || self.root_sum == 0),
            "a root without entries, or entries without a root",
        );
        unless(self.free_entries <= MOST_FREE as u64, "the free list is too long");
        unless(
            (self.free == 0) == (self.free_entries == 0) && (self.free > 0 || self.free_sum == 0),
            "a free list without entries, or entries without a free list",
        );
        let kind = number16(page, 80);
        let len = usize::from(number16(page, 82));
        unless(kind <= 4, "unknown kind of backing");
        unless(len <= 1024, "the backing's path is too long");
        let path = &page[1024..2048];
        unless(is_zero(&path[len.min(1024)..]), "there is something behind the backing's path");
        unless(!path[..len.min(1024)].contains(&0), "the backing's path has a zero byte");
        unless((kind == 0) == (len == 0), "a backing without a path, or a path without a backing");
        unless(kind != 0 || is_zero(&page[88..128]), "there is no backing, but something of one is noted");
        let (size, visible) = (number(page, 88, 8), number(page, 120, 8));
        unless(
            size % 512 == 0 && size <= 1 << 50 && visible % 512 == 0 && visible <= size,
            "the backing's size, or what is seen of it, is no multiple of 512 up to 1 PiB",
        );
        unless(
            is_zero(&page[84..88]) && is_zero(&page[128..1024]) && is_zero(&page[2048..4092]),
            "a reserved byte is not zero",
        );
        wrong
    }
}

/// One pass through the image.
struct Walk<'a> {
    storage: &'a dyn Storage,
    cluster_size: u64,
    file_len: u64,
    superblock: &'a Superblock,
    report: &'a mut Report,
    /// Whether this is the first pass, in which all is told and counted; the others only look for overlaps.
    first: bool,
    /// Start of what is looked at, in bytes.
    window: u64,
    used: Vec<u64>,
    /// Windows in which something lies.
    windows: BTreeSet<u64>,
    seen: HashSet<u64>,
    /// Where the cluster before lay.
    last: Option<u64>,
    counted: u64,
}

impl Walk<'_> {
    fn error(&mut self, what: impl FnOnce() -> String) {
        if self.first {
            self.always(what);
        }
    }

    fn always(&mut self, what: impl FnOnce() -> String) {
        self.report.tell(what);
    }

    /// Notes that a piece of the file is in use. Gives whether it was not yet.
    fn mark(&mut self, offset: u64, len: u64) -> bool {
        if self.first {
            self.windows.extend(offset / WINDOW..=(offset + len - 1) / WINDOW);
        }
        let from = offset.max(self.window);
        let to = (offset + len).min(self.window + WINDOW).min(self.superblock.end);
        let mut fresh = true;
        for page in (from..to).step_by(4096).map(|at| (at - self.window) / PAGE) {
            let Ok(word) = usize::try_from(page / 64) else { continue };
            let bit = 1 << (page % 64);
            fresh &= self.used[word] & bit == 0;
            self.used[word] |= bit;
        }
        fresh
    }

    /// Whether a page of the tree can lie at an offset.
    fn can_be_page(&mut self, offset: u64, len: u64, what: &str) -> bool {
        let end = offset.checked_add(len);
        let fits = offset.is_multiple_of(PAGE)
            && offset >= self.cluster_size
            && end.is_some_and(|end| end <= self.superblock.end && end <= self.file_len);
        if !fits {
            self.error(|| format!("{what} lies at {offset:#x}, which is no place for it"));
        }
        fits
    }

    fn read(&mut self, offset: u64, len: u64, sum: u32, what: &str) -> io::Result<Option<Vec<u8>>> {
        if !self.can_be_page(offset, len, what) {
            return Ok(None);
        }
        for page in (offset..offset + len).step_by(4096) {
            if !self.seen.insert(page) {
                self.error(|| format!("{what} at {offset:#x} is named twice"));
                return Ok(None);
            }
        }
        if !self.mark(offset, len) {
            self.always(|| format!("{what} at {offset:#x} lies where something else does"));
        }
        let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
        self.storage.read_at(&mut bytes, offset)?;
        if crc32c::crc32c(&bytes) != sum {
            self.error(|| format!("the checksum of {what} at {offset:#x} is wrong"));
            return Ok(None);
        }
        if self.first {
            self.report.tree += len;
        }
        Ok(Some(bytes))
    }

    fn tree(&mut self) -> io::Result<()> {
        let entries = self.superblock.root_entries;
        if entries == 0 {
            return Ok(());
        }
        let len = (entries * 16).next_multiple_of(PAGE);
        let (offset, sum) = (self.superblock.root, self.superblock.root_sum);
        let Some(root) = self.read(offset, len, sum, "the root")? else { return Ok(()) };
        for (index, entry) in (0..).zip(root.chunks_exact(16)) {
            let Some((offset, sum)) = self.entry(entry, index < entries, "root", index) else { continue };
            let Some(l1) = self.read(offset, PAGE, sum, "an L1 page")? else { continue };
            for (slot, entry) in (0..).zip(l1.chunks_exact(16)) {
                let first = (index * L1_ENTRIES + slot) * L2_ENTRIES;
                let inside = first < self.superblock.size.div_ceil(self.cluster_size);
                let Some((offset, sum)) = self.entry(entry, inside, "L1", first / L2_ENTRIES) else {
                    continue;
                };
                let Some(l2) = self.read(offset, PAGE, sum, "an L2 page")? else { continue };
                for (cluster, entry) in (first..).zip(l2.chunks_exact(8)) {
                    self.cluster(cluster, entry)?;
                }
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: &[u8], inside: bool, what: &str, index: u64) -> Option<(u64, u32)> {
        if is_zero(entry) {
            return None;
        }
        let offset = number(entry, 0, 8);
        if !inside {
            self.error(|| format!("{what} entry {index} is past the disk's end and names something"));
            return None;
        }
        if number32(entry, 12) != 0 {
            self.error(|| format!("{what} entry {index} has reserved bytes that are not zero"));
        }
        if offset == 0 {
            self.error(|| format!("{what} entry {index} has a checksum of nothing"));
            return None;
        }
        Some((offset, number32(entry, 8)))
    }

    fn cluster(&mut self, cluster: u64, entry: &[u8]) -> io::Result<()> {
        if is_zero(entry) {
            return Ok(());
        }
        let start = cluster.saturating_mul(self.cluster_size);
        if start >= self.superblock.size {
            self.error(|| format!("cluster {cluster} is past the disk's end and not absent"));
            return Ok(());
        }
        let (place, data, zeroes) = (number(entry, 0, 4), number16(entry, 4), number16(entry, 6));
        if data & zeroes != 0 {
            self.error(|| format!("cluster {cluster} has sub-clusters that hold data and are zero"));
        }
        let sub = self.cluster_size / 16;
        if self.first {
            self.report.data += u64::from(data.count_ones()) * sub;
            self.report.zeroes += u64::from(zeroes.count_ones()) * sub;
        }
        if place == 0 {
            if data != 0 {
                self.error(|| format!("cluster {cluster} has data but no place"));
            }
            return Ok(());
        }
        let offset = place * self.cluster_size;
        if offset >= self.superblock.end {
            self.error(|| format!("cluster {cluster} lies at {offset:#x}, which is no place for it"));
            return Ok(());
        }
        if !self.mark(offset, self.cluster_size) {
            self.always(|| format!("cluster {cluster} lies at {offset:#x}, where something else does"));
        }
        if self.first {
            self.counted += 1;
            if self.last.is_none_or(|last| last + self.cluster_size != offset) {
                self.report.fragments += 1;
            }
            self.last = Some(offset);
            // The sub-cluster that the disk ends in.
            let len = self.superblock.size - start;
            if len < self.cluster_size && !len.is_multiple_of(sub) && data >> (len / sub) & 1 == 1 {
                let mut rest = vec![0; usize::try_from(sub - len % sub).map_err(io::Error::other)?];
                if offset + self.cluster_size <= self.file_len {
                    self.storage.read_at(&mut rest, offset + len)?;
                }
                if !is_zero(&rest) {
                    self.error(|| format!("cluster {cluster} holds something past the disk's end"));
                }
            }
        }
        Ok(())
    }

    /// Reads the free list's page.
    fn free_list(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let superblock = self.superblock;
        if superblock.free_entries == 0 {
            return Ok(Vec::new());
        }
        let Some(page) = self.read(superblock.free, PAGE, superblock.free_sum, "the free list")? else {
            return Ok(Vec::new());
        };
        let mut list = Vec::new();
        let mut after = None;
        for (index, entry) in (0..).zip(page.chunks_exact(16)) {
            if index >= superblock.free_entries {
                if !is_zero(entry) {
                    self.error(|| "free list: there is something behind its end".to_owned());
                    break;
                }
                continue;
            }
            let (offset, len) = (number(entry, 0, 8), number(entry, 8, 8));
            let end = offset.checked_add(len).filter(|&end| end <= superblock.end);
            let Some(end) = end
                .filter(|_| offset % PAGE == 0 && len % PAGE == 0 && len > 0 && offset >= self.cluster_size)
            else {
                self.error(|| {
                    format!("free list entry {index}: {len:#x} bytes at {offset:#x} cannot be free")
                });
                continue;
            };
            if after.is_some_and(|after| offset <= after) {
                self.error(|| format!("free list entry {index} is not behind the one before"));
            }
            after = Some(end);
            list.push((offset, len));
        }
        Ok(list)
    }
}

/// Calls `run` with start and length in pages of each stretch of clear bits among the first `pages`.
fn clear_runs(used: &[u64], pages: u64, mut run: impl FnMut(u64, u64)) {
    let mut start = None;
    for (first, &word) in (0..).step_by(64).zip(used) {
        if first >= pages {
            break;
        }
        // Most words are all of one kind.
        if word == u64::MAX || (word == 0 && first + 64 <= pages) {
            match (word, start) {
                (0, None) => start = Some(first),
                (0, Some(_)) | (_, None) => {}
                (_, Some(from)) => {
                    run(from, first - from);
                    start = None;
                }
            }
            continue;
        }
        for page in first..(first + 64).min(pages) {
            match (word >> (page - first) & 1, start) {
                (0, None) => start = Some(page),
                (1, Some(from)) => {
                    run(from, page - from);
                    start = None;
                }
                _ => {}
            }
        }
    }
    if let Some(from) = start {
        run(from, pages - from);
    }
}

/// Checks the image at `path`, which nobody else may change meanwhile. What it lies on is not looked at.
///
/// With `repair` its leaked space is given back: made free space of the image and a hole in the file, or cut off at the end.
/// That is a new state of the image: what lies on it has to be told (`vmm image rebase --accept`). A wrong count and a
/// wrong free list are made right as well; everything else is left as it is, and nothing at all is changed in an image whose
/// tree has errors, since what seems leaked may be what a damaged page named. Of leaks in more than 256 pieces the smallest
/// stay, and so does a single page if there is no other to note it in.
///
/// # Errors
///
/// [`Error`] where the file does not open or is no thin image. Whatever is wrong with one is told by the report.
pub fn check(path: &Path, repair: bool) -> Result<Report, Error> {
    let options = OpenOptions { writable: repair, format: Some(Format::Thin), ..OpenOptions::default() };
    let (opened, _lock) = Opened::open(path, &options)?;
    let storage = FileStorage::new(opened.file, None, false);
    let path = path.to_owned();
    check_storage(&storage, repair).map_err(|failure| match failure {
        Failure::Corrupt(what) => Error::Corrupt { path, format: Format::Thin, what },
        Failure::Unsupported(what) => Error::Unsupported { path, what },
        Failure::Io(source) => Error::Io { path, what: "check", source },
    })
}

/// Why an image could not be checked at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// It is none.
    #[error("{0}")]
    Corrupt(String),
    /// It is not one of this version.
    #[error("it needs {0}")]
    Unsupported(String),
    /// It does not read.
    #[error("it does not read")]
    Io(#[from] io::Error),
}

/// Bits of the cluster size.
fn header(storage: &dyn Storage, report: &mut Report) -> Result<u32, Failure> {
    let mut page = [0; 4096];
    storage.read_at(&mut page, 0)?;
    if &page[..8] != b"VMM-THIN" {
        return Err(Failure::Corrupt("it does not begin with VMM-THIN".to_owned()));
    }
    if !sealed(&page) {
        return Err(Failure::Corrupt("the header's checksum is wrong".to_owned()));
    }
    let version = number(&page, 8, 4);
    if version != 1 {
        return Err(Failure::Unsupported(format!("version {version} of the thin format")));
    }
    let features = number(&page, 16, 8);
    if features != 0 {
        return Err(Failure::Unsupported(format!("features {features:#x} of the thin format")));
    }
    let bits = u32::from(page[32]);
    if !(16..=21).contains(&bits) {
        return Err(Failure::Corrupt(format!(
            "the header has {bits} for the bits of the cluster size, not 16 to 21"
        )));
    }
    if !is_zero(&page[12..16]) || !is_zero(&page[33..40]) || !is_zero(&page[56..4092]) {
        report.tell(|| "header: a reserved byte is not zero".to_owned());
    }
    Ok(bits)
}

/// The superblock that counts.
fn superblock(storage: &dyn Storage) -> Result<Superblock, Failure> {
    let mut best: Option<Superblock> = None;
    for slot in [0, 1] {
        let mut page = [0; 4096];
        storage.read_at(&mut page, PAGE * (1 + slot))?;
        let found = Superblock::parse(page);
        let valid = &page[..8] == b"VMMTSUPR" && sealed(&page) && found.generation % 2 == slot;
        if valid && best.as_ref().is_none_or(|best| best.generation < found.generation) {
            best = Some(found);
        }
    }
    best.ok_or_else(|| Failure::Corrupt("neither of its superblocks is valid".to_owned()))
}

/// Checks what is in `storage`, and with `repair` gives back what has leaked.
///
/// A tree with errors is left alone: what seems leaked may be what a damaged page named. Else the free list is made anew from
/// what the tree leaves, if anything has leaked or the list or the count was wrong.
pub(crate) fn check_storage(storage: &dyn Storage, repair: bool) -> Result<Report, Failure> {
    let file_len = storage.len()?;
    if file_len < 3 * PAGE {
        return Err(Failure::Corrupt(format!(
            "it has {file_len} bytes, too few for a header and superblocks"
        )));
    }
    let mut report = Report::default();
    let cluster_size = 1 << header(storage, &mut report)?;
    let superblock = superblock(storage)?;
    report.generation = superblock.generation;
    report.size = superblock.size;
    report.cluster_size = cluster_size;
    report.end = superblock.end;
    let wrong = superblock.wrong(cluster_size);
    if !wrong.is_empty() {
        wrong.into_iter().for_each(|what| report.tell(|| what));
        return Ok(report);
    }

    if file_len < superblock.end {
        report.tell(|| format!("the file has {file_len} bytes, and is in use up to {}", superblock.end));
    }
    let len = superblock.end.min(WINDOW).div_ceil(64 * PAGE);
    let used = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    let mut walk = Walk {
        storage,
        cluster_size,
        file_len,
        superblock: &superblock,
        report: &mut report,
        first: true,
        window: 0,
        used,
        windows: BTreeSet::new(),
        seen: HashSet::new(),
        last: None,
        counted: 0,
    };
    let mut unused = Unused::default();
    let mut tree_errors = walk.report.error_count;
    let mut list_errors = 0;
    let mut window = Some(0);
    while let Some(at) = window {
        walk.window = at;
        let before = walk.report.error_count;
        if at == 0 {
            // The superblocks' cluster is nobody's to use.
            walk.mark(0, cluster_size);
        }
        walk.tree()?;
        tree_errors += walk.report.error_count - before;

        let pages = (superblock.end - at).min(WINDOW) / PAGE;
        clear_runs(&walk.used, pages, |start, len| unused.add(at + start * PAGE, len * PAGE));

        let before = walk.report.error_count;
        let list = walk.free_list()?;
        for &(offset, len) in &list {
            if !walk.mark(offset, len) {
                walk.always(|| {
                    format!("the free list names {len:#x} bytes at {offset:#x}, where something lies")
                });
            }
        }
        list_errors += walk.report.error_count - before;
        if walk.first {
            walk.report.free = list.iter().map(|entry| entry.1).fold(0, u64::saturating_add);
        }
        let report = &mut *walk.report;
        clear_runs(&walk.used, pages, |_, len| {
            report.leaked += len * PAGE;
            report.leaks += 1;
        });

        walk.first = false;
        walk.seen.clear();
        walk.last = None;
        walk.used.fill(0);
        // Windows in which nothing lies are not gone through.
        let mut next = at + WINDOW;
        while next < superblock.end && !walk.windows.contains(&(next / WINDOW)) {
            let len = WINDOW.min(superblock.end - next);
            unused.add(next, len);
            walk.report.leaked += len;
            walk.report.leaks += 1;
            next += WINDOW;
        }
        window = Some(next).filter(|&next| next < superblock.end);
    }
    let counted = walk.counted;
    report.clusters = counted;
    report.beyond = file_len.saturating_sub(superblock.end);
    let count = counted != superblock.clusters;
    if count {
        report.tell(|| {
            let noted = superblock.clusters;
            format!("the superblock says that {noted} clusters have a place, and {counted} have")
        });
    }
    let free_list = list_errors > 0;
    if repair && tree_errors == 0 && (count || free_list || report.leaked > 0 || report.beyond > 0) {
        let mut repaired = Repaired { given_back: 0, count, free_list };
        repaired.given_back = commit(storage, &superblock, &report, unused, repaired)?;
        report.repaired = Some(repaired);
    }
    Ok(report)
}

/// Commits what the check found. Gives how many bytes were given back.
fn commit(
    storage: &dyn Storage,
    superblock: &Superblock,
    report: &Report,
    mut unused: Unused,
    what: Repaired,
) -> io::Result<u64> {
    // Of the next superblock a power loss may have left a part, which a part of the one to be written could make whole.
    let slot = PAGE * (1 + (superblock.generation + 1) % 2);
    let mut other = [0; 4096];
    storage.read_at(&mut other, slot)?;
    if !sealed(&other) && !is_zero(&other[..512]) {
        storage.write_at(&[0; 512], slot)?;
    }
    // The superblock that counts may not be stable yet: what only the other one names is still needed until it is.
    storage.sync()?;
    let mut end = superblock.end;
    let mut given_back = report.beyond;
    let mut pieces = Vec::new();
    if what.count || what.free_list || report.leaked > 0 {
        let mut page = superblock.page;
        let mut put = |at: usize, number: &[u8]| page[at..at + number.len()].copy_from_slice(number);
        put(8, &(superblock.generation + 1).to_le_bytes());
        put(72, &report.clusters.to_le_bytes());
        if what.free_list || report.leaked > 0 {
            let total = unused.total;
            // Clusters at the very end need no list.
            end = unused.trim(end, report.cluster_size);
            let list;
            (pieces, list) = unused.into_list(superblock.free);
            let listed: u64 = pieces.iter().map(|piece| piece.1).sum();
            let kept = list.map_or(0, |_| PAGE);
            let left = total.saturating_sub(listed + kept + (superblock.end - end));
            given_back += report.leaked.saturating_sub(left);
            let list = list.filter(|_| !pieces.is_empty());
            let mut bytes = [0; 4096];
            for (entry, piece) in bytes.chunks_exact_mut(16).zip(&pieces) {
                entry[..8].copy_from_slice(&piece.0.to_le_bytes());
                entry[8..].copy_from_slice(&piece.1.to_le_bytes());
            }
            if let Some(list) = list {
                storage.write_at(&bytes, list)?;
                storage.sync()?;
                put(56, &list.to_le_bytes());
                put(64, &u32::try_from(pieces.len()).map_err(io::Error::other)?.to_le_bytes());
                put(68, &crc32c::crc32c(&bytes).to_le_bytes());
            } else {
                put(56, &[0; 16]);
                pieces.clear();
            }
            put(32, &end.to_le_bytes());
        }
        let sum = crc32c::crc32c(&page[..4092]);
        page[4092..].copy_from_slice(&sum.to_le_bytes());
        storage.write_at(&page, slot)?;
        storage.sync()?;
    }
    for (offset, len) in pieces {
        storage.punch(offset, len)?;
    }
    if storage.len()? > end {
        storage.set_len(end)?;
    }
    Ok(given_back)
}

/// The largest pieces of the file that the tree does not use.
#[derive(Debug, Default)]
struct Unused {
    /// By length.
    largest: BTreeSet<(u64, u64)>,
    /// The one that was added last: the next may go on where it ends.
    last: Option<(u64, u64)>,
    total: u64,
}

impl Unused {
    /// Adds a piece behind all others.
    fn add(&mut self, offset: u64, len: u64) {
        self.total += len;
        match &mut self.last {
            Some(last) if last.0 + last.1 == offset => last.1 += len,
            _ => {
                self.settle();
                self.last = Some((offset, len));
            }
        }
    }

    fn settle(&mut self) {
        if let Some((offset, len)) = self.last.take() {
            self.largest.insert((len, offset));
            if self.largest.len() > MOST_FREE {
                self.largest.pop_first();
            }
        }
    }

    /// Takes whole clusters at the end away, after which the file ends where this says.
    fn trim(&mut self, end: u64, cluster_size: u64) -> u64 {
        match self.last.take() {
            Some((offset, len)) if offset + len == end => {
                let end = offset.next_multiple_of(cluster_size).min(end);
                if end > offset {
                    self.last = Some((offset, end - offset));
                }
                end
            }
            last => {
                self.last = last;
                end
            }
        }
    }

    /// The pieces by offset, and a page that was taken from them for their list; it is not `taken`.
    fn into_list(mut self, taken: u64) -> (Vec<(u64, u64)>, Option<u64>) {
        self.settle();
        // The smallest that has such a page gives it.
        let giver = self.largest.iter().copied().find(|&(len, offset)| offset != taken || len > PAGE);
        let mut page = None;
        if let Some((len, offset)) = giver {
            self.largest.remove(&(len, offset));
            if offset == taken {
                page = Some(offset + len - PAGE);
                self.largest.insert((len - PAGE, offset));
            } else {
                page = Some(offset);
                if len > PAGE {
                    self.largest.insert((len - PAGE, offset + PAGE));
                }
            }
        }
        let mut pieces: Vec<_> = self.largest.iter().map(|&(len, offset)| (offset, len)).collect();
        pieces.sort_unstable();
        (pieces, page)
    }
}
