//! Frames from the guest.

use super::backend::{Backend, Offloads, PieceList};
use super::counters::{Counters, add};
use super::header::{HEADER_LEN, Header};
use super::ring::{Direction, Pop, Ring, Taken};
use super::worker::{BATCH_BYTES, BATCH_FRAMES, Outage};
use super::{ETHERNET_HEADER, MAX_FRAME};

/// The transmit queue.
#[derive(Debug)]
pub struct Transmitter {
    pub ring: Ring,
    list: PieceList,
    /// What the driver may ask for.
    allowed: Offloads,
    outage: Outage,
}

/// What became of a frame.
enum Sent {
    /// It is gone, or not worth anything.
    Done(usize),
    /// There is no room for it.
    Full,
}

impl Transmitter {
    /// Sends from `ring` what asks for no more than `allowed`.
    pub fn new(ring: Ring, allowed: Offloads) -> Self {
        Self { list: ring.list(), ring, allowed, outage: Outage::default() }
    }

    /// Sends the frames that wait, up to a batch of them; after that, signals the kick itself. True if the back end is
    /// full: it is to be called again when there is room.
    pub fn serve(&mut self, backend: &mut dyn Backend, counters: &Counters) -> bool {
        self.ring.suppress_kicks();
        let (mut frames, mut bytes) = (0, 0);
        while frames < BATCH_FRAMES && bytes < BATCH_BYTES {
            frames += 1;
            self.list.truncate(0);
            match self.ring.pop(&mut self.list, Direction::FromGuest) {
                Pop::Chain(chain) => match self.send(chain, backend, counters) {
                    Sent::Done(len) => {
                        bytes += len;
                        self.ring.push(chain.head, 0);
                    }
                    Sent::Full => {
                        self.ring.undo(1);
                        self.ring.notify();
                        add(&counters.tx_waits, 1);
                        return true;
                    }
                },
                Pop::Bad { head, error } => self.ring.refuse(head, &error),
                Pop::Empty => {
                    self.ring.notify();
                    if !self.ring.allow_kicks() {
                        return false;
                    }
                    self.ring.suppress_kicks();
                }
            }
        }
        self.ring.notify();
        self.ring.come_back();
        false
    }

    fn send(&mut self, chain: Taken, backend: &mut dyn Backend, counters: &Counters) -> Sent {
        let chain_pieces = self.list.pieces(0..chain.pieces);
        let len = chain.len.saturating_sub(HEADER_LEN);
        if !(ETHERNET_HEADER..=MAX_FRAME).contains(&len) {
            add(&counters.tx_dropped_length, 1);
            return Sent::Done(0);
        }
        // A copy, because the guest could change its header after the check.
        let mut header = [0; HEADER_LEN];
        chain_pieces.copy_to(&mut header);
        let header = match Header::from_guest(&header, self.allowed, len) {
            Ok(header) => header,
            Err(error) => {
                tracing::debug!("a frame of the guest is dropped: {error}");
                add(&counters.tx_dropped_header, 1);
                return Sent::Done(0);
            }
        };
        match backend.send(&header.bytes(0), chain_pieces.skip(HEADER_LEN)) {
            Ok(()) => {
                self.outage.ends();
                add(&counters.tx_frames, 1);
                add(&counters.tx_bytes, len);
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Sent::Full,
            Err(error) => {
                self.outage.begins("to", backend.name(), &error);
                add(&counters.tx_errors, 1);
            }
        }
        Sent::Done(len)
    }
}
