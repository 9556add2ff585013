//! Snapshots of a disk: states of it that stay, by name, as a tree.
//!
//! ```text
//!  web.img                     what the disk is now (the head): a thin image on "fixed"
//!  web.img.snapshots/fresh     was web.img when that snapshot was made, and is changed no more
//!  web.img.snapshots/fixed     the same, later: a thin image on "fresh"
//! ```
//!
//! Who lies on whom is what the images note of their backing; there is no other list. A file whose name begins with a dot
//! is a step on the way:
//!
//! | file | what it is |
//! | --- | --- |
//! | `.NAME.about` | description of the snapshot NAME |
//! | `.new` | an overlay that is to become the head |
//! | a second name of the head's file | the snapshot of that name is being made |
//! | `.del-NAME` | NAME is being deleted: the head is being written to it, and it becomes the head |
//! | `.top` | what the head was when that began, while a guest goes on |
//!
//! Every step is stable before the next one begins, so a crash leaves the disk as before a step or behind it. What is left
//! over is cleaned up by whatever changes the snapshots next.

mod about;
mod change;
mod delete;
#[cfg(test)]
mod tests;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::Serialize;

use crate::image::{Error, Format, Identity, Image};
use crate::open::OpenOptions;
use crate::overlay::{self, SNAPSHOTS, home, open_frozen, resolve};
use crate::steps::{self, beside, failed, is_same};
use crate::thin::{self, Thin};

pub use about::About;
pub use change::{Prepared, create, prepare, revert};
pub use delete::delete;

/// Longest name of a snapshot, in bytes.
pub const MAX_NAME: usize = 64;

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// Its file.
    pub path: PathBuf,
    /// The snapshot that it lies on.
    pub parent: Option<String>,
    /// When it was made.
    pub created: SystemTime,
    /// What was said of it.
    pub description: String,
    /// Whether a guest was running then: the disk is as after a power failure.
    pub running: bool,
    /// Size as a disk in bytes, where it can be told.
    pub size: Option<u64>,
    /// What it takes of its file system, in bytes.
    pub allocated: u64,
    /// Its kind.
    pub format: Format,
    /// Its deletion was interrupted, and has to be finished by deleting it again.
    pub deleting: bool,
}

/// The snapshots of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tree {
    /// All of them, parents before children, and the older before the younger.
    pub snapshots: Vec<Snapshot>,
    /// The one that the disk itself lies on.
    pub head: Option<String>,
}

/// The directory of an image's snapshots.
#[must_use]
pub fn directory(path: &Path) -> PathBuf {
    beside(path, SNAPSHOTS)
}

/// The file of a snapshot.
#[must_use]
pub fn file(path: &Path, name: &str) -> PathBuf {
    directory(path).join(name)
}

/// The path of a snapshot as its image's overlays note it.
fn named(path: &Path, name: &str) -> PathBuf {
    let mut directory = path.file_name().unwrap_or_default().to_owned();
    directory.push(SNAPSHOTS);
    Path::new(&directory).join(name)
}

/// Whether a snapshot can have that name.
///
/// # Errors
///
/// What would be right.
pub fn check_name(name: &str) -> Result<(), String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-+@:".contains(c);
    let begins = name.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    if begins && name.len() <= MAX_NAME && name.chars().all(is_plain) {
        return Ok(());
    }
    Err(format!(
        "a snapshot's name has 1 to {MAX_NAME} characters of a-z, A-Z, 0-9 and . _ - + @ : and begins with a letter or digit"
    ))
}

fn check(path: &Path, name: &str) -> Result<(), Error> {
    check_name(name).map_err(|what| Error::Invalid {
        path: path.to_owned(),
        what: format!("\"{}\": {what}", name.escape_debug()),
    })
}

fn invalid<T>(path: &Path, what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid { path: path.to_owned(), what: what.into() })
}

const DELETING: &str = ".del-";
const TOP: &str = ".top";
const NEW: &str = ".new";

/// A file among the snapshots.
#[derive(Debug, Clone)]
struct Entry {
    /// Its name as a file.
    file: String,
    path: PathBuf,
    /// Index of what it lies on.
    parent: Option<usize>,
    format: Format,
    inode: (u64, u64),
}

impl Entry {
    /// The name of the snapshot, if it is one.
    fn name(&self) -> Option<&str> {
        let name = self.file.strip_prefix(DELETING).unwrap_or(&self.file);
        (!name.starts_with('.')).then_some(name)
    }

    fn is_deleting(&self) -> bool {
        self.file.starts_with(DELETING)
    }
}

/// The files among the snapshots, and which of them the head lies on.
#[derive(Debug)]
struct Scan {
    entries: Vec<Entry>,
    head: Option<usize>,
    /// Names that the head's file has there.
    unfinished: Vec<PathBuf>,
    /// One of them, or the head, takes what it lies on in any state: something was interrupted.
    relaxed: bool,
}

impl Scan {
    fn of(path: &Path) -> Result<Self, Error> {
        let directory = directory(path);
        let mut scan = Self { entries: Vec::new(), head: None, unfinished: Vec::new(), relaxed: false };
        let listing = match std::fs::read_dir(&directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(scan),
            listing => listing.map_err(failed(&directory, "list"))?,
        };
        let mut noted = Vec::new();
        for entry in listing {
            let entry = entry.map_err(failed(&directory, "list"))?;
            let Ok(file) = entry.file_name().into_string() else { continue };
            let path_of = entry.path();
            let is_image = check_name(&file).is_ok() || file == TOP || file.starts_with(DELETING);
            let Some(inode) = steps::identity(&path_of).map_err(failed(&path_of, "examine"))? else {
                continue;
            };
            if is_same(&path_of, path) {
                scan.unfinished.push(path_of);
                continue;
            }
            if !is_image || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
                continue;
            }
            let format = match About::read(path, file.strip_prefix(DELETING).unwrap_or(&file)).format {
                Some(format) => format,
                None => crate::probe(&path_of)?,
            };
            noted.push(scan.lies_on(&path_of, format)?);
            scan.entries.push(Entry { file, path: path_of, parent: None, format, inode });
        }
        let on = scan.lies_on(path, crate::probe(path)?)?;
        let find = |on: Option<PathBuf>| {
            let on = on?;
            // One that is being deleted may have two names.
            let by_name = scan.entries.iter().position(|entry| entry.path == on);
            let inode = steps::identity(&on).ok().flatten()?;
            by_name.or_else(|| scan.entries.iter().position(|entry| entry.inode == inode))
        };
        let parents: Vec<_> = noted.into_iter().map(find).collect();
        let head = find(on);
        scan.entries.iter_mut().zip(parents).for_each(|(entry, parent)| entry.parent = parent);
        scan.head = head;
        Ok(scan)
    }

    /// What a thin image lies on.
    fn lies_on(&mut self, path: &Path, format: Format) -> Result<Option<PathBuf>, Error> {
        let noted = if format == Format::Thin { thin::peek_backing(path)? } else { None };
        Ok(noted.map(|noted| {
            self.relaxed |= noted.identity.state == Identity::ANY_STATE;
            resolve(path, &noted.path)
        }))
    }

    /// The file of a snapshot, also of one that is being deleted.
    fn find(&self, name: &str) -> Option<usize> {
        let by_file = self.entries.iter().position(|entry| entry.file == name);
        by_file.or_else(|| self.entries.iter().position(|entry| entry.name() == Some(name)))
    }

    fn children(&self, of: usize) -> impl Iterator<Item = usize> + '_ {
        (0..self.entries.len()).filter(move |index| self.entries[*index].parent == Some(of))
    }

    /// What lies between the head and everything below it, from the top.
    fn below_head(&self) -> Vec<usize> {
        let mut chain: Vec<usize> = Vec::new();
        let mut next = self.head;
        while let Some(index) = next.filter(|index| !chain.contains(index)) {
            chain.push(index);
            next = self.entries[index].parent;
        }
        chain
    }
}

/// The snapshots of the disk at `path`. Nothing is locked: while others change them, something may be missing.
///
/// # Errors
///
/// [`Error`] for a directory that cannot be listed, or an image in it that is not sound.
pub fn list(path: &Path) -> Result<Tree, Error> {
    let path = &steps::real(path)?;
    let scan = Scan::of(path)?;
    // The one on top of a deletion stands for nothing of its own.
    let shown = |mut index: Option<usize>| {
        while let Some(at) = index {
            match scan.entries[at].name() {
                Some(name) => return Some(name.to_owned()),
                None => index = scan.entries[at].parent,
            }
        }
        None
    };
    let mut snapshots = Vec::new();
    for entry in &scan.entries {
        let Some(name) = entry.name() else { continue };
        if entry.is_deleting() && scan.entries.iter().any(|other| other.file == name) {
            continue;
        }
        let metadata = std::fs::metadata(&entry.path).map_err(failed(&entry.path, "examine"))?;
        let about = About::read(path, name);
        let size = match entry.format {
            Format::Thin => thin::peek_size(&entry.path).ok(),
            Format::Flat => Some(metadata.len()),
            _ => crate::open(&entry.path, &OpenOptions::default()).ok().map(|image| image.size()),
        };
        snapshots.push(Snapshot {
            name: name.to_owned(),
            path: entry.path.clone(),
            parent: shown(entry.parent),
            created: about.created.or_else(|| metadata.modified().ok()).unwrap_or(SystemTime::UNIX_EPOCH),
            description: about.description,
            running: about.running,
            size,
            allocated: metadata.blocks().saturating_mul(512),
            format: entry.format,
            deleting: entry.is_deleting(),
        });
    }
    snapshots.sort_by(|one, other| (one.created, &one.name).cmp(&(other.created, &other.name)));
    Ok(Tree { snapshots: parents_first(snapshots), head: shown(scan.head) })
}

fn parents_first(mut snapshots: Vec<Snapshot>) -> Vec<Snapshot> {
    let mut sorted: Vec<Snapshot> = Vec::with_capacity(snapshots.len());
    while !snapshots.is_empty() {
        let is_next = |snapshot: &Snapshot| {
            let Some(parent) = &snapshot.parent else { return true };
            sorted.iter().any(|before| before.name == *parent)
        };
        // In a circle, which nothing of ours makes, anyone may be the first.
        let next = snapshots.iter().position(is_next).unwrap_or(0);
        sorted.push(snapshots.remove(next));
    }
    sorted
}

/// Refuses to change a file among snapshots.
pub(crate) fn refuse_snapshot(path: &Path) -> Result<(), Error> {
    let directory = path.parent().unwrap_or(Path::new("."));
    if home(path) == directory {
        return Ok(());
    }
    invalid(path, "is a snapshot, which does not change: make a clone of it, or revert to it")
}

/// Refuses to show the bytes of a thin head as a flat disk, as a configuration says that was written before the first snapshot.
pub(crate) fn refuse_wrong_format(path: &Path, options: &OpenOptions) -> Result<(), Error> {
    let is_wrong = options.format == Some(Format::Flat)
        && directory(path).is_dir()
        && crate::probe(path)? == Format::Thin;
    if !is_wrong {
        return Ok(());
    }
    invalid(
        path,
        "is a thin image since a snapshot of it was made, and its format is given as \"flat\": leave the format out",
    )
}

/// Opens the head. Where it lies on a snapshot of its own, that one is opened so that it can be merged with while it is in use.
pub(crate) fn open_head(path: &Path, options: &OpenOptions) -> Result<Arc<dyn Image>, Error> {
    let format = options.format.map_or_else(|| crate::probe(path), Ok)?;
    let below =
        if options.writable && format == Format::Thin { open_own(path, path, options)? } else { None };
    match below {
        None => crate::open(path, options),
        below => Ok(Arc::new(Thin::open(path, options, below)?)),
    }
}

/// Opens what `image` lies on, if that is a snapshot of the disk at `path`.
fn open_own(path: &Path, image: &Path, options: &OpenOptions) -> Result<Option<Arc<dyn Image>>, Error> {
    let Some(noted) = thin::peek_backing(image)? else { return Ok(None) };
    let below = resolve(image, &noted.path);
    if is_same(&below, image) || below.parent().is_none_or(|parent| !is_same(parent, &directory(path))) {
        return Ok(None);
    }
    let failed = |source| Error::BackingOpen { path: image.to_owned(), source: Box::new(source) };
    if below.file_name() == Some(TOP.as_ref()) {
        // What is merged with is below that.
        let options = OpenOptions { frozen: true, format: Some(Format::Thin), ..options.clone() };
        let lower = open_own(path, &below, &options)?;
        return Ok(Some(Arc::new(Thin::open(&below, &options, lower).map_err(failed)?)));
    }
    // Its bytes tell that it is flat, so that it remains so when a guest writes to it.
    let probed = noted.format == Format::Flat && crate::probe(&below)? == Format::Flat;
    let format = if probed { None } else { Some(noted.format) };
    open_frozen(&below, &OpenOptions { format, ..options.clone() }).map(Some).map_err(failed)
}

/// Cleans up behind a crash. The caller has the head locked.
fn recover(path: &Path) -> Result<Scan, Error> {
    let scan = Scan::of(path)?;
    let directory = directory(path);
    for name in &scan.unfinished {
        steps::remove(name)?;
    }
    let chain = scan.below_head();
    let mut stale: Vec<PathBuf> = vec![directory.join(NEW)];
    for (index, entry) in scan.entries.iter().enumerate() {
        let is_step = entry.file == TOP || entry.is_deleting();
        if is_step && !chain.contains(&index) {
            stale.push(entry.path.clone());
        }
    }
    // The name that a snapshot had until its deletion began.
    for index in &chain {
        let entry = &scan.entries[*index];
        if let Some(name) = entry.name().filter(|_| entry.is_deleting()) {
            let old = directory.join(name);
            if is_same(&old, &entry.path) {
                stale.push(old);
            }
        }
    }
    let is_stale = stale.iter().any(|path| path.symlink_metadata().is_ok());
    for path in stale {
        steps::remove(&path)?;
    }
    About::clean(path)?;
    if is_stale || !scan.unfinished.is_empty() { Scan::of(path) } else { Ok(scan) }
}

/// Refuses what cannot be done while a deletion is unfinished.
fn refuse_unfinished(path: &Path, scan: &Scan) -> Result<(), Error> {
    let Some(name) = scan.entries.iter().filter(|entry| entry.is_deleting()).find_map(Entry::name) else {
        return Ok(());
    };
    invalid(
        path,
        format!("the deletion of its snapshot {name} was interrupted: delete it again to finish that"),
    )
}

/// A deletion of what the head in use lies on.
#[derive(Debug)]
pub(crate) struct Deletion {
    path: PathBuf,
    name: String,
}

impl Deletion {
    /// Of the snapshot `base`, on which nothing may lie but the head, or what is between while it is being deleted.
    pub(crate) fn of(path: &Path, base: &dyn Image) -> Result<Self, Error> {
        let scan = Scan::of(path)?;
        let found =
            scan.below_head().into_iter().find(|index| overlay::is_at(base, &scan.entries[*index].path));
        let Some(index) = found else {
            let what = format!(
                "lies on {}, which is no snapshot of it: others may lie on that, and it is not changed while this is in use",
                base.path().display()
            );
            return invalid(path, what);
        };
        let others: Vec<_> = scan.children(index).filter_map(|child| scan.entries[child].name()).collect();
        overlay::refuse_marked(&scan.entries[index].path, "were deleted")?;
        let name = scan.entries[index].name().unwrap_or_default().to_owned();
        if !others.is_empty() {
            let what = format!(
                "several lie on its snapshot {name}, also: {}. Delete those first",
                others.join(", ")
            );
            return invalid(path, what);
        }
        Ok(Self { path: path.to_owned(), name })
    }

    fn hidden(&self) -> PathBuf {
        file(&self.path, &format!("{DELETING}{}", self.name))
    }

    /// Takes its name from the snapshot, so that nobody goes back to what will be written to. Gives the path that `top`,
    /// which lies on `base`, notes of it.
    pub(crate) fn begin(&self, top: &Thin, base: &dyn Image) -> Result<PathBuf, Error> {
        let named = named(&self.path, &format!("{DELETING}{}", self.name));
        let target = file(&self.path, &self.name);
        if target.symlink_metadata().is_err() {
            return Ok(named);
        }
        if self.hidden().symlink_metadata().is_err() {
            steps::link(&target, &self.hidden())?;
        }
        overlay::note(top, base, &named, true)?;
        steps::remove(&target)?;
        Ok(named)
    }

    /// Puts what was the snapshot in the place of the head.
    pub(crate) fn end(&self) -> Result<(), Error> {
        steps::rename(&self.hidden(), &self.path)?;
        // Nothing depends on it.
        let _ = About::remove(&self.path, &self.name);
        Ok(())
    }
}

/// What lies between while a guest goes on, as a file and as it is noted; and the file of a new head.
pub(crate) fn steps_of(path: &Path) -> ((PathBuf, PathBuf), PathBuf) {
    ((file(path, TOP), named(path, TOP)), file(path, NEW))
}
