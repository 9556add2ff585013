//! Verbs that make images.

use std::io::Read;
use std::path::{Path, PathBuf};

use vmfs_image::flat::{self, Preallocate};
use vmfs_image::image::SECTOR;
use vmfs_image::ops::{self, ConvertOptions};
use vmfs_image::redo::{self, Mode};
use vmfs_image::{Error, Format, OpenOptions, clone as cloning, foreign, snapshot, thin};

use super::super::Failure;
use super::progress::Progress;
use super::{failure, output, replace, trouble};

/// What a new image is to be.
#[derive(Debug)]
pub struct Wanted {
    pub size: Option<u64>,
    pub format: Format,
    pub max_size: Option<u64>,
    pub backing: Option<PathBuf>,
    pub preallocate: bool,
    pub cluster_bits: Option<u8>,
}

fn invalid<T>(path: &Path, what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Invalid { path: path.to_owned(), what: what.into() })
}

/// `vmm image create`
pub fn create(path: &Path, wanted: &Wanted, force: bool, json: bool) -> Result<(), Failure> {
    if wanted.format != Format::Qcow2 && wanted.cluster_bits.is_some_and(|bits| bits < 16) {
        let refused: Result<(), Error> = invalid(path, "only a qcow2 image has clusters of less than 64K");
        return refused.map_err(trouble);
    }
    let _interruptible = Progress::begin("creating")?;
    let source = wanted.backing.as_deref();
    replace::make(path, force, source, |path| new_image(path, wanted)).map_err(failure)?;
    output::made(path, json)
}

/// Tries whether a thin image can be made at `path`: before a backing is marked as a base, which stays even if nothing comes of
/// the image, since another clone may rely on it by then.
fn try_out(path: &Path, new: &thin::Create) -> Result<(), Error> {
    let hidden = hidden(path)?;
    thin::create(&hidden, new).map_err(|error| replace::renamed(error, &hidden, path))?;
    remove(&hidden)
}

/// A name for a file that is there for a moment, beside `path`.
fn hidden(path: &Path) -> Result<PathBuf, Error> {
    let Some(name) = path.file_name() else { return invalid(path, "is no name of a file") };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".noted-{}", std::process::id()));
    Ok(path.with_file_name(hidden))
}

fn remove(path: &Path) -> Result<(), Error> {
    std::fs::remove_file(path).map_err(|source| Error::Io { path: path.to_owned(), what: "remove", source })
}

fn new_image(path: &Path, wanted: &Wanted) -> Result<(), Error> {
    let &Wanted { size, format, max_size, ref backing, preallocate, cluster_bits } = wanted;
    match format {
        Format::Flat => {
            if max_size.is_some() || backing.is_some() || cluster_bits.is_some() {
                return invalid(path, "a flat image has no max-size, backing or clusters; a thin one has");
            }
            let preallocate = if preallocate { Preallocate::Full } else { Preallocate::Sparse };
            flat::create(path, size.unwrap_or(0), preallocate)
        }
        Format::Thin if preallocate => {
            invalid(path, "a thin image gets its space as it is written to; --preallocate is for flat ones")
        }
        Format::Thin => {
            let new = thin::Create::new(size.unwrap_or(SECTOR));
            let new =
                thin::Create { cluster_bits: cluster_bits.unwrap_or(new.cluster_bits), max_size, ..new };
            let Some(backing) = backing else { return thin::create(path, &new) };
            try_out(path, &new)?;
            let below = noted(backing, path)?;
            let size = size.unwrap_or(below.identity.size);
            let backing = Some((below.path, below.format, below.identity));
            thin::create(path, &thin::Create { size, backing, ..new })
        }
        Format::Qcow2 if max_size.is_some() || backing.is_some() || preallocate => invalid(
            path,
            "a qcow2 image gets no max-size, backing or --preallocate here; a thin image has the first two, and can lie on \
             a qcow2 image",
        ),
        Format::Qcow2 => {
            let cluster = cluster_bits.map_or(foreign::CLUSTER, |bits| 1 << bits);
            foreign::create(path, size.unwrap_or(0), cluster)
        }
        format => Err(foreign::not_made(path, format)),
    }
}

/// What an image at `path` notes if it is laid on `backing`, which is marked as a base by that.
pub fn noted(backing: &Path, path: &Path) -> Result<thin::Backing, Error> {
    let hidden = hidden(path)?;
    // A clone is marked and noted as it should be. Only its note is kept.
    cloning::linked(backing, &hidden)?;
    let noted = thin::peek_backing(&hidden);
    remove(&hidden)?;
    noted?.map_or_else(|| invalid(backing, "was not noted"), Ok)
}

/// `vmm image clone`
pub fn clone(
    base: &Path,
    path: &Path,
    full: bool,
    snapshot: Option<&str>,
    force: bool,
    json: bool,
) -> Result<(), Failure> {
    let base = match snapshot {
        None => base.to_owned(),
        Some(name) => snapshot_file(base, name).map_err(failure)?,
    };
    let mut progress = Progress::begin("cloning")?;
    let mut make = |path: &Path| {
        if !full {
            // As with `try_out`; there is nothing more that could be wrong with a clone.
            let hidden = hidden(path)?;
            let failed = |source| Error::Io { path: path.to_owned(), what: "create", source };
            std::fs::File::create_new(&hidden).map_err(failed)?;
            remove(&hidden)?;
            return cloning::linked(&base, path);
        }
        // A clone of what is only read is one that can be written to.
        let format = match vmfs_image::probe(&base)? {
            Format::Vmdk => Format::Thin,
            format => format,
        };
        cloning::full(&base, path, format, &mut |done, total| progress.report(done, total))
    };
    replace::make(path, force, Some(&base), &mut make).map_err(failure)?;
    drop(progress);
    output::made(path, json)
}

fn snapshot_file(path: &Path, name: &str) -> Result<PathBuf, Error> {
    let tree = snapshot::list(path)?;
    match tree.snapshots.into_iter().find(|snapshot| snapshot.name == name) {
        Some(snapshot) => Ok(snapshot.path),
        None => {
            invalid(path, format!("has no snapshot {name}; `vmm image snapshot ls` lists those that it has"))
        }
    }
}

/// How an image is converted.
#[derive(Debug, Clone, Copy)]
pub struct How {
    /// What it becomes; none: what it is.
    pub format: Option<Format>,
    /// What it is; none: as its first bytes say.
    pub from: Option<Format>,
    pub preallocate: bool,
    pub detect_zeroes: bool,
}

/// `vmm image convert`, and `vmm image copy` to a new file
pub fn convert(source: &Path, path: &Path, how: How, force: bool, json: bool) -> Result<(), Failure> {
    let mut progress = Progress::begin("copying")?;
    replace::make(path, force, Some(source), |path| {
        refuse_pending(source)?;
        let src = vmfs_image::open(source, &OpenOptions { format: how.from, ..OpenOptions::default() })?;
        if let (Format::Flat, None, Some(kind)) = (src.format(), how.from, unknown_kind(source)?) {
            let what = format!(
                "looks like an image of {kind}, which vmm does not read: \"qemu-img convert -O raw\" makes a flat image of it; \
                 with `vmm image convert --from flat` its bytes are taken as they are"
            );
            return invalid(source, what);
        }
        let format = how.format.unwrap_or(src.format());
        if how.preallocate && format != Format::Flat {
            return invalid(path, "--preallocate is for flat images");
        }
        let preallocate = if how.preallocate { Preallocate::Full } else { Preallocate::Sparse };
        let options = ConvertOptions { format, preallocate, detect_zeroes: how.detect_zeroes };
        ops::convert(&*src, path, &options, &mut |done, total| progress.report(done, total))
    })
    .map_err(failure)?;
    drop(progress);
    output::made(path, json)
}

/// What kind of image that is neither read nor recognised elsewhere the file at `path` looks like.
fn unknown_kind(path: &Path) -> Result<Option<&'static str>, Error> {
    const KINDS: [(usize, &[u8], &str); 5] = [
        (64, b"\x7f\x10\xda\xbe", "VirtualBox (VDI)"),
        (0, b"conectix", "Virtual PC (VHD)"),
        (0, b"QED\0", "QEMU (QED)"),
        (0, b"WithoutFreeSpace", "Parallels"),
        (0, b"WithouFreSpacExt", "Parallels"),
    ];
    let failed = |source| Error::Io { path: path.to_owned(), what: "read the beginning of", source };
    let mut start = Vec::new();
    std::fs::File::open(path).and_then(|file| file.take(SECTOR).read_to_end(&mut start)).map_err(failed)?;
    let has = |offset: usize, magic: &[u8]| start.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    Ok(KINDS.into_iter().find(|&(offset, magic, _)| has(offset, magic)).map(|found| found.2))
}

/// What an image alone reads as is not what its disk reads as while a redo log waits.
fn refuse_pending(path: &Path) -> Result<(), Error> {
    match redo::pending(path) {
        None => Ok(()),
        Some(log) => invalid(
            path,
            format!(
                "has changes that were not decided upon, in {}: commit or discard them first",
                log.display()
            ),
        ),
    }
}

/// `vmm image copy --into`
pub fn copy_into(source: &Path, path: &Path, json: bool) -> Result<(), Failure> {
    let mut progress = Progress::begin("copying")?;
    let mut copy = || {
        refuse_pending(source)?;
        let src = vmfs_image::open(source, &OpenOptions::default())?;
        if replace::is_same(source, path) {
            return invalid(path, "is what would be copied: name another image");
        }
        let options = OpenOptions { writable: true, ..OpenOptions::default() };
        let dst = redo::open(path, Mode::Persistent, &options)?.image;
        ops::copy(&*src, &*dst, &mut |done, total| progress.report(done, total))
    };
    copy().map_err(failure)?;
    drop(progress);
    output::made(path, json)
}
