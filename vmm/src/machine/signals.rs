//! Signals that ask the monitor to end, as a descriptor its main thread waits on.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

const ENDING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// SIGTERM, SIGINT, SIGHUP and SIGQUIT, blocked in the calling thread and all it starts afterwards.
#[derive(Debug)]
pub struct EndSignals {
    fd: File,
}

impl EndSignals {
    /// Takes the signals over. Those that the process was started to ignore (`nohup`, a script's background) stay ignored.
    ///
    /// # Errors
    ///
    /// That of `pthread_sigmask` or `signalfd`.
    pub fn block() -> io::Result<Self> {
        let wanted: Vec<_> =
            ENDING.into_iter().filter(|signal| *signal == libc::SIGTERM || !is_ignored(*signal)).collect();
        let set = vmm_sys_util::signal::create_sigset(&wanted).map_err(io::Error::from)?;
        // SAFETY: set is an initialised signal set; the old mask is not asked for.
        let blocked = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        // SAFETY: as above; -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: fd was just opened and belongs to nobody else.
        Ok(Self { fd: unsafe { File::from_raw_fd(fd) } })
    }

    /// Takes one signal off, if there is one.
    pub fn take(&self) -> Option<u32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        (&self.fd).read_exact(&mut info).ok()?;
        // ssi_signo is the first field (signalfd(2)).
        let (number, _) = info.split_first_chunk()?;
        Some(u32::from_ne_bytes(*number))
    }
}

impl AsRawFd for EndSignals {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: an all-zero sigaction is a valid value to be overwritten.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only asks for the present one.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}
