//! Verbs that change images. Those that a running guest's monitor can do for its own disks are handed to it.

use std::path::{Path, PathBuf};

use api::client::{self, Reason};
use vmfs_image::ops::{self, Comparison};
use vmfs_image::redo::{self, Mode};
use vmfs_image::snapshot::{self, About};
use vmfs_image::{Error, Format, Image, OpenOptions, merge, thin};

use super::super::Failure;
use super::args::{Limit, SizeChange};
use super::output::{self, Done};
use super::progress::Progress;
use super::running::{self, Running};
use super::{failure, make};

fn invalid<T>(path: &Path, what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid { path: path.to_owned(), what: what.into() })
}

fn writable() -> OpenOptions {
    OpenOptions { writable: true, ..OpenOptions::default() }
}

/// What came of asking a guest's monitor.
#[derive(Debug, thiserror::Error)]
#[error("disk {} is in use by guest {guest}, whose monitor was asked (`vmm stop {guest}` ends that guest)", path.display())]
struct Asked {
    path: PathBuf,
    guest: String,
    source: client::Error,
}

/// What a guest's monitor does not do. It names disk and guest itself.
#[derive(Debug, thiserror::Error)]
#[error("{}, {why}", path.display())]
struct Refused {
    path: PathBuf,
    why: String,
}

/// If `result` is that somebody has the image, and that is a guest of this host, does it by the guest and gives its name.
fn or_by_guest(
    path: &Path,
    result: Result<(), Error>,
    by_guest: impl FnOnce(&mut Running) -> Result<(), Failure>,
) -> Result<Option<String>, Failure> {
    match result {
        Ok(()) => Ok(None),
        // What is impossible because of the redo log or the snapshots of a disk need not be so for its guest.
        Err(error @ (Error::Locked { .. } | Error::Invalid { .. })) => {
            let Some(mut running) = running::find(path) else { return Err(failure(error)) };
            match by_guest(&mut running) {
                Ok(()) => Ok(Some(running.guest)),
                Err(Failure::Error(source, status)) => {
                    let (path, guest) = (path.to_owned(), running.guest);
                    let error = match source.downcast::<client::Error>().map(|error| *error) {
                        Ok(client::Error { reason: Reason::Refused(why), .. }) => {
                            Refused { path, why }.into()
                        }
                        Ok(error) => Asked { path, guest, source: error }.into(),
                        // It says by itself of what and of whom it is.
                        Err(error) => error,
                    };
                    Err(Failure::Error(error, status))
                }
                Err(told) => Err(told),
            }
        }
        Err(error) => Err(failure(error)),
    }
}

/// `vmm image snapshot create`
pub fn snapshot(path: &Path, name: &str, description: String, json: bool) -> Result<(), Failure> {
    let mut about = About::default();
    about.description = description;
    let made = snapshot::create(path, name, &about);
    let guest = or_by_guest(path, made, |running| Ok(running.snapshot(name, &about.description)?))?;
    let done = Done { path, done: "snapshot create", snapshot: Some(name), guest };
    done.say(json, &format!("snapshot {name} made"))
}

/// `vmm image snapshot delete`
pub fn delete_snapshot(path: &Path, name: &str, json: bool) -> Result<(), Failure> {
    let mut progress = Progress::begin("deleting")?;
    snapshot::delete(path, name, &mut |done, total| progress.report(done, total)).map_err(failure)?;
    drop(progress);
    let done = Done { path, done: "snapshot delete", snapshot: Some(name), guest: None };
    done.say(json, &format!("snapshot {name} deleted"))
}

/// `vmm image revert`
pub fn revert(path: &Path, name: &str, keep: Option<&str>, json: bool) -> Result<(), Failure> {
    snapshot::revert(path, name, keep).map_err(failure)?;
    let done = Done { path, done: "revert", snapshot: Some(name), guest: None };
    done.say(json, &format!("is what it was at {name}"))
}

/// `vmm image commit`
pub fn commit(path: &Path, json: bool) -> Result<(), Failure> {
    let mut progress = Progress::begin("committing")?;
    let mut report = |done, total| progress.report(done, total);
    let result = match redo::pending(path) {
        Some(_) => redo::commit(path, &mut report),
        None => merge::commit(path, &mut report),
    };
    let guest = or_by_guest(path, result, |running| running.commit(&mut progress))?;
    drop(progress);
    Done { path, done: "commit", snapshot: None, guest }.say(json, "committed")
}

/// `vmm image discard`
pub fn discard(path: &Path, json: bool) -> Result<(), Failure> {
    redo::discard(path).map_err(failure)?;
    Done { path, done: "discard", snapshot: None, guest: None }.say(json, "changes thrown away")
}

/// `vmm image stream`
pub fn stream(path: &Path, onto: Option<&Path>, json: bool) -> Result<(), Failure> {
    let mut progress = Progress::begin("streaming")?;
    let result = merge::stream(path, onto, &mut |done, total| progress.report(done, total));
    let guest = or_by_guest(path, result, |running| match onto {
        None => running.stream(&mut progress),
        Some(_) => Err(failure(Error::Invalid {
            path: path.to_owned(),
            what: format!(
                "a running guest ({}) streams all of the chain; --onto is for images at rest",
                running.guest
            ),
        })),
    })?;
    drop(progress);
    let text = if onto.is_some() { "has all that is above" } else { "lies on no other image any more" };
    Done { path, done: "stream", snapshot: None, guest }.say(json, text)
}

/// `vmm image resize`
pub fn resize(
    path: &Path,
    size: Option<SizeChange>,
    max_size: Option<Limit>,
    json: bool,
) -> Result<(), Failure> {
    let larger = |now: u64| match size {
        None => Ok(None),
        Some(SizeChange::To(size)) => Ok(Some(size)),
        Some(SizeChange::By(more)) => {
            now.checked_add(more).map(Some).ok_or("is larger than any disk then".to_owned())
        }
    };
    let rest = || {
        let image = redo::open(path, Mode::Persistent, &writable())?.image;
        let wanted = larger(image.size()).or_else(|what| invalid(path, what))?;
        set_max_size(&*image, max_size)?;
        wanted.map_or(Ok(()), |size| grow(&*image, size))
    };
    or_by_guest(path, rest(), |running| {
        let now = running.size()?.unwrap_or(0);
        let refused = |what: String| failure(Error::Invalid { path: path.to_owned(), what });
        if let Some(Limit(bytes)) = max_size {
            running.set_max_size(bytes)?;
        }
        if let Some(size) = larger(now).map_err(refused)? {
            running.resize(size)?;
        }
        Ok(())
    })?;
    output::made(path, json)
}

fn set_max_size(image: &dyn Image, max_size: Option<Limit>) -> Result<(), Error> {
    let Some(Limit(max_size)) = max_size else { return Ok(()) };
    let path = image.path();
    let Some(thin) = image.as_thin() else {
        return invalid(path, "is no thin image; only these have a max-size");
    };
    thin.set_max_size(max_size).map_err(|source| match source.kind() {
        std::io::ErrorKind::InvalidInput => {
            Error::Invalid { path: path.to_owned(), what: source.to_string() }
        }
        _ => Error::Io { path: path.to_owned(), what: "limit", source },
    })
}

fn grow(image: &dyn Image, size: u64) -> Result<(), Error> {
    let (path, now) = (image.path(), image.size());
    if size < now {
        let show = crate::config::show_size;
        return invalid(path, format!("has {} and only becomes larger, not {}", show(now), show(size)));
    }
    image.grow(size).and_then(|()| image.flush()).map_err(|source| match source.kind() {
        std::io::ErrorKind::InvalidInput => {
            Error::Invalid { path: path.to_owned(), what: source.to_string() }
        }
        _ => Error::Io { path: path.to_owned(), what: "enlarge", source },
    })
}

/// `vmm image rebase`
pub fn rebase(path: &Path, backing: Option<&Path>, accept: bool, json: bool) -> Result<(), Failure> {
    let mut progress = Progress::begin("comparing")?;
    lay(path, backing, accept, &mut progress).map_err(failure)?;
    drop(progress);
    output::made(path, json)
}

fn lay(path: &Path, backing: Option<&Path>, accept: bool, progress: &mut Progress) -> Result<(), Error> {
    let noted = if vmfs_image::probe(path)? == Format::Thin { thin::peek_backing(path)? } else { None };
    let Some(noted) = noted else { return invalid(path, "lies on no other image") };
    let Some(backing) = backing else {
        let options = OpenOptions { format: Some(noted.format), ..OpenOptions::default() };
        let below = vmfs_image::open(&backing_of(path, &noted.path), &options)?;
        let failed = |source| Error::Io { path: below.path().to_owned(), what: "examine", source };
        let identity = below.identity().map_err(failed)?;
        drop(below);
        return thin::set_backing(path, Some((&noted.path, noted.format, identity)));
    };
    if !accept {
        let options = OpenOptions::default();
        let image = vmfs_image::open(path, &options)?;
        let new = vmfs_image::open(backing, &options)?;
        let Some(old) = image.backing() else { return invalid(path, "lies on no other image") };
        let same = ops::compare(&**old, &*new, false, &mut |done, total| progress.report(done, total))?;
        if let Comparison::Different { offset } = same {
            let what = format!(
                "lies on another image than {}: they differ at byte {offset}; --accept lays it there all the same",
                backing.display()
            );
            return invalid(path, what);
        }
    }
    let noted = make::noted(backing, path)?;
    thin::set_backing(path, Some((&noted.path, noted.format, noted.identity)))
}

/// Where the backing is that the image at `path` notes as `noted`: `docs/image-format.md`, "Backing".
pub fn backing_of(path: &Path, noted: &Path) -> PathBuf {
    let directory = path.parent().unwrap_or(Path::new(""));
    let is_snapshots = directory.extension().is_some_and(|extension| extension == "snapshots");
    let home = if is_snapshots { directory.parent().unwrap_or(directory) } else { directory };
    let named = home.join(noted);
    match noted.file_name().map(|name| home.join(name)) {
        Some(beside) if !named.exists() => beside,
        _ => named,
    }
}
