//! Sharing by extents of the file system.

use std::collections::HashMap;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::{CLUSTER, Method, Options, Outcome, Report, clusters, files_of};
use crate::image::Error;
use crate::ops::Progress;
use crate::steps::failed;

/// `_IOWR(0x94, 54, struct file_dedupe_range)` (linux/fs.h).
const FIDEDUPERANGE: libc::c_ulong = 0xc018_9436;
/// `_IOWR('f', 11, struct fiemap)` (linux/fs.h).
const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;
/// Bytes that a place in the table takes: hash, file and cluster.
const ENTRY: usize = 24;
/// The kernel is asked to share so much at once, at most, in bytes.
const MOST: u64 = 1 << 20;
/// Extents that a cluster is looked at in; one in more pieces is taken for one that is not shared.
const PIECES: usize = 16;

/// `struct file_dedupe_range` with one `struct file_dedupe_range_info` (linux/fs.h).
#[repr(C)]
#[derive(Debug, Default)]
struct Request {
    src_offset: u64,
    src_length: u64,
    dest_count: u16,
    reserved1: u16,
    reserved2: u32,
    dest_fd: i64,
    dest_offset: u64,
    bytes_deduped: u64,
    status: i32,
    reserved: u32,
}

/// Has the kernel share a range. Gives how much it shared: nothing where the bytes differ.
fn share_range(src: &File, from: u64, dst: &File, to: u64, len: u64) -> io::Result<u64> {
    let mut request = Request {
        src_offset: from,
        src_length: len,
        dest_count: 1,
        dest_fd: dst.as_raw_fd().into(),
        dest_offset: to,
        ..Request::default()
    };
    // SAFETY: the ioctl reads the request and fills in what is in its one place for a target.
    if unsafe { libc::ioctl(src.as_raw_fd(), FIDEDUPERANGE, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    match request.status {
        0 => Ok(request.bytes_deduped),
        1 => Ok(0),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// Whether files of a directory can share extents.
pub(super) fn can_share(directory: &Path) -> Result<bool, Error> {
    // Told by the first that there is: a range of no length changes nothing.
    for path in files_of(directory, true)? {
        let Ok(file) = File::open(&path) else { continue };
        return Ok(share_range(&file, 0, &file, 0, 0).is_ok());
    }
    Ok(false)
}

/// `struct fiemap` with room for extents (linux/fiemap.h).
#[repr(C)]
#[derive(Debug, Default)]
struct Map {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [Extent; PIECES],
}

/// `struct fiemap_extent` (linux/fiemap.h).
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved2: [u32; 3],
}

/// Where a cluster of a file lies on the disk.
#[derive(Debug, PartialEq, Eq)]
struct Places {
    /// Offset in the cluster, place, length.
    pieces: Vec<(u64, u64, u64)>,
    /// Whether other files lie there too.
    shared: bool,
}

fn places(file: &File, offset: u64) -> Option<Places> {
    const LAST: u32 = 1;
    /// Not known, not written yet, or in other ways not to be compared: `UNKNOWN | DELALLOC | ENCODED | DATA_INLINE`.
    const NO_PLACE: u32 = 2 | 4 | 8 | 0x200;
    const SHARED: u32 = 0x2000;
    let mut map =
        Map { start: offset, length: CLUSTER, count: u32::try_from(PIECES).unwrap_or(0), ..Map::default() };
    // SAFETY: the ioctl fills in up to `count` extents, for which there is room.
    if unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) } < 0 {
        return None;
    }
    let found = map.extents.get(..usize::try_from(map.mapped).ok()?)?;
    let last = found.last()?;
    let complete = last.flags & LAST != 0 || last.logical.checked_add(last.length)? >= offset + CLUSTER;
    if !complete || found.iter().any(|extent| extent.flags & NO_PLACE != 0) {
        return None;
    }
    let pieces = found.iter().map(|extent| {
        let skipped = offset.saturating_sub(extent.logical);
        let from = extent.logical.max(offset);
        let to = (extent.logical + extent.length).min(offset + CLUSTER);
        (from - offset, extent.physical + skipped, to.saturating_sub(from))
    });
    Some(Places { pieces: pieces.collect(), shared: found.iter().all(|extent| extent.flags & SHARED != 0) })
}

/// A file that is looked at.
#[derive(Debug)]
struct Source {
    path: PathBuf,
    file: File,
    saved: u64,
}

/// A stretch that is to be shared.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    src: usize,
    from: u64,
    dst: usize,
    to: u64,
    len: u64,
    /// Of that, what is saved.
    gain: u64,
}

pub(super) fn share(
    directory: &Path,
    options: &Options,
    progress: &mut Progress<'_>,
) -> Result<Report, Error> {
    let mut sources = Vec::new();
    let mut images = Vec::new();
    let (mut total, mut data) = (0, 0);
    for path in files_of(directory, true)? {
        match File::open(&path).and_then(|file| Ok((file.metadata()?, file))) {
            Ok((about, file)) => {
                use std::os::unix::fs::MetadataExt;
                total += about.len();
                data += about.len().min(about.blocks().saturating_mul(512));
                // What was written last has a place on the disk then, which is compared.
                let _ = file.sync_data();
                sources.push(Source { path, file, saved: 0 });
            }
            Err(error) => {
                images.push(Outcome { path, saved: 0, skipped: Some(format!("cannot be opened: {error}")) });
            }
        }
    }
    let room = (options.memory / ENTRY).max(1) as u64;
    let passes = (data / CLUSTER).div_ceil(room).max(1);
    // With a key of its own, so that no guest makes up clusters that are taken for one another.
    let hasher = RandomState::new();
    for pass in 0..passes {
        let mut before = 0;
        let mut table: HashMap<u64, (u32, u64)> = HashMap::new();
        for index in 0..sources.len() {
            let mut stretch: Option<Stretch> = None;
            let path = sources[index].path.clone();
            let file = sources[index].file.try_clone().map_err(failed(&path, "open"))?;
            let len = file.metadata().map_err(failed(&path, "examine"))?.len();
            clusters(&path, &file, |at, bytes| {
                if at % (16 << 20) == 0 && progress(pass * total + before + at, passes * total).is_break() {
                    return Err(Error::Interrupted { path: directory.to_owned() });
                }
                if bytes.iter().all(|byte| *byte == 0) {
                    return Ok(());
                }
                let mut hash = hasher.build_hasher();
                hash.write(bytes);
                let hash = hash.finish();
                if hash % passes != pass {
                    return Ok(());
                }
                let Some(&(src, from)) = table.get(&hash) else {
                    if (table.len() as u64) < room {
                        table.insert(hash, (u32::try_from(index).unwrap_or(u32::MAX), at));
                    }
                    return Ok(());
                };
                let src = usize::try_from(src).unwrap_or(usize::MAX);
                let Some(source) = sources.get(src) else { return Ok(()) };
                let (one, other) = (places(&source.file, from), places(&file, at));
                if one.is_some()
                    && one.as_ref().map(|one| &one.pieces) == other.as_ref().map(|other| &other.pieces)
                {
                    return Ok(());
                }
                let gain = if other.is_some_and(|other| other.shared) { 0 } else { CLUSTER };
                let found = Stretch { src, from, dst: index, to: at, len: CLUSTER, gain };
                match &mut stretch {
                    Some(last) if last.is_followed_by(&found) => {
                        last.len += CLUSTER;
                        last.gain += gain;
                    }
                    _ => flush(&mut sources, stretch.replace(found), options),
                }
                Ok(())
            })?;
            flush(&mut sources, stretch, options);
            before += len;
        }
    }
    let _ = progress(passes * total, passes * total);
    let saved = sources.iter().map(|source| source.saved).sum();
    images.extend(sources.into_iter().map(|source| Outcome {
        path: source.path,
        saved: source.saved,
        skipped: None,
    }));
    images.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(Report { method: Method::Extents, images, bases: Vec::new(), saved })
}

impl Stretch {
    fn is_followed_by(&self, next: &Self) -> bool {
        (self.src, self.dst) == (next.src, next.dst)
            && (self.from + self.len, self.to + self.len) == (next.from, next.to)
            && self.len + next.len <= MOST
            // A file with itself: the two may not come to overlap.
            && (self.src != self.dst || self.from.abs_diff(self.to) >= self.len + next.len)
    }
}

fn flush(sources: &mut [Source], stretch: Option<Stretch>, options: &Options) {
    let Some(stretch) = stretch else { return };
    if options.dry_run {
        sources[stretch.dst].saved += stretch.gain;
        return;
    }
    let (src, dst) = (&sources[stretch.src], &sources[stretch.dst]);
    let mut done = 0;
    // If it changed meanwhile in one place, the others are shared all the same.
    let whole = share_range(&src.file, stretch.from, &dst.file, stretch.to, stretch.len);
    if whole.as_ref().is_ok_and(|done| *done == stretch.len) {
        done = stretch.len;
    } else {
        let mut at = 0;
        while at < stretch.len {
            match share_range(&src.file, stretch.from + at, &dst.file, stretch.to + at, CLUSTER) {
                Ok(shared) => done += shared,
                Err(error) => {
                    tracing::debug!("{} at {}: not shared: {error}", dst.path.display(), stretch.to + at)
                }
            }
            at += CLUSTER;
        }
    }
    sources[stretch.dst].saved += done.min(stretch.gain);
}
