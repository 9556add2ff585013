//! Copying the contents of an image to another.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;

use super::{Progress, chain_run, failed, step};
use crate::image::{Access, Error, Extent, Image, Place};

/// How much is moved at once, in bytes.
const CHUNK: u64 = 2 << 20;
/// Zeroes are looked for in units of so many bytes.
const BLOCK: usize = 4096;

/// How an image is copied.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyOptions {
    /// Bytes that are there, and are zero, become a hole. All of the data is read for that; without, what the file system
    /// can share or move by itself is never read.
    pub detect_zeroes: bool,
    /// What is zero keeps the space that it has in the target.
    pub keep_space: bool,
}

/// Makes `dst` read as `src` does, chain and all; what is a hole there becomes one here. Where the file system can, both
/// share their bytes (reflink), else it copies them by itself. If `dst` is larger, the rest of it becomes zeroes. What was
/// copied is stable in the end.
///
/// # Errors
///
/// [`Error::Invalid`] if `dst` is smaller, [`Error::Io`], and [`Error::Interrupted`] once `progress` says to stop.
pub fn copy(src: &dyn Image, dst: &dyn Image, progress: &mut Progress<'_>) -> Result<(), Error> {
    copy_with(src, dst, CopyOptions::default(), progress)
}

/// As [`copy`], as `options` say.
///
/// # Errors
///
/// As [`copy`].
pub fn copy_with(
    src: &dyn Image,
    dst: &dyn Image,
    options: CopyOptions,
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    let (size, total) = (src.size(), dst.size());
    if total < size {
        return Err(Error::Invalid {
            path: dst.path().to_owned(),
            what: format!("has {total} bytes; to hold a copy of {} it needs {size}", src.path().display()),
        });
    }
    let mut copier = Copier { src, dst, options, buffer: Vec::new(), asks_kernel: can_ask_kernel(src, dst) };
    let mut at = 0;
    if !options.detect_zeroes && copier.clone_all() {
        at = size;
    }
    step(progress, dst, at, total)?;
    while at < size {
        let run = chain_run(src, at, size - at).map_err(failed(src, "read"))?;
        let end = at + run.len;
        if run.data.is_none() {
            copier.zero(at, run.len)?;
            at = end;
            step(progress, dst, at, total)?;
        }
        while at < end {
            let len = CHUNK.min(end - at);
            copier.data(at, len)?;
            at += len;
            step(progress, dst, at, total)?;
        }
    }
    if total > size {
        copier.zero(size, total - size)?;
    }
    dst.flush().map_err(failed(dst, "make stable what was written to"))?;
    step(progress, dst, total, total)
}

struct Copier<'a> {
    src: &'a dyn Image,
    dst: &'a dyn Image,
    options: CopyOptions,
    buffer: Vec<u8>,
    /// Whether the kernel is asked to move bytes from file to file.
    asks_kernel: bool,
}

/// Not past the page cache: of direct I/O the kernel would make buffered I/O in between.
fn can_ask_kernel(src: &dyn Image, dst: &dyn Image) -> bool {
    src.memory_alignment() == 1 && dst.memory_alignment() == 1
}

impl Copier<'_> {
    /// Shares all of the source at once, if it lies in one piece of one file, and so does the target.
    fn clone_all(&mut self) -> bool {
        let len = self.src.size();
        self.asks_kernel && self.by_extents(0, len, clone_range)
    }

    fn data(&mut self, offset: u64, len: u64) -> Result<(), Error> {
        if self.asks_kernel && !self.options.detect_zeroes && self.by_extents(offset, len, copy_range) {
            return Ok(());
        }
        let len_usize = usize::try_from(len).map_err(io::Error::other).map_err(failed(self.src, "read"))?;
        self.buffer.resize(len_usize, 0);
        let mut buffer = std::mem::take(&mut self.buffer);
        let moved = self.by_hand(offset, &mut buffer);
        self.buffer = buffer;
        moved
    }

    fn by_hand(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Error> {
        self.src.read_at(offset, &[VolatileSlice::from(&mut *buffer)]).map_err(failed(self.src, "read"))?;
        let mut at = offset;
        for (bytes, zero) in Stretches::new(buffer, self.options.detect_zeroes) {
            let len = bytes.len() as u64;
            if zero {
                self.zero(at, len)?;
            } else {
                self.dst.write_at(at, &[VolatileSlice::from(bytes)]).map_err(failed(self.dst, "write to"))?;
            }
            at += len;
        }
        Ok(())
    }

    /// Makes a range of the target zeroes, where it is not.
    fn zero(&self, offset: u64, len: u64) -> Result<(), Error> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let run = chain_run(self.dst, at, end - at).map_err(failed(self.dst, "read"))?;
            if run.data.is_some() {
                self.dst
                    .write_zeroes(at, run.len, !self.options.keep_space)
                    .map_err(failed(self.dst, "write to"))?;
            }
            at += run.len;
        }
        Ok(())
    }

    /// Moves a range from file to file by `call`, if both images know where it lies. Gives whether all of it was moved.
    fn by_extents(
        &self,
        offset: u64,
        len: u64,
        call: impl Fn(&File, u64, &File, u64, u64) -> io::Result<()>,
    ) -> bool {
        let (mut from, mut to) = (Vec::new(), Vec::new());
        let Some(reading) = self.src.locate(offset, len, Access::Read, &mut from) else { return false };
        let Some(writing) = self.dst.locate(offset, len, Access::Write, &mut to) else {
            self.src.finish(reading, true);
            return false;
        };
        let moved = pairs(&from, &to).try_for_each(|(from, to, len)| {
            let (Place::File { file: src, offset: from }, Place::File { file: dst, offset: to }) = (from, to)
            else {
                return Err(io::ErrorKind::Unsupported.into());
            };
            let src = self.src.files().get(usize::from(src)).ok_or(io::ErrorKind::Unsupported)?;
            let dst = self.dst.files().get(usize::from(dst)).ok_or(io::ErrorKind::Unsupported)?;
            call(src, from, dst, to, len)
        });
        self.src.finish(reading, true);
        self.dst.finish(writing, moved.is_ok());
        moved.is_ok()
    }
}

/// The pieces that two lists of extents of the same length have in common.
fn pairs(from: &[Extent], to: &[Extent]) -> impl Iterator<Item = (Place, Place, u64)> {
    let (mut from, mut to) = (from.iter().copied(), to.iter().copied());
    let (mut left, mut right) = (from.next(), to.next());
    std::iter::from_fn(move || {
        let (a, b) = (left?, right?);
        let len = a.len.min(b.len);
        let rest = |extent: Extent| {
            let place = match extent.place {
                Place::File { file, offset } => Place::File { file, offset: offset + len },
                Place::Zero => Place::Zero,
            };
            (extent.len > len).then_some(Extent { len: extent.len - len, place })
        };
        left = rest(a).or_else(|| from.next());
        right = rest(b).or_else(|| to.next());
        Some((a.place, b.place, len))
    })
}

/// Cuts bytes where blocks of zeroes begin and end.
struct Stretches<'a> {
    rest: &'a mut [u8],
    detect: bool,
}

impl<'a> Stretches<'a> {
    fn new(bytes: &'a mut [u8], detect: bool) -> Self {
        Self { rest: bytes, detect }
    }
}

impl<'a> Iterator for Stretches<'a> {
    type Item = (&'a mut [u8], bool);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let is_zero = |block: &[u8]| self.detect && all_zero(block);
        let first = is_zero(&self.rest[..BLOCK.min(self.rest.len())]);
        let blocks = self.rest.chunks(BLOCK).take_while(|block| is_zero(block) == first).count();
        let len = (blocks * BLOCK).min(self.rest.len());
        let (stretch, rest) = std::mem::take(&mut self.rest).split_at_mut(len);
        self.rest = rest;
        Some((stretch, first))
    }
}

/// Whether all bytes are zero.
pub(super) fn all_zero(bytes: &[u8]) -> bool {
    // By pieces of a cache line, which the compiler looks at as a whole.
    let (pieces, rest) = bytes.as_chunks::<64>();
    pieces.iter().all(|piece| piece.iter().fold(0, |all, b| all | b) == 0) && rest.iter().all(|b| *b == 0)
}

/// `FICLONERANGE` (ioctl_ficlonerange(2)): both files share the blocks from then on.
fn clone_range(src: &File, from: u64, dst: &File, to: u64, len: u64) -> io::Result<()> {
    let range = libc::file_clone_range {
        src_fd: i64::from(src.as_raw_fd()),
        src_offset: from,
        src_length: len,
        dest_offset: to,
    };
    // SAFETY: the ioctl reads the structure.
    if unsafe { libc::ioctl(dst.as_raw_fd(), libc::FICLONERANGE, &raw const range) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn copy_range(src: &File, mut from: u64, dst: &File, mut to: u64, len: u64) -> io::Result<()> {
    let mut left = usize::try_from(len).map_err(io::Error::other)?;
    while left > 0 {
        // Not by libc's function: the standard library refers to it weakly, and a static binary that is optimized as a
        // whole is linked without it then.
        match rustix::fs::copy_file_range(src, Some(&mut from), dst, Some(&mut to), left) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => left -= done,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
