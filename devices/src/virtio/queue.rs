//! A queue that a device serves: virtio-queue's rings together with the events on either side of them.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::{self, Chain};
use super::device::{ActiveQueue, VirtioInterrupt};
use super::log_limit::LogLimit;
use crate::GuestRam;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// Most chains served before others on the device's thread, a pause among them, get their turn.
const BUDGET: usize = 64;

/// The same as time: what one chain asks for may take long.
const TIME: Duration = Duration::from_millis(10);
/// Most chains that break the rules looked at for one that does not.
const REFUSALS: u16 = 16;

/// A guest can break its queue as often as it likes.
static BROKEN: LogLimit = LogLimit::new();

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
    /// Chains were given back that the driver has not been told of.
    untold: bool,
    broken: bool,
}

impl DeviceQueue {
    /// Takes over `active`.
    #[must_use]
    pub fn new(active: ActiveQueue, memory: Arc<GuestRam>, interrupt: Arc<dyn VirtioInterrupt>) -> Self {
        let ActiveQueue { index, queue, kick } = active;
        Self { index, queue, kick, memory, interrupt, untold: false, broken: false }
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
    /// A chain that breaks the rules is given back unused, and the next one is looked at, up to [`REFUSALS`] of
    /// them: a driver that makes them faster than they are refused holds nobody up.
    pub fn pop<'m>(&mut self, memory: &'m GuestRam) -> Option<Chain<'m>> {
        let mut chain = Chain::default();
        self.pop_into(memory, &mut chain).then_some(chain)
    }

    /// As [`pop`](Self::pop), in the place of another chain, whose room is used again; false if there is none.
    pub fn pop_into<'m>(&mut self, memory: &'m GuestRam, into: &mut Chain<'m>) -> bool {
        for _ in 0..REFUSALS.min(self.queue.size()) {
            if self.broken {
                return false;
            }
            let next = match self.queue.iter(memory).map(|mut chains| chains.next()) {
                Ok(Some(next)) => next,
                Ok(None) => return false,
                Err(error) => {
                    self.fail(&format!("its available ring cannot be read: {error}"));
                    return false;
                }
            };
            let head = next.head_index();
            match into.refill(memory, next) {
                Ok(()) => return true,
                Err(error) => self.refuse(head, &error),
            }
        }
        false
    }

    /// Whether the driver has made chains available that were not popped yet.
    #[must_use]
    pub fn has_more(&self) -> bool {
        let available = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        !self.broken && available.is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Most chains that can be made available at a time.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Its index among the device's queues.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Signals the kick itself, so that what is left is served once others on the device's thread had their turn.
    pub fn come_back(&self) {
        // Only an overflow of the counter can fail, and then the event is signalled already.
        self.kick.write(1).unwrap_or_default();
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
        if self.broken {
            return;
        }
        match self.queue.add_used(&*self.memory, head, len) {
            Ok(()) => self.untold = true,
            Err(error) => self.fail(&format!("chain {head} cannot be given back: {error}")),
        }
    }

    /// Tells the driver of the chains given back, if it wants to be told.
    pub fn notify(&mut self) {
        if self.broken || !std::mem::take(&mut self.untold) {
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
    ///
    /// After [`BUDGET`] chains, or [`TIME`], it leaves the rest for later and signals the kick itself, so that a driver that
    /// makes chains faster than they are served cannot keep the thread here.
    pub fn serve(&mut self, mut serve: impl FnMut(Chain<'_>) -> u32) {
        let memory = self.memory();
        let began = Instant::now();
        self.suppress_kicks();
        for _ in 0..BUDGET {
            if began.elapsed() >= TIME {
                break;
            }
            if let Some(chain) = self.pop(&memory) {
                let head = chain.head;
                let len = serve(chain);
                self.push(head, len);
                continue;
            }
            self.notify();
            if !self.allow_kicks() {
                return;
            }
            self.suppress_kicks();
        }
        self.notify();
        self.come_back();
    }

    fn fail(&mut self, what: &str) {
        if !std::mem::replace(&mut self.broken, true) {
            BROKEN.log(|dropped| {
                tracing::warn!("queue {} of a device is broken by its driver: {what}{dropped}", self.index);
            });
            if std::mem::take(&mut self.untold) {
                self.interrupt.queue_used(self.index);
            }
            self.interrupt.needs_reset();
        }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
