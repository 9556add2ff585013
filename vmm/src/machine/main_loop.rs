//! What the main thread does while the guest runs: it waits for the end, for signals, and for input to the console.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::control::Machine;
use super::ending::{Ending, Outcome};
use super::signals::EndSignals;

/// Most input taken at once, in bytes.
const CHUNK: usize = 256;
/// After how many milliseconds input that waits is offered again. A port in loopback mode takes none, and does not say
/// when it leaves that mode.
const RETRY: libc::c_int = 50;

/// Waits until the guest is at its end, and serves its console meanwhile.
pub fn until_the_end(ending: &Ending, signals: &EndSignals, machine: &Machine) -> io::Result<()> {
    let mut input = machine.console.input();
    let mut waiting: Vec<u8> = Vec::new();
    loop {
        // Input is not read before the guest has taken what was read before, so that whoever types or pipes waits.
        let room = if waiting.is_empty() { -1 } else { machine.serial.room().as_raw_fd() };
        let source = input.as_ref().filter(|_| waiting.is_empty()).map_or(-1, AsRawFd::as_raw_fd);
        let fds = [ending.event().as_raw_fd(), signals.as_raw_fd(), room, source];
        let [ended, signal, room, source] = readable(fds, if waiting.is_empty() { -1 } else { RETRY })?;
        if signal && let Some(number) = signals.take() {
            tracing::info!("signal {number} ends the guest");
            ending.report(Outcome::Stopped);
        }
        if ended || ending.is_reported() {
            return Ok(());
        }
        if room {
            machine.serial.room().read().unwrap_or_default();
        }
        if source && let Some(console) = &mut input {
            let mut chunk = [0; CHUNK];
            match console.read(&mut chunk) {
                Ok(0) => input = None,
                Ok(read) => waiting.extend_from_slice(&chunk[..read]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::warn!("the console's input ends: {error}");
                    input = None;
                }
            }
        }
        let taken = if waiting.is_empty() { 0 } else { machine.serial.input(&waiting) };
        waiting.drain(..taken);
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
