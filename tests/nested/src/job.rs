//! A running command: its input is a queue, its output and its end are events.
//!
//! The agent runs the commands of the emulated host with it, and a console on this machine is one.

use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use crate::protocol::{BODY_MAX, Status};
use crate::pty;

/// After the end of a command, its output is waited for this long: something that it left in the background may
/// hold it open.
const DRAIN: Duration = Duration::from_secs(2);

/// What a command does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It wrote to standard output, or to its terminal.
    Output(Vec<u8>),
    /// It wrote to standard error.
    Errors(Vec<u8>),
    /// It ended; no event follows.
    Exit(Status),
    /// It did not start; no event follows.
    Refused(String),
}

/// A started command.
#[derive(Debug)]
pub struct Job {
    group: i32,
    input: Option<Sender<Vec<u8>>>,
}

impl Job {
    /// Starts `command`, with a terminal of its own where `terminal` says so. Every event goes to `report`, which is
    /// called by several threads and never after [`Event::Exit`].
    ///
    /// # Errors
    ///
    /// What the system answers.
    pub fn start(
        mut command: Command,
        terminal: bool,
        report: impl Fn(Event) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let (done, ends) = channel();
        let (input, queue) = channel();
        let child = if terminal {
            let (master, slave) = pty::open()?;
            command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(slave);
            own_session(&mut command);
            let child = command.spawn()?;
            // It holds the terminal, which must be closed when the command ends.
            drop(command);
            feed(master.try_clone()?, queue);
            forward(master, report.clone(), Event::Output, done);
            child
        } else {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
            let mut child = command.spawn()?;
            if let Some(pipe) = child.stdin.take() {
                feed(pipe, queue);
            }
            if let Some(pipe) = child.stdout.take() {
                forward(pipe, report.clone(), Event::Output, done.clone());
            }
            if let Some(pipe) = child.stderr.take() {
                forward(pipe, report.clone(), Event::Errors, done);
            }
            child
        };
        let group = i32::try_from(child.id()).map_err(io::Error::other)?;
        thread::spawn(move || wait(child, &ends, &report));
        Ok(Self { group, input: Some(input) })
    }

    /// Hands `bytes` to the command. One that has ended gets nothing.
    pub fn input(&self, bytes: Vec<u8>) {
        if let Some(input) = &self.input {
            let _ = input.send(bytes);
        }
    }

    /// Closes the command's standard input once it has read what was sent. A terminal stays open.
    pub fn end_input(&mut self) {
        self.input = None;
    }

    /// Sends `signal` to the command and what it started.
    pub fn signal(&self, signal: i32) {
        // SAFETY: the call takes numbers only. The group is that of a child; should that be gone the number may be
        // free again, but the system hands out numbers in a circle.
        unsafe { libc::kill(-self.group, signal) };
    }
}

/// Makes the command the first process of a session whose terminal is its standard input.
fn own_session(command: &mut Command) {
    let own = || {
        // SAFETY: both calls are plain system calls on the child's own state; file descriptor 0 is the terminal.
        let result = unsafe { if libc::setsid() < 0 { -1 } else { libc::ioctl(0, libc::TIOCSCTTY, 0) } };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // SAFETY: the closure makes system calls only: it neither allocates nor takes locks.
    unsafe { command.pre_exec(own) };
}

/// Writes what comes through `queue` until one of the ends is gone.
fn feed(mut to: impl Write + Send + 'static, queue: Receiver<Vec<u8>>) {
    thread::spawn(move || {
        for bytes in queue {
            if to.write_all(&bytes).and_then(|()| to.flush()).is_err() {
                break;
            }
        }
    });
}

/// Reports what is read until the end; `done` then goes.
fn forward(
    mut from: impl Read + Send + 'static,
    report: impl Fn(Event) + Send + 'static,
    event: fn(Vec<u8>) -> Event,
    done: Sender<()>,
) {
    thread::spawn(move || {
        let mut buffer = vec![0; BODY_MAX];
        loop {
            match from.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // A terminal that nobody has open any more gives EIO.
                Ok(0) | Err(_) => break,
                Ok(length) => report(event(buffer[..length].to_vec())),
            }
        }
        drop(done);
    });
}

/// Reports the end of `child`, after its output.
fn wait(mut child: Child, ends: &Receiver<()>, report: &impl Fn(Event)) {
    let status = match child.wait() {
        Ok(status) => status.into(),
        Err(_) => Status::Code(-1),
    };
    // Nothing is ever sent: the channel closes with the last reader.
    let _ = ends.recv_timeout(DRAIN);
    report(Event::Exit(status));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, terminal: bool, input: Option<&str>) -> (String, String, Status) {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let (send, events) = channel();
        let mut job = Job::start(command, terminal, move |event| drop(send.send(event))).unwrap();
        if let Some(input) = input {
            job.input(input.into());
        }
        if !terminal {
            job.end_input();
        }
        let (mut output, mut errors) = (Vec::new(), Vec::new());
        for event in events {
            match event {
                Event::Output(bytes) => output.extend(bytes),
                Event::Errors(bytes) => errors.extend(bytes),
                Event::Exit(status) => {
                    return (String::from_utf8(output).unwrap(), String::from_utf8(errors).unwrap(), status);
                }
                Event::Refused(why) => panic!("{why}"),
            }
        }
        panic!("no exit")
    }

    #[test]
    fn output_errors_and_status_are_kept_apart() {
        let (output, errors, status) = shell("cat; echo wrong >&2; exit 3", false, Some("text"));
        assert_eq!((output.as_str(), errors.as_str(), status), ("text", "wrong\n", Status::Code(3)));
    }

    #[test]
    fn command_with_a_terminal_sees_one() {
        let (output, _, status) =
            shell("read line; tty >/dev/null && echo \"<$line>\"", true, Some("text\n"));
        assert!(output.contains("<text>"), "{output:?}");
        assert_eq!(status, Status::Code(0));
    }

    #[test]
    fn output_held_open_in_the_background_does_not_hide_the_end() {
        let (output, _, status) = shell("sleep 30 & echo $!", false, None);
        assert_eq!(status, Status::Code(0));
        let background: i32 = output.trim().parse().unwrap();
        // SAFETY: a number, of the process that this test started.
        assert_eq!(unsafe { libc::kill(background, libc::SIGKILL) }, 0);
    }

    #[test]
    fn signal_reaches_what_the_command_started() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 60; true"]);
        let (send, events) = channel();
        let job = Job::start(command, false, move |event| drop(send.send(event))).unwrap();
        job.signal(libc::SIGKILL);
        assert_eq!(events.into_iter().last(), Some(Event::Exit(Status::Signal(libc::SIGKILL))));
    }
}
