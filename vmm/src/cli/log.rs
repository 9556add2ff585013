//! Where the monitor's own messages go: to standard error or a file, never to standard output, which is the guest's.

use std::fs::OpenOptions;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;

/// The log cannot be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the log to {}", path.display())]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// Begins to log: warnings and errors, and more with each `verbosity`.
///
/// # Errors
///
/// [`Error`] if `file` cannot be opened.
pub fn start(verbosity: u8, file: Option<&Path>) -> Result<(), Error> {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let builder = tracing_subscriber::fmt().with_max_level(level).with_ansi(false).with_target(verbosity > 1);
    match file {
        Some(path) => {
            let file = OpenOptions::new().append(true).create(true).open(path);
            let file = file.map_err(|source| Error { path: path.to_owned(), source })?;
            builder.with_writer(Mutex::new(file)).init();
        }
        // On a terminal nobody needs to be told the time.
        None => builder.without_time().with_writer(|| Stderr(io::stderr().is_terminal())).init(),
    }
    Ok(())
}

/// Says something to whoever started the monitor. If nobody can be told, nothing is.
pub fn say(text: &str) {
    Stderr(io::stderr().is_terminal()).write_all(format!("{text}\n").as_bytes()).unwrap_or_default();
}

/// How long standard error may take to have room for a message, in milliseconds.
const PATIENCE: libc::c_int = 100;

/// Standard error. On a terminal, which is in raw mode while it is the guest's console, lines end with a carriage
/// return as well. Where nobody reads it, messages are lost and nobody waits: a vCPU that has something to tell is not to
/// stand still for it.
struct Stderr(bool);

impl Write for Stderr {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut room = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
        // SAFETY: room is one entry.
        if unsafe { libc::poll(&raw mut room, 1, PATIENCE) } != 1 || room.revents & libc::POLLOUT == 0 {
            return Ok(data.len());
        }
        let mut text = Vec::with_capacity(data.len() + 2);
        for byte in data {
            text.extend_from_slice(if self.0 && *byte == b'\n' {
                b"\r\n"
            } else {
                std::slice::from_ref(byte)
            });
        }
        // One write, whatever becomes of it: the rest of a message that was cut short has nowhere to go either.
        io::stderr().write(&text).unwrap_or_default();
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
