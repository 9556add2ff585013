//! Deleting a snapshot: what it holds is brought together with what lies on it.
//!
//! ```text
//!  base ◀─ A ◀─ head     delete A: what is smaller moves. Either A's bytes go up into the head, which then lies on base,
//!                        or the head's go down into A, which then becomes the head
//!  base ◀─ A ◀─ B ◀─ …   delete A: its bytes go up into B
//!  base ◀─ A             delete A: nothing lies on it, it goes
//!  base ◀─ A ◀─ B, ◀─ C  refused: its bytes would be needed twice
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::change::existing;
use super::{About, DELETING, Entry, Scan, TOP, check, directory, file, invalid, named, recover};
use crate::image::{Error, Format, Identity, Image};
use crate::merge::{Layer, Merger, collapse, open_thin};
use crate::open::{OpenOptions, Opened as Locked};
use crate::ops::Progress;
use crate::overlay::{self, is_marked, refuse_marked};
use crate::redo::refuse_pending;
use crate::steps::{self, failed};
use crate::thin::{self, Thin};

/// Deletes the snapshot `name` of the disk at `path`. All others, and the disk, are what they were. If another snapshot or
/// the disk lies on it, nobody may use the disk.
///
/// # Errors
///
/// [`Error::Invalid`] where there is no such snapshot, where more than one image lies on it, or where linked clones do;
/// [`Error::Locked`]; [`Error::Interrupted`] once `progress` says to stop, and any other [`Error`]. Then the call can be
/// repeated.
pub fn delete(path: &Path, name: &str, progress: &mut Progress<'_>) -> Result<(), Error> {
    let path = &steps::real(path)?;
    check(path, name)?;
    let scan = Scan::of(path)?;
    let target = existing(path, &scan, name)?;
    let writable = OpenOptions { writable: true, ..OpenOptions::default() };
    if is_marked(&target) {
        refuse_marked(&target, "were deleted")?;
    }
    let index = scan.find(name);
    let children: Vec<usize> = index.into_iter().flat_map(|index| scan.children(index)).collect();
    if children.is_empty() && scan.head != index && !scan.relaxed {
        // Whoever runs on another branch is not concerned.
        let _alone = Locked::open(&target, &writable)?;
        steps::remove(&target)?;
        return About::remove(path, name);
    }
    refuse_pending(path)?;
    refuse_marked(path, "became another image")?;
    let alone = Locked::open(path, &writable)?;
    let scan = recover(path)?;
    let target = existing(path, &scan, name)?;
    let Some(index) = scan.find(name) else { return invalid(path, format!("has no snapshot {name}")) };
    let other = scan.entries.iter().find(|entry| entry.is_deleting() && entry.name() != Some(name));
    if let Some(other) = other.and_then(Entry::name) {
        return invalid(
            path,
            format!("the deletion of its snapshot {other} was interrupted: finish that one first"),
        );
    }
    drop(alone);
    if scan.entries[index].is_deleting() {
        return finish_down(path, &scan, index, progress);
    }
    let children: Vec<usize> = scan.children(index).collect();
    match (children.as_slice(), scan.head == Some(index)) {
        ([], true) => {
            if is_down_cheaper(path, &target, scan.entries[index].format)? {
                begin_down(path, name, &target)?;
                let scan = Scan::of(path)?;
                let Some(index) = scan.find(name) else {
                    return invalid(path, format!("has no snapshot {name}"));
                };
                finish_down(path, &scan, index, progress)
            } else {
                up(path, path, progress)?;
                steps::remove(&target)?;
                About::remove(path, name)
            }
        }
        ([child], false) => {
            let descendants = descendants(path, &scan, *child);
            relax(&descendants)?;
            up(path, &scan.entries[*child].path, progress)?;
            tighten(&descendants)?;
            steps::remove(&target)?;
            About::remove(path, name)
        }
        ([], false) => {
            // What lay on it was moved before a crash, and is to know again exactly what it lies on.
            let roots = (0..scan.entries.len()).filter(|index| scan.entries[*index].parent.is_none());
            for root in roots {
                tighten(&descendants(path, &scan, root))?;
            }
            steps::remove(&target)?;
            About::remove(path, name)
        }
        (children, is_head) => {
            let mut on: Vec<_> = children.iter().filter_map(|child| scan.entries[*child].name()).collect();
            if is_head {
                on.push("the disk itself");
            }
            invalid(
                path,
                format!(
                    "several lie on its snapshot {name}: {}. Each would need what it holds; delete all but one of them \
                     first, or make a full clone of what is to be kept",
                    on.join(", ")
                ),
            )
        }
    }
}

fn allocated(path: &Path) -> Result<u64, Error> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path).map_err(failed(path, "examine"))?.blocks())
}

/// Whether the head is rather written to the snapshot than the other way round.
fn is_down_cheaper(path: &Path, target: &Path, format: Format) -> Result<bool, Error> {
    match format {
        Format::Flat => Ok(true),
        Format::Thin => Ok(allocated(path)? <= allocated(target)?),
        // Perhaps it cannot be written to.
        Format::Qcow2 | Format::Vmdk | Format::Vhdx => Ok(false),
    }
}

/// Pulls up into the thin image at `child` what its backing has, and makes it lie on what that lies on.
fn up(path: &Path, child: &Path, progress: &mut Progress<'_>) -> Result<(), Error> {
    let image = open_thin(child, None)?;
    let Some(middle) = image.backing().map(Arc::clone) else {
        return invalid(child, "lies on no other image");
    };
    let lower = middle.backing().map(Arc::clone);
    Merger::new(false).all(&image, progress, |merger, most| merger.pull(&image, lower.as_deref(), most))?;
    let noted = if middle.format() == Format::Thin { thin::peek_backing(middle.path())? } else { None };
    match (noted, lower) {
        (Some(noted), Some(lower)) => {
            // Both paths lead from the directory of the disk.
            debug_assert_eq!(overlay::home(middle.path()), overlay::home(path));
            overlay::note(&image, &*lower, &noted.path, false)
        }
        _ => overlay::set(&image, None),
    }
}

/// Takes its name from a snapshot, so that nobody goes back to what will be written to.
fn begin_down(path: &Path, name: &str, target: &Path) -> Result<(), Error> {
    let hidden = format!("{DELETING}{name}");
    let image = open_thin(path, None)?;
    let Some(below) = image.backing() else { return invalid(path, "lies on no other image") };
    steps::link(target, &file(path, &hidden))?;
    overlay::note(&image, &**below, &named(path, &hidden), true)?;
    steps::remove(target)
}

/// Writes the head, and what lies between, to the snapshot that is being deleted, and puts that in the place of the head.
fn finish_down(path: &Path, scan: &Scan, index: usize, progress: &mut Progress<'_>) -> Result<(), Error> {
    let entry = &scan.entries[index];
    let name = entry.name().unwrap_or_default();
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    // As its bytes tell, where they may: a flat image is not to become another kind by what a guest wrote.
    let is_flat = entry.format == Format::Flat && crate::probe(&entry.path)? == Format::Flat;
    let format = if is_flat { None } else { Some(entry.format) };
    let base = crate::open(&entry.path, &OpenOptions { format, ..options.clone() })?;
    let mut layers: Vec<Layer> = Vec::new();
    let between = directory(path).join(TOP);
    let lies_between = scan.below_head().iter().any(|index| scan.entries[*index].path == between);
    for file in [lies_between.then_some(between), Some(path.to_owned())].into_iter().flatten() {
        let below = layers
            .last()
            .map_or_else(|| Arc::clone(&base), |layer| Arc::clone(&layer.image) as Arc<dyn Image>);
        let image = Arc::new(Thin::open(
            &file,
            &OpenOptions { format: Some(Format::Thin), ..options.clone() },
            Some(below),
        )?);
        layers.push(Layer { image, path: file });
    }
    collapse(&base, &named(path, &entry.file), &layers, false, progress)?;
    steps::rename(&entry.path, path)?;
    About::remove(path, name)
}

/// An image that lies on another, and how it notes it.
#[derive(Debug)]
struct Child {
    path: PathBuf,
    parent: PathBuf,
}

/// Everything that lies on a snapshot, parents first.
fn descendants(path: &Path, scan: &Scan, of: usize) -> Vec<Child> {
    let mut found = Vec::new();
    let mut waiting = vec![of];
    while let Some(parent) = waiting.pop() {
        for child in scan.children(parent) {
            found.push(Child {
                path: scan.entries[child].path.clone(),
                parent: scan.entries[parent].path.clone(),
            });
            waiting.push(child);
        }
        if scan.head == Some(parent) {
            found.push(Child { path: path.to_owned(), parent: scan.entries[parent].path.clone() });
        }
    }
    found
}

/// Has images accept what they lie on in any state: what is noted of it will be wrong for a while. From the top, since noting
/// that changes the state of who does.
fn relax(children: &[Child]) -> Result<(), Error> {
    for child in children {
        refuse_marked(&child.path, "changed")?;
        refuse_marked(&child.parent, "changed")?;
        // Nobody may have it open.
        drop(Locked::open(&child.path, &OpenOptions { writable: true, ..OpenOptions::default() })?);
    }
    children.iter().rev().try_for_each(|child| {
        let Some(noted) = thin::peek_backing(&child.path)? else { return Ok(()) };
        renote(&child.path, &noted, Identity { state: Identity::ANY_STATE, ..noted.identity })
    })
}

/// Takes [`relax`] back, from the bottom.
fn tighten(children: &[Child]) -> Result<(), Error> {
    children.iter().try_for_each(|child| {
        let noted = thin::peek_backing(&child.path)?;
        let Some(noted) = noted.filter(|noted| noted.identity.state == Identity::ANY_STATE) else {
            return Ok(());
        };
        let parent = crate::open(
            &child.parent,
            &OpenOptions { format: Some(noted.format), ..OpenOptions::default() },
        )?;
        renote(&child.path, &noted, overlay::exact(&*parent)?)
    })
}

fn renote(path: &Path, noted: &thin::Backing, identity: Identity) -> Result<(), Error> {
    steps::before(path)?;
    thin::set_backing(path, Some((&noted.path, noted.format, identity)))
}
