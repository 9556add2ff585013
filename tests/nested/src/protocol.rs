//! What this machine and the agent in the emulated host say to each other: frames over a virtio-serial port.
//!
//! | bytes | |
//! | --- | --- |
//! | 4 | length of the body, at most [`BODY_MAX`], little-endian |
//! | 4 | channel, little-endian: one for each command, chosen by the one who starts it |
//! | 1 | [`Kind`] |
//! | … | body |

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use serde::{Deserialize, Serialize};

/// Most bytes in a frame.
pub const BODY_MAX: usize = 64 << 10;

/// What a frame means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// To the agent: start a command. Body: [`Start`] as JSON.
    Start,
    /// To the agent: bytes for the command.
    Input,
    /// To the agent: there is no more input.
    EndOfInput,
    /// To the agent: send the signal whose number is in the body, as text, to the command and what it started.
    Signal,
    /// From the agent, on channel 0: it listens.
    Ready,
    /// From the agent: standard output of a command, or all that it writes to its terminal.
    Output,
    /// From the agent: standard error of a command.
    Errors,
    /// From the agent: the command ended; nothing follows on the channel. Body: [`Status`] as JSON.
    Exit,
    /// From the agent: the command could not be started; nothing follows on the channel. Body: why.
    Refused,
}

const KINDS: [Kind; 9] = [
    Kind::Start,
    Kind::Input,
    Kind::EndOfInput,
    Kind::Signal,
    Kind::Ready,
    Kind::Output,
    Kind::Errors,
    Kind::Exit,
    Kind::Refused,
];

/// A command for the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// For `sh -c`.
    pub command: String,
    /// Whether it gets a terminal of its own for its input and output.
    pub terminal: bool,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// By itself, with this exit status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Status {
    /// Whether it ended with exit status 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit status {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

impl From<ExitStatus> for Status {
    fn from(status: ExitStatus) -> Self {
        // A process that was waited for has ended in one of the two ways.
        status.code().map_or_else(|| Self::Signal(status.signal().unwrap_or(0)), Self::Code)
    }
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The command it is about.
    pub channel: u32,
    /// What it means.
    pub kind: Kind,
    /// At most [`BODY_MAX`] bytes.
    pub body: Vec<u8>,
}

impl Frame {
    /// A frame of `kind` on `channel`.
    pub fn new(channel: u32, kind: Kind, body: impl Into<Vec<u8>>) -> Self {
        Self { channel, kind, body: body.into() }
    }

    /// Reads the next frame; `None` where the other side closed the connection between two of them.
    ///
    /// # Errors
    ///
    /// Of `from`; [`io::ErrorKind::InvalidData`] for what is no frame.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Self>> {
        let mut header = [0; 9];
        let first = loop {
            match from.read(&mut header) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        if first == 0 {
            return Ok(None);
        }
        from.read_exact(&mut header[first..])?;
        let [l0, l1, l2, l3, c0, c1, c2, c3, kind] = header;
        let length = usize::try_from(u32::from_le_bytes([l0, l1, l2, l3])).unwrap_or(usize::MAX);
        let kind = KINDS.get(usize::from(kind)).copied();
        let (Some(kind), true) = (kind, length <= BODY_MAX) else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("not a frame: {header:02x?}")));
        };
        let mut body = vec![0; length];
        from.read_exact(&mut body)?;
        Ok(Some(Self { channel: u32::from_le_bytes([c0, c1, c2, c3]), kind, body }))
    }

    /// Writes the frame.
    ///
    /// # Errors
    ///
    /// Of `to`; [`io::ErrorKind::InvalidInput`] where the body is too long.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let length = u32::try_from(self.body.len()).ok().filter(|_| self.body.len() <= BODY_MAX);
        let length = length.ok_or(io::ErrorKind::InvalidInput)?;
        let kind = KINDS.iter().position(|kind| *kind == self.kind).and_then(|at| u8::try_from(at).ok());
        let kind = kind.ok_or(io::ErrorKind::InvalidInput)?;
        let mut bytes = Vec::with_capacity(9 + self.body.len());
        bytes.extend(length.to_le_bytes());
        bytes.extend(self.channel.to_le_bytes());
        bytes.push(kind);
        bytes.extend(&self.body);
        to.write_all(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn frames_are_read_as_they_were_written(
            frames in proptest::collection::vec((any::<u32>(), 0..KINDS.len(), proptest::collection::vec(any::<u8>(), 0..50)), 0..10)
        ) {
            let frames: Vec<_> =
                frames.into_iter().map(|(channel, kind, body)| Frame::new(channel, KINDS[kind], body)).collect();
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.write(&mut bytes).unwrap();
            }
            let mut rest = bytes.as_slice();
            let mut read = Vec::new();
            while let Some(frame) = Frame::read(&mut rest).unwrap() {
                read.push(frame);
            }
            prop_assert_eq!(read, frames);
        }

        #[test]
        fn any_bytes_are_a_frame_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut rest = bytes.as_slice();
            while let Ok(Some(_)) = Frame::read(&mut rest) {}
        }
    }

    #[test]
    fn frame_that_claims_too_much_is_refused_before_it_is_read() {
        let mut bytes = vec![0xff, 0xff, 0xff, 0x7f, 0, 0, 0, 0, 1];
        bytes.extend([0; 20]);
        let error = Frame::read(&mut bytes.as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn frame_that_ends_early_is_an_error() {
        let mut bytes = Vec::new();
        Frame::new(1, Kind::Input, "text").write(&mut bytes).unwrap();
        bytes.pop();
        let error = Frame::read(&mut bytes.as_slice()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
