//! What the library reads from and writes to: a file, or an image below.

use std::fmt::{self, Display, Formatter};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use vm_memory::VolatileSlice;

use super::order::Order;
use crate::flat::{self, Aligned};
use crate::image::{Image, SECTOR};
use crate::open::Alignment;
use crate::transfer;

/// The most that is read at once, in bytes: the largest L1 table.
const MOST: usize = 32 << 20;

/// See the module.
#[derive(Debug)]
pub(super) struct Disk {
    kind: Kind,
    blockers: CommonStorageHelper,
}

#[derive(Debug)]
enum Kind {
    File(Plain),
    Below(Arc<dyn Image>),
    /// A description of files.
    Text(String),
}

/// A file, and how it is used.
#[derive(Debug, Clone)]
pub(super) struct Plain {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
    pub(super) direct: Option<Alignment>,
    pub(super) is_device: bool,
    /// A flush of it does something.
    pub(super) syncs: bool,
    /// In which order a qcow2 image is written to.
    pub(super) order: Option<Arc<Order>>,
}

impl Plain {
    /// Bytes of the file, however direct I/O wants them; zeroes past its end.
    pub(super) fn bytes(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        check_place(offset, len)?;
        let block = self.direct.map_or(1, |direct| u64::from(direct.file));
        let from = offset - offset % block;
        let to = (offset + len as u64).next_multiple_of(block);
        let mut buffer = Aligned::new(to - from)?;
        let bytes = buffer.bytes(usize::try_from(to - from).map_err(io::Error::other)?)?;
        read_or_zero(&self.file, from, bytes)?;
        let skip = usize::try_from(offset - from).map_err(io::Error::other)?;
        Ok(bytes[skip..skip + len].to_vec())
    }

    /// Changes bytes of the file; nobody else may do so to those around them meanwhile.
    pub(super) fn set_bytes(&self, offset: u64, new: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        super::tests::record(|| super::tests::Step::Write(offset, new.to_vec()));
        check_place(offset, new.len())?;
        let Some(direct) = self.direct else { return self.file.write_all_at(new, offset) };
        let block = u64::from(direct.file);
        let from = offset - offset % block;
        let to = (offset + new.len() as u64).next_multiple_of(block);
        let mut buffer = Aligned::new(to - from)?;
        let bytes = buffer.bytes(usize::try_from(to - from).map_err(io::Error::other)?)?;
        read_or_zero(&self.file, from, bytes)?;
        let skip = usize::try_from(offset - from).map_err(io::Error::other)?;
        bytes[skip..skip + new.len()].copy_from_slice(new);
        self.file.write_all_at(bytes, from)
    }

    /// What was written is stable.
    pub(super) fn sync(&self) -> io::Result<()> {
        #[cfg(test)]
        super::tests::record(|| super::tests::Step::Sync);
        if self.syncs { self.file.sync_data() } else { Ok(()) }
    }

    fn read(&self, into: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the vectors are those of the buffers, which live as long as `into`.
        let vectors = unsafe { into.as_iovec() }.to_vec();
        // SAFETY: the buffers may be written to: `into` borrows them to be filled.
        let done = unsafe { transfer::read_vectors(&self.file, offset, vectors) };
        let done = match done {
            // Direct I/O from an end of the file that is within a block.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && self.direct.is_some() => {
                let len = self.file.metadata()?.len();
                if offset < len && !self.is_device { len - offset } else { return Err(error) }
            }
            done => done?,
        };
        if done < into.len() {
            into.split_tail_at(done).fill(0);
        }
        Ok(())
    }
}

/// Refuses what is no place in a file, or more than a table has: what says where may come from a guest.
fn check_place(offset: u64, len: usize) -> io::Result<()> {
    if offset > 1 << 62 || len > MOST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a table is where none can be"));
    }
    Ok(())
}

fn read_or_zero(file: &File, offset: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // As in `Plain::read`.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) && done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    into[done..].fill(0);
    Ok(())
}

impl Disk {
    pub(super) fn file(plain: Plain) -> Self {
        Self::of(Kind::File(plain))
    }

    pub(super) fn below(image: Arc<dyn Image>) -> Self {
        Self::of(Kind::Below(image))
    }

    pub(super) fn text(text: String) -> Self {
        Self::of(Kind::Text(text))
    }

    fn of(kind: Kind) -> Self {
        Self { kind, blockers: CommonStorageHelper::default() }
    }

    /// It as a file.
    pub(super) fn plain(&self) -> Option<&Plain> {
        match &self.kind {
            Kind::File(plain) => Some(plain),
            Kind::Below(_) | Kind::Text(_) => None,
        }
    }

    fn direct(&self) -> Option<Alignment> {
        self.plain().and_then(|plain| plain.direct)
    }
}

impl Display for Disk {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::File(plain) => plain.path.display().fmt(f),
            Kind::Below(image) => image.path().display().fmt(f),
            Kind::Text(_) => f.write_str("descriptor"),
        }
    }
}

impl Storage for Disk {
    fn mem_align(&self) -> usize {
        self.direct().map_or(1, |direct| direct.memory)
    }

    fn req_align(&self) -> usize {
        match &self.kind {
            Kind::Below(_) => usize::try_from(SECTOR).unwrap_or(512),
            _ => self.direct().map_or(1, |direct| usize::try_from(direct.file).unwrap_or(4096)),
        }
    }

    fn size(&self) -> io::Result<u64> {
        match &self.kind {
            Kind::File(plain) => Ok(plain.file.metadata()?.len()),
            Kind::Below(image) => Ok(image.size()),
            Kind::Text(text) => Ok(text.len() as u64),
        }
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        // Only names that we gave: see `vmdk`.
        Ok(relative.as_ref().to_owned())
    }

    unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        match &self.kind {
            Kind::File(plain) => plain.read(bufv, offset),
            Kind::Below(image) => {
                let mut buffers = bufv.into_inner();
                let pieces: Vec<_> =
                    buffers.iter_mut().map(|buffer| VolatileSlice::from(&mut **buffer)).collect();
                image.read_at(offset, &pieces)
            }
            Kind::Text(text) => {
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                let len = usize::try_from(bufv.len()).unwrap_or(usize::MAX);
                let mut bytes = text.as_bytes()[from..].to_vec();
                bytes.resize(len, 0);
                bufv.copy_from_slice(&bytes);
                Ok(())
            }
        }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let Some(plain) = self.plain() else { return Err(io::ErrorKind::PermissionDenied.into()) };
        // SAFETY: the vectors are those of the buffers, which live as long as `bufv`.
        let vectors = unsafe { bufv.as_iovec() }.to_vec();
        let write = || {
            #[cfg(test)]
            super::tests::record(|| {
                let mut bytes = vec![0; usize::try_from(bufv.len()).unwrap()];
                bufv.copy_into_slice(&mut bytes);
                super::tests::Step::Write(offset, bytes)
            });
            // SAFETY: the buffers may be read: `bufv` borrows them.
            unsafe { transfer::write_vectors(&plain.file, offset, vectors) }
        };
        match &plain.order {
            None => write(),
            Some(order) => order.write(plain, offset, &bufv, write),
        }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let Some(plain) = self.plain() else { return Err(io::ErrorKind::PermissionDenied.into()) };
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        let zero = || {
            #[cfg(test)]
            super::tests::record(|| super::tests::Step::Zero(offset, length));
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // The library writes zeroes where this cannot be done.
            flat::allocate(&plain.file, mode, offset, length)
                .map_err(|_| io::Error::from(io::ErrorKind::Unsupported))?;
            // Others who read the image want its clusters to lie in the file.
            if !plain.is_device && plain.file.metadata()?.len() < end {
                plain.file.set_len(end)?;
            }
            Ok(())
        };
        match &plain.order {
            None => zero(),
            Some(order) => order.write_data(plain, offset, length, zero),
        }
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.plain().map_or(Ok(()), Plain::sync)
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.blockers
    }

    fn resize(&self, new_size: u64, _prealloc_mode: PreallocateMode) -> io::Result<()> {
        self.plain().ok_or(io::ErrorKind::Unsupported)?.file.set_len(new_size)
    }
}
