//! What every image can do.
//!
//! There are two ways in:
//!
//! * **Calls that wait** for the storage: [`Image::read_at`], [`Image::write_at`], [`Image::flush`] and the others. They do
//!   everything, and may be made from any number of threads.
//! * **The short way**, for an engine that moves data by itself, many requests at a time: [`Image::locate`] says in which
//!   places of which files a range lies, without ever waiting for storage, or that it cannot; the engine moves the data
//!   there, and says so by [`Image::finish`]. Whatever `locate` cannot do goes by the calls that wait.
//!
//! ```text
//!  locate(range, Write) ─▶ None ───────────────▶ write_at(range, data)     on a thread that may wait
//!       │
//!       └▶ extents, ticket ─▶ pwrite/io_uring to files()[i] ─▶ finish(ticket, ok)
//! ```
//!
//! # What survives
//!
//! A write is *done* when `write_at` or `finish` has returned, and *stable* once a `flush` that began afterwards has
//! returned `Ok`. After a crash of the process or the host every sector holds either what was stable last or what a write
//! since then gave it.
//!
//! # Errors of calls that move data
//!
//! They are `io::Error`s. [`io::ErrorKind::QuotaExceeded`] is an image at its `max_size`, [`io::ErrorKind::StorageFull`] a
//! file system without space: in both cases nothing was changed, and the same call succeeds once there is room.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vm_memory::VolatileSlice;

use crate::thin::Thin;

/// Unit of offsets and lengths, in bytes: all that are given to an image are multiples of it.
pub const SECTOR: u64 = 512;
/// Largest image, in bytes: 1 PiB.
pub const MAX_SIZE: u64 = 1 << 50;
/// Longest backing chain, the image itself included.
pub const MAX_DEPTH: usize = 64;

/// What is to be done with a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Its bytes are wanted.
    Read,
    /// It gets new bytes, all of it.
    Write,
}

/// Where a piece of a range lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In file `file` of [`Image::files`], from byte `offset` on.
    File {
        /// Index into [`Image::files`].
        file: u16,
        /// Offset in that file, in bytes.
        offset: u64,
    },
    /// Nowhere: it reads as zeroes. Only for [`Access::Read`].
    Zero,
}

/// A piece of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes.
    pub len: u64,
    /// Where it lies.
    pub place: Place,
}

/// What [`Image::locate`] wants to be given back by [`Image::finish`]. Its number means something to the image alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[must_use = "an image waits for the ticket of every range that it has located"]
pub struct Ticket(pub u64);

/// A virtual disk. Offsets and lengths are bytes and multiples of [`SECTOR`]; a range past the end is refused with
/// [`io::ErrorKind::InvalidInput`], a change of an image that was opened to be read with
/// [`io::ErrorKind::PermissionDenied`].
pub trait Image: Send + Sync + Debug {
    /// The file.
    fn path(&self) -> &Path;

    /// What kind of image it is.
    fn format(&self) -> Format;

    /// Its size as a disk, in bytes: a multiple of [`SECTOR`], at most [`MAX_SIZE`].
    fn size(&self) -> u64;

    /// Size in bytes of the blocks that its storage works in: a power of two from 512 to 4096. Requests of
    /// [`locate`](Self::locate) that are not aligned to it are refused by `None`.
    fn block_size(&self) -> u32;

    /// Addresses and lengths of the pieces of memory that an engine moves by itself have to be multiples of it, in bytes; a
    /// power of two. Others go by the calls that wait.
    fn memory_alignment(&self) -> usize {
        1
    }

    /// It as a thin one, if that is what it is.
    fn as_thin(&self) -> Option<&Thin> {
        None
    }

    /// Whether it can be changed.
    fn is_writable(&self) -> bool;

    /// Makes an image that was opened to be changed one that is only read, and its lock that of a reader, so that others
    /// can be laid on it; or takes that back. What was done before is stable then. Nothing may be in flight.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`] if it is to be changed again and somebody reads it, [`Error::Invalid`] if it was opened to be
    /// read, [`Error::Io`], and [`Error::Unsupported`] for an image that cannot do it. It is as it was then.
    fn set_writable(&self, writable: bool) -> Result<(), Error> {
        let _ = writable;
        let what = "to be opened anew to change what it is used for".to_owned();
        Err(Error::Unsupported { path: self.path().to_owned(), what })
    }

    /// The image below, whose bytes are read where this one has none.
    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    /// Fills `into` from `offset`.
    ///
    /// # Errors
    ///
    /// That of the storage; what `into` holds then is undefined.
    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Writes `from` at `offset`.
    ///
    /// # Errors
    ///
    /// That of the storage; what the range holds then is undefined, but for the two errors of the module's introduction.
    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()>;

    /// Makes a range read as zeroes; with `unmap`, giving its space back where that can be done.
    ///
    /// # Errors
    ///
    /// That of the storage.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Says that the contents of a range no longer matter. It reads as zeroes or as before; what can be given back to
    /// the file system is.
    ///
    /// # Errors
    ///
    /// That of the storage. An image that cannot discard does nothing and succeeds.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Returns once everything done before is stable.
    ///
    /// # Errors
    ///
    /// That of the storage.
    fn flush(&self) -> io::Result<()>;

    /// The file whose `fdatasync` is all that [`flush`](Self::flush) would do now, if it is so.
    fn flush_is_sync_of(&self) -> Option<u16> {
        None
    }

    /// The files that extents are in: this image's own, then its backing's. The list never changes while it is open.
    fn files(&self) -> &[Arc<File>] {
        &[]
    }

    /// Appends to `extents` where the range lies, in order and without gaps, or appends nothing and gives `None` where
    /// that cannot be told without waiting for storage, or where more has to be done than moving the range's own bytes.
    ///
    /// With a ticket given, space that the range was given stays its own until [`finish`](Self::finish).
    fn locate(&self, offset: u64, len: u64, access: Access, extents: &mut Vec<Extent>) -> Option<Ticket> {
        let _ = (offset, len, access, extents);
        None
    }

    /// Everything located under `ticket` was moved; `ok` says whether it went well. After a failure a range that had its
    /// space before is undefined, and one that was given space reads as before.
    fn finish(&self, ticket: Ticket, ok: bool) {
        let _ = (ticket, ok);
    }

    /// What a range that begins at `offset` and is as long as possible, but at most `len`, holds in this image itself.
    ///
    /// # Errors
    ///
    /// That of the storage.
    fn run(&self, offset: u64, len: u64) -> io::Result<Run>;

    /// Makes the disk larger; what is new reads as zeroes.
    ///
    /// # Errors
    ///
    /// That of the storage; `InvalidInput` for a smaller size or one that is none, `Unsupported` where it cannot be done.
    fn grow(&self, size: u64) -> io::Result<()>;

    /// Copies into this image what the range reads as in the backing, wherever this image has nothing of its own. Writes
    /// to the same range at the same time win.
    ///
    /// # Errors
    ///
    /// That of the storage; `Unsupported` for an image that never has a backing.
    fn pull(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// What is to be said of it.
    ///
    /// # Errors
    ///
    /// That of the storage.
    fn info(&self) -> io::Result<Info>;

    /// By what an image made on this one knows it again.
    ///
    /// # Errors
    ///
    /// That of the storage.
    fn identity(&self) -> io::Result<Identity>;
}

/// Kinds of image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk as they are: a regular file, dense or sparse, or a block device.
    Flat,
    /// Our copy-on-write format (`docs/image-format.md`).
    Thin,
    /// QEMU's.
    Qcow2,
    /// VMware's.
    Vmdk,
    /// Microsoft's, which is only recognised.
    Vhdx,
}

impl Format {
    /// Its name, as in `vm.toml` and on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Flat => "flat",
            Self::Thin => "thin",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Flat, Self::Thin, Self::Qcow2, Self::Vmdk, Self::Vhdx]
            .into_iter()
            .find(|format| format.as_str() == text)
            .ok_or_else(|| "has to be one of \"flat\", \"thin\", \"qcow2\", \"vmdk\"".to_owned())
    }
}

/// What a range holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// How long it is, in bytes: at least one sector.
    pub len: u64,
    /// What it holds.
    pub kind: RunKind,
}

/// What a range holds in one image of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RunKind {
    /// Bytes.
    Data,
    /// Zeroes, known without reading them, whatever the backing holds.
    Zero,
    /// Nothing: it reads as the backing does, or as zeroes where there is none.
    Absent,
}

/// By what an image is known again: see `docs/image-format.md`, "Backing".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Size as a disk in bytes.
    pub size: u64,
    /// The UUID of a thin image; of others what their bytes come to.
    pub id: [u8; 16],
    /// Which of the image's states it is: a thin image's generation; of others the time of their last change, in
    /// nanoseconds since 1970.
    pub state: u64,
}

impl Identity {
    /// Noted as the state of what an image is being merged into, which changes meanwhile: any is right.
    pub const ANY_STATE: u64 = u64::MAX;
}

/// What there is to say of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Info {
    /// The file.
    pub path: PathBuf,
    /// Its kind.
    pub format: Format,
    /// Size as a disk in bytes.
    pub size: u64,
    /// What it takes of its file system, in bytes.
    pub allocated: u64,
    /// Unit of allocation in bytes, where it has one.
    pub cluster_size: Option<u64>,
    /// The most it may take of its file system, in bytes.
    pub max_size: Option<u64>,
    /// The image below, as this one names it.
    pub backing: Option<PathBuf>,
    /// Anything else, ready to be shown: a name and a value.
    pub details: Vec<(String, String)>,
}

/// An image that cannot be opened, made or changed as a whole.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file does not open.
    #[error("cannot open disk {} for {}", path.display(), if *writable { "reading and writing" } else { "reading" })]
    Open {
        /// The file.
        path: PathBuf,
        /// Whether writing was asked for.
        writable: bool,
        /// What the system answered.
        source: io::Error,
    },
    /// Neither file nor block device.
    #[error("disk {} is {kind}; a disk is a regular file or a block device", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The host itself uses the block device.
    #[error("disk {} is in use by this host: mounted, part of another device, or open exclusively", path.display())]
    Busy {
        /// The device.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("disk {} holds {size} bytes, which is less than one sector ({SECTOR} bytes)", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Somebody else has it.
    #[error("disk {} is in use by {holder}; a disk has either one writer or any number of readers", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
        /// Who holds the lock: host, process and guest, as far as can be told.
        holder: String,
    },
    /// There are no locks where it lies.
    #[error("cannot lock disk {}, and without a lock two guests could write to it", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The file is not what it is said to be, or damaged.
    #[error("{} is not a sound {format} image: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What it was taken for.
        format: Format,
        /// Which structure is wrong, and how.
        what: String,
    },
    /// It needs what this version does not have.
    #[error("{} needs {what}, which this version of vmm does not have", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What it needs.
        what: String,
    },
    /// Its backing is wrong.
    #[error("the backing of {} is wrong: {what}", path.display())]
    Backing {
        /// The image on top.
        path: PathBuf,
        /// What is wrong with its backing, and what would be right.
        what: String,
    },
    /// The backing does not open.
    #[error("cannot open the backing of {}", path.display())]
    BackingOpen {
        /// The image on top.
        path: PathBuf,
        /// Why.
        source: Box<Error>,
    },
    /// Its file system does not let the page cache be passed by.
    #[error("{}: cache \"none\" needs direct I/O, and {why}; use cache \"writeback\"", path.display())]
    Direct {
        /// The file.
        path: PathBuf,
        /// What stands in the way.
        why: String,
    },
    /// Something asked for that cannot be.
    #[error("{}: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What was asked, and what would be right.
        what: String,
    },
    /// Somebody wanted it no longer.
    #[error("{} is not finished: it was interrupted", path.display())]
    Interrupted {
        /// The file.
        path: PathBuf,
    },
    /// Reading, writing or another step failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The step.
        what: &'static str,
        /// What the system answered.
        source: io::Error,
    },
}

impl Error {
    /// The same about `to` where it is about `from`: a file that has another name for its users than for those who make it.
    #[must_use]
    pub fn about(mut self, from: &Path, to: &Path) -> Self {
        match &mut self {
            Self::Open { path, .. }
            | Self::Kind { path, .. }
            | Self::Busy { path }
            | Self::Empty { path, .. }
            | Self::Locked { path, .. }
            | Self::Lock { path, .. }
            | Self::Corrupt { path, .. }
            | Self::Unsupported { path, .. }
            | Self::Backing { path, .. }
            | Self::BackingOpen { path, .. }
            | Self::Direct { path, .. }
            | Self::Invalid { path, .. }
            | Self::Interrupted { path }
            | Self::Io { path, .. }
                if path == from =>
            {
                to.clone_into(path);
            }
            _ => {}
        }
        self
    }
}
