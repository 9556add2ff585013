//! Thin images laid on others: how they are made, and what they note of what they lie on.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::image::{Error, Format, Identity, Image};
use crate::open::OpenOptions;
use crate::steps::{self, failed};
use crate::thin::{self, Thin};

/// Makes an overlay at `path`, where nothing is yet, that lies on `on`, of which it notes the path `named`.
pub(crate) fn create(path: &Path, on: &dyn Image, named: &Path) -> Result<(), Error> {
    steps::before(path)?;
    let backing = Some((named.to_owned(), on.format(), exact(on)?));
    // What may be written does not become more by being written to another file.
    let max_size = on.info().map_err(failed(on.path(), "examine"))?.max_size;
    thin::create(path, &thin::Create { backing, max_size, ..thin::Create::new(on.size()) })
}

/// Whether `image` lies in the file at `path`. Its own path may be one that its file had before.
pub(crate) fn is_at(image: &dyn Image, path: &Path) -> bool {
    let inode = |about: &std::fs::Metadata| (about.dev(), about.ino());
    let own = match image.files().first() {
        Some(file) => file.metadata(),
        None => std::fs::metadata(image.path()),
    };
    matches!((&own, &std::fs::metadata(path)), (Ok(own), Ok(found)) if inode(own) == inode(found))
}

/// The names that the images below `image`, whose own is `at`, have by now, from the next to the last. One that was opened
/// by a name that it has no more is found by what lies on it; one whose file is gone is left out.
#[must_use]
pub fn names_below(image: &dyn Image, at: &Path) -> Vec<PathBuf> {
    let mut names = Vec::new();
    // Where the next may be: what is noted by those above that have found none there.
    let mut noted: Vec<PathBuf> = Vec::new();
    let (mut image, mut at) = (image, Some(at.to_owned()));
    loop {
        let own = image.as_thin().and_then(Thin::noted_backing);
        if let Some((own, at)) = own.zip(at) {
            noted.push(resolve(&at, &own.path));
        }
        let Some(below) = image.backing() else { return names };
        at = noted.iter().find(|name| is_at(&**below, name)).cloned();
        at = at.or_else(|| Some(below.path().to_owned()).filter(|name| is_at(&**below, name)));
        if let Some(name) = &at {
            names.push(name.clone());
            noted.clear();
        }
        image = &**below;
    }
}

/// Refuses an image that is not the one at `path`, but perhaps one on top of it.
pub(crate) fn refuse_other(path: &Path, image: &dyn Image) -> Result<(), Error> {
    if is_at(image, path) {
        return Ok(());
    }
    let what = "is not what the guest writes to: snapshots and merging are for disks that are persistent, or have a redo log";
    Err(Error::Invalid { path: path.to_owned(), what: what.to_owned() })
}

/// Notes in `top` that it lies on `below`, whose path is `named`: as it is now, or with `any` in whatever state it will be.
pub(crate) fn note(top: &Thin, below: &dyn Image, named: &Path, any: bool) -> Result<(), Error> {
    let identity = exact(below)?;
    let identity = if any { Identity { state: Identity::ANY_STATE, ..identity } } else { identity };
    set(top, Some((named, below.format(), identity)))
}

/// Notes in `top` what it lies on.
pub(crate) fn set(top: &Thin, backing: Option<(&Path, Format, Identity)>) -> Result<(), Error> {
    steps::before(top.path())?;
    top.set_backing(backing).map_err(failed(top.path(), "note the backing of"))
}

/// The identity of an image that does not change, made stable with it: a time of change is not part of what a flush of a
/// file writes.
pub(crate) fn exact(image: &dyn Image) -> Result<Identity, Error> {
    let file = image.files().first().filter(|_| image.format() != Format::Thin);
    file.map_or(Ok(()), |file| file.sync_all()).map_err(failed(image.path(), "make stable"))?;
    image.identity().map_err(failed(image.path(), "identify"))
}

/// Makes stable what was written to `image`, and the time of its last change.
pub(crate) fn settle(image: &dyn Image) -> Result<(), Error> {
    steps::before(image.path())?;
    image.flush().map_err(failed(image.path(), "make stable what was written to"))?;
    exact(image).map(drop)
}

/// Opens what is to be changed later, perhaps: read until then, beside other readers. Where that may not be, it is opened to
/// be read.
pub(crate) fn open_frozen(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>, Error> {
    let frozen = OpenOptions { writable: true, frozen: true, ..options.clone() };
    match crate::open(path, &frozen) {
        Err(Error::Open { source, .. }) if is_refused(&source) => {}
        Err(Error::Unsupported { .. } | Error::Busy { .. }) => {}
        opened => return opened,
    }
    crate::open(path, &OpenOptions { writable: false, ..options.clone() })
}

fn is_refused(error: &std::io::Error) -> bool {
    use std::io::ErrorKind;
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)
}

/// Whether an image is marked as the base of clones: nobody may write to its file.
pub(crate) fn is_marked(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o222 == 0)
}

/// Refuses to change an image that is marked as the base of clones.
pub(crate) fn refuse_marked(path: &Path, what: &str) -> Result<(), Error> {
    if !is_marked(path) {
        return Ok(());
    }
    let what = format!(
        "is marked as the base of linked clones, which would be lost if it {what}: nobody has permission to write to its \
         file. Clone it, or take the mark away (chmod u+w) once no clone is left"
    );
    Err(Error::Invalid { path: path.to_owned(), what })
}

/// Marks an image as the base of clones.
pub(crate) fn mark(path: &Path) -> Result<(), Error> {
    let about = std::fs::metadata(path).map_err(failed(path, "examine"))?;
    if !about.is_file() || about.permissions().mode() & 0o222 == 0 {
        return Ok(());
    }
    let mode = about.permissions().mode() & !0o222;
    let marked = std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode));
    marked.map_err(failed(path, "mark as a base (as its owner does with chmod a-w)"))
}

/// Ends the name of the directory of an image's snapshots.
pub(crate) const SNAPSHOTS: &str = ".snapshots";

/// The directory from which an image's path of its backing leads.
pub(crate) fn home(image: &Path) -> &Path {
    let directory = image.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let is_snapshot =
        directory.file_name().is_some_and(|name| name.as_encoded_bytes().ends_with(SNAPSHOTS.as_bytes()));
    match directory.parent().filter(|_| is_snapshot) {
        None => directory,
        Some(above) if above.as_os_str().is_empty() => Path::new("."),
        Some(above) => above,
    }
}

/// Where the backing is that `image` notes as `noted`.
pub(crate) fn resolve(image: &Path, noted: &Path) -> PathBuf {
    let first = home(image).join(noted);
    if first.exists() {
        return first;
    }
    let beside = noted.file_name().zip(image.parent()).map(|(name, parent)| parent.join(name));
    beside.filter(|beside| beside.exists()).unwrap_or(first)
}
