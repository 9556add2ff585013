//! A monitor on a terminal of its own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::guest;

/// How long the terminal may take for what is waited for.
const DEADLINE: Duration = Duration::from_secs(60);

/// The flags of a terminal: input, output, control and local modes.
pub type Flags = (u32, u32, u32, u32);

/// A terminal with a monitor on it.
#[derive(Debug)]
pub struct Terminal {
    master: File,
    slave: File,
    child: Child,
    seen: Vec<u8>,
    dir: TempDir,
}

fn open_terminal() -> (File, File) {
    let (mut master, mut slave) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are filled; name, settings and size are not asked for or given.
    let opened =
        unsafe { libc::openpty(&raw mut master, &raw mut slave, none, std::ptr::null(), std::ptr::null()) };
    assert_eq!(opened, 0);
    // SAFETY: the descriptors were just opened and belong to nobody else.
    unsafe { (File::from_raw_fd(master), File::from_raw_fd(slave)) }
}

fn flags(file: &File) -> Flags {
    // SAFETY: an all-zero termios is a valid value to be overwritten.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is filled.
    assert_eq!(unsafe { libc::tcgetattr(file.as_raw_fd(), &raw mut termios) }, 0);
    (termios.c_iflag, termios.c_oflag, termios.c_cflag, termios.c_lflag)
}

impl Terminal {
    /// Runs the test guest with `cmdline` on a new terminal. Gives the terminal's flags as they were before, too.
    ///
    /// # Panics
    ///
    /// It cannot be started.
    #[must_use]
    pub fn start(cmdline: &str) -> (Self, Flags) {
        Self::start_in(TempDir::new().unwrap(), cmdline, "")
    }

    /// The same in `dir`, with `config` after the section `[boot]`.
    ///
    /// # Panics
    ///
    /// It cannot be started.
    #[must_use]
    pub fn start_in(dir: TempDir, cmdline: &str, config: &str) -> (Self, Flags) {
        let kernel = guest::elf().unwrap();
        let file = dir.path().join("on-terminal.toml");
        std::fs::write(&file, format!("[boot]\nkernel = {kernel:?}\ncmdline = {cmdline:?}\n{config}"))
            .unwrap();
        let (master, slave) = open_terminal();
        let before = flags(&slave);
        let stdio = || Stdio::from(OwnedFd::from(slave.try_clone().unwrap()));
        let mut command = Command::new(guest::vmm_binary().unwrap());
        command.arg("--config").arg(file).env("VMM_RUN_DIR", dir.path().join("run"));
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(|| {
                // A session of its own, with the terminal as its controlling one.
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        (Self { master, slave, child, seen: Vec::new(), dir }, before)
    }

    /// Directory of the guest's files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Process of the monitor.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The terminal's flags as they are now.
    #[must_use]
    pub fn flags(&self) -> Flags {
        flags(&self.slave)
    }

    /// Waits until `text` was written on it; what was written until then is not looked at again.
    ///
    /// # Panics
    ///
    /// It does not come.
    pub fn wait_for(&mut self, text: &str) {
        let until = Instant::now() + DEADLINE;
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let left = i32::try_from(until.saturating_duration_since(Instant::now()).as_millis()).unwrap();
            let mut polled = libc::pollfd { fd: self.master.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: polled is one entry.
            let ready = unsafe { libc::poll(&raw mut polled, 1, left) };
            assert!(ready > 0, "{text:?} did not come, but {:?}", String::from_utf8_lossy(&self.seen));
            let mut chunk = [0; 1024];
            let len = self.master.read(&mut chunk).unwrap();
            self.seen.extend_from_slice(&chunk[..len]);
        }
        self.seen.clear();
    }

    /// Types `text`.
    ///
    /// # Panics
    ///
    /// The terminal does not take it.
    pub fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    /// Waits for the monitor to end.
    ///
    /// # Panics
    ///
    /// It does not.
    pub fn ends(&mut self) -> ExitStatus {
        let until = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the monitor does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended already unless a test failed.
        self.child.kill().unwrap_or_default();
    }
}
