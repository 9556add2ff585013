//! Sharing what images of a directory have in common, in the sense of Linux-VServer's unification.
//!
//! Two ways:
//!
//! * **Extents.** Where the file system can (XFS, btrfs), equal clusters come to lie in the same place of the disk
//!   (`FIDEDUPERANGE`, ioctl_fideduperange(2)). The kernel compares them byte by byte while nobody can change them, so any
//!   file will do, and a guest that runs on one is not disturbed.
//! * **A base.** Elsewhere, thin images that hold the same at the same place, as those do that were copied from one
//!   template, become overlays on a new image that holds it once. They are written anew for that, so this is for images that
//!   nobody uses, and as much space as the largest of them has for itself is needed meanwhile.
//!
//! Memory is bounded: see [`Options::memory`].

mod base;
mod extents;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::flat::seek;
use crate::image::Error;
use crate::ops::Progress;
use crate::steps::{self, failed};

/// What is compared, in bytes: a cluster of a thin image, and the same of others.
pub const CLUSTER: u64 = 64 << 10;

/// By which way clusters are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// By extents where the file system can, else by a base.
    #[default]
    Auto,
    /// By extents of the file system.
    Extents,
    /// By a base image.
    Base,
}

/// How it is done.
#[derive(Debug, Clone)]
pub struct Options {
    /// By which way.
    pub method: Method,
    /// Nothing is changed; what would be saved is told.
    pub dry_run: bool,
    /// The most that the table of clusters may take, in bytes: one of 24 bytes for each cluster. Where there are more, the
    /// files are read several times, each time for a part of the clusters: with the 64 MiB of the default that is once for
    /// every 170 GiB of data.
    pub memory: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { method: Method::Auto, dry_run: false, memory: 64 << 20 }
    }
}

/// What came of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Outcome {
    /// The file.
    pub path: PathBuf,
    /// Bytes that it takes less.
    pub saved: u64,
    /// Why it was left as it is, if it was.
    pub skipped: Option<String>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// By which way: not [`Method::Auto`].
    pub method: Method,
    /// Every file that was looked at.
    pub images: Vec<Outcome>,
    /// New images that hold what others have in common, and what each takes, in bytes.
    pub bases: Vec<(PathBuf, u64)>,
    /// Bytes that all of it takes less, the new images counted.
    pub saved: u64,
}

/// Shares what images in `directory` have in common.
///
/// # Errors
///
/// [`Error::Unsupported`] if extents are asked for where the file system has none to share; [`Error::Interrupted`] once
/// `progress` says to stop, and any other [`Error`]. What was shared until then stays so, and everything reads as before.
pub fn dedupe(directory: &Path, options: &Options, progress: &mut Progress<'_>) -> Result<Report, Error> {
    let directory = &steps::real(directory)?;
    let can_share = || extents::can_share(directory);
    match options.method {
        Method::Extents if !can_share()? => Err(Error::Unsupported {
            path: directory.clone(),
            what: "a file system that shares extents (XFS or btrfs)".to_owned(),
        }),
        Method::Extents => extents::share(directory, options, progress),
        Method::Auto if can_share()? => extents::share(directory, options, progress),
        Method::Auto | Method::Base => base::share(directory, options, progress),
    }
}

/// Regular files of a directory that have a cluster at least, by name; with `deep`, those of its images' snapshots too.
fn files_of(directory: &Path, deep: bool) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed(directory, "list"))? {
        let entry = entry.map_err(failed(directory, "list"))?;
        let path = entry.path();
        let Ok(about) = path.symlink_metadata() else { continue };
        if about.is_file() && about.len() >= CLUSTER {
            files.push(path);
        } else if deep && about.is_dir() && path.as_os_str().as_encoded_bytes().ends_with(b".snapshots") {
            files.extend(files_of(&path, false)?);
        }
    }
    files.sort();
    // One of several names is enough.
    let mut inodes = std::collections::HashSet::new();
    files.retain(|path| path.metadata().is_ok_and(|about| inodes.insert((about.dev(), about.ino()))));
    Ok(files)
}

/// Calls `each` with the offset and the bytes of every whole cluster of a file that has data.
fn clusters(
    path: &Path,
    file: &File,
    mut each: impl FnMut(u64, &[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    let len = file.metadata().map_err(failed(path, "examine"))?.len();
    let mut bytes = vec![0; usize::try_from(CLUSTER).unwrap_or_default()];
    let mut at = 0;
    while at + CLUSTER <= len {
        // Where the file system cannot tell, everything is data.
        let data = seek(file, at, libc::SEEK_DATA).unwrap_or(Some(at));
        let Some(data) = data else { break };
        at = at.max(data - data % CLUSTER);
        if at + CLUSTER > len {
            break;
        }
        file.read_exact_at(&mut bytes, at).map_err(failed(path, "read"))?;
        each(at, &bytes)?;
        at += CLUSTER;
    }
    Ok(())
}
