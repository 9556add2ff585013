//! Opening the images of disks in their modes.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use vmfs_image::redo::{self, Opened};
use vmfs_image::{Cache, Error, Format, OpenOptions};

use crate::config::model::{Disk, Mode};

/// What stands behind a disk.
#[derive(Debug)]
pub struct Medium {
    /// The image, by the path that was asked for.
    pub path: PathBuf,
    /// How it was opened.
    pub options: OpenOptions,
    /// What it was opened to.
    pub opened: Opened,
}

/// The disk of the configuration that is opened.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub path: PathBuf,
    pub mode: Mode,
    pub readonly: bool,
    pub format: Option<Format>,
    pub cache: Cache,
    /// The guest's name.
    pub guest: String,
}

impl Wanted {
    pub fn of(disk: &Disk, guest: &str) -> Self {
        Self {
            path: disk.path.clone(),
            mode: disk.mode,
            readonly: disk.readonly,
            format: disk.format,
            cache: disk.cache,
            guest: guest.to_owned(),
        }
    }

    /// Opens it, and locks it. A redo log that had to be made is noted in `fresh`.
    ///
    /// # Errors
    ///
    /// [`Error`]; nothing is left of what was made then.
    pub fn open(self, fresh: &mut Fresh) -> Result<Medium, Error> {
        let options = OpenOptions {
            writable: !self.readonly,
            format: self.format,
            cache: self.cache,
            owner: Some(self.guest),
            ..OpenOptions::default()
        };
        let is_new = has_log(self.mode) && redo::pending(&self.path).is_none();
        let opened = redo::open(&self.path, self.mode, &options);
        if is_new {
            fresh.0.push(self.path.clone());
        }
        Ok(Medium { path: self.path, options, opened: opened? })
    }
}

/// Redo logs that were made for a guest. They are empty until it runs.
#[derive(Debug, Default)]
pub struct Fresh(Vec<PathBuf>);

impl Fresh {
    /// Removes them: the guest does not run. Their disks are closed.
    pub fn remove(self) {
        for path in self.0 {
            if redo::redo_path(&path).symlink_metadata().is_ok()
                && let Err(error) = redo::discard(&path)
            {
                tracing::warn!("an empty redo log is left over: {error}");
            }
        }
    }
}

/// Whether what the guest writes goes to a log that has a name.
pub fn has_log(mode: Mode) -> bool {
    matches!(mode, Mode::Undoable | Mode::Append)
}

/// The key of the configuration that `error` is about, with which the disk `wanted` did not open.
pub fn key(wanted: &Wanted, error: &Error) -> &'static str {
    let path = &wanted.path;
    match error {
        Error::Direct { .. } => "cache",
        Error::Invalid { .. } if wanted.mode == Mode::Persistent && redo::pending(path).is_some() => "mode",
        Error::Invalid { .. } if has_log(wanted.mode) && is_device(path) => "mode",
        Error::Corrupt { .. } | Error::Unsupported { .. } | Error::Invalid { .. }
            if wanted.format.is_some_and(|given| vmfs_image::probe(path).is_ok_and(|is| is != given)) =>
        {
            "format"
        }
        _ => "path",
    }
}

fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|about| about.file_type().is_block_device())
}
