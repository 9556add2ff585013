//! A guest with a network card behind its MMIO window, driven as a guest drives it: it kicks only when asked to, and
//! looks for frames only when interrupted.

#![allow(dead_code, reason = "every test that includes this file uses another part of it")]

use std::collections::VecDeque;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::GuestRam;
use devices::bus::{Bus, BusDevice};
use devices::virtio::mmio::{MmioTransport, WINDOW};
use devices::virtio::net::{Backend, Counters, HEADER_LEN, Net};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0xaa, 0xbb, 0xcc];
pub const EVENT_INDEX: u64 = 1 << 29;
pub const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];

const BASE: u64 = 0xd000_0000;
const SIZE: u16 = 64;
/// Rings of queue `n` lie from `n` times this on: descriptors, available ring, used ring.
const RINGS: u64 = 0x1_0000;
const RINGS_LEN: usize = 0x2_0000;
const AVAIL: u64 = 0x4000;
const USED: u64 = 0x8000;
/// Buffer `n` of queue `q`.
const BUFFERS: u64 = 0x10_0000;
const RX_LEN: u32 = 2048;
const TX_LEN: u32 = 0x1_1000;
const MEMORY: usize = 0x80_0000;

const RX: u16 = 0;
const TX: u16 = 1;

#[derive(Default)]
struct Queue {
    offered: u16,
    seen: u16,
    /// Index of the available ring at the last look at whether to kick.
    kicked: u16,
}

pub struct Guest {
    bus: Bus,
    pub transport: Arc<MmioTransport>,
    pub counters: Arc<Counters>,
    line: EventFd,
    memory: Arc<GuestRam>,
    event_index: bool,
    queues: [Queue; 2],
    free: Vec<u16>,
    arrived: VecDeque<([u8; HEADER_LEN], Vec<u8>)>,
}

impl Guest {
    pub fn new(backend: Box<dyn Backend>) -> Self {
        let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let net = Net::new(backend, MAC);
        let counters = net.counters();
        let interrupt = Arc::new(line.try_clone().unwrap());
        let transport = Arc::new(MmioTransport::new(Box::new(net), memory.clone(), interrupt).unwrap());
        let mut bus = Bus::default();
        bus.insert(BASE, WINDOW, transport.clone()).unwrap();
        let (queues, free, arrived) = Default::default();
        Self { bus, transport, counters, line, memory, event_index: false, queues, free, arrived }
    }

    fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.bus.read(BASE + register, &mut data));
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u64, value: u32) {
        assert!(self.bus.write(BASE + register, &value.to_le_bytes()));
    }

    /// The configuration space.
    pub fn config(&self) -> [u8; 12] {
        let mut data = [0; 12];
        self.transport.read(0x100, &mut data);
        data
    }

    /// Initializes the device with all it offers but `unknown`, in the order of section 3.1.1, and offers all buffers.
    pub fn start(&mut self, unknown: u64) {
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        let mut features = 0;
        for half in 0..2 {
            self.write(0x14, half);
            let wanted = u64::from(self.read(0x10)) << (32 * half) & !unknown;
            features |= wanted;
            self.write(0x24, half);
            self.write(0x20, u32::try_from(wanted >> (32 * half)).unwrap());
        }
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "the device accepts what it offers");
        self.memory.write_slice(&vec![0; RINGS_LEN], GuestAddress(0)).unwrap();
        for queue in [RX, TX] {
            self.write(0x30, queue.into());
            assert!(self.read(0x34) >= u32::from(SIZE));
            self.write(0x38, SIZE.into());
            for (register, offset) in [(0x80, 0), (0x90, AVAIL), (0xa0, USED)] {
                let address = u64::from(queue) * RINGS + offset;
                self.write(register, u32::try_from(address).unwrap());
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15);
        self.event_index = features & EVENT_INDEX != 0;
        self.queues = Default::default();
        self.arrived.clear();
        self.free = (0..8).collect();
        (0..SIZE).for_each(|head| self.offer(RX, head, RX_LEN));
        self.kick(RX);
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn get16(&self, address: u64) -> u16 {
        self.memory.load(GuestAddress(address), Ordering::SeqCst).unwrap()
    }

    fn buffer(queue: u16, head: u16) -> u64 {
        match queue {
            RX => BUFFERS + u64::from(head) * u64::from(RX_LEN),
            _ => 2 * BUFFERS + u64::from(head) * u64::from(TX_LEN),
        }
    }

    /// Makes chain `head` of `queue`, one buffer, available, without a kick.
    fn offer(&mut self, queue: u16, head: u16, len: u32) {
        let rings = u64::from(queue) * RINGS;
        self.put(rings + u64::from(head) * 16, Self::buffer(queue, head));
        self.put(rings + u64::from(head) * 16 + 8, len);
        self.put(rings + u64::from(head) * 16 + 12, [if queue == RX { 2_u16 } else { 0 }, 0]);
        let offered = &mut self.queues[usize::from(queue)].offered;
        let at = rings + AVAIL + 4 + u64::from(*offered % SIZE) * 2;
        *offered = offered.wrapping_add(1);
        let offered = *offered;
        self.put(at, head);
        self.memory.store(offered, GuestAddress(rings + AVAIL + 2), Ordering::SeqCst).unwrap();
    }

    /// Kicks if the device asks to be told of what was offered since the last time.
    fn kick(&mut self, queue: u16) {
        std::sync::atomic::fence(Ordering::SeqCst);
        let used = u64::from(queue) * RINGS + USED;
        let (event, flags) = (self.get16(used + 4 + u64::from(SIZE) * 8), self.get16(used));
        let Queue { offered, kicked, .. } = &mut self.queues[usize::from(queue)];
        let old = std::mem::replace(kicked, *offered);
        let wanted = if self.event_index {
            offered.wrapping_sub(event).wrapping_sub(1) < offered.wrapping_sub(old)
        } else {
            flags & 1 == 0
        };
        if wanted {
            self.write(0x50, queue.into());
        }
    }

    /// The next chain that came back, if there is one; if not, an interrupt is asked for.
    fn used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let rings = u64::from(queue) * RINGS;
        let seen = self.queues[usize::from(queue)].seen;
        self.put(rings + AVAIL + 4 + u64::from(SIZE) * 2, seen);
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.get16(rings + USED + 2) == seen {
            return None;
        }
        let element = rings + USED + 4 + u64::from(seen % SIZE) * 8;
        let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(element)).unwrap();
        self.queues[usize::from(queue)].seen = seen.wrapping_add(1);
        Some((u16::try_from(head).unwrap(), len))
    }

    /// Takes what has come back on both queues; false if nothing has.
    fn look(&mut self) -> bool {
        let mut found = false;
        while let Some((head, len)) = self.used(TX) {
            assert_eq!(len, 0);
            self.free.push(head);
            found = true;
        }
        while let Some((head, len)) = self.used(RX) {
            let (mut bytes, mut heads) = (Vec::new(), Vec::new());
            let (mut head, mut len) = (head, len);
            loop {
                let mut part = vec![0; usize::try_from(len).unwrap()];
                self.memory.read_slice(&mut part, GuestAddress(Self::buffer(RX, head))).unwrap();
                bytes.extend(part);
                heads.push(head);
                if heads.len() == usize::from(u16::from_le_bytes([bytes[10], bytes[11]])) {
                    break;
                }
                (head, len) = self.used(RX).expect("all buffers of a frame come at once");
            }
            let frame = bytes.split_off(HEADER_LEN);
            self.arrived.push_back((bytes.try_into().unwrap(), frame));
            heads.into_iter().for_each(|head| self.offer(RX, head, RX_LEN));
            found = true;
        }
        self.kick(RX);
        found
    }

    /// Sleeps until interrupted.
    fn sleep(&self) {
        let mut poll = libc::pollfd { fd: self.line.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 60_000) };
        assert_eq!(ready, 1, "no interrupt came; counters: {:?}", self.counters);
        self.line.read().unwrap();
        let cause = self.read(0x60);
        self.write(0x64, cause);
    }

    /// The next frame, waiting for it.
    pub fn receive(&mut self) -> ([u8; HEADER_LEN], Vec<u8>) {
        loop {
            if let Some(frame) = self.arrived.pop_front() {
                return frame;
            }
            if !self.look() {
                self.sleep();
            }
        }
    }

    /// The next frame of protocol `ethertype`; others are forgotten.
    pub fn receive_protocol(&mut self, ethertype: u16) -> ([u8; HEADER_LEN], Vec<u8>) {
        loop {
            let (header, frame) = self.receive();
            if frame[12..14] == ethertype.to_be_bytes() {
                return (header, frame);
            }
        }
    }

    /// Sends a frame, waiting for a free buffer.
    pub fn send(&mut self, header: [u8; HEADER_LEN], frame: &[u8]) {
        let head = loop {
            if let Some(head) = self.free.pop() {
                break head;
            }
            if !self.look() {
                self.sleep();
            }
        };
        let data = [&header, frame].concat();
        self.memory.write_slice(&data, GuestAddress(Self::buffer(TX, head))).unwrap();
        self.offer(TX, head, u32::try_from(data.len()).unwrap());
        self.kick(TX);
    }

    /// Waits until all that was sent has come back.
    pub fn flush(&mut self) {
        while self.free.len() < 8 {
            if !self.look() {
                self.sleep();
            }
        }
    }
}
