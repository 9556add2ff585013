//! Who may use an image: one writer, or any number of readers.
//!
//! The lock is behind a trait, so that one that holds between hosts can take the place of [`OfdLock`], which the kernel of
//! one host keeps (and its file server, where there is one).
//!
//! # Which bytes
//!
//! [`OfdLock`] is made of open-file-description locks (fcntl(2), `F_OFD_SETLK`). The kernel drops them with the last
//! descriptor, however a process ends: there are no stale ones. They lie on single bytes of the file, which need not exist:
//!
//! | byte | who has it locked |
//! | ---: | --- |
//! | 300 | ours: our readers shared, our writer exclusively. So of two of ours that come at once, one wins |
//! | 100 + *p* | QEMU's: whoever uses permission *p*, shared |
//! | 200 + *p* | QEMU's: whoever does not let others use permission *p*, shared |
//!
//! *p* is 0 to read, 1 to write, 2 to write what is there already, 3 to resize. QEMU (`block/file-posix.c`) first locks,
//! then looks whether somebody has locked what contradicts it; we do the same on the same bytes. Programs that lock the
//! whole file (Cloud Hypervisor) are met on every one of them.
//!
//! # Who has it
//!
//! The kernel names no process for such a lock. It is looked for in `/proc/*/fdinfo`, so it can be found if it is ours to
//! look at. The name of the guest, and the host of a lock from elsewhere, come from the attribute [`NOTE`] of the file,
//! which its writer leaves there. It is a hint: shown only while the lock is held, and only if the process is the one it
//! was written by.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::image::Error;

/// What an image is locked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// To be read, as others may at the same time.
    Shared,
    /// To be written, by nobody else.
    Exclusive,
}

/// A lock that is held until it is dropped.
pub trait Lock: Send + Sync + Debug {
    /// What for.
    fn mode(&self) -> Mode;

    /// Changes what for. Where that is refused, the lock stays as it was.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`] and [`Error::Lock`].
    fn set(&self, mode: Mode) -> Result<(), Error>;
}

/// Extended attribute in which the writer of an image says who it is.
pub const NOTE: &std::ffi::CStr = c"user.vmm.lock";

/// Our own byte.
const OURS: i64 = 300;
/// The first of QEMU's for permissions in use.
const USED: i64 = 100;
/// The first of QEMU's for permissions denied to others.
const DENIED: i64 = 200;
const READ: i64 = 0;
const WRITE: i64 = 1;
const WRITE_UNCHANGED: i64 = 2;
const RESIZE: i64 = 3;
/// QEMU's bytes that we lock in either mode.
const ALL: [i64; 8] = [
    USED + READ,
    USED + WRITE,
    USED + WRITE_UNCHANGED,
    USED + RESIZE,
    DENIED + READ,
    DENIED + WRITE,
    DENIED + WRITE_UNCHANGED,
    DENIED + RESIZE,
];

impl Mode {
    /// QEMU's bytes that are locked.
    fn taken(self) -> &'static [i64] {
        match self {
            Self::Shared => &[USED + READ, DENIED + WRITE, DENIED + RESIZE],
            Self::Exclusive => &[
                USED + READ,
                USED + WRITE,
                USED + RESIZE,
                DENIED + READ,
                DENIED + WRITE,
                DENIED + WRITE_UNCHANGED,
                DENIED + RESIZE,
            ],
        }
    }

    /// QEMU's bytes that nobody else may have locked.
    fn contradicted(self) -> &'static [i64] {
        match self {
            Self::Shared => &[DENIED + READ, USED + WRITE, USED + RESIZE],
            Self::Exclusive => &ALL,
        }
    }

    fn kind(self) -> libc::c_int {
        match self {
            Self::Shared => libc::F_RDLCK,
            Self::Exclusive => libc::F_WRLCK,
        }
    }
}

/// How long a lock that no process has is waited for: of one that was killed, the kernel may have open files still to close,
/// as those in an io_uring.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long until it is tried again.
const AGAIN: Duration = Duration::from_millis(10);

/// Why a lock is not to be had.
#[derive(Debug)]
enum Refusal {
    /// Another has one, in a process of this host if that is known.
    Held { process: Option<u32> },
    /// There are none.
    Failed(io::Error),
}

/// A lock that the kernel keeps.
#[derive(Debug)]
pub struct OfdLock {
    file: Arc<File>,
    path: PathBuf,
    owner: Option<String>,
    mode: Mutex<Mode>,
}

impl OfdLock {
    /// Locks `file`, which is open at `path` for what `mode` says. `owner` is the name of the guest that it is for.
    ///
    /// # Errors
    ///
    /// [`Error::Locked`] and [`Error::Lock`].
    pub fn acquire(file: &Arc<File>, path: &Path, mode: Mode, owner: Option<&str>) -> Result<Self, Error> {
        let lock = Self {
            file: Arc::clone(file),
            path: path.to_owned(),
            owner: owner.map(str::to_owned),
            mode: Mutex::new(mode),
        };
        let begun = Instant::now();
        // Where it is refused, the drop of `lock` gives back what was got.
        while let Err(refusal) = lock.take(mode) {
            let is_nobodys = matches!(refusal, Refusal::Held { process: None, .. });
            if !is_nobodys || begun.elapsed() >= PATIENCE {
                return Err(lock.refused(refusal));
            }
            std::thread::sleep(AGAIN);
        }
        Ok(lock)
    }

    fn refused(&self, refusal: Refusal) -> Error {
        let path = self.path.clone();
        match refusal {
            Refusal::Failed(source) => Error::Lock { path, source },
            Refusal::Held { process } => Error::Locked { path, holder: holder(&self.file, process) },
        }
    }

    fn take(&self, mode: Mode) -> Result<(), Refusal> {
        let failed = Refusal::Failed;
        let refused = |other: Other| Refusal::Held { process: other.pid.or_else(|| find(&self.file, other)) };
        let take = |byte, kind| match change(&self.file, byte, kind) {
            Ok(()) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                // It may be gone by now; that it was there is what counts.
                let other = other(&self.file, byte, kind).map_err(failed)?;
                Err(refused(other.unwrap_or(Other { pid: None, from: byte, to: byte })))
            }
            Err(error) => Err(failed(error)),
        };
        take(OURS, mode.kind())?;
        for byte in ALL {
            let kind = if mode.taken().contains(&byte) { libc::F_RDLCK } else { libc::F_UNLCK };
            take(byte, kind)?;
        }
        for byte in mode.contradicted() {
            if let Some(other) = other(&self.file, *byte, libc::F_WRLCK).map_err(failed)? {
                return Err(refused(other));
            }
        }
        if mode == Mode::Exclusive {
            note(&self.file, &self.path, self.owner.as_deref());
        }
        Ok(())
    }
}

impl Lock for OfdLock {
    fn mode(&self) -> Mode {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, mode: Mode) -> Result<(), Error> {
        let mut now = self.mode.lock().unwrap_or_else(PoisonError::into_inner);
        if *now == mode {
            return Ok(());
        }
        let taken = self.take(mode).map_err(|refusal| self.refused(refusal));
        if taken.is_err() {
            // What was held before contradicts nobody: they were let in beside it.
            let _ = self.take(*now);
        } else {
            *now = mode;
        }
        taken
    }
}

impl Drop for OfdLock {
    fn drop(&mut self) {
        // Descriptors of the same open file may live on, in a ring for example.
        for byte in ALL.into_iter().chain([OURS]) {
            let _ = change(&self.file, byte, libc::F_UNLCK);
        }
    }
}

fn request(byte: i64, kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}

fn change(file: &File, byte: i64, kind: libc::c_int) -> io::Result<()> {
    let request = request(byte, kind);
    // SAFETY: request is a valid flock structure.
    match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A lock of somebody else's.
#[derive(Debug, Clone, Copy)]
struct Other {
    /// Its process, where the kernel says so: not for locks like ours.
    pid: Option<u32>,
    /// Its first byte.
    from: i64,
    /// Its last byte.
    to: i64,
}

/// A lock that stands in the way of one of `kind` on `byte`.
fn other(file: &File, byte: i64, kind: libc::c_int) -> io::Result<Option<Other>> {
    let mut request = request(byte, kind);
    // SAFETY: request is a valid flock structure, which is filled.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) } != 0 {
        return Err(io::Error::last_os_error());
    }
    if libc::c_int::from(request.l_type) == libc::F_UNLCK {
        return Ok(None);
    }
    let to = if request.l_len == 0 { i64::MAX } else { request.l_start.saturating_add(request.l_len - 1) };
    let pid = u32::try_from(request.l_pid).ok().filter(|pid| *pid > 0);
    Ok(Some(Other { pid, from: request.l_start, to }))
}

/// Says who holds a lock, which is `process` if that is known.
fn holder(file: &File, process: Option<u32>) -> String {
    let note = Note::read(file);
    let here = host();
    let Some(pid) = process else {
        return match note {
            Some(note) if note.host != here => note.describe(),
            _ => format!("another process of host {here}, or of one that shares the file system"),
        };
    };
    match note {
        Some(note) if note.host == here && note.pid == pid && note.started == started(pid) => note.describe(),
        _ => {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} ({}) on host {here}", name.trim().escape_debug())
        }
    }
}

/// Looks through the descriptors of all processes for one with a lock on the file that is `other`, as
/// `/proc/PID/fdinfo/FD` shows it (proc(5)).
fn find(file: &File, other: Other) -> Option<u32> {
    let wanted = file.metadata().ok()?;
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find(|pid| {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        descriptors
            .filter(|fd| {
                std::fs::metadata(fd.path())
                    .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
            })
            // Ours, on which the lock is being asked for.
            .filter(|fd| !is_same(*pid, file, &fd.file_name()))
            .filter_map(|fd| {
                std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().to_str()?)).ok()
            })
            .any(|info| info.lines().filter_map(range).any(|(from, to)| from <= other.to && other.from <= to))
    })
}

fn is_same(pid: u32, file: &File, fd: &std::ffi::OsStr) -> bool {
    pid == std::process::id() && fd.to_str().and_then(|fd| fd.parse().ok()) == Some(file.as_raw_fd())
}

/// First and last byte of a lock, from a line like `lock: 1: OFDLCK ADVISORY WRITE -1 08:01:1234 300 300`.
fn range(line: &str) -> Option<(i64, i64)> {
    let mut words = line.strip_prefix("lock:")?.split_whitespace().skip(6);
    let (from, to) = (words.next()?.parse().ok()?, words.next()?);
    Some((from, to.parse().unwrap_or(i64::MAX)))
}

/// What the writer of an image left about itself.
#[derive(Debug, PartialEq, Eq)]
struct Note {
    host: String,
    pid: u32,
    /// When the process was started, in the kernel's ticks: tells it from a later one with its number.
    started: Option<u64>,
    guest: String,
}

impl Note {
    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let host = lines.next()?.to_owned();
        let pid = lines.next()?.parse().ok()?;
        let started = lines.next()?.parse().ok();
        Some(Self { host, pid, started, guest: lines.next().unwrap_or_default().to_owned() })
    }

    fn read(file: &File) -> Option<Self> {
        let mut text = [0_u8; 512];
        // SAFETY: the call fills at most `text.len()` bytes.
        let len =
            unsafe { libc::fgetxattr(file.as_raw_fd(), NOTE.as_ptr(), text.as_mut_ptr().cast(), text.len()) };
        Self::parse(std::str::from_utf8(text.get(..usize::try_from(len).ok()?)?).ok()?)
    }

    fn describe(&self) -> String {
        let guest = match self.guest.as_str() {
            "" => String::new(),
            name => format!("guest {}, ", name.escape_debug()),
        };
        format!("{guest}process {} on host {}", self.pid, self.host.escape_debug())
    }
}

/// Leaves a note on the file about this process. Where it cannot, less is known to whoever is refused, and that is all.
fn note(file: &File, path: &Path, owner: Option<&str>) {
    let pid = std::process::id();
    let owner: String = owner.unwrap_or_default().chars().filter(|c| !c.is_control()).take(64).collect();
    let text = format!("{}\n{pid}\n{}\n{owner}", host(), started(pid).unwrap_or_default());
    // SAFETY: the name is a string that ends in zero, and the value `text.len()` bytes.
    let set =
        unsafe { libc::fsetxattr(file.as_raw_fd(), NOTE.as_ptr(), text.as_ptr().cast(), text.len(), 0) };
    if set != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!("disk {} bears no note of who has it locked: {error}", path.display());
    }
}

/// When a process was started: field 22 of `/proc/PID/stat`.
fn started(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the name in brackets, in which anything may stand.
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

fn host() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "localhost".to_owned(),
        name => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> Arc<File> {
        Arc::new(std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap())
    }

    fn acquire(path: &Path, mode: Mode, owner: Option<&str>) -> Result<OfdLock, Error> {
        OfdLock::acquire(&open(path), path, mode, owner)
    }

    #[test]
    fn writer_is_alone_and_readers_are_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let writer = acquire(file.path(), Mode::Exclusive, None).unwrap();
        for mode in [Mode::Shared, Mode::Exclusive] {
            let refused = acquire(file.path(), mode, None).unwrap_err();
            assert!(matches!(refused, Error::Locked { .. }), "{refused}");
        }
        drop(writer);
        let _readers = [(); 2].map(|()| acquire(file.path(), Mode::Shared, None).unwrap());
        assert!(matches!(acquire(file.path(), Mode::Exclusive, None), Err(Error::Locked { .. })));
    }

    #[test]
    fn refusal_names_host_process_and_guest() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let path = dir.path().join("a.img");
        std::fs::write(&path, []).unwrap();
        let _writer = acquire(&path, Mode::Exclusive, Some("web\n1")).unwrap();
        let refused = acquire(&path, Mode::Shared, None).unwrap_err().to_string();
        let holder = format!("process {} on host {};", std::process::id(), host());
        assert!(refused.contains(&holder), "{refused}");
        // Where the file system has such attributes.
        let noted = Note::read(&open(&path)).is_some();
        assert_eq!(refused.contains("guest web1, "), noted, "{refused}");
    }

    #[test]
    fn note_of_a_process_that_is_not_the_holder_is_not_shown() {
        let dir = tempfile::tempdir_in(".").unwrap();
        let path = dir.path().join("a.img");
        std::fs::write(&path, []).unwrap();
        drop(acquire(&path, Mode::Exclusive, Some("old")).unwrap());
        // This process, but not as the writer that left the note.
        let file = open(&path);
        let text = format!("{}\n{}\n1\nold", host(), std::process::id());
        // SAFETY: as in `note`.
        unsafe { libc::fsetxattr(file.as_raw_fd(), NOTE.as_ptr(), text.as_ptr().cast(), text.len(), 0) };
        let _reader = acquire(&path, Mode::Shared, None).unwrap();
        let refused = acquire(&path, Mode::Exclusive, None).unwrap_err().to_string();
        assert!(!refused.contains("old") && refused.contains("process "), "{refused}");
    }

    #[test]
    fn writer_becomes_a_reader_and_a_writer_again_once_it_is_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lock = acquire(file.path(), Mode::Exclusive, None).unwrap();
        lock.set(Mode::Shared).unwrap();
        let reader = acquire(file.path(), Mode::Shared, None).unwrap();
        assert!(matches!(lock.set(Mode::Exclusive), Err(Error::Locked { .. })));
        assert_eq!(lock.mode(), Mode::Shared);
        let another = acquire(file.path(), Mode::Shared, None).unwrap();
        drop((reader, another));
        lock.set(Mode::Exclusive).unwrap();
        assert!(matches!(acquire(file.path(), Mode::Shared, None), Err(Error::Locked { .. })));
    }

    #[test]
    fn lock_ends_with_its_owner_although_the_file_stays_open() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = open(file.path());
        drop(OfdLock::acquire(&open, file.path(), Mode::Exclusive, None).unwrap());
        acquire(file.path(), Mode::Exclusive, None).unwrap();
    }

    #[test]
    fn process_that_only_has_the_file_open_is_not_blamed_for_the_lock() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let looker = std::process::Command::new("sleep").arg("60").stdin(file.reopen().unwrap()).spawn();
        let mut looker = looker.unwrap();
        let _first = acquire(file.path(), Mode::Shared, None).unwrap();
        let refused = acquire(file.path(), Mode::Exclusive, None).unwrap_err().to_string();
        looker.kill().unwrap();
        looker.wait().unwrap();
        assert!(refused.contains(&format!("process {} ", std::process::id())), "{refused}");
    }

    #[test]
    fn whole_file_locked_by_another_program_is_respected() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let foreign = open(file.path());
        let mut whole = request(0, libc::F_WRLCK);
        whole.l_len = 0;
        // SAFETY: whole is a valid flock structure.
        assert_eq!(unsafe { libc::fcntl(foreign.as_raw_fd(), libc::F_OFD_SETLK, &raw const whole) }, 0);
        for mode in [Mode::Shared, Mode::Exclusive] {
            assert!(matches!(acquire(file.path(), mode, None), Err(Error::Locked { .. })));
        }
    }

    #[test]
    fn lines_of_fdinfo_and_notes_that_are_none_are_ignored() {
        assert_eq!(range("lock:\t1: OFDLCK ADVISORY  WRITE -1 08:01:12 300 300"), Some((300, 300)));
        assert_eq!(range("lock:\t1: OFDLCK ADVISORY  READ -1 08:01:12 0 EOF"), Some((0, i64::MAX)));
        for line in ["", "pos:\t0", "lock:", "lock: 1: FLOCK x"] {
            assert_eq!(range(line), None);
        }
        for text in ["", "host", "host\nx\n1", "host\n-1\n1\n"] {
            assert_eq!(Note::parse(text), None);
        }
    }
}
