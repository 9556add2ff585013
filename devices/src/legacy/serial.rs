//! The first serial port, a 16550A (vm-superio's), with somewhere for its output to go and flow control for its input.

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use vm_superio::Trigger;
use vm_superio::serial::{Error, SerialEvents};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Interrupt;
use crate::bus::BusDevice;

/// First port of COM1.
pub const COM1: u64 = 0x3f8;
/// Number of ports.
pub const PORT_COUNT: u64 = 8;

/// How often a write that a signal interrupts is tried again before its byte is dropped. A vCPU that is
/// asked to leave the guest while the other side does not read has to come out of the write.
const INTERRUPTED_TRIES: usize = 2;

struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.trigger()
    }
}

/// Tells the input side that there is room again.
struct Room(Arc<EventFd>);

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // Only an overflow of the counter can fail, and then the event is signalled already.
        self.0.write(1).unwrap_or_default();
    }
}

/// Output that never fails towards the guest: what cannot be written is dropped, and the first loss is logged.
struct Output {
    to: Box<dyn Write + Send>,
    lost: bool,
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut tries = 0;
        loop {
            match self.to.write(data) {
                Ok(written) if written > 0 || data.is_empty() => return Ok(written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted && tries < INTERRUPTED_TRIES => {
                    tries += 1
                }
                failed => {
                    if !std::mem::replace(&mut self.lost, true) {
                        let reason = failed.err().map_or("nothing was taken".to_owned(), |e| e.to_string());
                        tracing::warn!("output of the serial port is lost: {reason}");
                    }
                    return Ok(data.len());
                }
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush().or(Ok(()))
    }
}

type Port = vm_superio::Serial<Line, Room, Output>;

/// The port.
pub struct Serial {
    port: Mutex<Port>,
    room: Arc<EventFd>,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl Serial {
    /// A port with interrupt `line` whose output goes to `output`, byte by byte as the guest sends it.
    ///
    /// # Errors
    ///
    /// No event descriptor is to be had.
    pub fn new(line: Arc<dyn Interrupt>, output: Box<dyn Write + Send>) -> io::Result<Self> {
        let room = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let output = Output { to: output, lost: false };
        let port = vm_superio::Serial::with_events(Line(line), Room(room.clone()), output);
        Ok(Self { port: Mutex::new(port), room })
    }

    fn lock(&self) -> MutexGuard<'_, Port> {
        self.port.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `input` into the receive FIFO and says how many bytes it took. When it has not taken all,
    /// [`room`](Self::room) is signalled once the guest has emptied it, and the rest should be offered again after a
    /// while in any case: a port that a vCPU is writing to, or that is in loopback mode, takes nothing. The call never
    /// waits, so that output which stands still does not hold up whoever has input.
    pub fn input(&self, input: &[u8]) -> usize {
        let mut port = match self.port.try_lock() {
            Ok(port) => port,
            Err(TryLockError::Poisoned(port)) => port.into_inner(),
            Err(TryLockError::WouldBlock) => return 0,
        };
        match port.enqueue_raw_bytes(input) {
            Ok(taken) => taken,
            Err(Error::FullFifo) => 0,
            Err(error) => {
                tracing::warn!("the guest does not hear of input on its serial port: {error:?}");
                input.len()
            }
        }
    }

    /// Signalled when the guest has emptied the receive FIFO.
    #[must_use]
    pub fn room(&self) -> &EventFd {
        &self.room
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The registers are a byte wide; wider reads see the open bus beyond it.
        data.fill(0xff);
        if let (Some(first), Ok(offset)) = (data.first_mut(), u8::try_from(offset)) {
            *first = self.lock().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Some(first), Ok(offset)) = (data.first(), u8::try_from(offset))
            && let Err(error) = self.lock().write(offset, *first)
        {
            tracing::debug!("serial port: {error:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::mpsc;

    struct Sender(mpsc::Sender<u8>);

    impl Write for Sender {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            data.iter().for_each(|byte| self.0.send(*byte).unwrap());
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    struct Failing(io::ErrorKind);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Err(self.0.into())
        }
    }

    fn serial(output: impl Write + Send + 'static) -> (Serial, Arc<EventFd>) {
        let line = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        (Serial::new(line.clone(), Box::new(output)).unwrap(), line)
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn written_bytes_come_out_at_once() {
        let (sender, receiver) = mpsc::channel();
        let (serial, _) = serial(Sender(sender));
        for byte in b"hi" {
            serial.write(0, &[*byte]);
            assert_eq!(receiver.try_recv().unwrap(), *byte);
        }
    }

    #[test]
    fn failing_or_interrupted_output_is_dropped_and_the_port_goes_on() {
        for kind in [io::ErrorKind::Interrupted, io::ErrorKind::BrokenPipe, io::ErrorKind::WouldBlock] {
            let (serial, _) = serial(Failing(kind));
            serial.write(0, b"x");
            assert_eq!(read(&serial, 5) & 0x20, 0x20, "the transmitter is empty");
        }
    }

    #[test]
    fn input_beyond_the_fifo_waits_until_the_guest_has_read_it() {
        let (serial, line) = serial(io::sink());
        serial.write(1, &[1]); // receive interrupt on
        line.read().unwrap_or_default();
        let input: Vec<u8> = (0..100).collect();
        let taken = serial.input(&input);
        assert!((1..100).contains(&taken));
        assert!(line.read().is_ok());
        assert_eq!(serial.input(&input[taken..]), 0);
        assert!(serial.room().read().is_err());
        let seen: Vec<u8> = (0..taken).map(|_| read(&serial, 0)).collect();
        assert_eq!(seen, input[..taken]);
        assert!(serial.room().read().is_ok());
        assert_eq!(serial.input(&input[taken..]), 100 - taken);
    }

    proptest! {
        #[test]
        fn any_sequence_of_accesses_is_survived(
            accesses in prop::collection::vec((any::<bool>(), 0_u64..12, prop::collection::vec(any::<u8>(), 1..5)), 0..200)
        ) {
            let (serial, _) = serial(io::sink());
            for (write, offset, mut data) in accesses {
                if write { serial.write(offset, &data) } else { serial.read(offset, &mut data) }
                serial.input(b"a");
            }
        }
    }
}
