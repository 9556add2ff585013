//! Split virtqueues (section 2.7), with event index and indirect descriptors where agreed on.

use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use super::feature;
use crate::{Error, heap, phys};

const DESCRIPTOR_LEN: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Flag of the available ring: no interrupts please; of the used ring: no notifications please.
const QUIET: u16 = 1;
/// Pieces that an indirect chain may have.
const INDIRECT_MAX: u64 = 16;
/// While the queue is polled, the wish for no interrupt is renewed after so many used buffers: it says "not at
/// the one before", which comes round again after 65536.
const RENEWED: u16 = 8192;

/// A piece of memory offered to the device.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// Where it lies.
    pub address: u64,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device writes to it (else it reads).
    pub written: bool,
}

impl Buffer {
    /// For the device to read.
    pub fn read(address: u64, len: u32) -> Self {
        Self { address, len, written: false }
    }

    /// For the device to write to.
    pub fn write(address: u64, len: u32) -> Self {
        Self { address, len, written: true }
    }
}

/// A queue.
#[derive(Debug)]
pub struct Queue {
    index: u32,
    size: u16,
    notify: u64,
    event_index: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    /// Indirect tables, one for each descriptor; 0 if chains are direct.
    tables: u64,
    free: Vec<u16>,
    /// By descriptor: the one after it in its chain.
    next: Vec<Option<u16>>,
    offered: u16,
    notified: u16,
    taken: u16,
    notifications: u64,
}

impl Queue {
    /// An empty queue of `size` descriptors, which tells the device of news by writing `index` to the register
    /// at `notify`.
    pub fn new(index: u32, size: u16, notify: u64, features: u64) -> Result<Self, Error> {
        let len = u64::from(size);
        let indirect = features & feature::INDIRECT != 0;
        let tables = if indirect { heap::zeroed(len * INDIRECT_MAX * DESCRIPTOR_LEN)? } else { 0 };
        let queue = Self {
            index,
            size,
            notify,
            event_index: features & feature::EVENT_INDEX != 0,
            descriptors: heap::zeroed(len * DESCRIPTOR_LEN)?,
            available: heap::zeroed(6 + 2 * len)?,
            used: heap::zeroed(6 + 8 * len)?,
            tables,
            free: (0..size).rev().collect(),
            next: (0..size).map(|_| None).collect(),
            offered: 0,
            notified: 0,
            taken: 0,
            notifications: 0,
        };
        queue.want_no_interrupt();
        Ok(queue)
    }

    /// Addresses of descriptor table, driver area and device area.
    pub fn areas(&self) -> (u64, u64, u64) {
        (self.descriptors, self.available, self.used)
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// How many chains of `pieces` buffers the queue can hold.
    pub fn room(&self, pieces: u16) -> u16 {
        if self.tables == 0 { self.size / pieces } else { self.size }
    }

    /// How often the device was notified.
    pub fn notifications(&self) -> u64 {
        self.notifications
    }

    /// Offers a chain and gives its number; `None` if there is no room. The device hears of it by
    /// [`kick`](Self::kick).
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let head = if self.tables == 0 { self.add_direct(buffers)? } else { self.add_indirect(buffers)? };
        let slot = u64::from(self.offered % self.size);
        put16(self.available + 4 + 2 * slot, head);
        self.offered = self.offered.wrapping_add(1);
        fence(Ordering::Release);
        put16(self.available + 2, self.offered);
        Some(head)
    }

    fn add_direct(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if self.free.len() < buffers.len() {
            return None;
        }
        // From the end, so that each knows the one after it.
        let mut next = None;
        for buffer in buffers.iter().rev() {
            let descriptor = self.free.pop()?;
            put_descriptor(self.descriptors, descriptor, *buffer, next);
            self.next[usize::from(descriptor)] = next;
            next = Some(descriptor);
        }
        next
    }

    fn add_indirect(&mut self, buffers: &[Buffer]) -> Option<u16> {
        let descriptor = self.free.pop()?;
        let table = self.tables + u64::from(descriptor) * INDIRECT_MAX * DESCRIPTOR_LEN;
        for (buffer, at) in buffers.iter().zip(0_u16..) {
            let last = usize::from(at) + 1 == buffers.len();
            put_descriptor(table, at, *buffer, (!last).then_some(at + 1));
        }
        let len = DESCRIPTOR_LEN * buffers.len() as u64;
        let whole = Buffer::read(table, u32::try_from(len).unwrap_or_default());
        put_descriptor(self.descriptors, descriptor, whole, None);
        put16(self.descriptors + u64::from(descriptor) * DESCRIPTOR_LEN + 12, INDIRECT);
        Some(descriptor)
    }

    /// Tells the device of what was offered, if it wants to hear.
    pub fn kick(&mut self) {
        let (old, new) = (self.notified, self.offered);
        if old == new {
            return;
        }
        self.notified = new;
        // What was offered is written before it is read what the device wants to hear.
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = get16(self.used + 4 + 8 * u64::from(self.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            get16(self.used) & QUIET == 0
        };
        if wanted {
            self.notifications += 1;
            phys::write32(self.notify, self.index);
        }
    }

    /// Whether the device has used a chain that was not yet taken.
    pub fn has_used(&self) -> bool {
        get16(self.used + 2) != self.taken
    }

    /// As [`has_used`](Self::has_used); if not, the device interrupts at the next.
    pub fn has_used_or_tells(&self) -> bool {
        if self.has_used() {
            return true;
        }
        self.want_interrupt();
        fence(Ordering::SeqCst);
        let used = self.has_used();
        if used {
            self.want_no_interrupt();
        }
        used
    }

    /// Takes a used chain: its number, and how many bytes the device has written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        fence(Ordering::Acquire);
        let element = self.used + 4 + 8 * u64::from(self.taken % self.size);
        let (head, len): (u32, u32) = (get32(element), get32(element + 4));
        self.taken = self.taken.wrapping_add(1);
        if self.taken.is_multiple_of(RENEWED) {
            self.want_no_interrupt();
        }
        // A device that names a chain which does not exist has gone mad; the index into `next` says so.
        let head = u16::try_from(head).unwrap_or(u16::MAX);
        let mut chain = Some(head);
        while let Some(descriptor) = chain {
            self.free.push(descriptor);
            chain = self.next[usize::from(descriptor)].take();
        }
        Some((head, len))
    }

    /// Has the device interrupt when it uses the next chain.
    pub fn want_interrupt(&self) {
        if self.event_index {
            put16(self.available + 4 + 2 * u64::from(self.size), self.taken);
        } else {
            put16(self.available, 0);
        }
    }

    fn want_no_interrupt(&self) {
        if self.event_index {
            put16(self.available + 4 + 2 * u64::from(self.size), self.taken.wrapping_sub(1));
        } else {
            put16(self.available, QUIET);
        }
    }
}

fn put_descriptor(table: u64, index: u16, buffer: Buffer, next: Option<u16>) {
    let at = table + u64::from(index) * DESCRIPTOR_LEN;
    let flags = if buffer.written { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
    let low = u64::from(buffer.len) | u64::from(flags) << 32 | u64::from(next.unwrap_or(0)) << 48;
    phys::store(at, buffer.address);
    phys::store(at + 8, low);
}

fn get16(address: u64) -> u16 {
    phys::load(address)
}

fn get32(address: u64) -> u32 {
    phys::load(address)
}

fn put16(address: u64, value: u16) {
    phys::store(address, value);
}
