//! A queue that a device serves: virtio-queue's rings together with the events on either side of them.

use std::fmt::Display;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::chain::Chain;
use super::device::{ActiveQueue, VirtioInterrupt};
use super::log_limit::LogLimit;
use crate::GuestRam;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.2, section 2.7.6).
const NO_INTERRUPT: u16 = 1;
/// Bytes of a ring before its first element: flags and index.
const RING_HEADER: u64 = 4;

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
    /// Used index when the driver was last considered for an interrupt.
    considered: u16,
    /// The driver has been asked not to kick.
    quiet: bool,
    broken: bool,
}

impl DeviceQueue {
    /// Takes over `active`.
    #[must_use]
    pub fn new(active: ActiveQueue, memory: Arc<GuestRam>, interrupt: Arc<dyn VirtioInterrupt>) -> Self {
        let ActiveQueue { index, queue, kick } = active;
        let considered = queue.next_used();
        Self { index, queue, kick, memory, interrupt, considered, quiet: false, broken: false }
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

    /// Signals the kick itself, so that what is left is served once others on the device's thread had their turn.
    pub fn come_back(&self) {
        // Only an overflow of the counter can fail, and then the event is signalled already.
        self.kick.write(1).unwrap_or_default();
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> Arc<GuestRam> {
        self.memory.clone()
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

    /// Whether the driver has made chains available that were not popped yet.
    #[must_use]
    pub fn has_more(&self) -> bool {
        let available = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        !self.broken && available.is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Hands `each` the chains that the driver has made available, until that does not go on.
    pub fn pop_each<'m>(
        &mut self,
        memory: &'m GuestRam,
        mut each: impl FnMut(DescriptorChain<&'m GuestRam>) -> ControlFlow<()>,
    ) {
        if self.broken {
            return;
        }
        match self.queue.iter(memory) {
            Ok(mut chains) => while chains.next().is_some_and(|chain| each(chain).is_continue()) {},
            Err(error) => self.fail(&format!("its available ring cannot be read: {error}")),
        }
    }

    /// The next chain the driver has made available, if there is one.
    ///
    /// A chain that breaks the rules is given back unused, and the next one is looked at, up to [`REFUSALS`] of
    /// them: a driver that makes them faster than they are refused holds nobody up.
    pub fn pop<'m>(&mut self, memory: &'m GuestRam) -> Option<Chain<'m>> {
        for _ in 0..REFUSALS.min(self.queue.size()) {
            let mut next = None;
            self.pop_each(memory, |chain| {
                next = Some(chain);
                ControlFlow::Break(())
            });
            let next = next?;
            let head = next.head_index();
            match Chain::parse(memory, next) {
                Ok(chain) => return Some(chain),
                Err(error) => self.refuse(head, &error),
            }
        }
        None
    }

    /// Gives chain `head` back unused because of `error`.
    pub fn refuse(&mut self, head: u16, error: &dyn Display) {
        tracing::debug!("queue {}: {error}", self.index);
        self.push(head, 0);
    }

    /// Gives the `count` chains popped last back as if they had not been popped.
    pub fn undo(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives chain `head` back with `len` bytes written. [`notify`](Self::notify) tells the driver.
    pub fn push(&mut self, head: u16, len: u32) {
        self.push_all(&[(head, len)]);
    }

    /// Gives chains back, each with the number of bytes written to it, so that the driver sees either all of them or
    /// none. [`notify`](Self::notify) tells it.
    pub fn push_all(&mut self, chains: &[(u16, u32)]) {
        if self.broken || chains.is_empty() {
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
        // Release: who sees the index sees the elements, and the bytes of the buffers, too.
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

    /// Asks the driver not to kick while the queue is being served.
    pub fn suppress_kicks(&mut self) {
        if std::mem::replace(&mut self.quiet, true) {
            return;
        }
        if let Err(error) = self.queue.disable_notification(&*self.memory) {
            self.fail(&format!("its used ring cannot be written: {error}"));
        }
    }

    /// Asks the driver to kick when it makes more chains available than those popped; true if it has done so already, which
    /// no kick will tell.
    pub fn allow_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        self.quiet = false;
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&format!("its used ring cannot be written: {error}"));
                false
            }
        }
    }

    /// Number of chains popped and not given back.
    #[cfg(test)]
    pub fn outstanding(&self) -> u16 {
        self.queue.next_avail().wrapping_sub(self.queue.next_used())
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
            if self.considered != self.queue.next_used() {
                self.interrupt.queue_used(self.index);
            }
            self.interrupt.needs_reset();
        }
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
