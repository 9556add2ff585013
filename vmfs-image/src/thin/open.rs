//! Making and opening.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex};

use super::Thin;
use super::commit::Committer;
use super::layout::{
    self, Backing, Bad, CLUSTER_BITS, FreeExtent, Header, ListRef, MAX_PATH, PAGE, PAGE_U64, Superblock,
};
use super::map::Tree;
use super::space::{Epochs, InFlight, Space};
use super::state::State;
use super::storage::{FileStorage, Storage};
use crate::image::{Error, Format, Identity, Image, MAX_SIZE, SECTOR};
use crate::lock::Lock;
use crate::open::{Cache, OpenOptions, Opened, set_direct};

/// The smallest `max_size`, in clusters: some data, and room for the tree.
const LEAST_CLUSTERS: u64 = 8;

/// What a new image is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Create {
    /// Size as a disk in bytes: a multiple of 512 up to 1 PiB.
    pub size: u64,
    /// The cluster size is 2 to this power: 16 to 21.
    pub cluster_bits: u8,
    /// The most that its file may grow to, in bytes.
    pub max_size: Option<u64>,
    /// What it lies on: path from its directory, kind and identity.
    pub backing: Option<(PathBuf, Format, Identity)>,
}

impl Create {
    /// An empty image of `size` bytes, with clusters of 64 KiB.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size, cluster_bits: 16, max_size: None, backing: None }
    }

    /// Its first three pages.
    pub(super) fn encode(&self) -> Result<Vec<u8>, String> {
        let size = self.size;
        if !size.is_multiple_of(SECTOR) || !(SECTOR..=MAX_SIZE).contains(&size) {
            return Err(format!(
                "{size} bytes is no size of a disk; right is a multiple of {SECTOR} up to {MAX_SIZE}"
            ));
        }
        if !CLUSTER_BITS.contains(&self.cluster_bits) {
            return Err("a cluster has from 64 KiB (2 to the power of 16) to 2 MiB (21)".to_owned());
        }
        let cluster = 1 << self.cluster_bits;
        let least = least(cluster, size);
        if self.max_size.is_some_and(|max| max < least) {
            return Err(format!("max_size has to be {least} bytes at least for a disk of that size"));
        }
        let backing = match &self.backing {
            None => None,
            Some((path, format, identity)) => {
                check_path(path)?;
                let identity = Identity { size: identity.size / SECTOR * SECTOR, ..*identity };
                let visible = size.min(identity.size);
                Some(Backing { path: path.clone(), format: *format, identity, visible })
            }
        };
        let header = Header { cluster_bits: self.cluster_bits, compatible: 0, uuid: uuid()? };
        let block = Superblock {
            generation: 0,
            size,
            max_size: self.max_size.unwrap_or(0),
            end: cluster,
            root: ListRef::default(),
            free: ListRef::default(),
            mapped: 0,
            backing,
        };
        let mut bytes = header.encode().to_vec();
        bytes.extend(block.encode());
        bytes.extend([0; PAGE]);
        Ok(bytes)
    }
}

/// The smallest `max_size` of a disk of `size` bytes, in bytes.
pub(super) fn least(cluster: u64, size: u64) -> u64 {
    // The root of one page is among the clusters; of a larger one there are two, that in use and the next.
    let entries = size.div_ceil(cluster).div_ceil(layout::ROOT_SPAN);
    let roots = 2 * (layout::list_bytes(entries) - PAGE_U64);
    cluster * LEAST_CLUSTERS + roots.next_multiple_of(cluster)
}

/// A path that can be noted.
pub(super) fn check_path(path: &Path) -> Result<(), String> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() || bytes.len() > MAX_PATH || bytes.contains(&0) {
        return Err(format!("the path of a backing has 1 to {MAX_PATH} bytes, none of them zero"));
    }
    Ok(())
}

/// A new UUID: RFC 9562, version 4.
fn uuid() -> Result<[u8; 16], String> {
    let mut uuid = [0; 16];
    // SAFETY: the call fills at most `uuid.len()` bytes.
    let got = unsafe { libc::getrandom(uuid.as_mut_ptr().cast(), uuid.len(), 0) };
    if usize::try_from(got) != Ok(uuid.len()) {
        return Err(format!("the system has no random numbers: {}", io::Error::last_os_error()));
    }
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    Ok(uuid)
}

/// Makes an image at `path`, where nothing may be yet. It is stable when this returns.
///
/// # Errors
///
/// [`Error::Invalid`] for what cannot be, [`Error::Io`] for what the system refuses; then there is no file.
pub fn create(path: &Path, create: &Create) -> Result<(), Error> {
    let bytes = create.encode().map_err(|what| Error::Invalid { path: path.to_owned(), what })?;
    let failed = |what| move |source| Error::Io { path: path.to_owned(), what, source };
    let file = File::create_new(path).map_err(failed("create"))?;
    let written = fill(&file, &bytes, 1 << create.cluster_bits).and_then(|()| {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    });
    written.map_err(failed("write")).inspect_err(|_| {
        let _ = std::fs::remove_file(path);
    })
}

fn fill(file: &File, bytes: &[u8], len: u64) -> io::Result<()> {
    write_start(file, bytes, len)?;
    file.sync_all()
}

fn write_start(mut file: &File, bytes: &[u8], len: u64) -> io::Result<()> {
    file.write_all(bytes)?;
    file.set_len(len)
}

/// Makes an image in an empty file that is for this process alone, and need not be stable. `path` is for messages.
pub(crate) fn create_in(file: &File, path: &Path, create: &Create) -> Result<(), Error> {
    let bytes = create.encode().map_err(|what| Error::Invalid { path: path.to_owned(), what })?;
    let written = write_start(file, &bytes, 1 << create.cluster_bits);
    written.map_err(|source| Error::Io { path: path.to_owned(), what: "write an overlay of", source })
}

/// What the image at `path` notes of its backing. Nothing is locked.
///
/// # Errors
///
/// [`Error`].
pub fn peek_backing(path: &Path) -> Result<Option<Backing>, Error> {
    let opened = Opened::without_lock(path, false)?;
    let storage = FileStorage::new(opened.file, None, true);
    Ok(read_super(&storage, path)?.1.backing)
}

/// Size as a disk of the image at `path`, in bytes. Nothing is locked.
///
/// # Errors
///
/// [`Error`].
pub fn peek_size(path: &Path) -> Result<u64, Error> {
    let opened = Opened::without_lock(path, false)?;
    let storage = FileStorage::new(opened.file, None, true);
    Ok(read_super(&storage, path)?.1.size)
}

/// Size of a cluster of the image at `path`, and the most that it may take of its file system, in bytes. Nothing is locked.
///
/// # Errors
///
/// [`Error`].
pub fn peek_limits(path: &Path) -> Result<(u64, Option<u64>), Error> {
    let opened = Opened::without_lock(path, false)?;
    let storage = FileStorage::new(opened.file, None, true);
    let (header, block) = read_super(&storage, path)?;
    Ok((1 << header.cluster_bits, (block.max_size > 0).then_some(block.max_size)))
}

/// Notes another backing in the image at `path`, which nobody has open; the one noted so far need not be there, and nothing
/// is compared. `None` says that it needs none any more.
///
/// # Errors
///
/// [`Error`].
pub fn set_backing(path: &Path, backing: Option<(&Path, Format, Identity)>) -> Result<(), Error> {
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    let (opened, lock) = Opened::open(path, &options)?;
    let storage = Arc::new(FileStorage::new(opened.file, None, false));
    let thin = Thin::assemble(storage, path, true, None, Some(lock.into()))?;
    thin.set_backing(backing).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidInput => Error::Invalid { path: path.to_owned(), what: source.to_string() },
        _ => Error::Io { path: path.to_owned(), what: "note the backing of", source },
    })
}

/// Opens an image in memory, without comparing `backing` with what the image notes.
///
/// # Errors
///
/// [`Error`].
#[cfg(any(test, feature = "fuzzing"))]
pub fn open_memory(
    memory: &super::memory::Memory,
    writable: bool,
    backing: Option<Arc<dyn Image>>,
) -> Result<Arc<dyn Image>, Error> {
    let storage = Arc::new(memory.clone());
    Ok(Arc::new(Thin::assemble(storage, Path::new("memory"), writable, backing, None)?))
}

fn corrupt(path: &Path, bad: Bad) -> Error {
    match bad {
        Bad::Newer(what) => Error::Unsupported { path: path.to_owned(), what },
        bad => wrong(path, bad.to_string()),
    }
}

fn wrong(path: &Path, what: String) -> Error {
    Error::Corrupt { path: path.to_owned(), format: Format::Thin, what }
}

/// Reads a structure of `len` bytes.
fn read(storage: &dyn Storage, path: &Path, name: &str, offset: u64, len: u64) -> Result<Vec<u8>, Error> {
    let len = usize::try_from(len).map_err(|_| wrong(path, format!("its {name} is too large")))?;
    let mut bytes = vec![0; len];
    storage.read_at(&mut bytes, offset).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => wrong(path, format!("the file ends before its {name}")),
        _ => Error::Io { path: path.to_owned(), what: "read", source },
    })?;
    Ok(bytes)
}

fn read_page(storage: &dyn Storage, path: &Path, name: &str, offset: u64) -> Result<[u8; PAGE], Error> {
    let mut page = [0; PAGE];
    page.copy_from_slice(&read(storage, path, name, offset, PAGE_U64)?);
    Ok(page)
}

/// The header and the superblock that counts.
pub(super) fn read_super(storage: &dyn Storage, path: &Path) -> Result<(Header, Superblock), Error> {
    let page = read_page(storage, path, "header", 0)?;
    let header = Header::decode(&page).map_err(|bad| corrupt(path, bad))?;
    let mut newest: Option<Superblock> = None;
    let mut damaged: Option<(u64, Bad)> = None;
    for slot in [0, 1] {
        let page = read_page(storage, path, "superblocks", PAGE_U64 * (1 + slot))?;
        match Superblock::decode(&page, &header, slot) {
            Ok(block) => {
                if newest.as_ref().is_none_or(|newest| newest.generation < block.generation) {
                    newest = Some(block);
                }
            }
            // Not written yet, or torn by a power loss.
            Err(Bad::Magic(_) | Bad::Checksum { .. } | Bad::Slot(_)) => {}
            Err(bad) => {
                let generation = layout::generation(&page);
                if damaged.as_ref().is_none_or(|damaged| damaged.0 < generation) {
                    damaged = Some((generation, bad));
                }
            }
        }
    }
    // Of the one that does not count it does not matter.
    if let Some((generation, bad)) = damaged
        && newest.as_ref().is_none_or(|newest| newest.generation < generation)
    {
        return Err(corrupt(path, bad));
    }
    let block = newest.ok_or_else(|| wrong(path, "neither of its superblocks is sound".to_owned()))?;
    Ok((header, block))
}

/// Makes sure that what a power loss has left of the superblock behind the one that counts is never made whole by a part of
/// the next one in its place: what it names will be used for other things. Stable with the next sync.
fn wipe_torn(storage: &dyn Storage, path: &Path, header: &Header, block: &Superblock) -> Result<(), Error> {
    let generation = block.generation.wrapping_add(1);
    let offset = layout::super_offset(generation);
    let page = read_page(storage, path, "superblocks", offset)?;
    let sector = [0; 512];
    if page.starts_with(&sector) || Superblock::decode(&page, header, generation % 2).is_ok() {
        return Ok(());
    }
    storage.write_at(&sector, offset).map_err(|source| Error::Io {
        path: path.to_owned(),
        what: "write to",
        source,
    })
}

/// Says how a backing differs from what is noted of it.
fn compare(noted: &Backing, format: Format, found: Identity) -> Result<(), String> {
    let name = noted.path.display();
    if format != noted.format {
        return Err(format!("{name} is a {format} image, and was a {} one", noted.format));
    }
    if noted.identity.state == Identity::ANY_STATE
        && (format != Format::Thin || found.id == noted.identity.id)
    {
        return Ok(());
    }
    if found.size / SECTOR * SECTOR != noted.identity.size {
        return Err(format!("{name} has {} bytes, and had {}", found.size, noted.identity.size));
    }
    if found.id != noted.identity.id {
        return Err(format!("{name} is another image than the one that this one was made on"));
    }
    if found.state != noted.identity.state {
        return Err(format!(
            "{name} was changed since this image was made on it, or was copied without its time of change; if it holds what \
             it held then, `vmm image rebase --accept` takes it as it is"
        ));
    }
    Ok(())
}

impl Thin {
    /// Opens and locks the image at `path`. `backing` is what it lies on, as [`peek_backing`] tells; it is ignored if the image
    /// lies on nothing.
    ///
    /// # Errors
    ///
    /// [`Error`]; [`Error::Backing`] where `backing` is not what the image notes.
    pub fn open(path: &Path, options: &OpenOptions, backing: Option<Arc<dyn Image>>) -> Result<Self, Error> {
        let (opened, lock) = Opened::open(path, options)?;
        if opened.is_device {
            let what = "a thin image lies in a file, not on a device".to_owned();
            return Err(Error::Invalid { path: path.to_owned(), what });
        }
        let (mut block_size, mut alignment) = (512, 1);
        let cached = if options.cache == Cache::None {
            // The open file itself, wherever its name is by now.
            let name = format!("/proc/self/fd/{}", opened.file.as_raw_fd());
            let cached = File::options().read(true).write(options.writable).open(name);
            let failed = |source| Error::Open { path: path.to_owned(), writable: options.writable, source };
            let direct = set_direct(&opened.file, path)?;
            (block_size, alignment) = (direct.file, direct.memory);
            Some(cached.map_err(failed)?)
        } else {
            None
        };
        let never_sync = options.cache == Cache::Unsafe;
        let storage = Arc::new(FileStorage::new(opened.file, cached, never_sync));
        let mut thin = Self::with_backing(storage, path, options.writable, backing, Some(lock.into()))?;
        thin.unfrozen = AtomicBool::new(options.writable && !options.frozen);
        thin.block_size = block_size;
        thin.memory_alignment = alignment.max(thin.memory_alignment);
        thin.no_flush = never_sync;
        Ok(thin)
    }

    /// Opens an image in `storage`, which `path` is the name of.
    #[cfg(test)]
    pub(crate) fn open_on(
        storage: Box<dyn Storage>,
        path: &Path,
        writable: bool,
        backing: Option<Arc<dyn Image>>,
    ) -> Result<Self, Error> {
        Self::with_backing(storage.into(), path, writable, backing, None)
    }

    pub(super) fn with_backing(
        storage: Arc<dyn Storage>,
        path: &Path,
        writable: bool,
        backing: Option<Arc<dyn Image>>,
        lock: Option<Arc<dyn Lock>>,
    ) -> Result<Self, Error> {
        let thin = Self::assemble(storage, path, writable, backing, lock)?;
        let wrong = |what| Error::Backing { path: path.to_owned(), what };
        match (&thin.noted_backing(), &thin.backing) {
            (None, _) => {}
            (Some(noted), None) => {
                return Err(wrong(format!("{} was not opened", noted.path.display())));
            }
            (Some(noted), Some(given)) => {
                let found = given.identity().map_err(|source| Error::Io {
                    path: given.path().to_owned(),
                    what: "identify",
                    source,
                })?;
                compare(noted, given.format(), found).map_err(wrong)?;
            }
        }
        Ok(thin)
    }

    /// Opens without looking at what the backing is.
    fn assemble(
        storage: Arc<dyn Storage>,
        path: &Path,
        writable: bool,
        backing: Option<Arc<dyn Image>>,
        lock: Option<Arc<dyn Lock>>,
    ) -> Result<Self, Error> {
        let io = |what| move |source| Error::Io { path: path.to_owned(), what, source };
        if writable {
            // A superblock that a process wrote and did not live to sync may count only once it is stable: what the one
            // before names will be used for other things.
            storage.sync().map_err(io("sync"))?;
        }
        let (header, block) = read_super(&*storage, path)?;
        let (bits, end) = (header.cluster_bits, block.end);
        let mut file_len = storage.len().map_err(io("examine"))?;
        if file_len < end {
            return Err(wrong(path, format!("it has {file_len} bytes instead of {end}: it was cut off")));
        }
        if writable {
            wipe_torn(&*storage, path, &header, &block)?;
        }
        let entries = layout::root_entries(block.size, bits);
        let count = usize::try_from(entries).map_err(|_| wrong(path, "its root is too large".to_owned()))?;
        let root = if block.root.entries == 0 {
            vec![layout::PageRef::default(); count]
        } else {
            let bytes = read(&*storage, path, "root", block.root.offset, layout::list_bytes(entries))?;
            layout::verify("root", &bytes, block.root.crc)
                .and_then(|()| layout::decode_refs("root", &bytes, count, bits, end))
                .map_err(|bad| corrupt(path, bad))?
        };
        let mut space = Space::new(1 << bits, end, file_len);
        if block.free.entries != 0 {
            let page = read_page(&*storage, path, "free list", block.free.offset)?;
            let count = usize::try_from(block.free.entries).unwrap_or(usize::MAX);
            layout::verify("free list", &page, block.free.crc)
                .and_then(|()| layout::decode_free(&page, count, bits, end))
                .map_err(|bad| corrupt(path, bad))?
                .into_iter()
                .for_each(|extent: FreeExtent| space.give(extent));
        }
        if writable && file_len > end {
            // What was taken since the last commit is free again.
            storage.set_len(end).map_err(io("cut the unused end off"))?;
            file_len = end;
        }
        space.file_len = file_len;
        space.max = Space::limit(1 << bits, block.max_size);
        let visible = match (&block.backing, &backing) {
            (Some(noted), Some(given)) => noted.visible.min(block.size).min(given.size()),
            _ => 0,
        };
        // One that it does not name any more is nothing to it.
        let backing = backing.filter(|_| block.backing.is_some());
        let memory_alignment = backing.as_ref().map_or(1, |backing| backing.memory_alignment());
        let files = storage.file().into_iter().cloned();
        let below = backing.iter().flat_map(|backing| backing.files().iter().cloned());
        let files = files.chain(below).collect();
        Ok(Self {
            path: path.to_owned(),
            writable,
            unfrozen: AtomicBool::new(writable),
            no_flush: false,
            block_size: 512,
            memory_alignment,
            bits,
            uuid: header.uuid,
            files,
            backing,
            size: AtomicU64::new(block.size),
            state: Mutex::new(State {
                bits,
                tree: Tree::new(root),
                space,
                epochs: Epochs::default(),
                freed: Vec::new(),
                busy: HashMap::new(),
                fresh: Vec::new(),
                fresh_unused: Vec::new(),
                generation: block.generation,
                size: block.size,
                max_size: block.max_size,
                mapped: block.mapped,
                backing: block.backing,
                visible,
                marked: false,
                super_dirty: false,
                committing: false,
                root: block.root,
                free: block.free,
                spare_root: None,
                spare_free: None,
            }),
            storage,
            changed: Condvar::new(),
            in_flight: InFlight::default(),
            committer: Committer::default(),
            growing: Mutex::new(()),
            settings: Mutex::new(()),
            lock,
        })
    }
}
