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
    /// Where it lies, for messages.
    fn path(&self) -> &Path;
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
    is_device: bool,
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
        // O_EXCL: a block device that the host has mounted is refused (open(2)); files do not care.
        let exclusive = if readonly { 0 } else { libc::O_EXCL };
        let file = OpenOptions::new()
            .read(true)
            .write(!readonly)
            .custom_flags(libc::O_NONBLOCK | exclusive)
            .open(path)
            .map_err(|source| {
                let path = path.to_owned();
                match source.raw_os_error() {
                    Some(libc::EISDIR) => Error::Kind { path, kind: "a directory" },
                    Some(libc::EBUSY) => Error::Busy { path },
                    _ => Error::Open { path, readonly, source },
                }
            })?;
        let metadata = file.metadata().map_err(examine)?;
        let kind = metadata.file_type();
        let (size, block_size) = if kind.is_file() {
            (metadata.len(), 512)
        } else if kind.is_block_device() {
            device_size(&file).map_err(examine)?
        } else {
            let kind = if kind.is_dir() { "a directory" } else { "a pipe, socket or character device" };
            return Err(Error::Kind { path: path.to_owned(), kind });
        };
        wait_for_storage(&file).map_err(examine)?;
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
        let lock = lock::acquire(&file, !readonly);
        if let Err(holder) = lock.map_err(|source| Error::Lock { path: path.to_owned(), source })? {
            return Err(Error::Locked { path: path.to_owned(), holder });
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            sectors: size / SECTOR,
            block_size,
            is_device: kind.is_block_device(),
            no_holes: AtomicBool::new(false),
        })
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
    fn path(&self) -> &Path {
        &self.path
    }

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
        let discarded = match len {
            0 => Ok(()),
            // Punching a hole in a device is zeroing it, which not every device does by discarding.
            _ if self.is_device => discard_on_device(&self.file, offset, len),
            _ => self.punch(offset, len),
        };
        // A discard is advice: a disk that cannot follow it has done nothing wrong.
        match discarded {
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

/// Takes `O_NONBLOCK` back. It means nothing to plain reads and writes of storage, but io_uring and some drivers
/// take it as a wish to fail rather than wait.
fn wait_for_storage(file: &File) -> io::Result<()> {
    // SAFETY: F_GETFL takes and gives integers.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: F_SETFL takes an integer.
    if flags < 0 || unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags & !libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn discard_on_device(file: &File, offset: u64, len: u64) -> io::Result<()> {
    /// `_IO(0x12, 119)` (linux/fs.h).
    const BLKDISCARD: libc::c_ulong = 0x1277;
    let range = [offset, len];
    // SAFETY: the ioctl reads two 64-bit integers.
    if unsafe { libc::ioctl(file.as_raw_fd(), BLKDISCARD, range.as_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
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
        for readonly in [true, false] {
            let directory = Raw::open(dir.path(), readonly).unwrap_err().to_string();
            assert!(directory.contains("is a directory"), "{directory}");
            let device = Raw::open(Path::new("/dev/null"), readonly).unwrap_err();
            assert!(matches!(device, Error::Kind { .. }), "{device}");
        }
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

    #[test]
    fn pipe_is_refused_at_once_instead_of_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        for readonly in [true, false] {
            assert!(matches!(Raw::open(&pipe, readonly), Err(Error::Kind { .. })));
        }
    }

    #[test]
    fn disk_is_opened_through_a_symbolic_link_and_waits_for_its_storage() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("a.img"), dir.path().join("link.img"));
        std::fs::write(&file, [0; 4096]).unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let raw = Raw::open(&link, false).unwrap();
        assert_eq!(raw.sectors(), 8);
        // SAFETY: F_GETFL takes and gives integers.
        let flags = unsafe { libc::fcntl(raw.file.as_raw_fd(), libc::F_GETFL) };
        assert_eq!(flags & libc::O_NONBLOCK, 0);
    }

    #[test]
    fn process_that_only_has_the_file_open_is_not_blamed_for_the_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let looker = std::process::Command::new("sleep").arg("60").stdin(file.reopen().unwrap()).spawn();
        let mut looker = looker.unwrap();
        let _first = Raw::open(file.path(), false).unwrap();
        let refused = Raw::open(file.path(), false).unwrap_err().to_string();
        looker.kill().unwrap();
        looker.wait().unwrap();
        assert!(refused.contains(&format!("process {} ", std::process::id())), "{refused}");
    }

    /// A loop device on a file of 4 MiB.
    struct Loop(PathBuf, tempfile::NamedTempFile);

    impl Loop {
        fn new() -> Self {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), vec![0x77; 4 << 20]).unwrap();
            let setup =
                std::process::Command::new("losetup").args(["-f", "--show"]).arg(file.path()).output();
            let setup = setup.unwrap();
            assert!(setup.status.success(), "{}", String::from_utf8_lossy(&setup.stderr));
            Self(String::from_utf8(setup.stdout).unwrap().trim().into(), file)
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            std::process::Command::new("losetup").arg("-d").arg(&self.0).status().unwrap();
        }
    }

    #[test]
    #[ignore = "needs root and loop devices"]
    fn block_device_shows_its_size_and_discards_and_zeroes_reach_its_file() {
        use std::os::unix::fs::{FileExt, MetadataExt};
        let device = Loop::new();
        let raw = Raw::open(&device.0, false).unwrap();
        assert_eq!((raw.sectors(), raw.block_size()), (8192, 512));
        let blocks = || device.1.as_file().metadata().unwrap().blocks();
        let full = blocks();
        raw.discard(0, 1 << 20).unwrap();
        assert!(blocks() < full, "the discard gave nothing back");
        for unmap in [false, true] {
            let at = if unmap { 2 << 20 } else { 3 << 20 };
            raw.write_zeroes(at, 4096, unmap).unwrap();
            let mut data = [1; 4097];
            raw.file.read_exact_at(&mut data, at).unwrap();
            assert!(data[..4096].iter().all(|b| *b == 0) && data[4096] == 0x77);
        }
        raw.flush().unwrap();
    }

    #[test]
    #[ignore = "needs root and loop devices"]
    fn block_device_that_is_open_exclusively_is_refused_as_busy() {
        let device = Loop::new();
        let first = Raw::open(&device.0, false).unwrap();
        assert!(matches!(Raw::open(&device.0, false), Err(Error::Busy { .. })));
        drop(first);
        Raw::open(&device.0, false).unwrap();
    }
}
