//! Where the first serial port leads.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::config::model::Serial;

/// The monitor's side of the serial port.
#[derive(Debug)]
pub struct Console {
    output: Option<File>,
    input: Option<File>,
    place: String,
}

impl Console {
    /// Opens what `serial` names.
    ///
    /// # Errors
    ///
    /// It cannot be opened.
    pub fn open(serial: &Serial) -> io::Result<Self> {
        match serial {
            Serial::Stdio => {
                let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
                let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
                Ok(Self { output: Some(output), input: Some(input), place: "stdio".to_owned() })
            }
            Serial::File(path) => {
                let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
                let place = path.display().to_string();
                Ok(Self { output: Some(file), input: None, place })
            }
            Serial::Pty => Err(io::Error::other("not yet")),
            Serial::Null => Ok(Self { output: None, input: None, place: "null".to_owned() }),
        }
    }

    /// Where the guest's output goes.
    pub fn take_output(&mut self) -> Box<dyn Write + Send> {
        match self.output.take() {
            Some(file) => Box::new(file),
            None => Box::new(io::sink()),
        }
    }

    /// Where its input comes from.
    pub fn input(&self) -> Option<Input> {
        self.input.as_ref()?.try_clone().ok().map(Input)
    }

    /// What a user has to know to find it.
    pub fn place(&self) -> String {
        self.place.clone()
    }
}

/// Input for the guest.
#[derive(Debug)]
pub struct Input(File);

impl Input {
    /// Reads what is there.
    pub fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl AsRawFd for Input {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
