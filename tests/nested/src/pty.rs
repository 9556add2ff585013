//! Pseudo-terminals.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

/// A new pseudo-terminal: the side of whoever drives it, and the terminal.
///
/// # Errors
///
/// What the system answers, for instance where `/dev/pts` is not mounted.
pub fn open() -> io::Result<(File, File)> {
    let master = OpenOptions::new().read(true).write(true).open("/dev/ptmx")?;
    let unlocked: libc::c_int = 0;
    // SAFETY: the request reads one int through the pointer, which lives until the call returns.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut number: libc::c_uint = 0;
    // SAFETY: the request writes one unsigned int through the pointer, which lives until the call returns.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTN, &raw mut number) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let terminal = OpenOptions::new().read(true).write(true).open(format!("/dev/pts/{number}"))?;
    Ok((master, terminal))
}
