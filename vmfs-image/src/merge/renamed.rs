//! An image whose file was given another name while it is open.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::image::{Access, Error, Extent, Format, Identity, Image, Info, Run, Ticket};
use crate::thin::Thin;

/// The image, but for its path.
#[derive(Debug)]
pub(super) struct Renamed {
    image: Arc<dyn Image>,
    path: PathBuf,
}

impl Renamed {
    pub(super) fn new(image: &Arc<dyn Image>, path: &Path) -> Self {
        Self { image: Arc::clone(image), path: path.to_owned() }
    }
}

impl Image for Renamed {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> Format {
        self.image.format()
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn block_size(&self) -> u32 {
        self.image.block_size()
    }

    fn memory_alignment(&self) -> usize {
        self.image.memory_alignment()
    }

    fn as_thin(&self) -> Option<&Thin> {
        self.image.as_thin()
    }

    fn is_writable(&self) -> bool {
        self.image.is_writable()
    }

    fn set_writable(&self, writable: bool) -> Result<(), Error> {
        self.image.set_writable(writable)
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.image.backing()
    }

    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.image.read_at(offset, into)
    }

    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.image.write_at(offset, from)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.image.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.image.discard(offset, len)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn flush_is_sync_of(&self) -> Option<u16> {
        self.image.flush_is_sync_of()
    }

    fn files(&self) -> &[Arc<File>] {
        self.image.files()
    }

    fn locate(&self, offset: u64, len: u64, access: Access, extents: &mut Vec<Extent>) -> Option<Ticket> {
        self.image.locate(offset, len, access, extents)
    }

    fn finish(&self, ticket: Ticket, ok: bool) {
        self.image.finish(ticket, ok);
    }

    fn run(&self, offset: u64, len: u64) -> io::Result<Run> {
        self.image.run(offset, len)
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        self.image.grow(size)
    }

    fn pull(&self, offset: u64, len: u64) -> io::Result<()> {
        self.image.pull(offset, len)
    }

    fn info(&self) -> io::Result<Info> {
        Ok(Info { path: self.path.clone(), ..self.image.info()? })
    }

    fn identity(&self) -> io::Result<Identity> {
        self.image.identity()
    }
}
