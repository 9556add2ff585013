//! What a thin image is kept in: a file, or in tests something that records or damages.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::VolatileSlice;

use crate::transfer;

/// Bytes that stay, once [`sync`](Self::sync) has said so. All calls may be made from any number of threads.
pub(crate) trait Storage: Send + Sync + Debug {
    /// Fills `into` from `offset`; past the end that is an error of kind `UnexpectedEof`.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes `from` at `offset`.
    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()>;

    /// Returns once everything written before is stable, the length included.
    fn sync(&self) -> io::Result<()>;

    /// Gives the space of a range back. Where that cannot be done nothing happens.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Cuts off, or lengthens with bytes that take no space.
    fn set_len(&self, len: u64) -> io::Result<()>;

    /// Its length.
    fn len(&self) -> io::Result<u64>;

    /// The file, if it is one.
    fn file(&self) -> Option<&Arc<File>>;

    /// Fills memory of a guest from `offset`.
    fn read_slices(&self, into: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
        let mut bytes = Vec::new();
        for slice in into {
            bytes.resize(slice.len(), 0);
            self.read_at(&mut bytes, offset)?;
            slice.copy_from(&bytes);
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    /// Writes memory of a guest at `offset`.
    fn write_slices(&self, from: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
        let mut bytes = Vec::new();
        for slice in from {
            bytes.resize(slice.len(), 0);
            slice.copy_to(&mut bytes);
            self.write_at(&bytes, offset)?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }
}

/// A file.
#[derive(Debug)]
pub(crate) struct FileStorage {
    /// What an engine moves data through; perhaps past the page cache.
    file: Arc<File>,
    /// The same file through the page cache, if `file` goes past it: buffers and lengths here are aligned to nothing.
    /// The kernel keeps the two in agreement.
    cached: Option<File>,
    /// Nothing has to survive the host: `sync` does nothing.
    never_sync: bool,
    /// The file system refuses to punch holes: it is not asked again.
    no_holes: AtomicBool,
}

impl FileStorage {
    /// A file that goes through the page cache, or, with `cached` given, past it.
    pub(crate) fn new(file: Arc<File>, cached: Option<File>, never_sync: bool) -> Self {
        Self { file, cached, never_sync, no_holes: AtomicBool::new(false) }
    }

    fn plain(&self) -> &File {
        self.cached.as_ref().unwrap_or(&self.file)
    }
}

impl Storage for FileStorage {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.plain().read_exact_at(into, offset)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.plain().write_all_at(from, offset)
    }

    fn sync(&self) -> io::Result<()> {
        if self.never_sync { Ok(()) } else { self.file.sync_data() }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let (Ok(offset), Ok(len)) = (libc::off64_t::try_from(offset), libc::off64_t::try_from(len)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if len == 0 || self.no_holes.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        loop {
            // SAFETY: The call takes numbers only.
            if unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, offset, len) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP | libc::ENOSYS) => {
                    self.no_holes.store(true, Ordering::Relaxed);
                    return Ok(());
                }
                _ => return Err(error),
            }
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn file(&self) -> Option<&Arc<File>> {
        Some(&self.file)
    }

    fn read_slices(&self, into: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        transfer::read(self.plain(), offset, into)
    }

    fn write_slices(&self, from: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        transfer::write(self.plain(), offset, from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_gives_back_what_was_written_through_either_way() {
        let storage = FileStorage::new(Arc::new(tempfile::tempfile().unwrap()), None, false);
        let mut memory = [1_u8, 2, 3, 4, 5, 6, 7];
        let (one, other) = memory.split_at_mut(3);
        storage.write_slices(&[VolatileSlice::from(one), VolatileSlice::from(other)], 10).unwrap();
        let mut found = [0; 7];
        storage.read_at(&mut found, 10).unwrap();
        assert_eq!(found, [1, 2, 3, 4, 5, 6, 7]);
        storage.write_at(&[9; 2], 11).unwrap();
        let (one, other) = memory.split_at_mut(1);
        storage.read_slices(&[VolatileSlice::from(one), VolatileSlice::from(other)], 10).unwrap();
        assert_eq!(memory, [1, 9, 9, 4, 5, 6, 7]);
        assert_eq!(storage.len().unwrap(), 17);
    }

    #[test]
    fn reading_past_the_end_is_an_error() {
        let storage = FileStorage::new(Arc::new(tempfile::tempfile().unwrap()), None, false);
        storage.set_len(100).unwrap();
        let mut bytes = [0; 200];
        assert_eq!(storage.read_at(&mut bytes, 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        let slices = [VolatileSlice::from(&mut bytes[..])];
        assert_eq!(storage.read_slices(&slices, 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
