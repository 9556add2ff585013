//! The images, and the state in which every run finds them.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::cases::{Image, State};
use crate::systems::{self, Format};

const PIECE: usize = 1 << 20;

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
}

impl Images {
    /// Images of `size` bytes in `dir`, the raw one made at once: all of it written, with data that does not compress.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn new(dir: &Path, size: u64) -> Result<Self, Error> {
        let images = Self { dir: dir.to_owned(), size };
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

    /// Makes `image` ready for a run and gives its path. Images that a run fills are new; of those that are full the
    /// data lies in the page cache and all of it on the disk; with `direct`, none in the cache.
    ///
    /// # Errors
    ///
    /// A file cannot be made, or the program that makes it is not there.
    pub fn prepare(&self, image: Image, direct: bool) -> Result<PathBuf, Error> {
        let path = match image {
            Image { format: Format::Raw, .. } => self.raw(),
            Image { format: Format::Qcow2, state } => self.qcow2(state)?,
            Image { format: Format::Thin, .. } => {
                return Err(Error::Tool("this version has no thin images".to_owned()));
            }
        };
        if image.state == State::Backed {
            settle(&self.raw(), direct)?;
        }
        settle(&path, direct)?;
        Ok(path)
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

/// All that was written to the file is on the disk; its data is in the page cache, or with `direct` is not.
fn settle(path: &Path, direct: bool) -> Result<(), Error> {
    let run = || {
        let mut file = File::open(path)?;
        file.sync_all()?;
        if direct {
            // SAFETY: no memory is involved.
            let refused = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
            return if refused == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(refused)) };
        }
        let mut piece = vec![0; PIECE];
        while file.read(&mut piece)? > 0 {}
        Ok(())
    };
    run().map_err(io_error("prepare", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_image_is_full_and_its_blocks_differ() {
        let dir = tempfile::tempdir().unwrap();
        let images = Images::new(dir.path(), 4 << 20).unwrap();
        let raw = images.prepare(Image { format: Format::Raw, state: State::Allocated }, false).unwrap();
        let bytes = std::fs::read(&raw).unwrap();
        assert_eq!(bytes.len(), 4 << 20);
        let mut blocks: Vec<&[u8]> = bytes.chunks(4096).collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), 1024);
        settle(&raw, true).unwrap();
    }

    #[test]
    fn file_that_is_not_there_is_named() {
        let error = settle(Path::new("/nonexistent/disk"), false).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/disk"), "{error}");
    }
}
