//! Disk modes: what becomes of what a guest writes.
//!
//! | mode | a guest's writes go to | at power-off |
//! | --- | --- | --- |
//! | persistent | the image | |
//! | nonpersistent | a file without a name on top of it | they are gone |
//! | undoable | the redo log `IMG.redo` on top of it | they are committed, discarded or kept |
//! | append | the same | they are kept, until somebody commits or discards them |
//!
//! A redo log is a thin image. While there is one, its image is not opened persistently: what the log holds would be lost or mixed.
//!
//! `IMG.redo.merging` is a log that is being committed while the guest goes on with a new one; once there is such a file,
//! what it holds belongs into the image, whatever becomes of the new log.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use crate::image::{Error, Format, Identity, Image};
use crate::merge::{Layer, collapse};
use crate::open::{Cache, OpenOptions, Opened as Locked};
use crate::ops::Progress;
use crate::overlay::{self, open_frozen, refuse_marked};
use crate::snapshot;
use crate::steps::{self, beside, failed, is_same};
use crate::thin::{self, Thin};

#[cfg(test)]
mod tests;

/// What becomes of a guest's writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// They are in the image.
    #[default]
    Persistent,
    /// They are gone with the guest.
    Nonpersistent,
    /// They are in a redo log, of which is decided at power-off.
    Undoable,
    /// They are in a redo log, which stays.
    Append,
}

impl Mode {
    /// Its name, as in `vm.toml`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Persistent => "persistent",
            Self::Nonpersistent => "nonpersistent",
            Self::Undoable => "undoable",
            Self::Append => "append",
        }
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// A disk opened in a mode.
#[derive(Debug)]
pub struct Opened {
    /// What the guest is given.
    pub image: Arc<dyn Image>,
    /// The image as it was before, which is only read; not if the mode is persistent.
    pub base: Option<Arc<dyn Image>>,
    /// The redo log, if there is one that stays.
    pub redo: Option<PathBuf>,
}

/// The redo log of an image.
#[must_use]
pub fn redo_path(path: &Path) -> PathBuf {
    beside(path, ".redo")
}

/// The redo log that is being committed while the guest goes on.
pub(crate) fn merging_path(path: &Path) -> PathBuf {
    beside(path, ".redo.merging")
}

/// Where a new redo log is made.
pub(crate) fn new_path(path: &Path) -> PathBuf {
    beside(path, ".redo.new")
}

/// A file of changes that wait to be committed or discarded.
#[must_use]
pub fn pending(path: &Path) -> Option<PathBuf> {
    let path = std::fs::canonicalize(path).ok()?;
    [redo_path(&path), merging_path(&path)].into_iter().find(|log| log.symlink_metadata().is_ok())
}

/// Refuses an image with changes that wait.
pub(crate) fn refuse_pending(path: &Path) -> Result<(), Error> {
    let Some(log) = pending(path) else { return Ok(()) };
    let what = format!(
        "has changes that were not decided upon, in {}: commit or discard them first (vmm image commit or discard), or use mode \
         \"undoable\" or \"append\" to go on with them",
        log.display()
    );
    Err(Error::Invalid { path: path.to_owned(), what })
}

/// Opens the disk at `path` in a mode. `options.writable` counts for a persistent one only; all others take what a guest writes.
///
/// # Errors
///
/// [`Error`]; [`Error::Invalid`] also for a persistent one with a redo log.
pub fn open(path: &Path, mode: Mode, options: &OpenOptions) -> Result<Opened, Error> {
    let path = &steps::real(path)?;
    match mode {
        Mode::Persistent => {
            refuse_pending(path)?;
            if options.writable {
                refuse_marked(path, "were written to")?;
                snapshot::refuse_snapshot(path)?;
            }
            snapshot::refuse_wrong_format(path, options)?;
            Ok(Opened { image: snapshot::open_head(path, options)?, base: None, redo: None })
        }
        Mode::Nonpersistent => {
            snapshot::refuse_wrong_format(path, options)?;
            let base = crate::open(path, &OpenOptions { writable: false, ..options.clone() })?;
            let image = unnamed(path, &base, options)?;
            Ok(Opened { image, base: Some(base), redo: None })
        }
        Mode::Undoable | Mode::Append => {
            refuse_device(path)?;
            snapshot::refuse_snapshot(path)?;
            snapshot::refuse_wrong_format(path, options)?;
            with_log(path, options)
        }
    }
}

fn is_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|about| about.file_type().is_block_device())
}

fn refuse_device(path: &Path) -> Result<(), Error> {
    if !is_device(path) {
        return Ok(());
    }
    let what = "is a block device, beside which no redo log can lie; make a thin image with it as backing, and use that";
    Err(Error::Invalid { path: path.to_owned(), what: what.to_owned() })
}

/// A name in `directory` that nobody else uses.
fn temporary(directory: &Path, path: &Path) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    directory.join(format!(".{name}.redo-{}-{count}", std::process::id()))
}

/// Removes what a crash has left of [`temporary`] files.
fn remove_stale(path: &Path) {
    const OLD: std::time::Duration = std::time::Duration::from_secs(60);
    let prefix = format!(".{}.redo-", path.file_name().unwrap_or_default().to_string_lossy());
    let entries = path.parent().and_then(|parent| std::fs::read_dir(parent).ok());
    for entry in entries.into_iter().flatten().flatten() {
        let is_old = || entry.metadata().ok()?.modified().ok()?.elapsed().ok().map(|age| age > OLD);
        if entry.file_name().to_string_lossy().starts_with(&prefix) && is_old() == Some(true) {
            let _ = std::fs::remove_file(entry.path());
        }
    }
}

/// An overlay that is gone with this process. Nothing of it has to survive, so no flush waits.
fn unnamed(path: &Path, base: &Arc<dyn Image>, options: &OpenOptions) -> Result<Arc<dyn Image>, Error> {
    let elsewhere = std::env::temp_dir();
    let directory = if is_device(path) { &elsewhere } else { path.parent().unwrap_or(Path::new(".")) };
    let cache = if options.cache == Cache::Writeback { Cache::Unsafe } else { options.cache };
    let options = OpenOptions { writable: true, format: Some(Format::Thin), cache, ..options.clone() };
    let identity = base.identity().map_err(failed(path, "identify"))?;
    let create = thin::Create {
        backing: Some((file_name(path), base.format(), identity)),
        ..thin::Create::new(base.size())
    };
    let (file, name) = unnamed_file(directory, path)?;
    let made = thin::create_in(&file, path, &create);
    // The open file by another descriptor, wherever its name is by now.
    let opened = made.and_then(|()| {
        let descriptor = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        Thin::open(&descriptor, &options, Some(Arc::clone(base)))
    });
    if let Some(name) = name {
        let _ = std::fs::remove_file(name);
    }
    Ok(Arc::new(opened?.renamed(path)))
}

/// An empty file without a name; where the file system has no such files, the name that it has is given, to be removed at once.
fn unnamed_file(directory: &Path, path: &Path) -> Result<(File, Option<PathBuf>), Error> {
    let mut options = File::options();
    options.read(true).write(true);
    if let Ok(file) = options.clone().custom_flags(libc::O_TMPFILE).mode(0o600).open(directory) {
        return Ok((file, None));
    }
    remove_stale(path);
    let name = temporary(directory, path);
    let file = options.create_new(true).mode(0o600).open(&name);
    file.map(|file| (file, Some(name.clone()))).map_err(|source| Error::Open {
        path: name,
        writable: true,
        source,
    })
}

fn with_log(path: &Path, options: &OpenOptions) -> Result<Opened, Error> {
    let base = open_frozen(path, options)?;
    let (log, merging) = (redo_path(path), merging_path(path));
    let name = PathBuf::from(path.file_name().unwrap_or_default());
    let writable = OpenOptions { writable: true, format: Some(Format::Thin), ..options.clone() };
    if log.symlink_metadata().is_err() {
        remove_stale(path);
        let below = match merging.symlink_metadata() {
            // A commit that has to be finished, whose log is what the guest saw last.
            Ok(_) => open_merging(&merging, &base, options)?,
            Err(_) => Arc::clone(&base),
        };
        let named = if Arc::ptr_eq(&below, &base) { name } else { file_name(&merging) };
        let new = temporary(path.parent().unwrap_or(Path::new(".")), path);
        overlay::create(&new, &*below, &named)?;
        // Whoever made one at the same time has it locked by now, or will be refused.
        let linked = steps::link(&new, &log);
        let _ = std::fs::remove_file(&new);
        match linked {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::AlreadyExists => {}
            linked => linked?,
        }
    }
    let below = match thin::peek_backing(&log)?.is_some_and(|noted| noted.path == file_name(&merging)) {
        true => open_merging(&merging, &base, options)?,
        false => Arc::clone(&base),
    };
    let image = Arc::new(Thin::open(&log, &writable, Some(below)).map_err(|error| explain(error, &log))?);
    remove_merged(path)?;
    steps::remove(&new_path(path))?;
    Ok(Opened { image, base: Some(base), redo: Some(log) })
}

fn file_name(path: &Path) -> PathBuf {
    PathBuf::from(path.file_name().unwrap_or_default())
}

fn open_merging(
    merging: &Path,
    base: &Arc<dyn Image>,
    options: &OpenOptions,
) -> Result<Arc<dyn Image>, Error> {
    let options = OpenOptions { writable: true, frozen: true, format: Some(Format::Thin), ..options.clone() };
    Ok(Arc::new(Thin::open(merging, &options, Some(Arc::clone(base)))?))
}

/// Says what to do about a log that does not fit its image any more.
fn explain(error: Error, log: &Path) -> Error {
    match error {
        Error::Backing { path, what } => Error::Backing {
            path,
            what: format!(
                "{what}. The redo log {} fits the image as it was; discard it, or make it fit (vmm image rebase)",
                log.display()
            ),
        },
        error => error,
    }
}

/// Writes what the redo log holds to the image, and removes the log. Can be repeated if it was cut off.
///
/// # Errors
///
/// [`Error::Invalid`] if there is no log; [`Error::Locked`] if a guest uses it, or another reads the image;
/// [`Error::Interrupted`] once `progress` says to stop, and any other [`Error`]. Then the log still stands for the disk.
pub fn commit(path: &Path, progress: &mut Progress<'_>) -> Result<(), Error> {
    commit_as(path, &OpenOptions::default(), progress)
}

/// As [`commit`], with the format and the owner's name that `options` give.
///
/// # Errors
///
/// As [`commit`].
pub fn commit_as(path: &Path, options: &OpenOptions, progress: &mut Progress<'_>) -> Result<(), Error> {
    let path = &steps::real(path)?;
    if pending(path).is_none() {
        let what = format!("has nothing to commit: there is no {}", redo_path(path).display());
        return Err(Error::Invalid { path: path.clone(), what });
    }
    refuse_marked(path, "were written to")?;
    let (log, merging) = (redo_path(path), merging_path(path));
    if log.symlink_metadata().is_ok() {
        let _alone = Locked::open(&log, &OpenOptions { writable: true, ..OpenOptions::default() })?;
        remove_merged(path)?;
    }
    let base = crate::open(path, &OpenOptions { writable: true, ..options.clone() })?;
    let layers = layers(path, &base, options)?;
    collapse(&base, &file_name(path), &layers, options.format.is_some(), progress)?;
    drop(layers);
    steps::remove(&new_path(path))?;
    steps::remove(&log)?;
    steps::remove(&merging)
}

/// The logs on an image, the lowest first.
fn layers(path: &Path, base: &Arc<dyn Image>, options: &OpenOptions) -> Result<Vec<Layer>, Error> {
    let options = OpenOptions { writable: true, format: Some(Format::Thin), ..options.clone() };
    let mut layers: Vec<Layer> = Vec::new();
    for log in [merging_path(path), redo_path(path)] {
        if log.symlink_metadata().is_err() {
            continue;
        }
        let below = layers.last().map(|layer| Arc::clone(&layer.image) as Arc<dyn Image>);
        let below = below.unwrap_or_else(|| Arc::clone(base));
        let image = Thin::open(&log, &options, Some(below)).map_err(|error| explain(error, &log))?;
        layers.push(Layer { image: Arc::new(image), path: log });
    }
    Ok(layers)
}

/// Removes the redo log: the disk is as it was.
///
/// # Errors
///
/// [`Error::Invalid`] if there is no log, or if its commit has begun; [`Error::Locked`] if a guest uses it.
pub fn discard(path: &Path) -> Result<(), Error> {
    let path = &steps::real(path)?;
    let (log, merging) = (redo_path(path), merging_path(path));
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    if pending(path).is_none() {
        let what = format!("has nothing to discard: there is no {}", log.display());
        return Err(Error::Invalid { path: path.clone(), what });
    }
    // The log itself need not be sound.
    let has_log = log.symlink_metadata().is_ok();
    let _alone = if has_log { Some(Locked::open(&log, &options)?) } else { None };
    if has_log {
        remove_merged(path)?;
    }
    if has_log && is_being_merged(&log) {
        let what =
            "is partly written to already: a commit was interrupted. Commit again to finish it".to_owned();
        return Err(Error::Invalid { path: path.clone(), what });
    }
    if merging.symlink_metadata().is_ok() {
        // What that one holds was committed, and the guest has gone on since: that is what is discarded.
        refuse_marked(path, "were written to")?;
        let base = crate::open(path, &options)?;
        let image = Arc::new(Thin::open(&merging, &options, Some(Arc::clone(&base)))?);
        let layer = Layer { image, path: merging.clone() };
        collapse(&base, &file_name(path), &[layer], false, &mut |_, _| std::ops::ControlFlow::Continue(()))?;
    }
    steps::remove(&new_path(path))?;
    steps::remove(&log)?;
    steps::remove(&merging)
}

/// Removes the file of a log that is being committed, if it is not one: the log was not replaced yet, and that is its second
/// name; or it is in the image already, on which the log lies. The caller has the log locked.
fn remove_merged(path: &Path) -> Result<(), Error> {
    let (log, merging) = (redo_path(path), merging_path(path));
    let lies_on_it = || match thin::peek_backing(&log) {
        Ok(noted) => noted.is_some_and(|noted| noted.path == file_name(&merging)),
        // What it lies on does not matter: what is merged once more is what it was.
        Err(_) => true,
    };
    if is_same(&log, &merging) || merging.symlink_metadata().is_ok() && !lies_on_it() {
        steps::remove(&merging)?;
    }
    Ok(())
}

/// Whether what a thin image holds may be in its backing already.
fn is_being_merged(log: &Path) -> bool {
    let noted = thin::peek_backing(log).ok().flatten();
    noted.is_some_and(|noted| noted.identity.state == Identity::ANY_STATE)
}
