//! What the main thread does while the guest runs: it waits for the end, for signals, and for input to the console.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};

use super::console::Wait;
use super::control::Machine;
use super::ending::{Ending, Outcome};
use super::signals::EndSignals;
use crate::terminal::{Action, HELP};

/// After how many milliseconds input that waits is offered again, to a port that did not say when it takes more.
const RETRY: libc::c_int = 10;
/// Most that waits of what is typed, in bytes. A terminal is read on while its input waits, because of the keys that are
/// the monitor's; what is typed beyond is lost, as on a real line.
const TYPED_AHEAD: usize = 4096;
/// After how many milliseconds a terminal that another has is looked at again.
const LOOK_AGAIN: libc::c_int = 250;
const FOREVER: libc::c_int = -1;

/// Waits until the guest is at its end, and serves its console meanwhile.
pub fn until_the_end(ending: &Ending, signals: &EndSignals, machine: &mut Machine) -> io::Result<()> {
    let mut waiting: Vec<u8> = Vec::new();
    loop {
        // What is piped in is not read before the guest has taken what was read before: the pipe waits.
        let (source, timeout) = match machine.console.wait() {
            Wait::Readable(fd) if waiting.is_empty() || machine.console.is_terminal() => (fd, FOREVER),
            Wait::Later => (-1, LOOK_AGAIN),
            Wait::Never | Wait::Readable(_) => (-1, FOREVER),
        };
        let (room, timeout) = match waiting.is_empty() {
            true => (-1, timeout),
            false => (machine.serial.room().as_raw_fd(), RETRY),
        };
        let fds = [ending.event().as_raw_fd(), signals.as_raw_fd(), room, source];
        let [ended, signal, room, source] = readable(fds, timeout)?;
        if signal && let Some(number) = signals.take() {
            ending.report(Outcome::Stopped);
            tracing::info!("signal {number} ends the guest");
        }
        if ended || ending.is_reported() {
            return Ok(());
        }
        if room {
            machine.serial.room().read().unwrap_or_default();
        }
        if source {
            let taken = machine.console.take();
            waiting.extend_from_slice(&taken.bytes);
            waiting.truncate(TYPED_AHEAD);
            taken.actions.into_iter().for_each(|action| carry_out(action, ending, machine));
        }
        let taken = if waiting.is_empty() { 0 } else { machine.serial.input(&waiting) };
        waiting.drain(..taken);
    }
}

/// Does what somebody at the console has asked the monitor for.
fn carry_out(action: Action, ending: &Ending, machine: &Machine) {
    match action {
        Action::Stop => ending.report(Outcome::Stopped),
        Action::PowerButton => machine.press_power_button(),
        // The terminal may be gone; then nobody reads this.
        Action::Help => io::stderr().write_all(HELP.as_bytes()).unwrap_or_default(),
    }
}

/// Waits until one of `fds` is readable, or at its end, or `timeout` milliseconds have passed; -1 is never.
fn readable<const N: usize>(fds: [RawFd; N], timeout: libc::c_int) -> io::Result<[bool; N]> {
    let mut polled = fds.map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
    let count = libc::nfds_t::try_from(N).unwrap_or_default();
    // SAFETY: polled is an array of as many entries.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), count, timeout) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted { Ok([false; N]) } else { Err(error) };
    }
    Ok(polled.map(|polled| polled.revents != 0))
}
