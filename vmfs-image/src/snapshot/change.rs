//! Making a snapshot, and going back to one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{About, NEW, Scan, check, directory, file, invalid, named, recover, refuse_unfinished};
use crate::image::{Error, Format, Image};
use crate::open::{OpenOptions, Opened as Locked};
use crate::overlay::{self, refuse_marked};
use crate::redo::refuse_pending;
use crate::steps::{self, beside, failed, is_same};
use crate::thin::Thin;

/// A new head that waits to take the place of an image in use.
#[derive(Debug)]
pub struct Prepared {
    path: PathBuf,
    old: Arc<dyn Image>,
    /// The second name that the old head has by now, and how overlays note it.
    kept: PathBuf,
    kept_named: PathBuf,
    new: PathBuf,
    options: OpenOptions,
    /// Nothing has to be cleaned up.
    done: bool,
}

impl Prepared {
    /// Gives the file of `old` the second name `kept`, which a new overlay at `new` will note as `kept_named`.
    pub(crate) fn new(
        path: &Path,
        old: Arc<dyn Image>,
        (kept, kept_named): (PathBuf, PathBuf),
        new: PathBuf,
        options: &OpenOptions,
    ) -> Result<Self, Error> {
        steps::remove(&new)?;
        steps::link(path, &kept)?;
        // Much of what is to be flushed is so before anybody has to wait for it.
        old.flush().map_err(failed(path, "make stable what was written to"))?;
        let options = OpenOptions { writable: true, format: Some(Format::Thin), ..options.clone() };
        Ok(Self { path: path.to_owned(), old, kept, kept_named, new, options, done: false })
    }

    /// Puts the new head in the place of the old one, which is frozen with all that was done until now, and gives it. For a
    /// guest that runs, the disk has to be drained; it takes as long as a few small writes to stable storage. The lock of
    /// the old one becomes that of a reader, and the new one is locked for the guest before anybody can find it.
    ///
    /// # Errors
    ///
    /// [`Error`]; then the old image is what it was, and can be written to.
    pub fn switch(mut self) -> Result<Arc<dyn Image>, Error> {
        self.old.set_writable(false)?;
        let switched = self.replace();
        self.done = switched.is_ok();
        switched
    }

    fn replace(&self) -> Result<Arc<dyn Image>, Error> {
        overlay::create(&self.new, &*self.old, &self.kept_named)?;
        let image = Thin::open(&self.new, &self.options, Some(Arc::clone(&self.old)))?;
        steps::rename(&self.new, &self.path)?;
        Ok(Arc::new(image.renamed(&self.path)))
    }

    fn undo(&self) -> Result<(), Error> {
        if !is_same(&self.path, &self.kept) {
            // The new head is in its place, but that is not known to be stable.
            let back = beside(&self.kept, ".back");
            steps::link(&self.kept, &back)?;
            steps::rename(&back, &self.path)?;
        }
        steps::remove(&self.new)?;
        steps::remove(&self.kept)
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        if let Err(error) = self.undo() {
            tracing::warn!("a snapshot that was not finished is left over: {error}");
        }
        if !self.old.is_writable()
            && let Err(error) = self.old.set_writable(true)
        {
            tracing::error!("the disk can no longer be written to: {error}");
        }
    }
}

/// What has to be so for a snapshot of the disk at `path` to be made.
fn may_begin(path: &Path, name: &str, format: Format) -> Result<(), Error> {
    use std::os::unix::fs::FileTypeExt;
    check(path, name)?;
    refuse_pending(path)?;
    refuse_marked(path, "became another image")?;
    super::refuse_snapshot(path)?;
    let kind = std::fs::metadata(path).map_err(failed(path, "examine"))?.file_type();
    if kind.is_block_device() {
        return invalid(
            path,
            "is a block device, beside which no snapshot can lie; make a thin image with it as backing, and use that",
        );
    }
    if !matches!(format, Format::Flat | Format::Thin) {
        return invalid(
            path,
            format!(
                "is a {format} image, of which no snapshots can be made; make a thin image with it as backing, and use that"
            ),
        );
    }
    Ok(())
}

/// Begins a snapshot of `image`, which is the disk at `path` and in use, perhaps by a guest that runs. `options` are those that
/// it was opened with. What takes time is done here; [`Prepared::switch`] ends it, and dropping it gives up.
///
/// # Errors
///
/// [`Error::Invalid`] for a name that is none or is taken, and for disks of which no snapshot can be made; other [`Error`]s.
/// The image is as it was.
pub fn prepare(
    path: &Path,
    image: &Arc<dyn Image>,
    name: &str,
    about: &About,
    options: &OpenOptions,
) -> Result<Prepared, Error> {
    let path = &steps::real(path)?;
    may_begin(path, name, image.format())?;
    overlay::refuse_other(path, &**image)?;
    let scan = recover(path)?;
    refuse_unfinished(path, &scan)?;
    steps::make_directory(&directory(path))?;
    let kept = file(path, name);
    if kept.symlink_metadata().is_ok() {
        return invalid(path, format!("has a snapshot {name} already"));
    }
    about.write(path, name, image.format())?;
    Prepared::new(path, Arc::clone(image), (kept, named(path, name)), directory(path).join(NEW), options)
}

/// Makes a snapshot of the disk at `path`, which nobody uses.
///
/// # Errors
///
/// As [`prepare`], and [`Error::Locked`].
pub fn create(path: &Path, name: &str, about: &About) -> Result<(), Error> {
    let path = &steps::real(path)?;
    may_begin(path, name, crate::probe(path)?)?;
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    let image = crate::open(path, &options)?;
    prepare(path, &image, name, about, &options)?.switch().map(drop)
}

/// Makes the disk at `path`, which nobody uses, what it was when the snapshot `name` was made. What it is now is lost, unless
/// `keep` is the name of a snapshot that it becomes.
///
/// # Errors
///
/// [`Error::Invalid`] where there is no such snapshot, or one of the name `keep`; [`Error::Locked`]; other [`Error`]s.
pub fn revert(path: &Path, name: &str, keep: Option<&str>) -> Result<(), Error> {
    let path = &steps::real(path)?;
    check(path, name)?;
    keep.map_or(Ok(()), |keep| check(path, keep))?;
    refuse_pending(path)?;
    refuse_marked(path, "became another image")?;
    // The head is not read: it may be damaged.
    let _alone = Locked::open(path, &OpenOptions { writable: true, ..OpenOptions::default() })?;
    let scan = recover(path)?;
    refuse_unfinished(path, &scan)?;
    let target = existing(path, &scan, name)?;
    let base = crate::open(
        &target,
        &OpenOptions { format: Some(scan_format(&scan, name)), ..OpenOptions::default() },
    )?;
    let new = directory(path).join(NEW);
    steps::remove(&new)?;
    overlay::create(&new, &*base, &named(path, name))?;
    if let Some(keep) = keep {
        if file(path, keep).symlink_metadata().is_ok() {
            return invalid(path, format!("has a snapshot {keep} already"));
        }
        About::default().write(path, keep, crate::probe(path)?)?;
        steps::link(path, &file(path, keep))?;
    }
    steps::rename(&new, path)
}

/// The file of a snapshot that there is.
pub(super) fn existing(path: &Path, scan: &Scan, name: &str) -> Result<PathBuf, Error> {
    match scan.find(name) {
        Some(index) => Ok(scan.entries[index].path.clone()),
        None => {
            let names: Vec<_> = scan.entries.iter().filter_map(super::Entry::name).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            invalid(path, format!("has no snapshot {name}; it has: {names}"))
        }
    }
}

fn scan_format(scan: &Scan, name: &str) -> Format {
    scan.find(name).map_or(Format::Flat, |index| scan.entries[index].format)
}
