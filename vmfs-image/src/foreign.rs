//! Images of others: qcow2 (QEMU), read and written, and VMDK (VMware) with flat extents, read. The formats are those of the
//! `imago` library; what is here makes them images like ours.
//!
//! ```text
//!   Foreign ── RwLock ─▶ imago (qcow2, VMDK) ─▶ Disk ─▶ order ─▶ file      see disk.rs, order.rs
//!      │                                         │
//!      └── backing ◀──────── reads, copy on write┘
//! ```
//!
//! # Who else is opened
//!
//! What an image names is the choice of whoever made it, and reading it gives its bytes to a guest. So a backing or an extent
//! is only opened where it lies in the directory of the image, or below, by a relative path without `..`; as a regular file;
//! to be read; and a backing as what its image says that it is, never as what its bytes look like.
//!
//! # Threads
//!
//! Reading, and writing to clusters that there are, is done by any number of threads at once. Whoever gives or takes space
//! is alone: the library lets nobody look up where data lies meanwhile, and `order` relies on it.
//!
//! # What survives
//!
//! After a flush, everything done before. Of what was done since, a crash of the process may take back any write for which
//! there was no space before: where it went is kept in memory until the next flush.

mod disk;
mod order;
mod qcow2;
#[cfg(test)]
mod tests;
mod vmdk;

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::UNIX_EPOCH;

use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{DenyImplicitOpenGate, StorageOpenOptions};
use imago::{FormatAccess, FormatCreateBuilder, FormatDriverBuilder, ShallowMapping, StorageExt};
use vm_memory::VolatileSlice;

use self::disk::{Disk, Plain};
use self::order::Order;
use self::qcow2::Bad;
use crate::flat;
use crate::image::{Error, Format, Identity, Image, Info, MAX_DEPTH, MAX_SIZE, Run, RunKind, SECTOR};
use crate::lock::{Lock, Mode};
use crate::open::{self, Cache, OpenOptions, Opened};
use crate::overlay;
use crate::transfer;

/// Cluster size of a new qcow2 image where no other is wanted, in bytes: QEMU's.
pub const CLUSTER: u64 = 64 << 10;
/// Pieces of one run, or of one write, that are looked at before it is taken for ended.
const MOST_PIECES: usize = 4096;

/// An image of another's format.
#[derive(Debug)]
pub struct Foreign {
    path: PathBuf,
    format: Format,
    /// Its own, and those below.
    files: Vec<Arc<File>>,
    /// How many of them are its own.
    own: usize,
    plain: Plain,
    backing: Option<Arc<dyn Image>>,
    about: About,
    size: AtomicU64,
    /// Was opened to be changed.
    writable: bool,
    /// May be changed now.
    unfrozen: AtomicBool,
    /// Something is in memory that belongs into the file.
    dirty: AtomicBool,
    /// The file system refuses to punch holes: it is not asked again.
    no_holes: AtomicBool,
    /// Dropped before the locks: what it has in memory is written then.
    inner: RwLock<Inner>,
    locks: Vec<Box<dyn Lock>>,
}

#[derive(Debug)]
struct Inner {
    image: FormatAccess<Disk>,
    /// It takes writes.
    writable: bool,
    order: Option<Arc<Order>>,
}

/// What does not change.
#[derive(Debug)]
struct About {
    cluster: Option<u64>,
    /// There are clusters that are zero, whatever is below.
    has_zeroes: bool,
    backing: Option<PathBuf>,
    details: Vec<(String, String)>,
}

/// Makes a qcow2 image of `size` bytes, in clusters of `cluster` bytes, where nothing is yet. It is of version 3.
///
/// # Errors
///
/// [`Error::Invalid`] for a size that is none, or that its L1 table would be too large for (32 MiB, as QEMU has it);
/// [`Error::Open`] also where something is already, [`Error::Io`]. Nothing is left behind then.
pub fn create(path: &Path, size: u64, cluster: u64) -> Result<(), Error> {
    flat::check_size(path, size)?;
    let invalid = |what| Error::Invalid { path: path.to_owned(), what };
    if !(512..=2 << 20).contains(&cluster) || !cluster.is_power_of_two() {
        return Err(invalid(format!(
            "a cluster of a qcow2 image has from 512 bytes to 2 MiB, a power of two: not {cluster}"
        )));
    }
    let most = (cluster / 8).saturating_mul(cluster).saturating_mul(qcow2::MAX_L1);
    if size > most {
        return Err(invalid(format!(
            "a qcow2 image with clusters of {cluster} bytes has at most {most} bytes, not {size}; take larger clusters"
        )));
    }
    let file = File::options().read(true).write(true).create_new(true).open(path);
    let file =
        Arc::new(file.map_err(|source| Error::Open { path: path.to_owned(), writable: true, source })?);
    let plain =
        Plain { file, path: path.to_owned(), direct: None, is_device: false, syncs: true, order: None };
    let fill = || {
        let cluster = usize::try_from(cluster).map_err(io::Error::other)?;
        imago::qcow2::Qcow2::<Disk>::create_builder(Disk::file(plain.clone()))
            .size(size)
            .cluster_size(cluster)
            .create()?;
        plain.file.sync_all()?;
        flat::sync_directory(path)
    };
    fill().map_err(|source| {
        let _ = std::fs::remove_file(path);
        Error::Io { path: path.to_owned(), what: "create disk", source }
    })
}

/// The error for a format of which no images are made.
#[must_use]
pub fn not_made(path: &Path, format: Format) -> Error {
    let what = format!(
        "new images of format {format} (flat, thin and qcow2 can be made, and \"qemu-img convert\" makes a {format} image of a \
         flat or qcow2 one)"
    );
    Error::Unsupported { path: path.to_owned(), what }
}

/// Size as a disk in bytes of an image at `path` that somebody else may have, and what it names as its backing.
///
/// # Errors
///
/// [`Error`].
pub fn peek(path: &Path, format: Format) -> Result<(u64, Option<PathBuf>), Error> {
    let opened = Opened::without_lock(path, false)?;
    let plain = plain(path, &opened, &OpenOptions::default())?;
    let peeked = match format {
        Format::Qcow2 => qcow2::Header::read(&plain, opened.len).map(|header| {
            (whole_sectors(path, header.size), header.backing.map(|named| PathBuf::from(named.0)))
        }),
        Format::Vmdk => descriptor(&plain, opened.len)
            .map(|found| (found.extents.iter().map(|extent| extent.len).sum(), None)),
        _ => Err(Bad::Unsupported(format!("images of format {format}"))),
    };
    peeked.map_err(refuse(path, format))
}

impl Foreign {
    /// Opens and locks the image at `path`, which is of `format`, and what it lies on.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn open(path: &Path, format: Format, options: &OpenOptions) -> Result<Self, Error> {
        Self::open_above(path, format, options, &mut Vec::new())
    }

    /// `above` are the images that lie on this one, by device and inode.
    fn open_above(
        path: &Path,
        format: Format,
        options: &OpenOptions,
        above: &mut Vec<(u64, u64)>,
    ) -> Result<Self, Error> {
        let unsupported = |what: &str| Error::Unsupported { path: path.to_owned(), what: what.to_owned() };
        match format {
            Format::Qcow2 => {}
            Format::Vmdk if options.writable => {
                return Err(unsupported(
                    "writing to VMDK images (they are read, and can have a redo log or a thin image on top)",
                ));
            }
            Format::Vmdk => {}
            _ => return Err(unsupported(&format!("images of format {format}"))),
        }
        let (opened, lock) = Opened::open(path, options)?;
        let failed = |source| Error::Io { path: path.to_owned(), what: "examine", source };
        let about = opened.file.metadata().map_err(failed)?;
        let inode = (about.dev(), about.ino());
        let wrong = |what: String| Error::Backing { path: path.to_owned(), what };
        if above.contains(&inode) {
            return Err(wrong("it lies on itself".to_owned()));
        }
        if above.len() == MAX_DEPTH {
            return Err(wrong(format!("the chain is longer than {MAX_DEPTH} images")));
        }
        above.push(inode);
        let plain = plain(path, &opened, options)?;
        match format {
            Format::Qcow2 => Self::qcow2(plain, opened.len, lock, options, above),
            _ => Self::vmdk(plain, opened.len, lock, options),
        }
    }

    fn qcow2(
        plain: Plain,
        len: u64,
        lock: Box<dyn Lock>,
        options: &OpenOptions,
        above: &mut Vec<(u64, u64)>,
    ) -> Result<Self, Error> {
        let path = plain.path.clone();
        let header = qcow2::Header::read(&plain, len).map_err(refuse(&path, Format::Qcow2))?;
        let mut details = vec![("qcow2 version".to_owned(), header.version.to_string())];
        details.push(("refcounts".to_owned(), format!("{} bits", 1 << header.layout.refcount_order)));
        if header.lazy_refcounts {
            details
                .push(("features".to_owned(), "lazy refcounts (not used when it is written to)".to_owned()));
        }
        if header.snapshots > 0 {
            details.push(("internal snapshots".to_owned(), header.snapshots.to_string()));
        }
        let backing = match &header.backing {
            None => None,
            Some((name, format)) => Some(below(&path, name, format.as_deref(), options, above)?),
        };
        let size = whole_sectors(&path, header.size);
        let mut image = Self {
            format: Format::Qcow2,
            files: vec![Arc::clone(&plain.file)],
            own: 1,
            about: About {
                cluster: Some(header.layout.cluster()),
                has_zeroes: header.version >= 3,
                backing: header.backing.map(|backing| PathBuf::from(backing.0)),
                details,
            },
            size: AtomicU64::new(size),
            writable: options.writable,
            unfrozen: AtomicBool::new(options.writable && !options.frozen),
            dirty: AtomicBool::new(false),
            no_holes: AtomicBool::new(false),
            inner: RwLock::new(load(&plain, backing.as_ref(), options.writable && !options.frozen)?),
            locks: vec![lock],
            backing,
            plain,
            path,
        };
        if let Some(backing) = &image.backing {
            image.files.extend(backing.files().iter().map(Arc::clone));
        }
        Ok(image)
    }

    fn vmdk(plain: Plain, len: u64, lock: Box<dyn Lock>, options: &OpenOptions) -> Result<Self, Error> {
        let path = plain.path.clone();
        let refused = refuse(&path, Format::Vmdk);
        let descriptor = descriptor(&plain, len).map_err(&refused)?;
        let mut files = vec![Arc::clone(&plain.file)];
        let mut locks = vec![lock];
        let mut extents = Vec::new();
        for extent in &descriptor.extents {
            let Some((name, offset)) = &extent.file else {
                extents.push(None);
                continue;
            };
            let file =
                beside(&path, name).map_err(|what| refused(Bad::Corrupt(format!("its extent {what}"))))?;
            let (opened, lock) = Opened::open(&file, options)?;
            if offset + extent.len > opened.len {
                return Err(refused(Bad::Corrupt(format!(
                    "its extent {} ends at byte {}, and has {} bytes",
                    file.display(),
                    offset + extent.len,
                    opened.len
                ))));
            }
            locks.push(lock);
            files.push(Arc::clone(&opened.file));
            extents.push(Some(Disk::file(self::plain(&file, &opened, options)?)));
        }
        let size = descriptor.extents.iter().map(|extent| extent.len).sum();
        let text = Disk::text(descriptor.text());
        let image = imago::vmdk::Vmdk::<Disk>::builder(text)
            .open(Extents(extents))
            .map_err(|error| refused(error.into()))?;
        Ok(Self {
            format: Format::Vmdk,
            own: files.len(),
            files,
            about: About {
                cluster: None,
                has_zeroes: false,
                backing: None,
                details: vec![
                    ("type".to_owned(), descriptor.kind),
                    ("extents".to_owned(), descriptor.extents.len().to_string()),
                ],
            },
            size: AtomicU64::new(size),
            writable: false,
            unfrozen: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            no_holes: AtomicBool::new(false),
            inner: RwLock::new(Inner { image: FormatAccess::new(image), writable: false, order: None }),
            locks,
            backing: None,
            path: plain.path.clone(),
            plain,
        })
    }

    fn shared(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`alone`](Self::alone), for what has to be flushed.
    fn changing(&self) -> RwLockWriteGuard<'_, Inner> {
        let inner = self.alone();
        self.dirty.store(true, Ordering::Release);
        inner
    }

    fn check(&self, offset: u64, len: u64, to_write: bool) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size());
        if end.is_none() || !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if to_write && !self.is_writable() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) {
        if self.no_holes.load(Ordering::Relaxed) {
            return;
        }
        #[cfg(test)]
        tests::record(|| tests::Step::Zero(offset, len));
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let punched = flat::allocate(&self.plain.file, mode, offset, len);
        if punched.is_err_and(|error| error.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            tracing::info!(
                "the file system of disk {} does not give discarded space back",
                self.path.display()
            );
            self.no_holes.store(true, Ordering::Relaxed);
        }
    }

    /// Gives up whole clusters, which read as zeroes then, and their space. Of version 2 only where nothing is below.
    fn free(&self, inner: &Inner, offset: u64, len: u64) -> io::Result<()> {
        let mut holes = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let (mapping, len) = inner.mapping(at, offset + len - at)?;
            if let ShallowMapping::Raw { storage, offset, writable: true, .. } = mapping
                && storage.plain().is_some()
            {
                holes.push((offset, len));
            }
            at += len;
        }
        let mut at = offset;
        while at < offset + len {
            let rest = offset + len - at;
            // SAFETY: whoever has looked up where data lies, or does so, has the lock that this thread has alone.
            let freed = unsafe {
                if self.about.has_zeroes {
                    inner.image.inner().discard_to_zero_unsafe(at, rest)
                } else {
                    inner.image.inner().discard_to_backing_unsafe(at, rest)
                }
            };
            let (from, len) = freed?;
            if from != at || len == 0 {
                return Err(io::Error::other("clusters were not given up"));
            }
            at += len;
        }
        // Now that they belong to nobody, and before anybody can get them again.
        for (offset, len) in holes {
            self.punch(offset, len);
        }
        Ok(())
    }

    /// Does something with each piece of a range that is not known to read as zeroes, and whether it is below.
    fn for_each_used(
        &self,
        inner: &Inner,
        offset: u64,
        len: u64,
        mut todo: impl FnMut(u64, u64, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let run = inner.run(at, end - at)?;
            let is_below = match run.kind {
                RunKind::Data => Some(false),
                RunKind::Absent if self.backing.is_some() => Some(true),
                RunKind::Zero | RunKind::Absent => None,
            };
            if let Some(is_below) = is_below {
                self.by_tables(inner, at, run.len, |at, len| todo(at, len, is_below))?;
            }
            at += run.len;
        }
        Ok(())
    }

    /// Does something with each piece of a range that one L2 table is for. Whatever it frees, no new table is put there before
    /// that is in the file.
    fn by_tables(
        &self,
        inner: &Inner,
        offset: u64,
        len: u64,
        mut todo: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(order) = &inner.order else { return Err(io::ErrorKind::PermissionDenied.into()) };
        let covered = order.covered();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let next = end.min(at - at % covered + covered);
            if order.needs_table(&self.plain, at)? {
                inner.image.flush()?;
            }
            todo(at, next - at)?;
            at = next;
        }
        Ok(())
    }

    /// The clusters that lie in a range as a whole; the last one of the disk may be a part.
    fn whole(&self, offset: u64, len: u64) -> (u64, u64) {
        let cluster = self.about.cluster.unwrap_or(SECTOR);
        let end = offset + len;
        let to = if end == self.size() { end } else { end - end % cluster };
        let from = offset.next_multiple_of(cluster);
        (from.min(to), to)
    }

    fn zero(&self, inner: &Inner, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = offset + len;
        let (from, to) = self.whole(offset, len);
        if from == to || !self.about.has_zeroes && (self.backing.is_some() || !unmap) {
            return self.zero_partly(inner, offset, len);
        }
        self.zero_partly(inner, offset, from - offset)?;
        if unmap {
            self.free(inner, from, to - from)?;
        } else {
            inner.image.write_zeroes(from, to - from)?;
        }
        self.zero_partly(inner, to, end - to)
    }

    /// Writes zeroes.
    fn zero_partly(&self, inner: &Inner, offset: u64, len: u64) -> io::Result<()> {
        const CHUNK: u64 = 64 << 10;
        let zeroes = vec![0; usize::try_from(CHUNK.min(len)).map_err(io::Error::other)?];
        let mut at = offset;
        while at < offset + len {
            let part = usize::try_from((offset + len - at).min(CHUNK)).map_err(io::Error::other)?;
            inner.image.write(&zeroes[..part], at)?;
            at += part as u64;
        }
        Ok(())
    }
}

impl Inner {
    fn mapping(&self, offset: u64, len: u64) -> io::Result<(ShallowMapping<'_, Disk>, u64)> {
        let (mapping, found) = self.image.get_shallow_mapping(offset, len)?;
        match found {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            found => Ok((mapping, found)),
        }
    }

    fn run(&self, offset: u64, len: u64) -> io::Result<Run> {
        let mut kind = None;
        let mut done = 0;
        for _ in 0..MOST_PIECES {
            let (mapping, found) = self.mapping(offset + done, len - done)?;
            let next = match mapping {
                ShallowMapping::Zero { explicit: true, .. } => RunKind::Zero,
                ShallowMapping::Zero { .. } | ShallowMapping::Indirect { .. } => RunKind::Absent,
                _ => RunKind::Data,
            };
            if *kind.get_or_insert(next) != next {
                break;
            }
            done += found;
            if done >= len {
                break;
            }
        }
        Ok(Run { len: done, kind: kind.unwrap_or(RunKind::Data) })
    }

    /// Writes where there is space already. Gives `None`, and has done nothing, where there is not.
    fn overwrite(&self, offset: u64, mut from: IoVector<'_>) -> io::Result<Option<()>> {
        let end = offset + from.len();
        let mut places = Vec::new();
        let mut at = offset;
        while at < end {
            let (ShallowMapping::Raw { storage, offset, writable: true, .. }, len) =
                self.mapping(at, end - at)?
            else {
                return Ok(None);
            };
            if places.len() == MOST_PIECES {
                return Ok(None);
            }
            places.push((storage, offset, len));
            at += len;
        }
        for (storage, offset, len) in places {
            let (now, later) = from.split_at(len);
            storage.writev(now, offset)?;
            from = later;
        }
        Ok(Some(()))
    }
}

impl Image for Foreign {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> Format {
        self.format
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn block_size(&self) -> u32 {
        let direct = self.plain.direct.map(|direct| direct.file);
        direct.filter(|block| self.size().is_multiple_of(u64::from(*block))).unwrap_or(512)
    }

    fn memory_alignment(&self) -> usize {
        self.plain.direct.map_or(1, |direct| direct.memory)
    }

    fn is_writable(&self) -> bool {
        self.unfrozen.load(Ordering::Acquire)
    }

    fn set_writable(&self, writable: bool) -> Result<(), Error> {
        if writable && !self.writable {
            let what = "is open to be read; to be changed it has to be opened anew".to_owned();
            return Err(Error::Invalid { path: self.path.clone(), what });
        }
        let Some(lock) = self.locks.first() else { return Ok(()) };
        if !writable {
            if self.is_writable() {
                self.flush().map_err(|source| Error::Io {
                    path: self.path.clone(),
                    what: "make stable what was written to",
                    source,
                })?;
                self.unfrozen.store(false, Ordering::Release);
            }
            let set = lock.set(Mode::Shared);
            self.unfrozen.store(lock.mode() == Mode::Exclusive, Ordering::Release);
            return set;
        }
        lock.set(Mode::Exclusive)?;
        let mut inner = self.alone();
        if !inner.writable {
            match load(&self.plain, self.backing.as_ref(), true) {
                Ok(loaded) => *inner = loaded,
                Err(error) => {
                    let _ = lock.set(Mode::Shared);
                    return Err(error);
                }
            }
        }
        self.unfrozen.store(true, Ordering::Release);
        Ok(())
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.check(offset, transfer::total(into), false)?;
        let (vector, _mapped) = IoVectorMut::from_volatile_slice(into);
        self.shared().image.readv(vector, offset)
    }

    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.check(offset, transfer::total(from), true)?;
        let (vector, _mapped) = IoVector::from_volatile_slice(from);
        if self.shared().overwrite(offset, vector)?.is_some() {
            return Ok(());
        }
        let (vector, _mapped) = IoVector::from_volatile_slice(from);
        let inner = self.changing();
        let mut rest = Some(vector);
        self.by_tables(&inner, offset, transfer::total(from), |at, len| {
            let (now, later) = rest.take().unwrap_or_default().split_at(len);
            rest = Some(later);
            inner.image.writev(now, at)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check(offset, len, true)?;
        let inner = self.changing();
        self.for_each_used(&inner, offset, len, |at, len, _| self.zero(&inner, at, len, unmap))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len, true)?;
        if !self.about.has_zeroes && self.backing.is_some() {
            return Ok(());
        }
        let inner = self.changing();
        self.for_each_used(&inner, offset, len, |at, len, is_below| {
            let (from, to) = self.whole(at, len);
            if is_below || from == to { Ok(()) } else { self.free(&inner, from, to - from) }
        })
    }

    fn flush(&self) -> io::Result<()> {
        let order = {
            let mut order = None;
            if self.dirty.load(Ordering::Acquire) {
                let inner = self.alone();
                inner.image.flush()?;
                self.dirty.store(false, Ordering::Release);
                order.clone_from(&inner.order);
            } else {
                order.clone_from(&self.shared().order);
            }
            order
        };
        match order {
            Some(order) => order.synced(|| self.plain.sync()),
            None => Ok(()),
        }
    }

    fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    fn run(&self, offset: u64, len: u64) -> io::Result<Run> {
        self.check(offset, len, false)?;
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.shared().run(offset, len)
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        if !self.is_writable() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let inner = self.changing();
        let old = self.size();
        if size < old || size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.backing.as_ref().is_some_and(|below| below.size() > old) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the image that it lies on is larger, and what that has there would appear",
            ));
        }
        // What follows the end in its last cluster belongs to nobody, and need not be zero.
        let tail = old.next_multiple_of(self.about.cluster.unwrap_or(SECTOR)).min(size);
        // As in `by_tables`: the L1 table may have to become larger.
        inner.image.flush()?;
        inner.image.resize_grow(size, PreallocateMode::None)?;
        self.for_each_used(&inner, old, tail - old, |at, len, _| self.zero_partly(&inner, at, len))?;
        inner.image.flush()?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn info(&self) -> io::Result<Info> {
        let mut allocated = 0_u64;
        for file in &self.files[..self.own] {
            allocated = allocated.saturating_add(file.metadata()?.blocks().saturating_mul(512));
        }
        Ok(Info {
            path: self.path.clone(),
            format: self.format,
            size: self.size(),
            allocated,
            cluster_size: self.about.cluster,
            max_size: None,
            backing: self.about.backing.clone(),
            details: self.about.details.clone(),
        })
    }

    fn identity(&self) -> io::Result<Identity> {
        let mut identity = flat::identity(self, &self.plain.file)?;
        for file in &self.files {
            let changed = file.metadata()?.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            identity.state = identity.state.max(u64::try_from(changed.as_nanos()).unwrap_or(u64::MAX));
        }
        Ok(identity)
    }
}

/// Gives the extents of a VMDK image to the library, by their number.
struct Extents(Vec<Option<Disk>>);

impl imago::format::gate::ImplicitOpenGate<Disk> for Extents {
    fn open_format<F: FormatDriverBuilder<Disk>>(&mut self, _: F) -> io::Result<FormatAccess<Disk>> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn open_storage(&mut self, named: StorageOpenOptions) -> io::Result<Disk> {
        let index = named.get_filename().and_then(Path::to_str).and_then(|name| name.parse::<usize>().ok());
        let extent = index.and_then(|index| self.0.get_mut(index)).and_then(Option::take);
        extent.ok_or_else(|| io::ErrorKind::PermissionDenied.into())
    }
}

/// A file as it is used.
fn plain(path: &Path, opened: &Opened, options: &OpenOptions) -> Result<Plain, Error> {
    let direct = match options.cache {
        Cache::None => Some(open::set_direct(&opened.file, path)?),
        Cache::Writeback | Cache::Unsafe => None,
    };
    Ok(Plain {
        file: Arc::clone(&opened.file),
        path: path.to_owned(),
        direct,
        is_device: opened.is_device,
        syncs: options.cache != Cache::Unsafe,
        order: None,
    })
}

/// The descriptor in a file of `len` bytes.
fn descriptor(plain: &Plain, len: u64) -> Result<vmdk::Descriptor, Bad> {
    let start = plain.bytes(0, usize::try_from(len.min(vmdk::MAX_LEN)).unwrap_or_default())?;
    let found = vmdk::Descriptor::parse(&start)?;
    if len > vmdk::MAX_LEN {
        let what = format!("its descriptor has {len} bytes, and {} is the most", vmdk::MAX_LEN);
        return Err(Bad::Corrupt(what));
    }
    Ok(found)
}

/// Hands a qcow2 image to the library.
fn load(plain: &Plain, backing: Option<&Arc<dyn Image>>, writable: bool) -> Result<Inner, Error> {
    let refused = refuse(&plain.path, Format::Qcow2);
    let mut plain = plain.clone();
    if writable {
        let len = if plain.is_device {
            open::device_size(&plain.file).map(|size| size.0)
        } else {
            plain.file.metadata().map(|about| about.len())
        };
        let len = len.map_err(|error| refused(error.into()))?;
        // Anew: since it was looked at, it was locked as what is read is.
        let layout = qcow2::Header::read(&plain, len).map_err(&refused)?.layout;
        let tables = qcow2::check_tables(&plain, &layout, len).map_err(&refused)?;
        plain.order = Some(Arc::new(Order::new(layout, tables)));
    }
    let order = plain.order.clone();
    let below = match backing {
        None => None,
        Some(image) => {
            let raw = imago::raw::Raw::open_image(Disk::below(Arc::clone(image)), false);
            Some(FormatAccess::new(raw.map_err(|error| refused(error.into()))?))
        }
    };
    let file = Arc::clone(&plain.file);
    let changed = || file.metadata().and_then(|about| about.modified());
    let before = changed().map_err(|error| refused(error.into()))?;
    let image = imago::qcow2::Qcow2::<Disk>::builder(Disk::file(plain))
        .write(writable)
        .data_file(None)
        .backing(below)
        .open(DenyImplicitOpenGate::default())
        .map_err(|error| refused(error.into()))?;
    // Features that it does not keep up to date are taken out of the header, which changes nothing of what the disk is; what
    // lies on the image need not notice.
    if changed().is_ok_and(|now| now != before) {
        file.set_modified(before).map_err(|error| refused(error.into()))?;
    }
    Ok(Inner { image: FormatAccess::new(image), writable, order })
}

/// Opens the backing that a qcow2 image names.
fn below(
    path: &Path,
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
    above: &mut Vec<(u64, u64)>,
) -> Result<Arc<dyn Image>, Error> {
    let wrong = |what: String| Error::Backing { path: path.to_owned(), what };
    let file = beside(path, name).map_err(&wrong)?;
    let format = match format {
        Some("raw" | "file") => Format::Flat,
        Some("qcow2") => Format::Qcow2,
        Some("vmdk") => Format::Vmdk,
        Some(other) => {
            let what = format!(
                "it is of format {}, and one of raw, qcow2 and vmdk can be read",
                other.escape_debug()
            );
            return Err(wrong(what));
        }
        None => {
            let what = format!(
                "its format is not noted, and is not guessed from its bytes, which a guest may have written; note it with \
                 \"qemu-img rebase -u -b {} -F FORMAT\"",
                name.escape_debug()
            );
            return Err(wrong(what));
        }
    };
    let options = OpenOptions { writable: false, frozen: false, format: Some(format), ..options.clone() };
    let opened = match format {
        Format::Flat => crate::open(&file, &options),
        _ => {
            Foreign::open_above(&file, format, &options, above).map(|image| Arc::new(image) as Arc<dyn Image>)
        }
    };
    match opened {
        Err(error @ (Error::Backing { .. } | Error::BackingOpen { .. })) => Err(error),
        opened => {
            opened.map_err(|error| Error::BackingOpen { path: path.to_owned(), source: Box::new(error) })
        }
    }
}

/// Where the regular file is that an image names, if it may name it.
fn beside(image: &Path, name: &str) -> Result<PathBuf, String> {
    let shown = name.escape_debug();
    let is_protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    if is_protocol {
        return Err(format!("is named \"{shown}\", which is no file"));
    }
    let is_below = Path::new(name)
        .components()
        .all(|component| matches!(component, Component::Normal(_) | Component::CurDir));
    if name.is_empty() || name.contains('\0') || !is_below {
        return Err(format!(
            "is named \"{shown}\", and what an image of another's format names is only opened in its own directory or \
             below, by a relative path without \"..\""
        ));
    }
    let path = overlay::home(image).join(name);
    match std::fs::metadata(&path) {
        Ok(about) if !about.is_file() => Err(format!("is named \"{shown}\", which is not a regular file")),
        _ => Ok(path),
    }
}

fn whole_sectors(path: &Path, size: u64) -> u64 {
    let odd = size % SECTOR;
    if odd != 0 {
        tracing::warn!(
            "the last {odd} bytes of disk {} are not a whole sector and not shown to the guest",
            path.display()
        );
    }
    size - odd
}

/// Gives the error for an image that is not used.
fn refuse(path: &Path, format: Format) -> impl Fn(Bad) -> Error + '_ {
    move |bad| {
        let path = path.to_owned();
        match bad {
            Bad::Corrupt(what) => Error::Corrupt { path, format, what },
            Bad::Unsupported(what) => Error::Unsupported { path, what },
            Bad::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                Error::Corrupt { path, format, what: error.to_string() }
            }
            Bad::Io(source) => Error::Io { path, what: "read", source },
        }
    }
}
