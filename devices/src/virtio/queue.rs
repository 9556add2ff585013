//! A queue that a device serves: virtio-queue's rings together with the events on either side of them.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{self, Chain};
use super::device::{ActiveQueue, VirtioInterrupt};
use crate::GuestRam;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// A queue that a device serves.
///
/// A ring that breaks the rules stops being served, and the driver is told that the device needs a reset: the
/// damage ends with the guest's own device.
#[derive(Debug)]
pub struct DeviceQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    memory: Arc<GuestRam>,
    interrupt: Arc<dyn VirtioInterrupt>,
    broken: bool,
}

impl DeviceQueue {
    /// Takes over `active`.
    #[must_use]
    pub fn new(active: ActiveQueue, memory: Arc<GuestRam>, interrupt: Arc<dyn VirtioInterrupt>) -> Self {
        let ActiveQueue { index, queue, kick } = active;
        Self { index, queue, kick, memory, interrupt, broken: false }
    }

    /// The descriptor that becomes readable when the driver notifies the queue.
    #[must_use]
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes note of the driver's notifications so far.
    pub fn clear_kick(&self) {
        // Nothing to read means that nobody has kicked.
        self.kick.read().unwrap_or_default();
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestRam> {
        self.memory.clone()
    }

    /// The next chain the driver has made available, if there is one.
    ///
    /// A chain that breaks the rules is given back unused, and the next one is looked at.
    pub fn pop<'m>(&mut self, memory: &'m GuestRam) -> Option<Chain<'m>> {
        while !self.broken {
            let next = match self.queue.iter(memory) {
                Ok(mut chains) => chains.next()?,
                Err(error) => {
                    self.fail(&format!("its available ring cannot be read: {error}"));
                    return None;
                }
            };
            let head = next.head_index();
            match Chain::parse(memory, next) {
                Ok(chain) => return Some(chain),
                Err(error) => self.refuse(head, &error),
            }
        }
        None
    }

    /// Gives chain `head` back unused because of `error`.
    pub fn refuse(&mut self, head: u16, error: &chain::Error) {
        tracing::debug!("queue {}: {error}", self.index);
        self.push(head, 0);
    }

    /// Gives back the chain popped last as if it had not been popped.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives chain `head` back with `len` bytes written. [`notify`](Self::notify) tells the driver.
    pub fn push(&mut self, head: u16, len: u32) {
        if !self.broken
            && let Err(error) = self.queue.add_used(&*self.memory, head, len)
        {
            self.fail(&format!("chain {head} cannot be given back: {error}"));
        }
    }

    /// Tells the driver of the chains given back, if it wants to be told.
    pub fn notify(&mut self) {
        if self.broken {
            return;
        }
        match self.queue.needs_notification(&*self.memory) {
            Ok(true) if self.queue.event_idx_enabled() || !self.interrupts_suppressed() => {
                self.interrupt.queue_used(self.index);
            }
            Ok(_) => {}
            Err(error) => self.fail(&format!("its used event cannot be read: {error}")),
        }
    }

    /// Without the event index the driver may ask by a flag not to be interrupted.
    fn interrupts_suppressed(&self) -> bool {
        let flags = self.memory.read_obj::<u16>(GuestAddress(self.queue.avail_ring()));
        flags.is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT != 0)
    }

    /// Asks the driver not to kick while the queue is being served.
    pub fn suppress_kicks(&mut self) {
        if let Err(error) = self.queue.disable_notification(&*self.memory) {
            self.fail(&format!("its used ring cannot be written: {error}"));
        }
    }

    /// Asks the driver to kick again; true if chains were made available meanwhile, which no kick will tell.
    pub fn allow_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&format!("its used ring cannot be written: {error}"));
                false
            }
        }
    }

    /// Serves chains with `serve`, which says how many bytes it has written, until there are none left.
    pub fn serve(&mut self, mut serve: impl FnMut(Chain<'_>) -> u32) {
        let memory = self.memory();
        loop {
            self.suppress_kicks();
            let mut served = false;
            while let Some(chain) = self.pop(&memory) {
                let head = chain.head;
                let len = serve(chain);
                self.push(head, len);
                served = true;
            }
            if served {
                self.notify();
            }
            if !self.allow_kicks() {
                return;
            }
        }
    }

    fn fail(&mut self, what: &str) {
        if !std::mem::replace(&mut self.broken, true) {
            tracing::warn!("queue {} of a device is broken by its driver: {what}", self.index);
            self.interrupt.needs_reset();
        }
    }
}
