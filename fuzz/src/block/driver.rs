//! Rings and chains in memory of a guest that is not there.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use devices::GuestRam;
use devices::virtio::device::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;

pub(super) const QUEUES: u16 = 2;
/// Requests of a queue at a time.
pub(super) const SLOTS: u16 = 4;
/// Descriptors of a queue.
const SIZE: u16 = 64;
/// Descriptors of a slot.
const SHARE: u16 = SIZE / SLOTS;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const EVENT_INDEX: u64 = 1 << 29;
const INDIRECT_DESC: u64 = 1 << 28;

/// Memory: queues, slots and junk in the first region; the second begins behind a hole.
const QUEUE: u64 = 0x4000;
const SLOT_AREA: u64 = 0x1_0000;
const SLOT_BYTES: u64 = 0x1_0000;
/// Of a slot: its indirect table, and its data.
const TABLE: u64 = 0x100;
const DATA: u64 = 0x1000;
const JUNK: u64 = SLOT_AREA + SLOT_BYTES * (QUEUES * SLOTS) as u64;
const FIRST: u64 = JUNK + 0x4000;
const SECOND: u64 = FIRST + 0x10_0000;
const SECOND_LEN: u64 = 0x2000;

/// A piece of a chain, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Piece {
    /// The device reads it.
    Read(u64),
    /// The device writes it.
    Write(u64),
    /// It is not memory, or not all of it.
    Outside(u64, u64),
    /// Memory that is nothing; whether the device writes to it.
    Junk(bool, u64),
}

#[derive(Debug, Default)]
struct Interrupts {
    used: AtomicU64,
    needs_reset: AtomicBool,
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

/// What came back.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) slot: u16,
    pub(super) len: u32,
    /// The last byte that could be written.
    pub(super) status: Option<u8>,
    /// All bytes that could be written, one after the other.
    pub(super) written: Vec<u8>,
}

#[derive(Debug, Default)]
struct Ring {
    kick: Option<EventFd>,
    offered: u16,
    told: u16,
    seen: u16,
    under_way: Vec<UnderWay>,
}

/// A chain under way.
#[derive(Debug)]
struct UnderWay {
    slot: u16,
    /// What of memory the device may write: addresses and lengths.
    writable: Vec<(u64, u64)>,
    /// It was twisted: anything of its slot may be written.
    twisted: bool,
}

#[derive(Debug)]
pub(super) struct Driver {
    pub(super) device: Box<dyn VirtioDevice>,
    memory: Arc<GuestRam>,
    interrupts: Arc<Interrupts>,
    features: u64,
    rings: Vec<Ring>,
    /// Rings were broken, so that a reset may be asked for.
    scribbled: bool,
    /// What memory has to hold where the device may not write.
    shadow: Vec<u8>,
}

fn avail(queue: u16) -> u64 {
    0x1000 + QUEUE * u64::from(queue) + 0x1000
}

fn used(queue: u16) -> u64 {
    0x1000 + QUEUE * u64::from(queue) + 0x2000
}

fn table(queue: u16) -> u64 {
    0x1000 + QUEUE * u64::from(queue)
}

fn slot_area(queue: u16, slot: u16) -> u64 {
    SLOT_AREA + SLOT_BYTES * u64::from(queue * SLOTS + slot)
}

impl Driver {
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let ranges = [(0, FIRST), (SECOND, SECOND_LEN)]
            .map(|(at, len)| (GuestAddress(at), usize::try_from(len).expect("a small number")));
        let memory = Arc::new(GuestRam::from_ranges(&ranges).expect("there is memory"));
        let shadow = vec![0; usize::try_from(FIRST).unwrap_or(0)];
        let interrupts = Arc::new(Interrupts::default());
        Self { device, memory, interrupts, features: 0, rings: Vec::new(), scribbled: false, shadow }
    }

    /// Makes the rings anew and starts the device, with those features of its own that `mask` has.
    pub(super) fn start(&mut self, mask: u64) {
        self.features = self.device.features() & mask;
        self.memory.write_slice(&[0; 0x8000], GuestAddress(0x1000)).expect("there is memory");
        self.interrupts.needs_reset.store(false, Ordering::SeqCst);
        self.scribbled = false;
        self.rings = (0..QUEUES).map(|_| Ring::default()).collect();
        let queues = (0..QUEUES)
            .map(|index| {
                let mut queue = Queue::new(256).expect("a power of two");
                let half = |address: u64| Some(u32::try_from(address).unwrap_or(0));
                queue.set_size(SIZE);
                queue.set_desc_table_address(half(table(index)), Some(0));
                queue.set_avail_ring_address(half(avail(index)), Some(0));
                queue.set_used_ring_address(half(used(index)), Some(0));
                queue.set_event_idx(self.features & EVENT_INDEX != 0);
                queue.set_ready(true);
                let kick = EventFd::new(EFD_NONBLOCK).expect("there are descriptors");
                self.rings[usize::from(index)].kick = kick.try_clone().ok();
                ActiveQueue { index, queue, kick }
            })
            .collect();
        let activation = Activation {
            memory: self.memory.clone(),
            features: self.features,
            queues,
            interrupt: self.interrupts.clone(),
        };
        self.device.activate(activation).expect("the device starts");
        self.remember();
    }

    pub(super) fn capacity(&self) -> u64 {
        let mut bytes = [0; 8];
        self.device.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).expect("it is memory");
        let place = usize::try_from(address).unwrap_or(0);
        self.shadow[place..place + bytes.len()].copy_from_slice(bytes);
    }

    fn get16(&self, address: u64) -> u16 {
        u16::from_le(self.memory.load(GuestAddress(address), Ordering::SeqCst).expect("it is memory"))
    }

    fn put16(&mut self, address: u64, value: u16) {
        let place = usize::try_from(address).unwrap_or(0);
        self.shadow[place..place + 2].copy_from_slice(&value.to_le_bytes());
        self.memory.store(value.to_le(), GuestAddress(address), Ordering::SeqCst).expect("it is memory");
    }

    /// A slot that is not under way, if fewer than `most` are.
    pub(super) fn slot(&self, queue: u16, most: u16) -> Option<u16> {
        let ring = &self.rings[usize::from(queue)];
        (0..most.min(SLOTS)).find(|slot| ring.under_way.iter().all(|other| other.slot != *slot))
    }

    fn descriptor(&mut self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        self.put(at, &address.to_le_bytes());
        self.put(at + 8, &len.to_le_bytes());
        self.put(at + 12, &[flags.to_le_bytes(), next.to_le_bytes()].concat());
    }

    /// Lays a chain of `pieces` out in a slot; what the device reads of it is `bytes`.
    pub(super) fn make(&mut self, queue: u16, slot: u16, bytes: &[u8], pieces: &[Piece], indirect: bool) {
        let area = slot_area(queue, slot);
        let indirect = indirect && self.features & INDIRECT_DESC != 0;
        let most = if indirect { 128 } else { usize::from(SHARE) };
        // The last pieces stay: the status is among them.
        let pieces = &pieces[pieces.len().saturating_sub(most)..];
        let head = slot * SHARE;
        let (place, first) = if indirect { (area + TABLE, 0) } else { (table(queue), head) };
        let mut data = area + DATA;
        self.put(data, &vec![0xdd; usize::try_from(SLOT_BYTES - DATA).unwrap_or(0)]);
        self.put(data, bytes);
        let mut writable = Vec::new();
        for (index, piece) in (first..).zip(pieces) {
            let last = usize::from(index - first) + 1 == pieces.len();
            let (address, len, flags) = match *piece {
                Piece::Read(len) => {
                    data += len;
                    (data - len, len, 0)
                }
                Piece::Write(len) => {
                    data += len;
                    (data - len, len, WRITE)
                }
                Piece::Outside(where_, len) => {
                    let places = [
                        FIRST,
                        FIRST - 1,
                        SECOND + SECOND_LEN - 1,
                        u64::MAX,
                        u64::MAX - 511,
                        1 << 63,
                        SECOND - 1,
                        FIRST + 512,
                    ];
                    (
                        places[usize::try_from(where_).unwrap_or(0) % 8],
                        len,
                        [0, WRITE][usize::from(len % 2 == 0)],
                    )
                }
                Piece::Junk(write, len) => {
                    (if len % 3 == 0 { SECOND } else { JUNK }, len, if write { WRITE } else { 0 })
                }
            };
            if flags & WRITE != 0 {
                writable.push((address, len));
            }
            let next = if last { 0 } else { NEXT };
            let at = place + u64::from(index) * 16;
            self.descriptor(at, address, u32::try_from(len).unwrap_or(u32::MAX), flags | next, index + 1);
        }
        if indirect {
            let len = u32::try_from(pieces.len() * 16).unwrap_or(0);
            self.descriptor(table(queue) + u64::from(head) * 16, area + TABLE, len, INDIRECT, 0);
        } else if pieces.is_empty() {
            self.descriptor(table(queue) + u64::from(head) * 16, area + DATA, 0, 0, 0);
        }
        self.rings[usize::from(queue)].under_way.push(UnderWay { slot, writable, twisted: false });
    }

    /// Breaks the chain of a slot: circles, tables that are none, flags, lengths. It stays within what the slot has.
    pub(super) fn twist(&mut self, queue: u16, slot: u16, indirect: bool, input: &mut Input<'_>) {
        let mut under_way = self.rings[usize::from(queue)].under_way.iter_mut();
        if let Some(chain) = under_way.find(|chain| chain.slot == slot) {
            chain.twisted = true;
        }
        let head = slot * SHARE;
        let area = slot_area(queue, slot);
        let direct = table(queue) + u64::from(head) * 16;
        let inner = if indirect { area + TABLE } else { direct };
        let base = if indirect { 0 } else { head };
        let index = u16::try_from(input.below(8)).unwrap_or(0);
        let at = inner + u64::from(index) * 16;
        match input.below(8) {
            // A circle.
            0 => self.put(at + 12, &[NEXT.to_le_bytes(), (base + index / 2).to_le_bytes()].concat()),
            // On to a descriptor that cannot be.
            1 => self.put(at + 12, &[NEXT.to_le_bytes(), (SIZE + index * 9).to_le_bytes()].concat()),
            2 => self.put(at + 12, &[NEXT.to_le_bytes(), u16::MAX.to_le_bytes()].concat()),
            // A table in a table, or one that goes on.
            3 => self.descriptor(at, area + TABLE, 64, INDIRECT, 0),
            4 => self.descriptor(direct, area + TABLE, 32, INDIRECT | NEXT, base + index),
            // A table of another length, of none, or too far out.
            5 => {
                let len = input.one_of(&[0, 1, 15, 17, 0x1_0000, 0x10_0000, u64::from(u32::MAX)]);
                self.descriptor(direct, area + TABLE, u32::try_from(len).unwrap_or(0), INDIRECT, 0);
            }
            6 => self.descriptor(direct, input.one_of(&[FIRST - 16, FIRST, u64::MAX - 15]), 32, INDIRECT, 0),
            // A table that the device may write to.
            _ => self.descriptor(direct, area + TABLE, 48, INDIRECT | WRITE, 0),
        }
    }

    /// Makes a slot's chain available.
    pub(super) fn offer(&mut self, queue: u16, slot: u16) {
        let ring = &mut self.rings[usize::from(queue)];
        let at = avail(queue) + 4 + u64::from(ring.offered % SIZE) * 2;
        ring.offered = ring.offered.wrapping_add(1);
        let (offered, seen) = (ring.offered, ring.seen);
        self.put16(at, slot * SHARE);
        self.put16(avail(queue) + 4 + u64::from(SIZE) * 2, seen);
        self.put16(avail(queue) + 2, offered);
    }

    /// Tells the device; with `asked` only if it wants to be told.
    pub(super) fn kick(&mut self, queue: u16, asked: bool) {
        fence(Ordering::SeqCst);
        let ring = &self.rings[usize::from(queue)];
        let (old, new) = (ring.told, ring.offered);
        let wanted = if self.features & EVENT_INDEX != 0 {
            let event = self.get16(used(queue) + 4 + u64::from(SIZE) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.get16(used(queue)) & 1 == 0
        };
        let ring = &mut self.rings[usize::from(queue)];
        ring.told = new;
        if let Some(kick) = ring.kick.as_ref().filter(|_| wanted || !asked) {
            let _ = kick.write(1);
        }
    }

    /// Waits for the next chain that comes back.
    pub(super) fn next(&mut self, queue: u16) -> Done {
        let deadline = Instant::now() + Duration::from_secs(15);
        let ring = &self.rings[usize::from(queue)];
        let mut turns = 0_u32;
        while self.get16(used(queue) + 2) == ring.seen {
            let broken = !self.scribbled && self.interrupts.needs_reset.load(Ordering::SeqCst);
            assert!(!broken, "queue {queue} was given up, though nobody broke its rings");
            assert!(Instant::now() < deadline, "queue {queue} stands still: {ring:?}");
            turns += 1;
            if turns > 100 {
                std::thread::sleep(Duration::from_micros(20));
            } else {
                std::thread::yield_now();
            }
        }
        let element = used(queue) + 4 + u64::from(ring.seen % SIZE) * 8;
        let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(element)).expect("it is memory");
        let ring = &mut self.rings[usize::from(queue)];
        ring.seen = ring.seen.wrapping_add(1);
        let head = u16::try_from(head).expect("a chain that there is");
        assert!(head % SHARE == 0 && head < SIZE, "{head} is no chain");
        let slot = head / SHARE;
        let index = ring.under_way.iter().position(|chain| chain.slot == slot);
        let index = index.unwrap_or_else(|| panic!("slot {slot} is not under way"));
        let UnderWay { mut writable, twisted, .. } = ring.under_way.swap_remove(index);
        let area = slot_area(queue, slot);
        if twisted {
            writable = vec![(area, SLOT_BYTES), (JUNK, FIRST - JUNK)];
        }
        let mut written = Vec::new();
        for (address, len) in writable.iter().filter(|(address, len)| address.saturating_add(*len) <= FIRST) {
            let at = written.len();
            written.resize(at + usize::try_from(*len).unwrap_or(0), 0);
            self.memory.read_slice(&mut written[at..], GuestAddress(*address)).expect("it is memory");
            let place = usize::try_from(*address).unwrap_or(0);
            self.shadow[place..place + written.len() - at].copy_from_slice(&written[at..]);
        }
        let room: u64 = writable.iter().map(|piece| piece.1).sum();
        assert!(twisted || u64::from(len) <= room, "{len} bytes were written where {room} could be");
        Done { slot, len, status: written.last().copied(), written }
    }

    fn remember(&mut self) {
        let memory = self.memory.clone();
        memory.read_slice(&mut self.shadow, GuestAddress(0)).expect("it is memory");
    }

    /// Nothing is under way: memory is what it was, but for what the device might write.
    pub(super) fn check_memory(&mut self, wild: bool) {
        if wild {
            return self.remember();
        }
        let mut now = vec![0; self.shadow.len()];
        self.memory.read_slice(&mut now, GuestAddress(0)).expect("it is memory");
        for queue in 0..QUEUES {
            // The device may still be asking for notifications, or for none.
            let place = usize::try_from(used(queue)).unwrap_or(0);
            let ring = place..place + 6 + 8 * usize::from(SIZE);
            self.shadow[ring.clone()].copy_from_slice(&now[ring]);
        }
        if now != self.shadow {
            let at = (0..now.len()).find(|at| now[*at] != self.shadow[*at]).unwrap_or(0);
            panic!("the device wrote {:#x} to {at:#x}, where it may not", now[at]);
        }
    }

    /// Breaks the rings of a queue.
    pub(super) fn scribble(&mut self, queue: u16, input: &mut Input<'_>) {
        self.scribbled = true;
        for _ in 0..1 + input.below(6) {
            let value = u16::try_from(input.interesting(&[64, 65, 128, 0x8000]) & 0xffff).unwrap_or(0);
            let offered = self.rings[usize::from(queue)].offered;
            match input.below(7) {
                0 => self.put16(avail(queue) + 2, value),
                1 => self.put16(avail(queue) + 2, offered.wrapping_add(value % 80)),
                2 => self.put16(avail(queue) + 4 + input.below(64) * 2, value),
                3 => self.put16(used(queue) + 2, value),
                4 => self.put16(used(queue) + 4 + u64::from(SIZE) * 8, value),
                5 => self.put16(table(queue) + input.below(512) * 2, value),
                _ => self.put16(avail(queue), value),
            }
            if let Some(kick) = self.rings[usize::from(queue)].kick.as_ref().filter(|_| input.one_in(2)) {
                let _ = kick.write(1);
            }
        }
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.device.reset();
    }
}
