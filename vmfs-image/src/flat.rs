//! The bytes of a disk as they are: a regular file, dense or sparse, or a block device.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::UNIX_EPOCH;

use vm_memory::VolatileSlice;

use crate::image::{
    Access, Error, Extent, Format, Identity, Image, Info, MAX_SIZE, Place, Run, RunKind, SECTOR, Ticket,
};
use crate::lock::{Lock, Mode};
use crate::open::{self, Alignment, Cache, MAGIC_LEN, OpenOptions, Opened};
use crate::transfer;

/// How much space a new image gets at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preallocate {
    /// None: it gets space as it is written to.
    #[default]
    Sparse,
    /// All: no write fails for want of space.
    Full,
}

/// Makes a flat image of zeroes, `size` bytes long, where nothing is yet.
///
/// # Errors
///
/// [`Error::Invalid`] for a size that is none, [`Error::Open`] also where something is already, [`Error::Io`]. Nothing is
/// left behind then.
pub fn create(path: &Path, size: u64, preallocate: Preallocate) -> Result<(), Error> {
    check_size(path, size)?;
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|source| Error::Open { path: path.to_owned(), writable: true, source })?;
    let fill = || {
        file.set_len(size)?;
        if preallocate == Preallocate::Full {
            match allocate(&file, 0, 0, size) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    transfer::write_zeroes(&file, 0, size)?;
                }
                allocated => allocated?,
            }
        }
        file.sync_all()?;
        sync_directory(path)
    };
    fill().map_err(|source| {
        let _ = std::fs::remove_file(path);
        Error::Io { path: path.to_owned(), what: "create disk", source }
    })
}

/// Whether a disk can be of that size.
pub(crate) fn check_size(path: &Path, size: u64) -> Result<(), Error> {
    if !(SECTOR..=MAX_SIZE).contains(&size) || !size.is_multiple_of(SECTOR) {
        let what = format!(
            "a disk has from {SECTOR} to {MAX_SIZE} bytes (1 PiB), a multiple of {SECTOR}: not {size}"
        );
        return Err(Error::Invalid { path: path.to_owned(), what });
    }
    Ok(())
}

/// Makes the entry of `path` in its directory stable.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
}

/// A raw file or block device.
#[derive(Debug)]
pub struct Flat {
    files: [Arc<File>; 1],
    path: PathBuf,
    size: AtomicU64,
    block_size: u32,
    is_device: bool,
    /// Was opened to be changed.
    writable: bool,
    /// May be changed now.
    unfrozen: AtomicBool,
    cache: Cache,
    /// It was found to be flat by its bytes, and is to remain so.
    guarded: bool,
    direct: Option<Alignment>,
    /// Held to change parts of blocks: those who change whole ones share it.
    partly: RwLock<()>,
    /// Held to change the size.
    growing: Mutex<()>,
    /// The file system refuses to punch holes: it is not asked again.
    no_holes: AtomicBool,
    lock: Box<dyn Lock>,
}

impl Flat {
    /// Opens and locks `path`.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, Error> {
        let (Opened { file, len, sector_size, is_device }, lock) = Opened::open(path, options)?;
        let invalid = |what| Error::Invalid { path: path.to_owned(), what };
        if len < SECTOR {
            return Err(Error::Empty { path: path.to_owned(), size: len });
        }
        let odd = len % SECTOR;
        let size = len - odd;
        if size > MAX_SIZE {
            return Err(invalid(format!("has {len} bytes, and a disk at most {MAX_SIZE} (1 PiB)")));
        }
        if odd != 0 {
            tracing::warn!(
                "the last {odd} bytes of disk {} are not a whole sector and not shown to the guest",
                path.display()
            );
        }
        let guarded = options.format.is_none();
        let kind = open::kind_of_file(&file).map_err(|source| Error::Io {
            path: path.to_owned(),
            what: "read the beginning of",
            source,
        })?;
        if guarded && kind != Format::Flat {
            return Err(invalid(format!("has become a {kind} image while it was being opened")));
        }
        let mut block_size = sector_size;
        let mut direct = None;
        if options.cache == Cache::None {
            let alignment = open::set_direct(&file, path)?;
            block_size = block_size.max(alignment.file);
            if !size.is_multiple_of(u64::from(block_size)) {
                return Err(invalid(format!(
                    "has {size} bytes, and with cache \"none\" its file system wants a multiple of {block_size}; \
                     use cache \"writeback\", or make it larger"
                )));
            }
            direct = Some(alignment);
        }
        Ok(Self {
            files: [file],
            path: path.to_owned(),
            size: AtomicU64::new(size),
            block_size,
            is_device,
            writable: options.writable,
            unfrozen: AtomicBool::new(options.writable && !options.frozen),
            cache: options.cache,
            guarded,
            direct,
            partly: RwLock::new(()),
            growing: Mutex::new(()),
            no_holes: AtomicBool::new(false),
            lock,
        })
    }

    fn file(&self) -> &File {
        &self.files[0]
    }

    fn check(&self, offset: u64, len: u64, access: Access) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size());
        if end.is_none() || !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if access == Access::Write && !self.is_writable() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(())
    }

    /// Writes pieces that may not be aligned as direct I/O wants it.
    fn write_pieces(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        let Some(alignment) = self.direct else { return transfer::write(self.file(), offset, from) };
        if is_aligned(alignment, offset, from) {
            let _shared = self.partly.read().unwrap_or_else(PoisonError::into_inner);
            return transfer::write(self.file(), offset, from);
        }
        self.bounce(offset, from, Access::Write)
    }

    /// Moves what direct I/O does not take, by way of memory and a range that it does take.
    fn bounce(&self, offset: u64, pieces: &[VolatileSlice<'_>], access: Access) -> io::Result<()> {
        const CHUNK: u64 = 1 << 20;
        let block = u64::from(self.block_size);
        let end = offset + transfer::total(pieces);
        let mut buffer = Aligned::new(CHUNK.min((end - offset).next_multiple_of(block) + block))?;
        // Of a block that is written partly, the rest is read and written back: nobody may change it in between.
        let _alone = self.partly.write().unwrap_or_else(PoisonError::into_inner);
        let mut rest = pieces.to_vec();
        let mut at = offset;
        while at < end {
            let from = at - at % block;
            let to = end.min(from + CHUNK);
            let whole = to.next_multiple_of(block);
            let bytes = buffer.bytes(usize::try_from(whole - from).map_err(io::Error::other)?)?;
            let skip = usize::try_from(at - from).map_err(io::Error::other)?;
            let len = usize::try_from(to - at).map_err(io::Error::other)?;
            if access == Access::Read || from < at || to < whole {
                self.file().read_exact_at(bytes, from)?;
            }
            let (now, later) = transfer::split(&rest, len)?;
            transfer::copy(&now, &mut bytes[skip..skip + len], access == Access::Read);
            if access == Access::Write {
                self.file().write_all_at(bytes, from)?;
            }
            (rest, at) = (later, to);
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.no_holes.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let punched = allocate(self.file(), mode, offset, len);
        if punched.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            tracing::info!(
                "the file system of disk {} does not give discarded space back",
                self.path.display()
            );
            self.no_holes.store(true, Ordering::Relaxed);
        }
        punched
    }
}

impl Image for Flat {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> Format {
        Format::Flat
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn memory_alignment(&self) -> usize {
        self.direct.map_or(1, |alignment| alignment.memory)
    }

    fn is_writable(&self) -> bool {
        self.unfrozen.load(Ordering::Acquire)
    }

    fn set_writable(&self, writable: bool) -> Result<(), Error> {
        if writable && !self.writable {
            let what = "is open to be read; to be changed it has to be opened anew".to_owned();
            return Err(Error::Invalid { path: self.path.clone(), what });
        }
        if !writable && self.is_writable() {
            self.flush().map_err(|source| Error::Io {
                path: self.path.clone(),
                what: "make stable what was written to",
                source,
            })?;
            self.unfrozen.store(false, Ordering::Release);
        }
        let set = self.lock.set(if writable { Mode::Exclusive } else { Mode::Shared });
        self.unfrozen.store(self.lock.mode() == Mode::Exclusive, Ordering::Release);
        set
    }

    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.check(offset, transfer::total(into), Access::Read)?;
        match self.direct {
            Some(alignment) if !is_aligned(alignment, offset, into) => {
                self.bounce(offset, into, Access::Read)
            }
            _ => transfer::read(self.file(), offset, into),
        }
    }

    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        let len = transfer::total(from);
        self.check(offset, len, Access::Write)?;
        if !self.guarded || offset > 0 || len == 0 {
            return self.write_pieces(offset, from);
        }
        // A copy, since the guest may change its memory between the look and the write.
        let mut first = [0; 512];
        let (head, rest) = transfer::split(from, first.len())?;
        transfer::copy(&head, &mut first, false);
        let kind = open::kind_of(&first[..MAGIC_LEN]);
        if kind != Format::Flat {
            tracing::warn!(
                "disk {} was not made into a {kind} image by its guest: say format = \"flat\" to let it",
                self.path.display()
            );
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut checked = vec![VolatileSlice::from(&mut first[..])];
        checked.extend(rest);
        self.write_pieces(0, &checked)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check(offset, len, Access::Write)?;
        if len == 0 || unmap && self.punch(offset, len).is_ok() {
            return Ok(());
        }
        let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        if allocate(self.file(), mode, offset, len).is_ok() {
            return Ok(());
        }
        if self.direct.is_none() {
            return transfer::write_zeroes(self.file(), offset, len);
        }
        let mut zeroes = Aligned::new(64 << 10)?;
        let zeroes = zeroes.bytes(64 << 10)?;
        let mut at = offset;
        while at < offset + len {
            let part = (offset + len - at).min(zeroes.len() as u64);
            let part = usize::try_from(part).map_err(io::Error::other)?;
            self.write_pieces(at, &[VolatileSlice::from(&mut zeroes[..part])])?;
            at += part as u64;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len, Access::Write)?;
        let discarded = match len {
            0 => Ok(()),
            // Punching a hole in a device is zeroing it, which not every device does by discarding.
            _ if self.is_device => discard_on_device(self.file(), offset, len),
            _ => self.punch(offset, len),
        };
        // A discard is advice: a disk that cannot follow it has done nothing wrong.
        match discarded {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Err(error),
            _ => Ok(()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        if self.cache == Cache::Unsafe { Ok(()) } else { self.file().sync_data() }
    }

    fn flush_is_sync_of(&self) -> Option<u16> {
        (self.cache != Cache::Unsafe).then_some(0)
    }

    fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    fn locate(&self, offset: u64, len: u64, access: Access, extents: &mut Vec<Extent>) -> Option<Ticket> {
        self.check(offset, len, access).ok()?;
        let block = u64::from(self.block_size);
        if !offset.is_multiple_of(block) || !len.is_multiple_of(block) {
            return None;
        }
        if self.guarded && access == Access::Write && offset < SECTOR {
            return None;
        }
        extents.push(Extent { len, place: Place::File { file: 0, offset } });
        Some(Ticket::default())
    }

    fn run(&self, offset: u64, len: u64) -> io::Result<Run> {
        self.check(offset, len, Access::Read)?;
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.is_device {
            return Ok(Run { len, kind: RunKind::Data });
        }
        let end = offset + len;
        // Holes are as long as the file system makes them; sectors that they cover partly count as data.
        let data = seek(self.file(), offset, libc::SEEK_DATA)?.unwrap_or(end);
        let data = data - data % SECTOR;
        if data > offset {
            return Ok(Run { len: data.min(end) - offset, kind: RunKind::Zero });
        }
        let hole = seek(self.file(), offset, libc::SEEK_HOLE)?.unwrap_or(end);
        let hole = hole.next_multiple_of(SECTOR).max(offset + SECTOR);
        Ok(Run { len: hole.min(end) - offset, kind: RunKind::Data })
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        if !self.is_writable() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let _alone = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let old = self.size();
        if size < old || size > MAX_SIZE || !size.is_multiple_of(u64::from(self.block_size)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.is_device {
            let (len, _) = open::device_size(self.file())?;
            if len < size {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("the block device has {len} bytes and has to be made larger first"),
                ));
            }
        } else if size > old {
            // First to the size it has as a disk: what follows is no whole sector and must not become part of one.
            self.file().set_len(old)?;
            self.file().set_len(size)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn info(&self) -> io::Result<Info> {
        let metadata = self.file().metadata()?;
        let mut details = Vec::new();
        if self.is_device {
            details.push(("lies in".to_owned(), "a block device".to_owned()));
            details.push(("sector size".to_owned(), self.block_size.to_string()));
        }
        Ok(Info {
            path: self.path.clone(),
            format: Format::Flat,
            size: self.size(),
            allocated: if self.is_device { self.size() } else { metadata.blocks().saturating_mul(512) },
            cluster_size: None,
            max_size: None,
            backing: None,
            details,
        })
    }

    fn identity(&self) -> io::Result<Identity> {
        identity(self, self.file())
    }
}

/// Identity of an image that has no UUID, whose file is `file`.
pub(crate) fn identity(image: &dyn Image, file: &File) -> io::Result<Identity> {
    const SAMPLE: u64 = 64 << 10;
    let size = image.size();
    let len = SAMPLE.min(size);
    let mut sample = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    let mut id = [0; 16];
    for (part, offset) in [(0..4, 0), (4..8, size - len)] {
        image.read_at(offset, &[VolatileSlice::from(sample.as_mut_slice())])?;
        id[part].copy_from_slice(&crc32c::crc32c(&sample).to_le_bytes());
    }
    let changed = file.metadata()?.modified()?;
    let state = changed.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    Ok(Identity { size, id, state: u64::try_from(state).unwrap_or(u64::MAX) })
}

fn is_aligned(alignment: Alignment, offset: u64, pieces: &[VolatileSlice<'_>]) -> bool {
    let block = u64::from(alignment.file);
    offset.is_multiple_of(block)
        && transfer::total(pieces).is_multiple_of(block)
        && pieces.iter().all(|piece| {
            piece.ptr_guard().as_ptr().addr().is_multiple_of(alignment.memory)
                && piece.len().is_multiple_of(alignment.memory)
        })
}

/// Memory aligned for direct I/O.
#[derive(Debug)]
pub(crate) struct Aligned {
    memory: Vec<u8>,
}

impl Aligned {
    /// Enough for every device: `alignment` of `open` refuses more.
    const ALIGN: usize = 1 << 16;

    pub(crate) fn new(len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        Ok(Self { memory: vec![0; len + Self::ALIGN] })
    }

    pub(crate) fn bytes(&mut self, len: usize) -> io::Result<&mut [u8]> {
        let skip = self.memory.as_ptr().align_offset(Self::ALIGN);
        let bytes = self.memory.get_mut(skip..).and_then(|bytes| bytes.get_mut(..len));
        bytes.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

pub(crate) fn allocate(file: &File, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
    let [offset, len] = [offset, len].map(libc::off64_t::try_from);
    let (offset, len) = (offset.map_err(io::Error::other)?, len.map_err(io::Error::other)?);
    loop {
        // SAFETY: fallocate takes integers.
        if unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Where after `offset` data or a hole begins; `None` if there is none up to the end.
pub(crate) fn seek(file: &File, offset: u64, what: libc::c_int) -> io::Result<Option<u64>> {
    let offset = libc::off64_t::try_from(offset).map_err(io::Error::other)?;
    // SAFETY: lseek takes integers. The position that it changes is nobody's: all I/O names its offset.
    match u64::try_from(unsafe { libc::lseek64(file.as_raw_fd(), offset, what) }) {
        Ok(found) => Ok(Some(found)),
        Err(_) => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            error => Err(error),
        },
    }
}

fn discard_on_device(file: &File, offset: u64, len: u64) -> io::Result<()> {
    /// `_IO(0x12, 119)` (linux/fs.h).
    const BLKDISCARD: libc::c_ulong = 0x1277;
    let range = [offset, len];
    // SAFETY: the ioctl reads two 64-bit integers.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests;
