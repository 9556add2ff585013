//! Opening an image: its file, its lock, and what kind it is.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::flat::Flat;
use crate::foreign::Foreign;
use crate::image::{Error, Format, Image, MAX_DEPTH};
use crate::lock::{Lock, Mode, OfdLock};
use crate::overlay;
use crate::thin::{self, Thin};

/// What lies between the guest and the storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Nothing: the host's page cache is passed by (`O_DIRECT`). What is done is in the device, whose own cache a flush
    /// empties.
    None,
    /// The host's page cache: what is done survives the end of the monitor, what is flushed that of the host.
    #[default]
    Writeback,
    /// The host's page cache, and a flush does nothing: what is done survives the end of the monitor, not that of the
    /// host. For what can be made again.
    Unsafe,
}

impl Cache {
    /// Its name, as in `vm.toml` and on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
            Self::Unsafe => "unsafe",
        }
    }
}

impl std::fmt::Display for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for Cache {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::None, Self::Writeback, Self::Unsafe]
            .into_iter()
            .find(|cache| cache.as_str() == text)
            .ok_or_else(|| "has to be one of \"writeback\", \"none\", \"unsafe\"".to_owned())
    }
}

/// How an image is to be opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Whether it is to be changed. It is locked accordingly.
    pub writable: bool,
    /// With `writable`: perhaps later, by [`Image::set_writable`]. Until then it is read, and locked as what is read is.
    pub frozen: bool,
    /// What kind it is; without, its bytes tell.
    pub format: Option<Format>,
    /// What lies between it and the storage.
    pub cache: Cache,
    /// The guest that it is for: named to others that find it locked.
    pub owner: Option<String>,
}

/// Opens and locks the image at `path`, and what it lies on.
///
/// Without a format given, the first bytes tell. A guest could then make its raw disk into an image of another kind, with
/// a backing of its choice, so a flat image that was found to be one refuses to become anything else.
///
/// # Errors
///
/// [`Error`].
pub fn open(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>, Error> {
    let format = match options.format {
        Some(format) => format,
        None => probe(path)?,
    };
    match format {
        Format::Thin => open_chain(path, options),
        format => open_one(path, format, options),
    }
}

/// Opens an image that knows by itself what it lies on.
fn open_one(path: &Path, format: Format, options: &OpenOptions) -> Result<Arc<dyn Image>, Error> {
    match format {
        Format::Flat => Ok(Arc::new(Flat::open(path, options)?)),
        Format::Thin => Ok(Arc::new(Thin::open(path, options, None)?)),
        format => Ok(Arc::new(Foreign::open(path, format, options)?)),
    }
}

/// Opens a thin image and what it lies on, which is opened to be read.
fn open_chain(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>, Error> {
    let wrong = |path: &Path, what: String| Error::Backing { path: path.to_owned(), what };
    // From the top, by what each notes.
    let mut chain: Vec<(PathBuf, Format)> = vec![(path.to_owned(), Format::Thin)];
    let mut inodes = Vec::new();
    while let Some((top, Format::Thin)) = chain.last().cloned() {
        let below = |error: Error| match chain.len() {
            1 => error,
            depth => Error::BackingOpen { path: chain[depth - 2].0.clone(), source: Box::new(error) },
        };
        let noted = thin::peek_backing(&top).map_err(below)?;
        let about = std::fs::metadata(&top).map_err(|source| Error::Io {
            path: top.clone(),
            what: "examine",
            source,
        })?;
        if inodes.contains(&(about.dev(), about.ino())) {
            return Err(wrong(path, format!("{} lies on itself", top.display())));
        }
        inodes.push((about.dev(), about.ino()));
        let Some(noted) = noted else { break };
        if chain.len() == MAX_DEPTH {
            return Err(wrong(path, format!("the chain is longer than {MAX_DEPTH} images")));
        }
        chain.push((overlay::resolve(&top, &noted.path), noted.format));
    }
    let mut image: Option<Arc<dyn Image>> = None;
    while let Some((path, format)) = chain.pop() {
        let is_top = chain.is_empty();
        let options = if is_top {
            OpenOptions { format: Some(format), ..options.clone() }
        } else {
            OpenOptions { writable: false, frozen: false, format: Some(format), ..options.clone() }
        };
        let opened = match image.take() {
            None => open_one(&path, format, &options),
            below => Thin::open(&path, &options, below).map(|thin| Arc::new(thin) as Arc<dyn Image>),
        };
        image = Some(match (opened, chain.last()) {
            (Err(error @ (Error::Backing { .. } | Error::BackingOpen { .. })), _) => return Err(error),
            (Err(error), Some((top, _))) => {
                return Err(Error::BackingOpen { path: top.clone(), source: Box::new(error) });
            }
            (opened, _) => opened?,
        });
    }
    image.ok_or_else(|| wrong(path, "there is no image".to_owned()))
}

/// What a file begins with that is not flat.
const MAGIC: [(&[u8], Format); 6] = [
    (b"VMM-THIN", Format::Thin),
    (b"QFI\xfb", Format::Qcow2),
    (b"KDMV", Format::Vmdk),
    (b"COWD", Format::Vmdk),
    (b"# Disk DescriptorFile", Format::Vmdk),
    (b"vhdxfile", Format::Vhdx),
];

/// How many bytes of an image tell its kind.
pub(crate) const MAGIC_LEN: usize = 21;

/// What kind of image begins with `start`.
pub(crate) fn kind_of(start: &[u8]) -> Format {
    MAGIC.into_iter().find(|(magic, _)| start.starts_with(magic)).map_or(Format::Flat, |found| found.1)
}

/// What kind of image is at `path`, from its first bytes. It need not be a sound one.
///
/// # Errors
///
/// [`Error`].
pub fn probe(path: &Path) -> Result<Format, Error> {
    let opened = Opened::without_lock(path, false)?;
    kind_of_file(&opened.file).map_err(|source| Error::Io {
        path: path.to_owned(),
        what: "read the beginning of",
        source,
    })
}

/// What kind of image `file` is, which is not open with `O_DIRECT`.
pub(crate) fn kind_of_file(file: &File) -> io::Result<Format> {
    use std::os::unix::fs::FileExt;
    let mut start = [0; MAGIC_LEN];
    let mut len = 0;
    while len < start.len() {
        match file.read_at(&mut start[len..], len as u64) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(kind_of(&start[..len]))
}

/// A file or block device in which an image lies.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) file: Arc<File>,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// Unit in bytes in which it can be written: 512 for a file, the logical sector of a device.
    pub(crate) sector_size: u32,
    pub(crate) is_device: bool,
}

impl Opened {
    /// Opens `path` and locks it, for a writer where `options` say so. The lock is that of the image.
    pub(crate) fn open(path: &Path, options: &OpenOptions) -> Result<(Self, Box<dyn Lock>), Error> {
        let mode = if options.writable && !options.frozen { Mode::Exclusive } else { Mode::Shared };
        for _ in 0..16 {
            let opened = Self::without_lock(path, options.writable)?;
            let lock = OfdLock::acquire(&opened.file, path, mode, options.owner.as_deref())?;
            // While the lock was not held, another may have made it larger, or have put another file in its place: a snapshot
            // does that, and what was found is one by now.
            let opened = opened.examined(path)?;
            if opened.is_device || is_at(&opened.file, path)? {
                return Ok((opened, Box::new(lock)));
            }
        }
        let source =
            io::Error::new(io::ErrorKind::Interrupted, "another file takes its place again and again");
        Err(Error::Open { path: path.to_owned(), writable: options.writable, source })
    }

    pub(crate) fn without_lock(path: &Path, writable: bool) -> Result<Self, Error> {
        // O_NONBLOCK: a FIFO without a writer is refused below instead of being waited for.
        // O_EXCL: a block device that the host has mounted is refused (open(2)); files do not care.
        let exclusive = if writable { libc::O_EXCL } else { 0 };
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(writable)
            .custom_flags(libc::O_NONBLOCK | exclusive)
            .open(path)
            .map_err(|source| {
                let path = path.to_owned();
                match source.raw_os_error() {
                    Some(libc::EISDIR) => Error::Kind { path, kind: "a directory" },
                    Some(libc::EBUSY) => Error::Busy { path },
                    _ => Error::Open { path, writable, source },
                }
            })?;
        Self { file: Arc::new(file), len: 0, sector_size: 512, is_device: false }.examined(path)
    }

    fn examined(mut self, path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Io { path: path.to_owned(), what: "examine disk", source };
        let metadata = self.file.metadata().map_err(failed)?;
        let kind = metadata.file_type();
        self.is_device = kind.is_block_device();
        (self.len, self.sector_size) = if kind.is_file() {
            (metadata.len(), 512)
        } else if self.is_device {
            device_size(&self.file).map_err(failed)?
        } else {
            let kind = if kind.is_dir() { "a directory" } else { "a pipe, socket or character device" };
            return Err(Error::Kind { path: path.to_owned(), kind });
        };
        set_flags(&self.file, 0, libc::O_NONBLOCK).map_err(failed)?;
        Ok(self)
    }
}

/// Whether `file` is what is at `path`.
fn is_at(file: &File, path: &Path) -> Result<bool, Error> {
    let failed = |source| Error::Io { path: path.to_owned(), what: "examine", source };
    let inode = |about: std::fs::Metadata| (about.dev(), about.ino());
    match std::fs::metadata(path) {
        Ok(found) => Ok(inode(found) == file.metadata().map(inode).map_err(failed)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(failed(error)),
    }
}

/// What `O_DIRECT` wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of addresses and lengths of each piece of memory, in bytes.
    pub(crate) memory: usize,
    /// Of offsets and lengths in the file, in bytes: 512 to 4096.
    pub(crate) file: u32,
}

/// Makes reads and writes of `file` pass the page cache by.
///
/// # Errors
///
/// [`Error::Direct`] where the file system cannot.
pub(crate) fn set_direct(file: &File, path: &Path) -> Result<Alignment, Error> {
    let refused = |why: &str| Error::Direct { path: path.to_owned(), why: why.to_owned() };
    let alignment = alignment(file).ok_or_else(|| refused("its file system has none for this file"))?;
    if !(512..=4096).contains(&alignment.file)
        || !alignment.file.is_power_of_two()
        || !alignment.memory.is_power_of_two()
        || alignment.memory > 1 << 16
    {
        let why = format!("that of its file system works in blocks of {} bytes", alignment.file);
        return Err(refused(&why));
    }
    match set_flags(file, libc::O_DIRECT, 0) {
        Ok(()) => Ok(alignment),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Err(refused("its file system has none")),
        Err(source) => Err(Error::Io { path: path.to_owned(), what: "set direct I/O for", source }),
    }
}

/// As the kernel tells it, or an alignment that is enough everywhere where it does not. `None` where there is no direct I/O.
fn alignment(file: &File) -> Option<Alignment> {
    use rustix::fs::{AtFlags, StatxFlags};
    /// `STATX_DIOALIGN` (statx(2)).
    const WANTED: StatxFlags = StatxFlags::from_bits_retain(0x2000);
    let careful = Some(Alignment { memory: 4096, file: 4096 });
    let Ok(about) = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, WANTED) else { return careful };
    if about.stx_mask & WANTED.bits() == 0 {
        return careful;
    }
    match (about.stx_dio_mem_align, about.stx_dio_offset_align) {
        (0, _) | (_, 0) => None,
        (memory, file) => Some(Alignment { memory: usize::try_from(memory).ok()?, file: file.max(512) }),
    }
}

/// Changes the flags of an open file. `O_NONBLOCK` means nothing to plain reads and writes of storage, but io_uring and
/// some drivers take it as a wish to fail rather than wait, so it is taken back after opening.
fn set_flags(file: &File, set: libc::c_int, clear: libc::c_int) -> io::Result<()> {
    // SAFETY: F_GETFL takes and gives integers.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: F_SETFL takes an integer.
    if flags < 0 || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !clear | set) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Size and logical block size of a block device, in bytes.
pub(crate) fn device_size(file: &File) -> io::Result<(u64, u32)> {
    /// `_IOR(0x12, 114, size_t)` (linux/fs.h).
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    /// `_IO(0x12, 104)` (linux/fs.h).
    const BLKSSZGET: libc::c_ulong = 0x1268;
    let (mut size, mut block) = (0_u64, 0_i32);
    // SAFETY: the ioctl fills a 64-bit integer.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the ioctl fills an int.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut block) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let block = u32::try_from(block).ok().filter(|b| b.is_power_of_two() && (512..=4096).contains(b));
    Ok((size, block.unwrap_or(512)))
}
