//! What a disk shows whose image was closed, because its guest has ended.

use std::io;
use std::path::{Path, PathBuf};

use vm_memory::VolatileSlice;
use vmfs_image::{Format, Identity, Image, Info, Run};

/// Nothing of an image but what it was called.
#[derive(Debug)]
pub struct Gone {
    path: PathBuf,
    format: Format,
    size: u64,
    block_size: u32,
}

impl Gone {
    pub fn of(image: &dyn Image) -> Self {
        Self {
            path: image.path().to_owned(),
            format: image.format(),
            size: image.size(),
            block_size: image.block_size(),
        }
    }
}

fn closed<T>() -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::NotConnected, "its image was closed"))
}

impl Image for Gone {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> Format {
        self.format
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    /// It takes the place of one that was.
    fn is_writable(&self) -> bool {
        true
    }

    fn read_at(&self, _offset: u64, _into: &[VolatileSlice<'_>]) -> io::Result<()> {
        closed()
    }

    fn write_at(&self, _offset: u64, _from: &[VolatileSlice<'_>]) -> io::Result<()> {
        closed()
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        closed()
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        closed()
    }

    fn flush(&self) -> io::Result<()> {
        closed()
    }

    fn run(&self, _offset: u64, _len: u64) -> io::Result<Run> {
        closed()
    }

    fn grow(&self, _size: u64) -> io::Result<()> {
        closed()
    }

    fn info(&self) -> io::Result<Info> {
        closed()
    }

    fn identity(&self) -> io::Result<Identity> {
        closed()
    }
}
