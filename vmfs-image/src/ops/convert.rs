//! Making an image of another kind.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{CopyOptions, Progress, copy_with};
use crate::flat::{self, Preallocate};
use crate::foreign;
use crate::image::{Error, Format, Image};
use crate::lock::{Mode, OfdLock};
use crate::open::{OpenOptions, open};
use crate::thin;

/// How an image is converted.
#[derive(Debug, Clone, Copy)]
pub struct ConvertOptions {
    /// What it becomes.
    pub format: Format,
    /// How much space a flat one gets at once.
    pub preallocate: Preallocate,
    /// Bytes that are there, and are zero, become a hole.
    pub detect_zeroes: bool,
}

/// Makes a new image at `path` that reads as `src` does, chain and all. It appears there once it is complete and stable;
/// until then it has a name of its own in the same directory, and nothing is left of it if it does not get that far.
///
/// # Errors
///
/// [`Error::Invalid`] if there is something already, [`Error::Unsupported`] for a format that cannot be written, those of
/// [`copy`](super::copy).
pub fn convert(
    src: &dyn Image,
    path: &Path,
    options: &ConvertOptions,
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    let exists = || Error::Invalid {
        path: path.to_owned(),
        what: "there is something of that name already; remove it first, or take another name".to_owned(),
    };
    if path.symlink_metadata().is_ok() {
        return Err(exists());
    }
    let mut unfinished = Unfinished::new(path)?;
    let filled = fill(src, &mut unfinished, options, progress);
    filled.map_err(|error| error.about(&unfinished.path, path))?;
    unfinished.finish(path).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => exists(),
        _ => Error::Io { path: path.to_owned(), what: "give its name to", source },
    })
}

/// Makes the image, whatever its name.
fn fill(
    src: &dyn Image,
    unfinished: &mut Unfinished,
    options: &ConvertOptions,
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    let path = &unfinished.path;
    match options.format {
        Format::Flat => flat::create(path, src.size(), options.preallocate)?,
        Format::Thin => thin::create(path, &thin::Create::new(src.size()))?,
        Format::Qcow2 => foreign::create(path, src.size(), foreign::CLUSTER)?,
        format => return Err(foreign::not_made(path, format)),
    }
    unfinished.own = inode(path);
    let to = OpenOptions { writable: true, format: Some(options.format), ..OpenOptions::default() };
    let dst = open(path, &to)?;
    // What was given space is to keep it.
    let keep_space = options.preallocate == Preallocate::Full;
    let detect_zeroes = options.detect_zeroes && !keep_space;
    copy_with(src, &*dst, CopyOptions { detect_zeroes, keep_space }, progress)
}

/// A file that is removed unless it is finished.
struct Unfinished {
    path: PathBuf,
    /// What was made there. What somebody else made is theirs.
    own: Option<(u64, u64)>,
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    path.symlink_metadata().ok().map(|about| (about.dev(), about.ino()))
}

impl Unfinished {
    fn new(path: &Path) -> Result<Self, Error> {
        let name = path.file_name().ok_or_else(|| Error::Invalid {
            path: path.to_owned(),
            what: "is no name of a file".to_owned(),
        })?;
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(".unfinished");
        let hidden = path.with_file_name(hidden);
        // One that is left of a process that was killed is locked by nobody.
        if let Ok(file) = File::options().read(true).write(true).open(&hidden) {
            let file = Arc::new(file);
            let lock = OfdLock::acquire(&file, &hidden, Mode::Exclusive, None);
            let _lock = lock.map_err(|error| error.about(&hidden, path))?;
            let removed = std::fs::remove_file(&hidden);
            removed.map_err(|source| Error::Io { path: hidden.clone(), what: "remove", source })?;
        }
        Ok(Self { path: hidden, own: None })
    }

    fn finish(self, path: &Path) -> io::Result<()> {
        let name = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
        let (from, to) = (name(&self.path)?, name(path)?);
        // SAFETY: both names end in zero.
        let renamed = unsafe {
            libc::renameat2(
                libc::AT_FDCWD,
                from.as_ptr(),
                libc::AT_FDCWD,
                to.as_ptr(),
                libc::RENAME_NOREPLACE,
            )
        };
        if renamed == 0 {
            return flat::sync_directory(path);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
        // A file system that cannot rename without replacing: a second name, which never replaces, instead.
        std::fs::hard_link(&self.path, path)?;
        flat::sync_directory(path)
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if self.own.is_some() && inode(&self.path) == self.own {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
