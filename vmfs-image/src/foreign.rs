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
mod io;
mod open;
mod order;
mod qcow2;
#[cfg(test)]
mod tests;
mod vmdk;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, RwLock};

use imago::{FormatAccess, FormatCreateBuilder};

use self::disk::{Disk, Plain};
use self::open::{descriptor, plain, refuse, whole_sectors};
use self::order::Order;
use self::qcow2::Bad;
use crate::flat;
use crate::image::{Error, Format, Image};
use crate::lock::Lock;
use crate::open::{OpenOptions, Opened};

/// Cluster size of a new qcow2 image where no other is wanted, in bytes: QEMU's.
pub const CLUSTER: u64 = 64 << 10;
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
        let cluster = usize::try_from(cluster).map_err(std::io::Error::other)?;
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

/// Examines the header and the tables of the qcow2 image at `path`: whether each is at a place of its own in the file, counted
/// as used, and says what it may say. That the refcounts of data are right is not looked at.
///
/// # Errors
///
/// [`Error::Corrupt`] for an image of which that is not so; other [`Error`]s of opening it.
pub fn check_tables(path: &Path) -> Result<(), Error> {
    let image = Foreign::open(path, Format::Qcow2, &OpenOptions::default())?;
    let refused = refuse(path, Format::Qcow2);
    let len = image.plain.file.metadata().map(|about| about.len()).map_err(|error| refused(error.into()))?;
    let layout = qcow2::Header::read(&image.plain, len).map_err(&refused)?.layout;
    qcow2::check_tables(&image.plain, &layout, len).map_err(&refused)?;
    let mut at = 0;
    while at < image.size() {
        at += image.run(at, image.size() - at).map_err(|error| refused(error.into()))?.len;
    }
    Ok(())
}
