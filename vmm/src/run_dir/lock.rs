//! Locks of monitors: on open file descriptions, so that they end with the process and are not lost when the file is
//! opened and closed a second time (fcntl(2), "Open file description locks").

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

fn request() -> libc::flock {
    libc::flock {
        l_type: libc::c_short::try_from(libc::F_WRLCK).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Takes the lock; false if another has it.
pub fn acquire(file: &File) -> io::Result<bool> {
    let request = request();
    // SAFETY: request is a valid flock structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Whether somebody has the lock. It is not taken to find out.
pub fn is_held(file: &File) -> bool {
    let mut request = request();
    // SAFETY: request is a valid flock structure, which the kernel overwrites with another.
    let asked = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut request) };
    asked == 0 && libc::c_int::from(request.l_type) != libc::F_UNLCK
}
