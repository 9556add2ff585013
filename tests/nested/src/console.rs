//! A command that is driven as somebody at its terminal would: wait for what it says, type, look how it ended.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::job::{Event, Job};
use crate::l1::Link;
use crate::protocol::{Kind, Status};
use crate::{Error, Result};

/// How much of what was seen goes into an error.
const TAIL: usize = 4000;

/// Where a console's command runs.
#[derive(Debug)]
enum Place {
    /// On this machine.
    Here(Job),
    /// In the emulated host.
    There { link: Arc<Link>, channel: u32 },
}

/// A running command. It is killed, with what it started, when this is dropped.
#[derive(Debug)]
pub struct Console {
    name: String,
    place: Place,
    /// Whether the command has a terminal, which ends lines with two characters.
    terminal: bool,
    events: Receiver<Event>,
    output: Vec<u8>,
    errors: Vec<u8>,
    /// Up to where the output was looked at.
    mark: usize,
    status: Option<Status>,
}

impl Console {
    /// Starts `command` on this machine with a terminal of its own. Messages call it `name`.
    ///
    /// # Errors
    ///
    /// [`Error::Run`].
    pub fn start(name: &str, command: std::process::Command) -> Result<Self> {
        let (send, events) = channel();
        let job = Job::start(command, true, move |event| drop(send.send(event)))
            .map_err(|source| Error::Run { program: name.to_owned(), source })?;
        Ok(Self::new(name, Place::Here(job), true, events))
    }

    /// The command on `channel` of the emulated host.
    pub(crate) fn there(
        name: &str,
        link: Arc<Link>,
        channel: u32,
        terminal: bool,
        events: Receiver<Event>,
    ) -> Self {
        Self::new(name, Place::There { link, channel }, terminal, events)
    }

    fn new(name: &str, place: Place, terminal: bool, events: Receiver<Event>) -> Self {
        let name = name.to_owned();
        let (output, errors) = (Vec::new(), Vec::new());
        Self { name, place, terminal, events, output, errors, mark: 0, status: None }
    }

    /// Waits until `text` is in what comes after what the last call found, and returns what stood before it.
    ///
    /// # Errors
    ///
    /// [`Error::Deadline`], or [`Error::Gone`] where the command ended without it.
    pub fn wait_for(&mut self, text: &str, deadline: Duration) -> Result<String> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(at) = find(&self.output[self.mark..], text.as_bytes()) {
                let before = String::from_utf8_lossy(&self.output[self.mark..self.mark + at]).into_owned();
                self.mark += at + text.len();
                return Ok(before);
            }
            let what = || format!("{text:?} of {}", self.name);
            if self.status.is_some() {
                return Err(Error::Gone { who: self.name.clone(), what: what(), tail: self.tail() });
            }
            let what = what();
            self.advance(&what, end, deadline)?;
        }
    }

    /// Types `text`.
    pub fn send(&self, text: &str) {
        self.input(text.as_bytes());
    }

    /// Hands `bytes` to the command.
    pub fn input(&self, bytes: &[u8]) {
        match &self.place {
            Place::Here(job) => job.input(bytes.to_vec()),
            Place::There { link, channel } => link.send(*channel, Kind::Input, bytes),
        }
    }

    /// Closes the command's standard input, if that is no terminal.
    pub fn end_input(&mut self) {
        match &mut self.place {
            Place::Here(job) => job.end_input(),
            Place::There { link, channel } => link.send(*channel, Kind::EndOfInput, b""),
        }
    }

    /// Sends `signal` to the command and what it started.
    pub fn signal(&self, signal: i32) {
        match &self.place {
            Place::Here(job) => job.signal(signal),
            Place::There { link, channel } => {
                link.send(*channel, Kind::Signal, signal.to_string().as_bytes())
            }
        }
    }

    /// Waits for the end of the command.
    ///
    /// # Errors
    ///
    /// [`Error::Deadline`], [`Error::Refused`] where it did not start, [`Error::Gone`] where the emulated host ended.
    pub fn exit_status(&mut self, deadline: Duration) -> Result<Status> {
        let end = Instant::now() + deadline;
        loop {
            if let Some(status) = self.status {
                return Ok(status);
            }
            let what = format!("end of {}", self.name);
            self.advance(&what, end, deadline)?;
        }
    }

    /// What the command has written so far to standard output, or to its terminal.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        &self.output
    }

    /// What the command has written so far to standard error, if it has no terminal.
    #[must_use]
    pub fn errors(&self) -> &[u8] {
        &self.errors
    }

    /// What the command writes next, for somebody who passes it on; `None` where there is nothing within `wait`. What
    /// is taken here is not in [`Console::output`].
    ///
    /// # Errors
    ///
    /// [`Error::Refused`] where it did not start, [`Error::Gone`] where the emulated host ended.
    pub fn next_output(&mut self, wait: Duration) -> Result<Option<Vec<u8>>> {
        if self.status.is_some() {
            return Ok(None);
        }
        match self.events.recv_timeout(wait) {
            Ok(Event::Output(bytes) | Event::Errors(bytes)) => Ok(Some(bytes)),
            Ok(Event::Exit(status)) => {
                self.status = Some(status);
                Ok(None)
            }
            Ok(Event::Refused(why)) => Err(Error::Refused(why)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                let what = format!("output of {}", self.name);
                Err(Error::Gone { who: "the emulated host".to_owned(), what, tail: self.tail() })
            }
        }
    }

    /// How the command ended, if it has.
    #[must_use]
    pub fn status(&self) -> Option<Status> {
        self.status
    }

    /// Takes in the next event.
    fn advance(&mut self, what: &str, end: Instant, deadline: Duration) -> Result<()> {
        match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
            Ok(Event::Output(bytes)) => {
                self.output.extend(bytes.into_iter().filter(|byte| !self.terminal || *byte != b'\r'));
            }
            Ok(Event::Errors(bytes)) => self.errors.extend(bytes),
            Ok(Event::Exit(status)) => self.status = Some(status),
            Ok(Event::Refused(why)) => {
                self.status = Some(Status::Code(126));
                return Err(Error::Refused(why));
            }
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::Deadline { what: what.to_owned(), deadline, tail: self.tail() });
            }
            Err(RecvTimeoutError::Disconnected) => {
                let who = "the emulated host".to_owned();
                return Err(Error::Gone { who, what: what.to_owned(), tail: self.tail() });
            }
        }
        Ok(())
    }

    fn tail(&self) -> String {
        let mut text = String::new();
        for (name, bytes) in [("output", &self.output), ("errors", &self.errors)] {
            if !bytes.is_empty() {
                let tail = &bytes[bytes.len().saturating_sub(TAIL)..];
                text.push_str(&format!("--- {name} of {}:\n{}\n", self.name, String::from_utf8_lossy(tail)));
            }
        }
        if let Place::There { link, .. } = &self.place {
            text.push_str(&link.log_tail());
        }
        text
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if self.status.is_none() {
            self.signal(libc::SIGKILL);
        }
        if let Place::There { link, channel } = &self.place {
            link.close(*channel);
        }
    }
}

fn find(text: &[u8], part: &[u8]) -> Option<usize> {
    if part.is_empty() {
        return Some(0);
    }
    text.windows(part.len()).position(|window| window == part)
}
