//! The images, and the state in which every run finds them.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::cases::{Cache, Image, State};
use crate::systems::{self, Format};

/// What is handled at a time: no folio of the page cache is larger, and each lies within one.
const PIECE: usize = 4 << 20;

/// An image that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// A program.
    #[error("{0}")]
    Tool(String),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// A directory with images of one size, made when they are wanted.
#[derive(Debug)]
pub struct Images {
    dir: PathBuf,
    size: u64,
    /// How the page cache holds each file.
    cached: HashMap<PathBuf, Cache>,
}

impl Images {
    /// Images of `size` bytes in `dir`, the raw one made at once: all of it written, with data that does not compress.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn new(dir: &Path, size: u64) -> Result<Self, Error> {
        let images = Self { dir: dir.to_owned(), size, cached: HashMap::new() };
        let path = images.raw();
        let write = || {
            let mut source = File::open("/dev/urandom")?;
            let mut piece = vec![0; PIECE];
            source.read_exact(&mut piece)?;
            let mut file = File::create(&path)?;
            for number in 0..size / PIECE as u64 {
                // No two blocks are alike.
                for block in piece.chunks_mut(4096) {
                    block[..8].copy_from_slice(&number.to_le_bytes());
                }
                file.write_all(&piece)?;
            }
            file.set_len(size)?;
            file.sync_all()
        };
        write().map_err(io_error("write", &path))?;
        Ok(images)
    }

    /// Size of the disks in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The raw image, which the host's own benchmark uses as well.
    #[must_use]
    pub fn raw(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    /// Makes `image` ready for a run and gives its path: all that was written to it is on the disk, its data in the page
    /// cache as `cache` says. Images that a run fills are new.
    ///
    /// # Errors
    ///
    /// A file cannot be made, or the program that makes it is not there.
    pub fn prepare(&mut self, image: Image, cache: Cache) -> Result<PathBuf, Error> {
        let path = match image {
            Image { format: Format::Raw, .. } => self.raw(),
            Image { format: Format::Qcow2, state } => self.qcow2(state)?,
            Image { format: Format::Thin, .. } => {
                return Err(Error::Tool("this version has no thin images".to_owned()));
            }
        };
        match image.state {
            State::Allocated => self.settle(&path, cache)?,
            State::Fresh => sync(&path).map_err(io_error("prepare", &path))?,
            State::Backed => {
                self.settle(&self.raw(), cache)?;
                sync(&path).map_err(io_error("prepare", &path))?;
            }
        }
        Ok(path)
    }

    fn settle(&mut self, path: &Path, cache: Cache) -> Result<(), Error> {
        let failed = io_error("prepare", path);
        if self.cached.get(path) == Some(&cache) && cache != Cache::Nothing {
            return sync(path).map_err(failed);
        }
        self.cached.remove(path);
        fill(path, cache).map_err(failed)?;
        self.cached.insert(path.to_owned(), cache);
        Ok(())
    }

    fn qcow2(&self, state: State) -> Result<PathBuf, Error> {
        let (raw, size) = (self.raw(), self.size.to_string());
        let full = self.dir.join("full.qcow2");
        let new = self.dir.join("new.qcow2");
        match state {
            State::Allocated if full.exists() => return Ok(full),
            State::Allocated => {
                qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &[&raw, &full])?;
                return Ok(full);
            }
            State::Fresh => qemu_img(&["create", "-q", "-f", "qcow2"], &[&new, Path::new(&size)])?,
            State::Backed => {
                let backing = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"];
                qemu_img(&backing, &[&raw, &new])?;
            }
        }
        Ok(new)
    }
}

fn qemu_img(args: &[&str], paths: &[&Path]) -> Result<(), Error> {
    let program = systems::tool("qemu-img", "QEMU_IMG").map_err(Error::Tool)?;
    let mut command = Command::new(program);
    command.args(args).args(paths).stdin(Stdio::null());
    let output = command.output().map_err(|error| Error::Tool(format!("cannot run qemu-img: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Tool(format!("qemu-img {} ended with {}: {}", args[0], output.status, said.trim())))
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Writes the file to the disk and brings it anew into the page cache.
fn fill(path: &Path, cache: Cache) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    file.sync_all()?;
    let len = file.metadata()?.len();
    match cache {
        Cache::Nothing => advise(&file, 0, len, libc::POSIX_FADV_DONTNEED),
        Cache::ReadAhead => {
            advise(&file, 0, len, libc::POSIX_FADV_DONTNEED)?;
            let mut piece = vec![0; PIECE];
            while file.read(&mut piece)? > 0 {}
            Ok(())
        }
        Cache::Pieces(size) => {
            // What is read is not to bring its neighbours along.
            advise(&file, 0, len, libc::POSIX_FADV_RANDOM)?;
            let mut piece = vec![0; PIECE];
            let mut at = 0;
            while at < len {
                let wanted = usize::try_from(len - at).map_or(PIECE, |left| left.min(PIECE));
                let piece = &mut piece[..wanted];
                file.read_exact_at(piece, at)?;
                advise(&file, at, wanted as u64, libc::POSIX_FADV_DONTNEED)?;
                for part in piece.chunks(usize::try_from(size).unwrap_or(PIECE)) {
                    file.write_all_at(part, at)?;
                    at += part.len() as u64;
                }
            }
            file.sync_all()
        }
    }
}

fn advise(file: &File, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
    let place = |number: u64| libc::off_t::try_from(number).map_err(|_| io::ErrorKind::InvalidInput);
    // SAFETY: no memory is involved.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), place(offset)?, place(len)?, advice) } {
        0 => Ok(()),
        refused => Err(io::Error::from_raw_os_error(refused)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: Image = Image { format: Format::Raw, state: State::Allocated };

    #[test]
    fn raw_image_is_full_and_its_blocks_differ() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = Images::new(dir.path(), 4 << 20).unwrap();
        let raw = images.prepare(RAW, Cache::Pieces(4096)).unwrap();
        let bytes = std::fs::read(&raw).unwrap();
        assert_eq!(bytes.len(), 4 << 20);
        let mut blocks: Vec<&[u8]> = bytes.chunks(4096).collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), 1024);
    }

    #[test]
    fn preparation_changes_no_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..PIECE + 5 * 512).map(|at| u8::try_from(at % 251).unwrap()).collect();
        std::fs::write(&path, &bytes).unwrap();
        for cache in [Cache::Pieces(4096), Cache::Pieces(128 << 10), Cache::ReadAhead, Cache::Nothing] {
            fill(&path, cache).unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes, "{cache:?}");
        }
    }

    #[test]
    fn file_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = Images::new(dir.path(), 1 << 20).unwrap();
        std::fs::remove_file(images.raw()).unwrap();
        let error = images.prepare(RAW, Cache::Nothing).unwrap_err().to_string();
        assert!(error.contains("disk.raw"), "{error}");
    }
}
