//! One client's connection, from its first byte to its last.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::Shared;
use super::answer::{Answer, CONTINUE};
use super::request::{self, Request};
use super::wait;
use crate::http::HEAD_LIMIT;

/// How much is read at once.
const PIECE: usize = 2048;
/// Most bytes read and dropped from a client that was told that the connection ends.
const LINGER_LIMIT: usize = 256 << 10;

/// A connection, on its own thread.
pub struct Connection<'a> {
    /// Does not block.
    stream: UnixStream,
    shared: &'a Shared,
    /// Bytes that were read and not yet used, at most [`HEAD_LIMIT`].
    bytes: Vec<u8>,
}

/// Why there is no request to perform.
#[derive(Debug)]
enum End {
    /// The client has gone, or the server stops.
    Closed,
    /// The client took too long.
    Late,
    /// What it sent cannot be served.
    Rejected(Answer),
}

impl<'a> Connection<'a> {
    pub fn new(stream: UnixStream, shared: &'a Shared) -> Self {
        Self { stream, shared, bytes: Vec::new() }
    }

    /// Answers the client until one of the two ends the connection.
    pub fn serve(mut self) {
        loop {
            let (request, body) = match self.next_request() {
                Ok(request) => request,
                Err(End::Closed) => return,
                Err(End::Late) => {
                    return self.farewell(&Answer::error(408, "the request did not arrive in time"));
                }
                Err(End::Rejected(answer)) => return self.farewell(&answer),
            };
            let answer = request.perform(&*self.shared.control, &body);
            tracing::debug!("control: answered {}", answer.status());
            let bytes = answer.encode(request.is_head(), request.close);
            if self.send(&bytes).is_err() {
                return;
            }
            if request.close {
                return self.linger();
            }
        }
    }

    /// Waits for the next request and reads all of it, its body too.
    fn next_request(&mut self) -> Result<(Request, Vec<u8>), End> {
        if self.bytes.is_empty() {
            self.fill(Instant::now() + self.shared.limits.idle).map_err(|end| match end {
                End::Late => End::Closed,
                end => end,
            })?;
        }
        let deadline = Instant::now() + self.shared.limits.request;
        let request = loop {
            // Requests sent ahead keep a connection busy without any waiting that would notice a stop.
            if self.shared.is_stopping() {
                return Err(End::Closed);
            }
            match request::parse(&self.bytes).map_err(End::Rejected)? {
                Some((request, len)) => {
                    self.bytes.drain(..len);
                    break request;
                }
                None => self.fill(deadline)?,
            }
        };
        if request.expects_continue && request.body > 0 {
            self.send(CONTINUE)?;
        }
        let body = self.take_body(request.body, deadline)?;
        Ok((request, body))
    }

    /// Takes `len` bytes of body, which are no more than a body may have.
    fn take_body(&mut self, len: u64, deadline: Instant) -> Result<Vec<u8>, End> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let mut body = Vec::new();
        loop {
            let here = (len - body.len()).min(self.bytes.len());
            body.extend(self.bytes.drain(..here));
            if body.len() == len {
                return Ok(body);
            }
            self.fill(deadline)?;
        }
    }

    /// Reads at least one more byte. Called only while there is room.
    fn fill(&mut self, deadline: Instant) -> Result<(), End> {
        let old = self.bytes.len();
        self.bytes.resize((old + PIECE).min(HEAD_LIMIT), 0);
        let read = self.patiently(libc::POLLIN, deadline, |connection| {
            (&connection.stream).read(&mut connection.bytes[old..])
        });
        self.bytes.truncate(old + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Err(End::Closed),
            Ok(_) => Ok(()),
            Err(end) => Err(end),
        }
    }

    /// Sends all of `bytes`.
    fn send(&mut self, mut bytes: &[u8]) -> Result<(), End> {
        let deadline = Instant::now() + self.shared.limits.request;
        while !bytes.is_empty() {
            let sent = self
                .patiently(libc::POLLOUT, deadline, |connection| (&connection.stream).write(bytes))
                .map_err(|_| End::Closed)?;
            bytes = bytes.get(sent..).unwrap_or_default();
        }
        Ok(())
    }

    /// Tries `act` until it does not have to wait. Waiting ends with the deadline and when the server stops.
    fn patiently(
        &mut self,
        events: libc::c_short,
        deadline: Instant,
        mut act: impl FnMut(&mut Self) -> io::Result<usize>,
    ) -> Result<usize, End> {
        loop {
            match act(self) {
                Ok(count) => return Ok(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return Err(End::Closed),
            }
            let wanted = [(self.stream.as_raw_fd(), events), (self.shared.stop.as_raw_fd(), libc::POLLIN)];
            match wait::ready(wanted, Some(deadline)) {
                Ok([_, true]) | Err(_) => return Err(End::Closed),
                Ok([true, _]) => {}
                Ok([false, false]) => return Err(End::Late),
            }
        }
    }

    /// Sends the last answer.
    fn farewell(mut self, answer: &Answer) {
        let to_head = self.bytes.trim_ascii_start().starts_with(b"HEAD ");
        if self.send(&answer.encode(to_head, true)).is_ok() {
            self.linger();
        }
    }

    /// Lets the client finish: closing while it sends would break its sending, and with many clients the reading of
    /// the answer too.
    fn linger(mut self) {
        if self.stream.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let deadline = Instant::now() + self.shared.limits.linger;
        let mut dropped = 0;
        while dropped < LINGER_LIMIT {
            self.bytes.clear();
            if self.fill(deadline).is_err() {
                return;
            }
            dropped += self.bytes.len();
        }
    }
}

/// How long a client may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Between two requests.
    pub idle: Duration,
    /// For the whole of a request, and again to take its answer.
    pub request: Duration,
    /// To close a connection that has ended.
    pub linger: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(30),
            request: Duration::from_secs(5),
            linger: Duration::from_secs(1),
        }
    }
}
