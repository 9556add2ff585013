//! What a disk is to the device, and the plain one: a raw file or block device.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Error, SECTOR, lock};
use crate::virtio::chain::Buffers;

/// Storage behind a block device. Offsets and lengths are bytes; the device has checked them against
/// [`sectors`](Self::sectors).
pub trait Disk: Send + Sync + Debug {
    /// Capacity in sectors of 512 bytes.
    fn sectors(&self) -> u64;
    /// Size in bytes of the blocks that the storage itself works in, a power of two from 512 on.
    fn block_size(&self) -> u32;
    /// Fills `into` from `offset`.
    ///
    /// # Errors
    ///
    /// That of the storage; what `into` holds then is undefined.
    fn read(&self, offset: u64, into: &Buffers<'_>) -> io::Result<()>;
    /// Writes `from` to `offset`.
    ///
    /// # Errors
    ///
    /// That of the storage; what the range holds then is undefined.
    fn write(&self, offset: u64, from: &Buffers<'_>) -> io::Result<()>;
    /// Returns once everything written before is on stable storage.
    ///
    /// # Errors
    ///
    /// That of the storage.
    fn flush(&self) -> io::Result<()>;
    /// Makes a range read as zeroes; with `unmap`, giving its space back where that can be done.
    ///
    /// # Errors
    ///
    /// That of the storage.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;
    /// Says that the contents of a range no longer matter.
    ///
    /// # Errors
    ///
    /// That of the storage.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// A raw file or block device.
#[derive(Debug)]
pub struct Raw {
    file: File,
    path: PathBuf,
    sectors: u64,
    block_size: u32,
    /// The file system refuses to punch holes: it is not asked again.
    no_holes: AtomicBool,
}

impl Raw {
    /// Opens and locks `path`.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn open(path: &Path, readonly: bool) -> Result<Self, Error> {
        let examine = |source| Error::Examine { path: path.to_owned(), source };
        // O_NONBLOCK: a FIFO without a writer is refused below instead of being waited for.
        let file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(|source| Error::Open { path: path.to_owned(), readonly, source })?;
        let kind = file.metadata().map_err(examine)?.file_type();
        let (size, block_size) = if kind.is_file() {
            (file.metadata().map_err(examine)?.len(), 512)
        } else if kind.is_block_device() {
            device_size(&file).map_err(examine)?
        } else {
            return Err(Error::Kind { path: path.to_owned() });
        };
        if size < SECTOR {
            return Err(Error::Empty { path: path.to_owned(), size });
        }
        if size % SECTOR != 0 {
            tracing::warn!(
                "the last {} bytes of disk {} are not a whole sector and not shown to the guest",
                size % SECTOR,
                path.display()
            );
        }
        if let Err(holder) = lock::acquire(&file, !readonly).map_err(examine)? {
            return Err(Error::Locked { path: path.to_owned(), holder });
        }
        let (sectors, path) = (size / SECTOR, path.to_owned());
        Ok(Self { file, path, sectors, block_size, no_holes: AtomicBool::new(false) })
    }

    /// Transfers all of `buffers` by `call`, the vectored read or write of the kernel, beginning at `offset`.
    fn transfer(
        &self,
        mut offset: u64,
        buffers: &Buffers<'_>,
        call: unsafe extern "C" fn(
            libc::c_int,
            *const libc::iovec,
            libc::c_int,
            libc::off64_t,
        ) -> libc::ssize_t,
    ) -> io::Result<()> {
        let mut pieces = buffers.iovecs();
        let mut rest = &mut pieces[..];
        while !rest.is_empty() {
            let count = libc::c_int::try_from(rest.len()).map_err(io::Error::other)?;
            let at = libc::off64_t::try_from(offset).map_err(io::Error::other)?;
            // SAFETY: the pieces lie in guest memory, which `buffers` borrows; that the guest may change it
            // meanwhile is as with memory that a device of hardware reads or writes.
            let done = unsafe { call(self.file.as_raw_fd(), rest.as_ptr(), count, at) };
            let mut done = match usize::try_from(done) {
                // The file is shorter than it was: nothing is there.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(done) => done,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted {
                        continue;
                    }
                    return Err(error);
                }
            };
            offset += done as u64;
            while let Some(first) = rest.first_mut() {
                if done < first.iov_len {
                    first.iov_base = first.iov_base.wrapping_byte_add(done);
                    first.iov_len -= done;
                    break;
                }
                done -= first.iov_len;
                rest = &mut rest[1..];
            }
        }
        Ok(())
    }

    fn allocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<()> {
        let [offset, len] = [offset, len].map(libc::off64_t::try_from);
        let (offset, len) = (offset.map_err(io::Error::other)?, len.map_err(io::Error::other)?);
        // SAFETY: fallocate takes integers.
        if unsafe { libc::fallocate64(self.file.as_raw_fd(), mode, offset, len) } == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.no_holes.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let punched = self.allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len);
        if punched.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            tracing::info!(
                "the file system of disk {} does not give discarded space back",
                self.path.display()
            );
            self.no_holes.store(true, Ordering::Relaxed);
        }
        punched
    }
}

impl Disk for Raw {
    fn sectors(&self) -> u64 {
        self.sectors
    }

    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn read(&self, offset: u64, into: &Buffers<'_>) -> io::Result<()> {
        self.transfer(offset, into, libc::preadv64)
    }

    fn write(&self, offset: u64, from: &Buffers<'_>) -> io::Result<()> {
        self.transfer(offset, from, libc::pwritev64)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if len == 0 || unmap && self.punch(offset, len).is_ok() {
            return Ok(());
        }
        if self.allocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, len).is_ok() {
            return Ok(());
        }
        write_zeroes_by_hand(&self.file, offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // A discard is advice: a disk that cannot follow it has done nothing wrong.
        match self.punch(offset, len) {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => Err(error),
            _ => Ok(()),
        }
    }
}

fn write_zeroes_by_hand(file: &File, mut offset: u64, len: u64) -> io::Result<()> {
    const CHUNK: u64 = 64 << 10;
    use std::os::unix::fs::FileExt;
    let zeroes = vec![0; usize::try_from(CHUNK.min(len)).map_err(io::Error::other)?];
    let end = offset + len;
    while offset < end {
        let part = usize::try_from((end - offset).min(CHUNK)).map_err(io::Error::other)?;
        file.write_all_at(&zeroes[..part], offset)?;
        offset += part as u64;
    }
    Ok(())
}

/// Size and logical block size of a block device, in bytes.
fn device_size(file: &File) -> io::Result<(u64, u32)> {
    /// `_IOR(0x12, 114, size_t)` (linux/fs.h).
    const BLKGETSIZE64: libc::c_ulong = 0x8008_1272;
    /// `_IO(0x12, 104)` (linux/fs.h).
    const BLKSSZGET: libc::c_ulong = 0x1268;
    let (mut size, mut block) = (0_u64, 0_i32);
    // SAFETY: the ioctl fills a 64-bit integer.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the ioctl fills an int.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &raw mut block) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((size, u32::try_from(block).ok().filter(|b| b.is_power_of_two()).unwrap_or(512)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_missing_and_empty_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let missing = Raw::open(&dir.path().join("none.img"), false).unwrap_err();
        assert!(matches!(missing, Error::Open { .. }) && missing.to_string().contains("none.img"));
        assert!(matches!(Raw::open(dir.path(), true), Err(Error::Kind { .. })));
        assert!(matches!(Raw::open(dir.path(), false), Err(Error::Open { .. })));
        let empty = dir.path().join("empty.img");
        std::fs::write(&empty, [0; 511]).unwrap();
        assert!(matches!(Raw::open(&empty, false), Err(Error::Empty { size: 511, .. })));
    }

    #[test]
    fn second_writer_is_refused_and_told_who_holds_the_disk() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let first = Raw::open(file.path(), false).unwrap();
        for readonly in [false, true] {
            let refused = Raw::open(file.path(), readonly).unwrap_err().to_string();
            assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        }
        drop(first);
        let _readers = [Raw::open(file.path(), true).unwrap(), Raw::open(file.path(), true).unwrap()];
        assert!(matches!(Raw::open(file.path(), false), Err(Error::Locked { .. })));
    }

    #[test]
    fn odd_tail_of_a_file_is_left_out() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1025).unwrap();
        assert_eq!(Raw::open(file.path(), true).unwrap().sectors(), 2);
    }
}
