//! Another process, held by a descriptor so that its number cannot come to mean a different one.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::{Duration, Instant};

/// A process (pidfd_open(2)).
#[derive(Debug)]
pub struct Process(File);

impl Process {
    /// The process that has the number `pid` now; `None` if there is none.
    pub fn open(pid: u32) -> io::Result<Option<Self>> {
        // SAFETY: pidfd_open takes a number and flags.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let Ok(fd @ 0..) = i32::try_from(fd) else {
            let error = io::Error::last_os_error();
            return if error.raw_os_error() == Some(libc::ESRCH) { Ok(None) } else { Err(error) };
        };
        // SAFETY: fd was just opened and belongs to nobody else.
        Ok(Some(Self(unsafe { File::from_raw_fd(fd) })))
    }

    /// Waits until it has ended; false if `limit` passes before.
    pub fn wait(&self, limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut polled = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // Rounded up, so that the last wait is not none at all.
            let millis = i32::try_from(left.as_millis() + u128::from(!left.is_zero())).unwrap_or(i32::MAX);
            // SAFETY: polled is one entry.
            match unsafe { libc::poll(&raw mut polled, 1, millis) } {
                0 if left.is_zero() => return Ok(false),
                0 => {}
                1.. => return Ok(true),
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    /// Kills it.
    pub fn kill(&self) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is a process's; without information the signal is as from kill(2).
        let sent =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), libc::SIGKILL, none, 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn killed_process_is_seen_to_end_and_a_living_one_is_not() {
        let mut child = Command::new("sleep").arg("100").spawn().unwrap();
        let process = Process::open(child.id()).unwrap().unwrap();
        assert!(!process.wait(Duration::from_millis(5)).unwrap());
        process.kill().unwrap();
        assert!(process.wait(Duration::from_secs(60)).unwrap());
        child.wait().unwrap();
        assert!(process.kill().is_err(), "a number that was given back is not signalled");
    }

    #[test]
    fn number_that_no_process_has_is_no_process() {
        assert!(Process::open(0x3fff_ffff).unwrap().is_none());
    }
}
