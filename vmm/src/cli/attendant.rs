//! Whoever sits at the terminal that the monitor was started on, when the guest has ended.

use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsRawFd, RawFd};

use api::AtPowerOff;

use super::image::progress::Progress;
use super::log;
use crate::config::show_size;
use crate::machine::disks::power_off::{Attendant, Log};
use crate::machine::ending::Outcome;

/// Longest answer, in bytes.
const ANSWER: usize = 256;

/// The terminal, if there is one.
#[derive(Debug)]
pub struct Terminal {
    guest: String,
    bar: Option<Progress>,
}

impl Terminal {
    /// For the guest `name`.
    pub fn new(name: &str) -> Self {
        Self { guest: name.to_owned(), bar: None }
    }
}

impl Attendant for Terminal {
    fn ended(&mut self, outcome: &Outcome) {
        let name = &self.guest;
        match outcome {
            Outcome::PowerOff => tracing::info!("guest {name} has powered off"),
            Outcome::Reset => tracing::info!("guest {name} has asked for a reset, which ends it"),
            Outcome::Stopped => tracing::info!("guest {name} was stopped"),
            Outcome::Crashed(diagnosis) => {
                log::say(&format!("vmm: guest {name} cannot go on: {diagnosis}"));
            }
        }
    }

    fn ask(&mut self, disk: &Log, end: RawFd) -> Option<AtPowerOff> {
        let input = io::stdin();
        if !input.is_terminal() || !io::stderr().is_terminal() || !is_foreground(input.as_raw_fd()) {
            return None;
        }
        let holds = disk.holds.unwrap_or(0).next_multiple_of(1 << 10);
        let question = format!(
            "vmm: guest {} has ended. What becomes of what it wrote to disk {} ({}), {} in {}?\n\
             [c]ommit, [d]iscard or [k]eep: ",
            self.guest,
            disk.disk,
            disk.image.display(),
            show_size(holds),
            disk.file.display()
        );
        let mut question = question.as_str();
        loop {
            io::stderr().write_all(question.as_bytes()).ok()?;
            let Some(answer) = line(input.as_raw_fd(), end) else {
                // What is told next begins a line of its own.
                let _ = io::stderr().write_all(b"\n");
                return None;
            };
            match answer.trim().to_ascii_lowercase().as_str() {
                "c" | "commit" => return Some(AtPowerOff::Commit),
                "d" | "discard" => return Some(AtPowerOff::Discard),
                "k" | "keep" => return Some(AtPowerOff::Keep),
                _ => question = "[c]ommit, [d]iscard or [k]eep: ",
            }
        }
    }

    fn committing(&mut self, done: u64, total: u64) {
        // What interrupts it is the machine's affair.
        let _ = self.bar.get_or_insert_with(|| Progress::watched("committing")).report(done, total);
    }

    fn committed(&mut self) {
        self.bar = None;
    }

    fn tell(&mut self, text: &str) {
        log::say(&format!("vmm: {text}"));
    }
}

/// Whether this process may read the terminal. From the background, reading would stop it.
fn is_foreground(terminal: RawFd) -> bool {
    // SAFETY: both take and give integers.
    let (foreground, own) = unsafe { (libc::tcgetpgrp(terminal), libc::getpgrp()) };
    // One that is not that of the session has no job control on it.
    foreground < 0 || foreground == own
}

/// Reads a line from `terminal`; `None` at its end, or once `end` is readable.
fn line(terminal: RawFd, end: RawFd) -> Option<String> {
    let mut text = Vec::new();
    loop {
        let mut fds = [terminal, end].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        // SAFETY: fds is an array of two entries.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {
            if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                continue;
            }
            return None;
        }
        if fds[1].revents != 0 {
            return None;
        }
        // Not by way of the standard library's buffer, which may hold on to what follows.
        let mut chunk = [0_u8; ANSWER];
        // SAFETY: chunk has as many bytes.
        let read = unsafe { libc::read(terminal, chunk.as_mut_ptr().cast(), chunk.len()) };
        let read = usize::try_from(read).ok().filter(|read| *read > 0)?;
        text.extend_from_slice(&chunk[..read]);
        if text.contains(&b'\n') || text.len() >= ANSWER {
            return Some(String::from_utf8_lossy(&text).into_owned());
        }
    }
}
