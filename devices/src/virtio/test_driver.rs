//! A driver for tests: it makes a device's queues in memory of its own and sends chains through them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};
use crate::GuestRam;

pub const SIZE: u16 = 16;
const QUEUE_BYTES: u64 = 0x1000;
const BUFFERS: u64 = 0x10_0000;
pub const MEMORY: usize = 0x40_0000;

#[derive(Debug, Default)]
pub struct Interrupts {
    pub used: AtomicU64,
    pub needs_reset: AtomicBool,
}

impl VirtioInterrupt for Interrupts {
    fn queue_used(&self, _: u16) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {}
    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
    }
}

/// A part of a chain.
#[derive(Debug, Clone)]
pub enum Buffer {
    /// The device reads these bytes.
    Read(Vec<u8>),
    /// The device may write this many.
    Write(u32),
}

/// What came back.
#[derive(Debug)]
pub struct Used {
    pub head: u32,
    pub len: u32,
    /// Contents of the writable buffers, one after the other.
    pub written: Vec<u8>,
}

#[derive(Debug)]
pub struct Driver {
    pub device: Box<dyn VirtioDevice>,
    pub memory: Arc<GuestRam>,
    pub interrupts: Arc<Interrupts>,
    kicks: Vec<EventFd>,
    avail: Vec<u16>,
    used: Vec<u16>,
}

impl Driver {
    /// Starts `device` with all it offers.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let features = device.features();
        Self::with_features(device, features)
    }

    pub fn with_features(mut device: Box<dyn VirtioDevice>, features: u64) -> Self {
        let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let interrupts = Arc::new(Interrupts::default());
        let count = u16::try_from(device.queue_sizes().len()).unwrap();
        let kicks: Vec<_> = (0..count).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        let queues = (0..count)
            .map(|index| {
                let mut queue = Queue::new(256).unwrap();
                queue.set_size(SIZE);
                let base = u32::try_from(Self::base(index)).unwrap();
                queue.set_desc_table_address(Some(base), Some(0));
                queue.set_avail_ring_address(Some(base + 0x400), Some(0));
                queue.set_used_ring_address(Some(base + 0x800), Some(0));
                queue.set_event_idx(features >> 29 & 1 == 1);
                queue.set_ready(true);
                ActiveQueue { index, queue, kick: kicks[usize::from(index)].try_clone().unwrap() }
            })
            .collect();
        let activation =
            Activation { memory: memory.clone(), features, queues, interrupt: interrupts.clone() };
        device.activate(activation).unwrap();
        let zeroes = vec![0; usize::from(count)];
        Self { device, memory, interrupts, kicks, avail: zeroes.clone(), used: zeroes }
    }

    /// Where the rings of `queue` lie: descriptors, from 0x400 on the available ring, from 0x800 on the used one.
    pub fn base(queue: u16) -> u64 {
        0x1000 + u64::from(queue) * QUEUE_BYTES
    }

    /// Writes descriptor `index` of `queue`.
    pub fn descriptor(&self, queue: u16, index: u16, descriptor: Descriptor) {
        let address = Self::base(queue) + u64::from(index) * 16;
        self.memory.write_obj(RawDescriptor::from(descriptor), GuestAddress(address)).unwrap();
    }

    /// Makes the chain that begins with descriptor `head` available, without a kick.
    pub fn offer(&mut self, queue: u16, head: u16) {
        let base = Self::base(queue) + 0x400;
        let avail = &mut self.avail[usize::from(queue)];
        let slot = base + 4 + u64::from(*avail % SIZE) * 2;
        self.memory.write_obj(head.to_le(), GuestAddress(slot)).unwrap();
        *avail = avail.wrapping_add(1);
        self.memory.store(avail.to_le(), GuestAddress(base + 2), Ordering::SeqCst).unwrap();
        // Ask for an interrupt at the next used chain (used_event).
        let used = self.used[usize::from(queue)];
        self.memory.write_obj(used.to_le(), GuestAddress(base + 4 + u64::from(SIZE) * 2)).unwrap();
    }

    pub fn kick(&self, queue: u16) {
        self.kicks[usize::from(queue)].write(1).unwrap();
    }

    /// Lays out `buffers` as a chain from descriptor 0 on and returns where its writable ones lie.
    pub fn chain(&self, queue: u16, buffers: &[Buffer]) -> Vec<(u64, u32)> {
        let mut at = BUFFERS + u64::from(queue) * 0x8_0000;
        let mut writable = Vec::new();
        for (index, buffer) in (0_u16..).zip(buffers) {
            let next = u16::from(usize::from(index) + 1 < buffers.len());
            let (len, flags) = match buffer {
                Buffer::Read(data) => {
                    self.memory.write_slice(data, GuestAddress(at)).unwrap();
                    (u32::try_from(data.len()).unwrap(), next)
                }
                Buffer::Write(len) => {
                    writable.push((at, *len));
                    (*len, next | 2)
                }
            };
            self.descriptor(queue, index, Descriptor::new(at, len, flags, index + 1));
            at += u64::from(len);
        }
        writable
    }

    /// Waits for the next used chain; `None` if none comes.
    pub fn wait_used(&mut self, queue: u16, timeout: Duration) -> Option<(u32, u32)> {
        let base = Self::base(queue) + 0x800;
        let used = &mut self.used[usize::from(queue)];
        let end = Instant::now() + timeout;
        loop {
            let now: u16 = self.memory.load(GuestAddress(base + 2), Ordering::SeqCst).unwrap();
            if now != *used {
                let element = base + 4 + u64::from(*used % SIZE) * 8;
                *used = used.wrapping_add(1);
                let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(element)).unwrap();
                return Some((head, len));
            }
            if Instant::now() > end {
                return None;
            }
            std::thread::yield_now();
        }
    }

    /// Sends one chain and waits for it.
    pub fn transfer(&mut self, queue: u16, buffers: &[Buffer]) -> Used {
        let writable = self.chain(queue, buffers);
        self.offer(queue, 0);
        self.kick(queue);
        let (head, len) = self.wait_used(queue, Duration::from_secs(20)).expect("the device answers");
        let mut written = Vec::new();
        for (address, len) in writable {
            let mut data = vec![0; usize::try_from(len).unwrap()];
            self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
            written.extend(data);
        }
        Used { head, len, written }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.device.reset();
    }
}
