//! The terminal that the monitor was started on, as the guest's console.

use std::io;
use std::os::fd::AsFd;

use super::restore::{self, Terminal};

/// While it lives, every key reaches the guest: no echo, no line editing, no signals from Ctrl-C.
///
/// The settings go back to what they were on [every way out](super::restore). Reads should be made only
/// when [`hold`](Self::hold) agrees, and without making the descriptor non-blocking, which would last
/// beyond this process: it shares the open file with its shell.
#[derive(Debug)]
pub struct RawMode {
    terminal: &'static Terminal,
}

impl RawMode {
    /// Makes the terminal behind `fd` raw; `None` if it is no terminal. There can be one at a time.
    ///
    /// In the background (`vmm … &`) nothing is changed; [`hold`](Self::hold), or a SIGCONT in the
    /// foreground, does it later.
    ///
    /// # Errors
    ///
    /// Another terminal is in raw mode ([`io::ErrorKind::ResourceBusy`]), or this one has hung up.
    pub fn enter(fd: impl AsFd) -> io::Result<Option<Self>> {
        match restore::settings(fd.as_fd()) {
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => return Ok(None),
            checked => checked?,
        };
        Ok(Some(Self { terminal: Terminal::take(fd.as_fd())? }))
    }

    /// Whether the terminal is this process's to read from now; it is raw then.
    ///
    /// To be asked before each read: one from the background would stop the whole process (SIGTTIN), guest and
    /// all. A shell's `fg` need not send a signal, so this is also where the terminal becomes raw after it. Where
    /// the answer is no, what is typed is meant for another, and the descriptor stays readable until that one
    /// has read it: wait for it edge-triggered, or look again after a while.
    #[must_use]
    pub fn hold(&self) -> bool {
        self.terminal.hold()
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.terminal.release();
    }
}
