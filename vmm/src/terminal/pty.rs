//! A pseudo-terminal for a guest's console, which people open and leave as they like.

use std::ffi::{CStr, OsStr};
use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::restore;

/// How long a full terminal is given to be read from before its oldest output is thrown away.
const PATIENCE: Duration = Duration::from_millis(50);
/// After waiting in vain, how long nobody is waited for.
const IMPATIENCE: Duration = Duration::from_secs(1);

/// The monitor's side of a pseudo-terminal.
///
/// The other side starts out raw, so that the guest's terminal driver alone echoes and edits, and only its owner
/// may open it. The monitor keeps a descriptor of that side as well: a pseudo-terminal whose last reader leaves would
/// otherwise be in a permanent state of error, on which no event loop could wait.
#[derive(Debug)]
pub struct Pty {
    master: File,
    slave: File,
    path: PathBuf,
}

impl Pty {
    /// Opens a new one.
    ///
    /// # Errors
    ///
    /// The host has no pseudo-terminals (`/dev/ptmx`, `/dev/pts`) or none is left (`kernel.pty.max`).
    pub fn open() -> io::Result<Self> {
        const FLAGS: libc::c_int = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
        // SAFETY: takes flags only.
        let master = owned(unsafe { libc::posix_openpt(FLAGS | libc::O_NONBLOCK) })?;
        let fd = master.as_raw_fd();
        // SAFETY: fd is an open pseudo-terminal.
        if unsafe { libc::grantpt(fd) } != 0 || unsafe { libc::unlockpt(fd) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let path = path(&master)?;
        // Not by its path, behind which another mount of devpts may lie (ioctl_tty(2)).
        // SAFETY: TIOCGPTPEER takes open flags by value.
        let slave = owned(unsafe { libc::ioctl(fd, libc::TIOCGPTPEER, FLAGS) })?;
        let mut settings = restore::settings(slave.as_fd())?;
        // SAFETY: changes the fields of an initialised termios.
        unsafe { libc::cfmakeraw(&raw mut settings) };
        restore::set(slave.as_raw_fd(), &settings)?;
        let slave = File::from(slave);
        // The group tty, by which programs write to each other's terminals, has nothing to say to the guest.
        slave.set_permissions(Permissions::from_mode(0o600))?;
        Ok(Self { master: File::from(master), slave, path })
    }

    /// Where people open it: `/dev/pts/<number>`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes off what was typed.
    ///
    /// # Errors
    ///
    /// [`WouldBlock`](io::ErrorKind::WouldBlock) if there is nothing; wait until the descriptor is readable.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.master).read(buffer)
    }

    /// Where the guest's output goes.
    ///
    /// # Errors
    ///
    /// There are too many open files.
    pub fn output(&self) -> io::Result<Output> {
        Ok(Output {
            master: self.master.try_clone()?,
            slave: self.slave.try_clone()?,
            patience: PATIENCE,
            in_vain: None,
        })
    }
}

impl AsRawFd for Pty {
    fn as_raw_fd(&self) -> RawFd {
        self.master.as_raw_fd()
    }
}

impl AsFd for Pty {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the caller got fd from a call that opens a descriptor for it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn path(master: &OwnedFd) -> io::Result<PathBuf> {
    let mut name = [0_u8; 64];
    // SAFETY: name is writable for as long as its length says.
    let failed = unsafe { libc::ptsname_r(master.as_raw_fd(), name.as_mut_ptr().cast(), name.len()) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    let name = CStr::from_bytes_until_nul(&name).map_err(|_| io::ErrorKind::InvalidData)?;
    Ok(OsStr::from_bytes(name.to_bytes()).into())
}

/// Takes the guest's output, and never holds the guest up for long.
///
/// The kernel buffers some kilobytes. When they are full, a reader that is there gets time to go on, and nothing
/// is lost; if there is none, the oldest output makes room for the newest, so that whoever comes later sees what
/// happened last.
#[derive(Debug)]
pub struct Output {
    master: File,
    slave: File,
    patience: Duration,
    /// When a wait ended without anybody reading.
    in_vain: Option<Instant>,
}

impl Output {
    /// Waits until something has been read; false if that takes too long.
    fn wait(&mut self) -> io::Result<bool> {
        if self.in_vain.is_some_and(|at| at.elapsed() < IMPATIENCE) {
            return Ok(false);
        }
        let mut fd = libc::pollfd { fd: self.master.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        let timeout = libc::c_int::try_from(self.patience.as_millis()).unwrap_or(libc::c_int::MAX);
        // SAFETY: fd is one pollfd.
        match unsafe { libc::poll(&raw mut fd, 1, timeout) } {
            0 => {
                self.in_vain = Some(Instant::now());
                Ok(false)
            }
            ready if ready > 0 => Ok(true),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let full = |result: &io::Result<usize>| {
            result.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
        };
        loop {
            let written = self.master.write(data);
            if !full(&written) {
                return written;
            }
            if self.wait()? {
                continue;
            }
            // SAFETY: takes a queue's name by value. What was written here is the other side's input.
            if unsafe { libc::tcflush(self.slave.as_raw_fd(), libc::TCIFLUSH) } != 0 {
                return Err(io::Error::last_os_error());
            }
            let written = self.master.write(data);
            return if full(&written) { Ok(data.len()) } else { written };
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    use std::thread;

    /// Opens the other side as a person's program does.
    fn visit(pty: &Pty) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOCTTY).open(pty.path()).unwrap()
    }

    /// What was typed, waiting for it.
    fn typed(pty: &Pty) -> Vec<u8> {
        let mut buffer = [0; 64];
        loop {
            match pty.read(&mut buffer) {
                Ok(len) => return buffer[..len].to_vec(),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
            let mut fd = libc::pollfd { fd: pty.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: fd is one pollfd.
            assert_eq!(unsafe { libc::poll(&raw mut fd, 1, 10_000) }, 1, "nothing was typed");
        }
    }

    #[test]
    fn output_and_input_pass_unchanged_and_without_echo() {
        let pty = Pty::open().unwrap();
        let mut visitor = visit(&pty);
        pty.output().unwrap().write_all(b"login:\r\n\x03").unwrap();
        let mut seen = [0; 9];
        visitor.read_exact(&mut seen).unwrap();
        assert_eq!(&seen, b"login:\r\n\x03");
        visitor.write_all(b"root\r\n\x03\x1a").unwrap();
        assert_eq!(typed(&pty), b"root\r\n\x03\x1a");
        assert_eq!(pty.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock, "output was echoed");
    }

    #[test]
    fn terminal_without_a_visitor_is_idle_rather_than_in_error() {
        let pty = Pty::open().unwrap();
        for _ in 0..2 {
            let mut fd = libc::pollfd { fd: pty.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: fd is one pollfd.
            assert_eq!(unsafe { libc::poll(&raw mut fd, 1, 0) }, 0, "events {:#x}", fd.revents);
            assert_eq!(pty.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            drop(visit(&pty));
        }
    }

    #[test]
    fn only_the_owner_may_open_it() {
        let pty = Pty::open().unwrap();
        assert_eq!(pty.path().metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn output_that_nobody_reads_gives_way_to_newer_output() {
        let pty = Pty::open().unwrap();
        let mut output = pty.output().unwrap();
        output.patience = Duration::ZERO;
        for line in 0..100_000 {
            output.write_all(format!("line {line:6}\r\n").as_bytes()).unwrap();
        }
        let mut visitor = visit(&pty);
        output.write_all(b"\0").unwrap();
        let mut seen = Vec::new();
        while seen.last() != Some(&0) {
            let mut buffer = [0; 4096];
            let len = visitor.read(&mut buffer).unwrap();
            seen.extend_from_slice(&buffer[..len]);
        }
        let seen = String::from_utf8(seen).unwrap();
        assert!(seen.ends_with("line  99998\r\nline  99999\r\n\0"), "{:?}", &seen[seen.len() - 60..]);
        assert!(!seen.contains("line      0\r\n"));
    }

    #[test]
    fn reader_that_is_slower_than_the_guest_gets_everything() {
        let pty = Pty::open().unwrap();
        let mut output = pty.output().unwrap();
        output.patience = Duration::from_secs(60);
        let sent: Vec<u8> = (0..300_000_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
        let mut visitor = visit(&pty);
        let len = sent.len();
        let reader = thread::spawn(move || {
            let mut seen = vec![0; len];
            seen.chunks_mut(500).for_each(|part| visitor.read_exact(part).unwrap());
            seen
        });
        output.write_all(&sent).unwrap();
        assert!(reader.join().unwrap() == sent, "bytes were lost or changed");
    }
}
