//! A queue as a card serves it.
//!
//! What [`DeviceQueue`](crate::virtio::queue::DeviceQueue) does not have: chains go into a list that is used again and
//! again, several can be taken before the first is given back, and the chains of one frame are given back all at once,
//! because a driver that sees the first of them expects the others to be there.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, Permissions};
use vmm_sys_util::eventfd::EventFd;

use super::backend::PieceList;
use crate::GuestRam;
use crate::virtio::chain::Error;
use crate::virtio::device::{ActiveQueue, VirtioInterrupt};
use crate::virtio::log_limit::LogLimit;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, section 2.7.6).
const NO_INTERRUPT: u16 = 1;
/// Bytes of a ring before its first element: flags and index.
const RING_HEADER: u64 = 4;

/// A guest can break its queue as often as it likes.
static BROKEN: LogLimit = LogLimit::new();

/// Which way a chain's bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device reads them.
    FromGuest,
    /// The device writes them.
    ToGuest,
}

/// A chain that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// What names it in the used ring.
    pub head: u16,
    /// Its number of bytes.
    pub len: usize,
    /// Its number of pieces in the list.
    pub pieces: usize,
}

/// What there is to take.
#[derive(Debug, PartialEq, Eq)]
pub enum Pop {
    /// A chain. Its pieces are at the end of the list.
    Chain(Taken),
    /// A chain that breaks the rules, taken like any other, but without pieces.
    Bad {
        /// What names it in the used ring.
        head: u16,
        /// Which rule.
        error: BadChain,
    },
    /// Nothing.
    Empty,
}

/// A rule that a chain breaks.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// As with any device.
    #[error("{0}")]
    Chain(#[from] Error),
    /// The wrong direction.
    #[error("a descriptor chain of a queue for one direction has a buffer for the other")]
    Direction,
}

/// A queue of which the driver has been told nothing that it need not know.
///
/// A ring that breaks the rules stops being served, and the driver is told that the device needs a reset.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    queue: Queue,
    kick: EventFd,
    memory: Arc<GuestRam>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// Used index when the driver was last considered for an interrupt.
    considered: u16,
    /// The driver has been asked not to kick.
    quiet: bool,
    broken: bool,
}

impl Ring {
    /// Takes over `active`.
    pub fn new(active: ActiveQueue, memory: Arc<GuestRam>, interrupt: Arc<dyn VirtioInterrupt>) -> Self {
        let ActiveQueue { index, queue, kick } = active;
        let considered = queue.next_used();
        Self { index, queue, kick, memory, interrupt, considered, quiet: false, broken: false }
    }

    /// The descriptor that becomes readable when the driver notifies the queue.
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes note of the driver's notifications so far.
    pub fn clear_kick(&self) {
        // Nothing to read means that nobody has kicked.
        self.kick.read().unwrap_or_default();
    }

    /// Has the queue served again soon.
    pub fn kick(&self) {
        // Only an overflow of the counter can fail, and then the event is signalled already.
        self.kick.write(1).unwrap_or_default();
    }

    /// Number of chains that the driver can make available at once.
    pub fn size(&self) -> usize {
        self.queue.size().into()
    }

    /// An empty list for this queue's chains.
    pub fn list(&self) -> PieceList {
        PieceList::new(self.memory.clone())
    }

    /// Takes the next chain that the driver has made available, appending its pieces to `list`.
    pub fn pop(&mut self, list: &mut PieceList, direction: Direction) -> Pop {
        if self.broken {
            return Pop::Empty;
        }
        let memory = &*self.memory;
        let chain = match self.queue.iter(memory) {
            Ok(mut chains) => match chains.next() {
                Some(chain) => chain,
                None => return Pop::Empty,
            },
            Err(error) => {
                self.fail(&format!("its available ring cannot be read: {error}"));
                return Pop::Empty;
            }
        };
        let (head, before) = (chain.head_index(), list.count());
        match Self::parse(chain, list, direction) {
            Ok(len) => Pop::Chain(Taken { head, len, pieces: list.count() - before }),
            Err(error) => {
                list.truncate(before);
                Pop::Bad { head, error }
            }
        }
    }

    fn parse(
        chain: virtio_queue::DescriptorChain<&GuestRam>,
        list: &mut PieceList,
        direction: Direction,
    ) -> Result<usize, BadChain> {
        let (writable, access) = match direction {
            Direction::FromGuest => (false, Permissions::Read),
            Direction::ToGuest => (true, Permissions::Write),
        };
        let mut len = 0;
        // The iterator simply ends where it cannot go on, with the last descriptor still naming a next one.
        let mut goes_on = true;
        for descriptor in chain {
            goes_on = descriptor.has_next();
            if descriptor.is_write_only() != writable {
                return Err(BadChain::Direction);
            }
            // The sum stays below 4 GiB; a longer chain ends there, without its end.
            len += list.push(descriptor.addr(), descriptor.len(), access)?;
        }
        if goes_on { Err(Error::Endless.into()) } else { Ok(len) }
    }

    /// Gives back the `count` chains taken last as if they had not been taken.
    pub fn undo(&mut self, count: usize) {
        let count = u16::try_from(count).unwrap_or_default();
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives chain `head` back unused because of `error`.
    pub fn refuse(&mut self, head: u16, error: &BadChain) {
        tracing::debug!("queue {}: {error}", self.index);
        self.give_back(&[(head, 0)]);
    }

    /// Gives chains back, each with the number of bytes written to it, so that the driver sees either all of them or
    /// none. [`notify`](Self::notify) tells it.
    pub fn give_back(&mut self, chains: &[(u16, u32)]) {
        if self.broken {
            return;
        }
        let mut next = self.queue.next_used();
        for (head, len) in chains {
            if *head >= self.queue.size() {
                self.fail(&format!("there is no chain {head}"));
                return;
            }
            let element = RING_HEADER + u64::from(next % self.queue.size()) * 8;
            let written = [u32::from(*head).to_le(), len.to_le()];
            if self.write(self.queue.used_ring(), element, written).is_none() {
                self.fail("its used ring cannot be written");
                return;
            }
            next = next.wrapping_add(1);
        }
        self.queue.set_next_used(next);
        // Release: who sees the index sees the elements, and the bytes of the frame, too.
        let index = self.queue.used_ring().checked_add(2).map(GuestAddress);
        if index.is_none_or(|index| self.memory.store(next.to_le(), index, Ordering::Release).is_err()) {
            self.fail("its used ring cannot be written");
        }
    }

    fn write<T: vm_memory::ByteValued>(&self, ring: u64, offset: u64, value: T) -> Option<()> {
        self.memory.write_obj(value, GuestAddress(ring.checked_add(offset)?)).ok()
    }

    /// Tells the driver of the chains given back, if it wants to be told.
    pub fn notify(&mut self) {
        let (new, old) = (self.queue.next_used(), self.considered);
        if self.broken || new == old {
            return;
        }
        self.considered = new;
        // The driver must not both miss the chains and have its wish missed.
        fence(Ordering::SeqCst);
        // `used_event` lies behind the available ring, its flags at the beginning (section 2.7.6).
        let event_index = self.queue.event_idx_enabled();
        let offset = if event_index { RING_HEADER + 2 * u64::from(self.queue.size()) } else { 0 };
        let address = self.queue.avail_ring().checked_add(offset).map(GuestAddress);
        let wish = address.and_then(|address| self.memory.load::<u16>(address, Ordering::Relaxed).ok());
        match wish.map(u16::from_le) {
            Some(event) if event_index => {
                // Whether going from old to new passes event (section 2.7.7.2).
                if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
                    self.interrupt.queue_used(self.index);
                }
            }
            Some(flags) if flags & NO_INTERRUPT == 0 => self.interrupt.queue_used(self.index),
            Some(_) => {}
            None => self.fail("its available ring cannot be read"),
        }
    }

    /// Asks the driver not to kick.
    pub fn suppress_kicks(&mut self) {
        if !self.quiet && self.queue.disable_notification(&*self.memory).is_err() {
            self.fail("its used ring cannot be written");
        }
        self.quiet = true;
    }

    /// Asks the driver to kick when it makes more chains available than those taken; true if it has done so already,
    /// which no kick will tell.
    pub fn allow_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        self.quiet = false;
        self.queue.enable_notification(&*self.memory).unwrap_or_else(|error| {
            self.fail(&format!("its used ring cannot be written: {error}"));
            false
        })
    }

    /// Number of chains taken and not given back.
    #[cfg(test)]
    pub fn outstanding(&self) -> u16 {
        self.queue.next_avail().wrapping_sub(self.queue.next_used())
    }

    fn fail(&mut self, what: &str) {
        if !std::mem::replace(&mut self.broken, true) {
            BROKEN.log(|dropped| {
                tracing::warn!(
                    "queue {} of a network card is broken by its driver: {what}{dropped}",
                    self.index
                );
            });
            if self.considered != self.queue.next_used() {
                self.interrupt.queue_used(self.index);
            }
            self.interrupt.needs_reset();
        }
    }
}
