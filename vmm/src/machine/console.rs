//! Where the first serial port leads.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::config::model::Serial;
use crate::terminal::{Action, Escape, Pty, RawMode};

/// Most input taken at once, in bytes.
const CHUNK: usize = 256;

/// The monitor's side of the serial port.
#[derive(Debug)]
pub struct Console {
    output: Option<Output>,
    input: Option<Input>,
    place: String,
}

/// Where the guest's output goes. Boxed only when the port takes it.
type Output = Box<dyn Sink>;

/// What takes the guest's output.
trait Sink: Write + Send + std::fmt::Debug {}

impl<W: Write + Send + std::fmt::Debug> Sink for W {}

/// Where the guest's input comes from.
#[derive(Debug)]
enum Input {
    /// A file, a pipe, or whatever else standard input is.
    Plain(File),
    /// A terminal in raw mode.
    Terminal { file: File, raw: RawMode, escape: Escape },
    /// A pseudo-terminal of the monitor's own.
    Pty(Pty),
}

/// Input that has come.
#[derive(Debug, Default)]
pub struct Taken {
    /// For the guest.
    pub bytes: Vec<u8>,
    /// For the monitor.
    pub actions: Vec<Action>,
    /// No more will come.
    pub ended: bool,
}

/// What the console's input can be waited for by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// There is no input.
    Never,
    /// This descriptor becomes readable.
    Readable(RawFd),
    /// The terminal is somebody else's at present: look again after a while.
    Later,
}

impl Console {
    /// Opens what `serial` names. A terminal is in raw mode from here on until the console is dropped.
    ///
    /// # Errors
    ///
    /// It cannot be opened.
    pub fn open(serial: &Serial) -> io::Result<Self> {
        match serial {
            Serial::Stdio => {
                let file = File::from(io::stdin().as_fd().try_clone_to_owned()?);
                let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
                let input = match RawMode::enter(&file)? {
                    Some(raw) => Input::Terminal { file, raw, escape: Escape::default() },
                    None => Input::Plain(file),
                };
                Ok(Self { output: Some(Box::new(output)), input: Some(input), place: "stdio".to_owned() })
            }
            Serial::File(path) => {
                // O_NONBLOCK: a FIFO that nobody reads is refused instead of waited for.
                let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
                let mut options = OpenOptions::new();
                let file = options.append(true).create(true).mode(0o600).custom_flags(flags).open(path)?;
                // SAFETY: F_SETFL takes an integer; of those that it changes only O_APPEND was set on purpose.
                if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_APPEND) } < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(Self { output: Some(Box::new(file)), input: None, place: path.display().to_string() })
            }
            Serial::Pty => {
                let pty = Pty::open()?;
                let (output, place) = (pty.output()?, pty.path().display().to_string());
                Ok(Self { output: Some(Box::new(output)), input: Some(Input::Pty(pty)), place })
            }
            Serial::Null => Ok(Self { output: None, input: None, place: "null".to_owned() }),
        }
    }

    /// Where the guest's output goes.
    pub fn take_output(&mut self) -> Box<dyn Write + Send> {
        match self.output.take() {
            Some(output) => Box::new(output),
            None => Box::new(io::sink()),
        }
    }

    /// What a user has to know to find it.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Whether its input is a terminal, some keys of which are for the monitor.
    pub fn is_terminal(&self) -> bool {
        matches!(self.input, Some(Input::Terminal { .. }))
    }

    /// What to wait for before [`take`](Self::take).
    pub fn wait(&self) -> Wait {
        match &self.input {
            None => Wait::Never,
            Some(Input::Terminal { raw, .. }) if !raw.hold() => Wait::Later,
            Some(Input::Plain(file) | Input::Terminal { file, .. }) => Wait::Readable(file.as_raw_fd()),
            Some(Input::Pty(pty)) => Wait::Readable(pty.as_raw_fd()),
        }
    }

    /// Takes what has come. After an end of input nothing more is waited for.
    pub fn take(&mut self) -> Taken {
        let mut chunk = [0; CHUNK];
        let read = match &mut self.input {
            None => return Taken::default(),
            Some(Input::Terminal { raw, .. }) if !raw.hold() => return Taken::default(),
            Some(Input::Plain(file) | Input::Terminal { file, .. }) => file.read(&mut chunk),
            Some(Input::Pty(pty)) => pty.read(&mut chunk),
        };
        let mut taken = Taken::default();
        match read {
            Ok(0) => taken.ended = true,
            Ok(len) => match &mut self.input {
                Some(Input::Terminal { escape, .. }) => {
                    taken.actions = escape.feed(&chunk[..len], &mut taken.bytes);
                }
                _ => taken.bytes.extend_from_slice(&chunk[..len]),
            },
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            Err(error) => {
                tracing::warn!("the input of the guest's console ends: {error}");
                taken.ended = true;
            }
        }
        if taken.ended {
            // A terminal that has hung up is not put back either.
            self.input = None;
        }
        taken
    }
}
