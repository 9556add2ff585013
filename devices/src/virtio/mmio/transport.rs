//! The register window of one device, and the state machine behind it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::registers as reg;
use crate::bus::BusDevice;
use crate::virtio::device::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};
use crate::virtio::log_limit::LogLimit;
use crate::{GuestRam, Interrupt};

/// A guest can mistreat its devices as often as it likes.
static COMPLAINTS: LogLimit = LogLimit::new();

/// The way to the driver. Apart from the rest of the state, so that the guest's interrupt handler never waits
/// for a lock that a slow register access holds.
#[derive(Debug)]
struct Line {
    line: Arc<dyn Interrupt>,
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl Line {
    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        if let Err(error) = self.line.trigger() {
            tracing::warn!("an interrupt of a virtio device is lost: {error}");
        }
    }
}

impl VirtioInterrupt for Line {
    fn queue_used(&self, _index: u16) {
        self.raise(reg::INTERRUPT_USED);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(reg::INTERRUPT_CONFIG);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(reg::INTERRUPT_CONFIG);
    }
}

/// A queue while its driver sets it up.
#[derive(Debug)]
struct Slot {
    queue: Queue,
    /// The driver gave a size or an address that no queue can have. Only a reset makes that good.
    wrong: bool,
}

#[derive(Debug)]
struct State {
    device: Box<dyn VirtioDevice>,
    queues: Vec<Slot>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    active: bool,
    paused: bool,
}

/// A virtio device behind a window of [`reg::WINDOW`] bytes.
#[derive(Debug)]
pub struct MmioTransport {
    memory: Arc<GuestRam>,
    line: Arc<Line>,
    kicks: Vec<EventFd>,
    state: Mutex<State>,
}

impl MmioTransport {
    /// Puts `device` behind a window. `line` is its interrupt.
    ///
    /// # Errors
    ///
    /// No event descriptors are to be had, or the device names a queue size that is not a power of two.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<GuestRam>,
        line: Arc<dyn Interrupt>,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        let slot = |size: &u16| Queue::new(*size).map(|queue| Slot { queue, wrong: false });
        let queues = sizes.iter().map(slot).collect::<Result<_, _>>().map_err(io::Error::other)?;
        let kicks =
            sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<Result<_, _>>()?;
        let line = Line {
            line,
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        };
        let state = State {
            device,
            queues,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            active: false,
            paused: false,
        };
        Ok(Self { memory, line: Arc::new(line), kicks, state: Mutex::new(state) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One event per queue. Whoever can turn a write of the queue's number to [`reg::QUEUE_NOTIFY`] into a signal of its
    /// event does so; a write that reaches [`BusDevice::write`] signals it as well.
    #[must_use]
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Device ID (virtio 1.2, section 5).
    #[must_use]
    pub fn device_id(&self) -> u32 {
        self.lock().device.device_id()
    }

    /// Returns once the device serves nothing and has nothing in flight. A device that its driver starts
    /// afterwards stays so too.
    pub fn pause(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.paused, true) && state.active {
            state.device.pause();
        }
    }

    /// Lets the device go on.
    pub fn resume(&self) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.paused, false) && state.active {
            state.device.resume();
        }
    }

    /// Stops the device for good, with nothing left in flight.
    pub fn stop(&self) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.active, false) {
            state.device.reset();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::MAGIC => return reg::MAGIC_VALUE,
            reg::VERSION => return reg::VERSION_2,
            reg::VENDOR_ID => return reg::VENDOR,
            reg::INTERRUPT_STATUS => return self.line.status.load(Ordering::SeqCst),
            reg::CONFIG_GENERATION => return self.line.generation.load(Ordering::SeqCst),
            // No shared memory regions: length and base read as all ones (section 4.2.2).
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => return u32::MAX,
            _ => {}
        }
        let state = self.lock();
        let queue = usize::try_from(state.queue_sel).ok().and_then(|i| state.queues.get(i));
        match offset {
            reg::DEVICE_ID => state.device.device_id(),
            reg::DEVICE_FEATURES => word(state.device.features(), state.device_features_sel),
            reg::QUEUE_SIZE_MAX => queue.map_or(0, |q| q.queue.max_size().into()),
            reg::QUEUE_READY => queue.is_some_and(|q| q.queue.ready()).into(),
            reg::STATUS => {
                state.status | if self.line.needs_reset.load(Ordering::SeqCst) { reg::NEEDS_RESET } else { 0 }
            }
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            reg::QUEUE_NOTIFY => {
                if let Some(kick) = usize::try_from(value).ok().and_then(|i| self.kicks.get(i)) {
                    // Only an overflow of the counter can fail, and then the event is signalled already.
                    kick.write(1).unwrap_or_default();
                }
                return;
            }
            reg::INTERRUPT_ACK => {
                self.line.status.fetch_and(!value, Ordering::SeqCst);
                return;
            }
            _ => {}
        }
        let mut state = self.lock();
        match offset {
            reg::DEVICE_FEATURES_SEL => state.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => state.driver_features_sel = value,
            reg::DRIVER_FEATURES => state.accept_features(value),
            reg::QUEUE_SEL => state.queue_sel = value,
            reg::STATUS => self.set_status(&mut state, value),
            _ => state.set_up_queue(offset, value),
        }
    }

    fn set_status(&self, state: &mut State, value: u32) {
        if value == 0 {
            self.reset(state);
            return;
        }
        // Bits are added, never taken back but by a reset (section 2.1.1).
        let added = value & !state.status;
        if added & reg::FAILED != 0 {
            COMPLAINTS.log(|dropped| {
                let id = state.device.device_id();
                tracing::warn!("the driver of a virtio device (ID {id}) has given up on it{dropped}");
            });
        }
        state.status |= added & (reg::ACKNOWLEDGE | reg::DRIVER | reg::FAILED);
        let known = reg::ACKNOWLEDGE | reg::DRIVER;
        if added & reg::FEATURES_OK != 0 && state.status & known == known {
            let offered = state.device.features();
            let modern = state.driver_features >> VIRTIO_F_VERSION_1 & 1 == 1;
            if modern && state.driver_features & !offered == 0 {
                state.status |= reg::FEATURES_OK;
            }
        }
        if added & reg::DRIVER_OK != 0 && state.status & (reg::FEATURES_OK | reg::FAILED) == reg::FEATURES_OK
        {
            state.status |= reg::DRIVER_OK;
            self.activate(state);
        }
    }

    fn activate(&self, state: &mut State) {
        let event_index = state.driver_features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let mut queues = Vec::new();
        for (index, (Slot { queue, wrong }, kick)) in (0_u16..).zip(state.queues.iter_mut().zip(&self.kicks))
        {
            if !queue.ready() {
                continue;
            }
            queue.set_event_idx(event_index);
            let kick = kick.try_clone();
            let copy = Queue::try_from(queue.state());
            match (!*wrong && queue.is_valid(&*self.memory), copy, kick) {
                (true, Ok(queue), Ok(kick)) => queues.push(ActiveQueue { index, queue, kick }),
                _ => {
                    COMPLAINTS.log(|dropped| {
                        let id = state.device.device_id();
                        tracing::warn!(
                            "queue {index} of a virtio device (ID {id}) is misaligned, of a wrong size, or not \
                             in memory{dropped}"
                        );
                    });
                    self.line.needs_reset();
                    return;
                }
            }
        }
        let activation = Activation {
            memory: self.memory.clone(),
            features: state.driver_features,
            queues,
            interrupt: self.line.clone(),
        };
        match state.device.activate(activation) {
            Ok(()) => {
                state.active = true;
                if state.paused {
                    state.device.pause();
                }
            }
            Err(error) => {
                COMPLAINTS.log(|dropped| {
                    let id = state.device.device_id();
                    tracing::error!("a virtio device (ID {id}) cannot start: {error}{dropped}");
                });
                self.line.needs_reset();
            }
        }
    }

    fn reset(&self, state: &mut State) {
        if std::mem::replace(&mut state.active, false) {
            state.device.reset();
        }
        state.status = 0;
        state.driver_features = 0;
        (state.device_features_sel, state.driver_features_sel, state.queue_sel) = (0, 0, 0);
        for slot in &mut state.queues {
            slot.queue.reset();
            slot.wrong = false;
        }
        // Kicks for the queues of before are void. There being none is no error.
        self.kicks.iter().for_each(|kick| drop(kick.read()));
        self.line.needs_reset.store(false, Ordering::SeqCst);
        self.line.status.store(0, Ordering::SeqCst);
    }
}

/// Half `select` of `value`: 0 the low 32 bits, 1 the high ones, others zero.
fn word(value: u64, select: u32) -> u32 {
    let [low, high] = [0, 32].map(|shift| u32::try_from(value >> shift & 0xffff_ffff).unwrap_or_default());
    match select {
        0 => low,
        1 => high,
        _ => 0,
    }
}

impl State {
    fn accept_features(&mut self, value: u32) {
        // Between DRIVER and FEATURES_OK (section 3.1.1).
        if self.status & (reg::DRIVER | reg::FEATURES_OK) != reg::DRIVER {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn set_up_queue(&mut self, offset: u64, value: u32) {
        // Between FEATURES_OK and DRIVER_OK (section 3.1.1).
        if self.status & (reg::FEATURES_OK | reg::DRIVER_OK) != reg::FEATURES_OK {
            return;
        }
        let Some(slot) = usize::try_from(self.queue_sel).ok().and_then(|i| self.queues.get_mut(i)) else {
            return;
        };
        let queue = &mut slot.queue;
        if offset == reg::QUEUE_READY {
            queue.set_ready(value == 1);
        }
        if queue.ready() {
            return;
        }
        let low = |old: u64| GuestAddress(old & !0xffff_ffff | u64::from(value));
        let high = |old: u64| GuestAddress(old & 0xffff_ffff | u64::from(value) << 32);
        let set = match offset {
            // A size that does not fit in 16 bits is as wrong as 0, which the queue refuses.
            reg::QUEUE_SIZE => queue.try_set_size(u16::try_from(value).unwrap_or(0)),
            reg::QUEUE_DESC_LOW => queue.try_set_desc_table_address(low(queue.desc_table())),
            reg::QUEUE_DESC_HIGH => queue.try_set_desc_table_address(high(queue.desc_table())),
            reg::QUEUE_DRIVER_LOW => queue.try_set_avail_ring_address(low(queue.avail_ring())),
            reg::QUEUE_DRIVER_HIGH => queue.try_set_avail_ring_address(high(queue.avail_ring())),
            reg::QUEUE_DEVICE_LOW => queue.try_set_used_ring_address(low(queue.used_ring())),
            reg::QUEUE_DEVICE_HIGH => queue.try_set_used_ring_address(high(queue.used_ring())),
            _ => Ok(()),
        };
        slot.wrong |= set.is_err();
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            self.lock().device.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(&mut *data)
            && offset.is_multiple_of(4)
        {
            *data = self.read_register(offset).to_le_bytes();
        } else {
            // Registers are 32 bits wide and aligned; nothing else is defined (section 4.2.2.2).
            data.fill(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            let mut state = self.lock();
            if state.status & reg::DRIVER != 0 {
                state.device.write_config(offset, data);
            }
        } else if let Ok(data) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
