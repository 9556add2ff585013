//! Frames for the guest.

use std::collections::VecDeque;
use std::io;

use super::backend::{Backend, Offloads, PieceList, Pieces};
use super::counters::{Counters, add};
use super::header::{HEADER_LEN, Header};
use super::ring::{Direction, Pop, Ring, Taken};
use super::worker::{BATCH_BYTES, BATCH_FRAMES, Outage};
use super::{ETHERNET_HEADER, MAX_FRAME};

/// Chains taken from the ring to receive into. They lie in the available ring one after the other.
#[derive(Debug)]
struct Window {
    chains: VecDeque<Taken>,
    list: PieceList,
    /// Bytes of all chains.
    room: usize,
}

/// Why a window does not grow further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Filled {
    /// It is as large as wanted.
    Enough,
    /// The driver has made nothing more available.
    Empty,
    /// The next chain cannot be taken before those in the window are given back.
    Blocked,
    /// A chain was given back unused, and there may be more.
    Refused,
}

impl Window {
    /// Takes chains until there is room for `wanted` bytes.
    fn fill(&mut self, ring: &mut Ring, wanted: usize) -> Filled {
        while self.room < wanted {
            let before = self.list.count();
            let (head, error) = match ring.pop(&mut self.list, Direction::ToGuest) {
                Pop::Chain(chain) if chain.len >= HEADER_LEN => {
                    self.room += chain.len;
                    self.chains.push_back(chain);
                    continue;
                }
                // Any chain may come to be the first of a frame and hold its header (section 5.1.6.3.1).
                Pop::Chain(chain) => {
                    let missing = HEADER_LEN - chain.len;
                    (chain.head, crate::virtio::chain::Error::Short { missing }.into())
                }
                Pop::Bad { head, error } => (head, error),
                Pop::Empty => return Filled::Empty,
            };
            self.list.truncate(before);
            // A chain given back out of turn could not be told from the others when these are put back. A chain that is
            // bad only because the list is full is good later.
            if !self.chains.is_empty() {
                ring.undo(1);
                return Filled::Blocked;
            }
            ring.refuse(head, &error);
            return Filled::Refused;
        }
        Filled::Enough
    }

    /// Bytes of the first chain.
    fn first(&self) -> Pieces<'_> {
        self.list.pieces(0..self.chains.front().map_or(0, |chain| chain.pieces))
    }

    /// Bytes of all chains.
    fn all(&self) -> Pieces<'_> {
        self.list.pieces(0..self.list.count())
    }

    /// Forgets the first `count` chains.
    fn consume(&mut self, count: usize) {
        let (mut pieces, mut room) = (0, 0);
        for chain in self.chains.drain(..count.min(self.chains.len())) {
            pieces += chain.pieces;
            room += chain.len;
        }
        self.list.drop_front(pieces);
        self.room -= room;
    }

    /// Puts all chains back into the ring.
    fn put_back(&mut self, ring: &mut Ring) {
        ring.undo(u16::try_from(self.chains.len()).unwrap_or_default());
        self.chains.clear();
        self.list.truncate(0);
        self.room = 0;
    }
}

/// A frame in the bounce buffer.
#[derive(Debug, Clone, Copy)]
struct Held {
    header: Header,
    len: usize,
}

/// How it goes on.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// A frame of so many bytes is done with; there may be more.
    More(usize),
    /// There is no frame.
    NoFrame,
    /// There are no buffers, or too few.
    NoRoom,
}

/// The receive queue.
#[derive(Debug)]
pub struct Receiver {
    pub ring: Ring,
    window: Window,
    /// Frames may span several chains.
    mergeable: bool,
    /// What the driver can finish by itself.
    allowed: Offloads,
    /// Room that suffices for all frames to be expected.
    wanted: usize,
    /// Takes what does not fit into the guest's buffers; one byte longer than any frame, to know those that are too long.
    bounce: Vec<u8>,
    /// A frame that waits for more buffers.
    held: Option<Held>,
    /// Frames wait for buffers.
    waiting: bool,
    /// The back end may have frames.
    pub readable: bool,
    /// Chains of the frame being given back.
    used: Vec<(u16, u32)>,
    outage: Outage,
}

impl Receiver {
    /// Receives into the chains of `ring` frames that ask for no more than `allowed`, most of them no longer than
    /// `usual` bytes.
    pub fn new(ring: Ring, allowed: Offloads, mergeable: bool, usual: usize) -> Self {
        let window = Window { chains: VecDeque::new(), list: ring.list(), room: 0 };
        let longest = if allowed.large_frames() { MAX_FRAME } else { usual.min(MAX_FRAME) };
        let used = Vec::with_capacity(ring.size().into());
        Self {
            ring,
            window,
            mergeable,
            allowed,
            // A frame in one chain: it fits or it does not.
            wanted: if mergeable { longest + HEADER_LEN } else { 1 },
            bounce: vec![0; MAX_FRAME + 1],
            held: None,
            waiting: false,
            readable: true,
            used,
            outage: Outage::default(),
        }
    }

    /// Hands over the frames that wait, up to a batch of them; after that, signals the kick itself.
    pub fn serve(&mut self, backend: &mut dyn Backend, counters: &Counters) {
        if !self.readable && self.held.is_none() {
            return;
        }
        self.ring.suppress_kicks();
        let (mut frames, mut bytes) = (0, 0);
        while frames < BATCH_FRAMES && bytes < BATCH_BYTES {
            frames += 1;
            match self.step(backend, counters) {
                Step::More(len) => {
                    self.waiting = false;
                    bytes += len;
                }
                Step::NoFrame => {
                    (self.readable, self.waiting) = (false, false);
                    self.ring.notify();
                    return;
                }
                Step::NoRoom => {
                    self.ring.notify();
                    if !self.ring.allow_kicks() {
                        if !std::mem::replace(&mut self.waiting, true) {
                            add(&counters.rx_waits, 1);
                        }
                        return;
                    }
                    self.ring.suppress_kicks();
                }
            }
        }
        self.ring.notify();
        self.ring.come_back();
    }

    /// Puts back the chains that nothing was received into.
    pub fn drain(&mut self) {
        self.window.put_back(&mut self.ring);
    }

    fn step(&mut self, backend: &mut dyn Backend, counters: &Counters) -> Step {
        if let Some(held) = self.held {
            return self.deliver(held, counters);
        }
        if self.window.fill(&mut self.ring, self.wanted) == Filled::Refused {
            return Step::More(0);
        }
        if self.window.chains.is_empty() {
            return Step::NoRoom;
        }
        let into = if self.mergeable { self.window.all() } else { self.window.first() };
        let into = into.skip(HEADER_LEN);
        let room = into.len();
        let cut = room.min(self.bounce.len());
        let (front, overflow) = self.bounce.split_at_mut(cut);
        let mut header = [0; HEADER_LEN];
        let len = match backend.receive(&mut header, into, overflow) {
            Ok(len) => len,
            Err(error) => {
                if error.kind() != io::ErrorKind::WouldBlock {
                    self.outage.begins("from", backend.name(), &error);
                    add(&counters.rx_errors, 1);
                }
                // What came and was no frame is gone, and others may wait behind it.
                let taken = error.kind() == io::ErrorKind::InvalidData;
                return if taken { Step::More(0) } else { Step::NoFrame };
            }
        };
        self.outage.ends();
        if !(ETHERNET_HEADER..=MAX_FRAME).contains(&len) {
            add(&counters.rx_dropped_length, 1);
            return Step::More(len);
        }
        let header = match Header::for_guest(&header, self.allowed, len) {
            Ok(header) => header,
            Err(error) => {
                tracing::debug!("a frame for the guest is dropped: {error}");
                add(&counters.rx_dropped_header, 1);
                return Step::More(len);
            }
        };
        if len <= room {
            self.finish(header, len, counters);
        } else if self.mergeable {
            into.copy_to(front);
            self.held = Some(Held { header, len });
        } else {
            add(&counters.rx_dropped_room, 1);
        }
        Step::More(len)
    }

    /// Copies a frame that did not fit at first, now that there may be more room.
    fn deliver(&mut self, Held { header, len }: Held, counters: &Counters) -> Step {
        let wanted = len + HEADER_LEN;
        let filled = self.window.fill(&mut self.ring, wanted);
        if filled == Filled::Refused {
            return Step::More(0);
        }
        if self.window.room < wanted {
            if filled == Filled::Empty && self.window.chains.len() < self.ring.size().into() {
                return Step::NoRoom;
            }
            self.held = None;
            add(&counters.rx_dropped_room, 1);
            return Step::More(0);
        }
        self.window.all().skip(HEADER_LEN).copy_from(&self.bounce[..len]);
        self.held = None;
        self.finish(header, len, counters);
        Step::More(len)
    }

    /// Puts the header in front of a frame of `len` bytes in the window, and gives back the chains that it spans.
    fn finish(&mut self, header: Header, len: usize, counters: &Counters) {
        let mut left = len + HEADER_LEN;
        self.used.clear();
        for chain in &self.window.chains {
            let part = left.min(chain.len);
            self.used.push((chain.head, u32::try_from(part).unwrap_or(u32::MAX)));
            left -= part;
            if left == 0 {
                break;
            }
        }
        let count = u16::try_from(self.used.len()).unwrap_or(u16::MAX);
        self.window.first().copy_from(&header.bytes(count));
        self.ring.push_all(&self.used);
        self.window.consume(self.used.len());
        add(&counters.rx_frames, 1);
        add(&counters.rx_bytes, len);
    }
}
