//! A queue as a card serves it.
//!
//! Chains go into a list that is used again and again. Several are taken before the first is given back, and the chains of one
//! frame are given back all at once, because a driver that sees the first of them expects the others to be there.

use std::ops::ControlFlow;
use std::sync::Arc;

use vm_memory::Permissions;

use super::backend::PieceList;
use crate::GuestRam;
use crate::virtio::chain::Error;
use crate::virtio::device::{ActiveQueue, VirtioInterrupt};
use crate::virtio::queue::DeviceQueue;

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

/// A queue of a card.
#[derive(Debug)]
pub struct Ring(DeviceQueue);

impl std::ops::Deref for Ring {
    type Target = DeviceQueue;

    fn deref(&self) -> &DeviceQueue {
        &self.0
    }
}

impl std::ops::DerefMut for Ring {
    fn deref_mut(&mut self) -> &mut DeviceQueue {
        &mut self.0
    }
}

impl Ring {
    /// Takes over `active`.
    pub fn new(active: ActiveQueue, memory: Arc<GuestRam>, interrupt: Arc<dyn VirtioInterrupt>) -> Self {
        Self(DeviceQueue::new(active, memory, interrupt))
    }

    /// An empty list for this queue's chains.
    pub fn list(&self) -> PieceList {
        PieceList::new(self.memory())
    }

    /// Takes the next chain that the driver has made available, appending its pieces to `list`.
    pub fn pop(&mut self, list: &mut PieceList, direction: Direction) -> Pop {
        let memory = self.memory();
        let mut popped = Pop::Empty;
        self.pop_each(&memory, |chain| {
            let (head, before) = (chain.head_index(), list.count());
            popped = match Self::parse(chain, list, direction) {
                Ok(len) => Pop::Chain(Taken { head, len, pieces: list.count() - before }),
                Err(error) => {
                    list.truncate(before);
                    Pop::Bad { head, error }
                }
            };
            ControlFlow::Break(())
        });
        popped
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
}
