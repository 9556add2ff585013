//! Sharing by a new image below all others.
//!
//! ```text
//!  1. base   a new thin image, on what the images lie on, gets each cluster that two of them at least hold at the same place;
//!            it is made stable, marked as a base and given its name
//!  2. image  written anew as an overlay on the base, without what the base holds; made stable, and renamed to the image
//! ```
//!
//! A crash leaves a base that nobody uses yet, or images of which some are overlays already; all read as before.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::{CLUSTER, Method, Options, Outcome, Report, files_of};
use crate::image::{Error, Format, Identity, Image, MAX_DEPTH, RunKind};
use crate::merge::open_thin;
use crate::open::OpenOptions;
use crate::ops::Progress;
use crate::overlay::{self, is_marked, mark, resolve};
use crate::redo;
use crate::steps::{self, failed};
use crate::thin::{self, Backing, Thin};

/// A base for less than that is not worth a layer more, in bytes.
const LEAST: u64 = 1 << 20;

/// An image that can be written anew.
#[derive(Debug)]
struct Candidate {
    path: PathBuf,
    image: Thin,
    /// Bytes of clusters that another holds too.
    common: u64,
}

pub(super) fn share(
    directory: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Report, Error> {
    let mut report = Report { method: Method::Base, images: Vec::new(), bases: Vec::new(), saved: 0 };
    let mut groups: Vec<(Option<Backing>, Vec<Candidate>)> = Vec::new();
    let files = files_of(directory, false)?;
    let below = backings(&files);
    for path in files {
        match candidate(&path, &below) {
            Ok(found) => {
                let backing = found.image.noted_backing().map(|noted| Backing { visible: 0, ..noted });
                match groups.iter_mut().find(|(other, _)| *other == backing) {
                    Some((_, group)) => group.push(found),
                    None => groups.push((backing, vec![found])),
                }
            }
            Err(why) => report.images.push(Outcome { path, saved: 0, skipped: Some(why) }),
        }
    }
    let total: u64 = groups.iter().flat_map(|(_, group)| group).map(|found| found.image.size() * 2).sum();
    let mut before = 0;
    for (backing, mut group) in groups {
        let size: u64 = group.iter().map(|found| found.image.size() * 2).sum();
        let mut told = |done: u64, _: u64| progress(before + done.min(size), total);
        if group.len() > 1 {
            one_group(directory, backing, &mut group, options, &mut told, &mut report)?;
        } else {
            report.images.extend(group.into_iter().map(|found| Outcome {
                path: found.path,
                saved: 0,
                skipped: None,
            }));
        }
        before += size;
    }
    let _ = progress(total, total);
    report.images.sort_by(|one, other| one.path.cmp(&other.path));
    let shared: u64 = report.images.iter().map(|image| image.saved).sum();
    report.saved = shared.saturating_sub(report.bases.iter().map(|(_, taken)| taken).sum());
    Ok(report)
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    path.metadata().ok().map(|about| (about.dev(), about.ino()))
}

/// What images of the directory lie on.
fn backings(files: &[PathBuf]) -> Vec<(u64, u64)> {
    let lies_on = |path: &PathBuf| {
        let format = crate::probe(path).ok()?;
        let noted = if format == Format::Thin { thin::peek_backing(path).ok()? } else { None };
        inode(&resolve(path, &noted?.path))
    };
    files.iter().filter_map(lies_on).collect()
}

/// Opens an image, or says why it is left as it is.
fn candidate(path: &Path, below: &[(u64, u64)]) -> Result<Candidate, String> {
    match crate::probe(path) {
        Ok(Format::Thin) => {}
        Ok(_) => return Err("is no thin image; convert it to one to share what it holds".to_owned()),
        Err(error) => return Err(error.to_string()),
    }
    if is_marked(path) || inode(path).is_some_and(|inode| below.contains(&inode)) {
        return Err("others lie on it".to_owned());
    }
    if path.as_os_str().as_encoded_bytes().ends_with(b".redo") || redo::pending(path).is_some() {
        return Err("has changes that are neither committed nor discarded".to_owned());
    }
    let image = open_thin(path, None).map_err(|error| match std::error::Error::source(&error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    })?;
    let mut depth = 2;
    let mut next = image.backing();
    while let Some(found) = next {
        depth += 1;
        next = found.backing();
    }
    if depth > MAX_DEPTH {
        return Err(format!("its chain would be longer than {MAX_DEPTH} images"));
    }
    Ok(Candidate { path: path.to_owned(), image, common: 0 })
}

/// A file that is removed unless it is to stay.
struct Unfinished(Option<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        if let Some(path) = self.0.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn one_group(
    directory: &Path,
    backing: Option<Backing>,
    group: &mut [Candidate],
    options: &Options,
    progress: &mut Progress<'_>,
    report: &mut Report,
) -> Result<(), Error> {
    let size = group.iter().map(|found| found.image.size()).max().unwrap_or(0);
    let new = directory.join(".shared.new");
    let mut unfinished = Unfinished(None);
    let base = if options.dry_run {
        None
    } else {
        steps::remove(&new)?;
        let backing = backing.map(|noted| (noted.path, noted.format, noted.identity));
        thin::create(&new, &thin::Create { backing, ..thin::Create::new(size) })?;
        unfinished.0 = Some(new.clone());
        Some(open_thin(&new, None)?)
    };
    let kept = gather(group, size, base.as_ref(), progress)?;
    let common: u64 = group.iter().map(|found| found.common).sum();
    let gain = common.saturating_sub(kept);
    let base = match base {
        Some(base) if gain >= LEAST => base,
        base => {
            let is_worth = base.is_none() && gain >= LEAST;
            if is_worth {
                report.bases.push((free_name(directory), kept));
            }
            report.images.extend(group.iter().map(|found| {
                let saved = if is_worth { found.common } else { 0 };
                Outcome { path: found.path.clone(), saved, skipped: None }
            }));
            return Ok(());
        }
    };
    base.flush().map_err(failed(&new, "make stable what was written to"))?;
    drop(base);
    mark(&new)?;
    let name = free_name(directory);
    steps::link(&new, &name)?;
    drop(unfinished);
    let base: Arc<dyn Image> = crate::open(&name, &OpenOptions::default())?;
    let taken = base.info().map_err(failed(&name, "examine"))?.allocated;
    report.bases.push((name, taken));
    let mut before: u64 = group.iter().map(|found| found.image.size()).sum();
    for found in group.iter() {
        let mut told = |done: u64, total: u64| progress(before + done, total);
        let saved = if found.common > 0 { rewrite(found, &base, &mut told)? } else { 0 };
        report.images.push(Outcome { path: found.path.clone(), saved, skipped: None });
        before += found.image.size();
    }
    Ok(())
}

/// A name for a base that nothing has yet.
fn free_name(directory: &Path) -> PathBuf {
    let name = |number: u32| directory.join(format!("shared-{number}.base"));
    (1..).map(name).find(|name| name.symlink_metadata().is_err()).unwrap_or_else(|| name(0))
}

fn read(image: &dyn Image, at: u64, into: &mut [u8]) -> Result<(), Error> {
    image.read_at(at, &[VolatileSlice::from(into)]).map_err(failed(image.path(), "read"))
}

fn write(image: &dyn Image, at: u64, from: &mut [u8]) -> Result<(), Error> {
    image.write_at(at, &[VolatileSlice::from(from)]).map_err(failed(image.path(), "write to"))
}

/// Looks for clusters that two images at least hold at the same place, and writes them to `base`. Gives how many bytes those are.
fn gather(
    group: &mut [Candidate],
    size: u64,
    base: Option<&Thin>,
    progress: &mut Progress<'_>,
) -> Result<u64, Error> {
    let len = usize::try_from(CLUSTER).map_err(io::Error::other).map_err(failed(Path::new(""), "read"))?;
    let (mut bytes, mut other) = (vec![0; len], vec![0; len]);
    let hasher = RandomState::new();
    // Up to where each image holds nothing more.
    let mut nothing_until = vec![0; group.len()];
    let (mut at, mut kept) = (0, 0);
    let count = group.len() as u64;
    while at + CLUSTER <= size {
        if at % (16 << 20) == 0 && progress(at * count, size * count).is_break() {
            return Err(Error::Interrupted { path: group[0].path.clone() });
        }
        let mut found: HashMap<u64, Vec<usize>> = HashMap::new();
        for (index, candidate) in group.iter().enumerate() {
            let image = &candidate.image;
            if nothing_until[index] > at || at + CLUSTER > image.size() {
                continue;
            }
            let run = image.run(at, image.size() - at).map_err(failed(&candidate.path, "read"))?;
            if run.kind != RunKind::Data || run.len < CLUSTER {
                if run.kind != RunKind::Data {
                    nothing_until[index] = (at + run.len) / CLUSTER * CLUSTER;
                }
                continue;
            }
            read(image, at, &mut bytes)?;
            let mut hash = hasher.build_hasher();
            hash.write(&bytes);
            found.entry(hash.finish()).or_default().push(index);
        }
        let most = found.into_values().filter(|sharers| sharers.len() > 1).max_by_key(Vec::len);
        if let Some(sharers) = most {
            read(&group[sharers[0]].image, at, &mut bytes)?;
            let mut equal = Vec::new();
            for index in sharers {
                read(&group[index].image, at, &mut other)?;
                if other == bytes {
                    equal.push(index);
                }
            }
            if equal.len() > 1 {
                equal.into_iter().for_each(|index| group[index].common += CLUSTER);
                kept += CLUSTER;
                if let Some(base) = base {
                    write(base, at, &mut bytes)?;
                }
            }
        }
        at += CLUSTER;
    }
    Ok(kept)
}

/// Puts an overlay on `base` in the place of an image, and gives how much less it takes.
fn rewrite(old: &Candidate, base: &Arc<dyn Image>, progress: &mut Progress<'_>) -> Result<u64, Error> {
    let (image, path) = (&old.image, &old.path);
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".dedupe");
    let new = path.with_file_name(name);
    steps::remove(&new)?;
    let info = image.info().map_err(failed(path, "examine"))?;
    let named = PathBuf::from(base.path().file_name().unwrap_or_default());
    let identity: Identity = overlay::exact(&**base)?;
    let create = thin::Create {
        cluster_bits: image.cluster_bits(),
        max_size: info.max_size,
        backing: Some((named, Format::Thin, identity)),
        ..thin::Create::new(image.size())
    };
    thin::create(&new, &create)?;
    let mut unfinished = Unfinished(Some(new.clone()));
    let options = OpenOptions { writable: true, format: Some(Format::Thin), ..OpenOptions::default() };
    let overlay = Thin::open(&new, &options, Some(Arc::clone(base)))?;
    copy_rest(image, &**base, &overlay, progress)?;
    overlay.flush().map_err(failed(&new, "make stable what was written to"))?;
    drop(overlay);
    keep_owner(path, &new)?;
    let blocks =
        |path: &Path| path.metadata().map(|about| about.blocks() * 512).map_err(failed(path, "examine"));
    let saved = blocks(path)?.saturating_sub(blocks(&new)?);
    steps::rename(&new, path)?;
    unfinished.0 = None;
    Ok(saved)
}

/// Writes to `overlay`, which lies on `base`, all that `image` reads as and `base` does not.
fn copy_rest(
    image: &dyn Image,
    base: &dyn Image,
    overlay: &dyn Image,
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    let (size, mut at) = (image.size(), 0);
    let (mut bytes, mut other) = (Vec::new(), Vec::new());
    while at < size {
        let own = image.run(at, size - at).map_err(failed(image.path(), "read"))?;
        let below = base.run(at, own.len).map_err(failed(base.path(), "read"))?;
        let mut len = below.len.min(own.len);
        match (own.kind, below.kind) {
            (RunKind::Absent, RunKind::Absent) => {}
            (RunKind::Zero, _) => {
                overlay.write_zeroes(at, len, true).map_err(failed(overlay.path(), "write to"))?;
            }
            (_, below) => {
                len = len.min(CLUSTER - at % CLUSTER);
                let usize_len = usize::try_from(len).map_err(io::Error::other);
                let usize_len = usize_len.map_err(failed(image.path(), "read"))?;
                bytes.resize(usize_len, 0);
                other.resize(usize_len, 0);
                read(image, at, &mut bytes)?;
                if below != RunKind::Absent {
                    read(base, at, &mut other)?;
                }
                let is_zero = bytes.iter().all(|byte| *byte == 0);
                if below != RunKind::Absent && bytes == other {
                    // The base has it.
                } else if is_zero {
                    overlay.write_zeroes(at, len, true).map_err(failed(overlay.path(), "write to"))?;
                } else {
                    write(overlay, at, &mut bytes)?;
                }
            }
        }
        if at / (16 << 20) != (at + len) / (16 << 20) && progress(at, size).is_break() {
            return Err(Error::Interrupted { path: image.path().to_owned() });
        }
        at += len;
    }
    Ok(())
}

/// Gives the new file the owner and the permissions of the old one.
fn keep_owner(old: &Path, new: &Path) -> Result<(), Error> {
    let about = old.metadata().map_err(failed(old, "examine"))?;
    let file = File::open(new).map_err(failed(new, "open"))?;
    if file.metadata().is_ok_and(|found| (found.uid(), found.gid()) != (about.uid(), about.gid())) {
        std::os::unix::fs::fchown(&file, Some(about.uid()), Some(about.gid()))
            .map_err(failed(new, "give its owner to"))?;
    }
    file.set_permissions(about.permissions())
        .and_then(|()| file.sync_all())
        .map_err(failed(new, "set the permissions of"))
}
