//! Bringing images of a chain together: what one holds goes down into the one below ([`commit`]), or up into it comes what
//! it lacks ([`stream`]).
//!
//! # A crash in the middle
//!
//! Everything here can be cut at any point, and done again.
//!
//! * **Down.** Bytes of the image below change only where the one on top has its own, so the one on top reads the same all
//!   the time. But it knows the image below by its state, which changes with the first byte: so first it notes
//!   [`Identity::ANY_STATE`], which is to say "I am being merged". When all is done, what was merged is flushed, and only
//!   then is the one on top removed or replaced.
//! * **Up.** Pulling does not change what an image reads as. When it has everything, its backing is exchanged in one
//!   commit of its metadata.

mod live;
mod renamed;
#[cfg(test)]
mod tests;
mod transfer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::image::{Error, Format, Identity, Image};
use crate::open::OpenOptions;
use crate::ops::Progress;
use crate::overlay::{self, refuse_marked, resolve};
use crate::steps::{self, beside, failed};
use crate::thin::{self, Thin};

pub use live::{ActiveCommit, Job, Next, Stream};
pub(crate) use transfer::Merger;

/// An overlay that is to go down into what it lies on.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) image: Arc<Thin>,
    pub(crate) path: PathBuf,
}

/// Writes to `base` what the layers hold, the lowest of which is the first and lies on it. All but the last are removed; that
/// one lies on `base` then, in any state, and has nothing that `base` has not.
///
/// `named` is the path of `base` as the layers note it.
pub(crate) fn collapse(
    base: &Arc<dyn Image>,
    named: &Path,
    layers: &[Layer],
    any_kind: bool,
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    // What is noted of a layer is wrong once that notes something else: from the top, all take what they lie on as it will be.
    for layer in layers.iter().rev() {
        let noted = layer.image.noted_backing();
        if let Some(noted) = noted.filter(|noted| noted.identity.state != Identity::ANY_STATE) {
            let identity = Identity { state: Identity::ANY_STATE, ..noted.identity };
            overlay::set(&layer.image, Some((&noted.path, noted.format, identity)))?;
        }
    }
    let count = layers.len() as u64;
    for (index, layer) in layers.iter().enumerate() {
        let top = &*layer.image;
        if index > 0 {
            overlay::note(top, &**base, named, true)?;
        }
        if let Some(below) = index.checked_sub(1).and_then(|index| layers.get(index)) {
            steps::remove(&below.path)?;
        }
        let before = index as u64 * top.size();
        let mut merger = Merger::new(any_kind);
        let mut report = |done, total: u64| progress(before + done, total * count);
        merger.all(top, &mut report, |merger, most| merger.push(top, &**base, most))?;
        overlay::settle(&**base)?;
    }
    Ok(())
}

fn invalid<T>(path: &Path, what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid { path: path.to_owned(), what: what.into() })
}

/// Opens a thin image to change it, and what it lies on to read it.
pub(crate) fn open_thin(path: &Path, owner: Option<&str>) -> Result<Thin, Error> {
    let owner = owner.map(str::to_owned);
    let Some(noted) = thin::peek_backing(path)? else {
        return Thin::open(path, &OpenOptions { writable: true, owner, ..OpenOptions::default() }, None);
    };
    let options = OpenOptions { format: Some(noted.format), owner, ..OpenOptions::default() };
    let below = crate::open(&resolve(path, &noted.path), &options)
        .map_err(|source| Error::BackingOpen { path: path.to_owned(), source: Box::new(source) })?;
    Thin::open(path, &OpenOptions { writable: true, format: Some(Format::Thin), ..options }, Some(below))
}

/// Copies into the image at `path` everything that it reads from others, so that it needs none of them any more; or, with
/// `lower` given, which lies below it, nothing but that one and what that lies on.
///
/// # Errors
///
/// [`Error::Invalid`] for an image without backing, or if `lower` is none; [`Error::Locked`] if it is in use;
/// [`Error::Interrupted`] once `progress` says to stop, and any other [`Error`]. The image reads the same then, and what was
/// copied stays.
pub fn stream(path: &Path, lower: Option<&Path>, progress: &mut Progress<'_>) -> Result<(), Error> {
    let path = &steps::real(path)?;
    refuse_marked(path, "changed")?;
    if crate::probe(path)? != Format::Thin {
        return invalid(path, "is no thin image: it lies on nothing");
    }
    let image = open_thin(path, None)?;
    let lower = find_lower(&image, lower)?;
    Merger::new(false).all(&image, progress, |merger, most| {
        merger.pull(&image, lower.as_ref().map(|lower| &*lower.image), most)
    })?;
    note_lower(&image, lower.as_ref())
}

/// An image below, from which on nothing is copied.
#[derive(Debug)]
pub(crate) struct Lower {
    pub(crate) image: Arc<dyn Image>,
    named: PathBuf,
}

/// Looks for the image at `lower` below `image`.
pub(crate) fn find_lower(image: &dyn Image, lower: Option<&Path>) -> Result<Option<Lower>, Error> {
    if image.backing().is_none() {
        return invalid(image.path(), "lies on no other image");
    }
    let Some(lower) = lower else { return Ok(None) };
    let wanted = steps::real(lower)?;
    let mut below = image.backing();
    while let Some(found) = below {
        if overlay::is_at(&**found, &wanted) {
            let home = steps::real(overlay::home(image.path()))?;
            return Ok(Some(Lower { image: Arc::clone(found), named: steps::relative(&home, &wanted) }));
        }
        below = found.backing();
    }
    invalid(image.path(), format!("does not lie on {}", lower.display()))
}

/// Notes in `image`, which has everything else, that it lies on `lower` alone.
pub(crate) fn note_lower(image: &Thin, lower: Option<&Lower>) -> Result<(), Error> {
    match lower {
        Some(lower) => overlay::note(image, &*lower.image, &lower.named, false),
        None => overlay::set(image, None),
    }
}

/// Writes what the thin image at `path` holds to the image that it lies on. It stays, and holds nothing any more.
///
/// # Errors
///
/// [`Error::Invalid`] for an image without backing, or where the backing may not be changed: it is a snapshot, or marked as
/// the base of clones; [`Error::Locked`] if either is in use; [`Error::Interrupted`] once `progress` says to stop, and any
/// other [`Error`]. Then it still stands for the disk, and the call can be repeated.
pub fn commit(path: &Path, progress: &mut Progress<'_>) -> Result<(), Error> {
    let path = &steps::real(path)?;
    refuse_marked(path, "changed")?;
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    let noted = if crate::probe(path)? == Format::Thin { thin::peek_backing(path)? } else { None };
    let Some(noted) = noted else {
        return invalid(path, "lies on no other image, to which it could be committed");
    };
    let below = steps::real(&resolve(path, &noted.path))?;
    refuse_marked(&below, "were written to")?;
    if crate::snapshot::refuse_snapshot(&below).is_err() {
        let name = below.file_name().unwrap_or_default().display();
        let what = format!(
            "lies on its snapshot {name}, which does not change; to have one file of both, delete that snapshot"
        );
        return invalid(path, what);
    }
    let format = if noted.format == Format::Flat { None } else { Some(noted.format) };
    let base = crate::open(&below, &OpenOptions { format, ..options.clone() })?;
    if base.format() != noted.format {
        return invalid(&below, format!("was noted as {} and looks like {}", noted.format, base.format()));
    }
    let image = Arc::new(Thin::open(path, &options, Some(Arc::clone(&base)))?);
    let cluster_bits = image.cluster_bits();
    let layer = Layer { image, path: path.clone() };
    collapse(&base, &noted.path, std::slice::from_ref(&layer), false, progress)?;
    // An empty one takes its place.
    let identity = overlay::exact(&*base)?;
    let new = beside(path, ".new");
    steps::remove(&new)?;
    let info = layer.image.info().map_err(failed(path, "examine"))?;
    let create = thin::Create {
        cluster_bits,
        max_size: info.max_size,
        backing: Some((noted.path, base.format(), Identity { ..identity })),
        ..thin::Create::new(base.size())
    };
    thin::create(&new, &create)?;
    steps::rename(&new, path)
}
