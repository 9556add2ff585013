//! Who sleeps when, without threads: the driver kicks only if asked to, looks only if interrupted, and nothing that
//! could be done may be left when both sleep.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::backend::{Offloads, Pieces};
use super::super::header::HEADER_LEN;
use super::super::ring::Ring;
use super::*;
use crate::GuestRam;
use crate::virtio::device::ActiveQueue;
use crate::virtio::test_driver::Interrupts;

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const DATA: u64 = 0x8000;
const BUFFER: u32 = 100;

/// A back end of numbers: frames to be had, and room for those sent.
#[derive(Debug, Default)]
struct Numbers {
    /// Lengths.
    arrived: VecDeque<usize>,
    room: usize,
    sent: usize,
}

impl Backend for Numbers {
    fn name(&self) -> &str {
        "numbers"
    }
    fn mtu(&self) -> Option<u16> {
        None
    }
    fn offloads(&self) -> Offloads {
        Offloads::default()
    }
    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn fd(&self) -> RawFd {
        -1
    }
    fn receive(&mut self, _: &mut [u8; HEADER_LEN], _: Pieces<'_>, _: &mut [u8]) -> io::Result<usize> {
        self.arrived.pop_front().ok_or(io::ErrorKind::WouldBlock.into())
    }
    fn send(&mut self, _: &[u8; HEADER_LEN], _: Pieces<'_>) -> io::Result<()> {
        self.room = self.room.checked_sub(1).ok_or(io::ErrorKind::WouldBlock)?;
        self.sent += 1;
        Ok(())
    }
}

/// The driver's end of a queue.
struct Driver {
    memory: Arc<GuestRam>,
    interrupts: Arc<Interrupts>,
    kick: EventFd,
    offered: u16,
    event_index: bool,
    /// Used index at the last look, after which an interrupt was asked for.
    seen: u16,
    told: bool,
}

impl Driver {
    /// With rings whose indices begin anywhere.
    fn new(event_index: bool, start: u16, writable: bool) -> (Self, Ring) {
        let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap());
        let interrupts = Arc::new(Interrupts::default());
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        queue.set_next_avail(start);
        queue.set_next_used(start);
        let active = ActiveQueue { index: 1, queue, kick: kick.try_clone().unwrap() };
        let ring = Ring::new(active, memory.clone(), interrupts.clone());
        let driver = Self { memory, interrupts, kick, offered: start, event_index, seen: start, told: false };
        driver.put(AVAIL + 2, start);
        driver.put(USED + 2, start);
        // Whatever was asked of a driver that stood here before.
        driver.put(USED + 4 + u64::from(SIZE) * 8, start);
        driver.put(AVAIL + 4 + u64::from(SIZE) * 2, start);
        for index in 0..SIZE {
            let flags = if writable { 2 } else { 0 };
            let descriptor = Descriptor::new(DATA + u64::from(index) * 0x100, BUFFER, flags, 0);
            let address = GuestAddress(TABLE + u64::from(index) * 16);
            driver.memory.write_obj(RawDescriptor::from(descriptor), address).unwrap();
        }
        (driver, ring)
    }

    fn put(&self, address: u64, value: u16) {
        self.memory.write_obj(value.to_le(), GuestAddress(address)).unwrap();
    }

    fn get(&self, address: u64) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(address)).unwrap())
    }

    fn used(&self) -> u16 {
        self.get(USED + 2)
    }

    /// Offers up to `count` chains, those that are free, and kicks if asked to. Returns how many.
    fn offer(&mut self, count: u16) -> u16 {
        let count = count.min(SIZE - self.offered.wrapping_sub(self.seen));
        let old = self.offered;
        for _ in 0..count {
            self.put(AVAIL + 4 + u64::from(self.offered % SIZE) * 2, self.offered % SIZE);
            self.offered = self.offered.wrapping_add(1);
        }
        self.put(AVAIL + 2, self.offered);
        let wanted = if self.event_index {
            let event = self.get(USED + 4 + u64::from(SIZE) * 8);
            self.offered.wrapping_sub(event).wrapping_sub(1) < self.offered.wrapping_sub(old)
        } else {
            self.get(USED) & 1 == 0
        };
        if count > 0 && wanted {
            self.kick.write(1).unwrap();
        }
        count
    }

    /// Looks at what came back, and asks for an interrupt at the next one.
    fn look(&mut self) {
        self.seen = self.used();
        self.put(AVAIL + 4 + u64::from(SIZE) * 2, self.seen);
        self.told = false;
    }

    /// Whether the driver sleeps although something has come back.
    fn sleeps_in_vain(&mut self) -> bool {
        self.told |= self.interrupts.used.swap(0, Ordering::SeqCst) > 0;
        self.used() != self.seen && !self.told
    }
}

#[test]
fn nothing_is_taken_from_the_queues_of_a_card_that_is_held() {
    let (mut buffers, rx) = Driver::new(true, 65_534, true);
    let (mut frames, tx) = Driver::new(true, 7, false);
    buffers.offer(SIZE);
    frames.offer(3);
    let backend = Numbers { room: 1, ..Numbers::default() };
    let rx = Receiver::new(rx, Offloads::default(), true, 500);
    let tx = Transmitter::new(tx, Offloads::default());
    let backend: Shared = Arc::new(Mutex::new(Box::new(backend)));
    let mut server = Server::new(backend, Arc::default(), Some(rx), Some(tx));
    server.receive();
    let taken = |server: &Server| {
        let (rx, tx) = (server.rx.as_ref().unwrap(), server.tx.as_ref().unwrap());
        (rx.ring.outstanding(), tx.ring.outstanding())
    };
    assert_eq!(taken(&server), (6, 0));
    let full = server.tx.as_mut().unwrap().serve(&mut **lock(&server.backend), &server.counters);
    assert!(full);
    server.drain();
    assert_eq!((taken(&server), frames.used()), ((0, 0), 8));
}

#[derive(Debug, Clone)]
enum Step {
    /// The driver makes so many chains available.
    Offer(u16),
    /// The driver looks at what came back.
    Look,
    /// Frames of so many buffers arrive; or so many frames can be sent.
    Backend(u16),
    /// The thread is held and goes on.
    Pause,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (1..SIZE + 1).prop_map(Step::Offer),
        3 => Just(Step::Look),
        4 => (1..SIZE + 3).prop_map(Step::Backend),
        1 => Just(Step::Pause),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    #[test]
    fn frames_to_send_and_room_for_them_never_wait_for_each_other(
        event_index in any::<bool>(), start in any::<u16>(), steps in steps()
    ) {
        let (mut driver, ring) = Driver::new(event_index, start, false);
        let mut tx = Transmitter::new(ring, Offloads::default());
        let (mut backend, counters) = (Numbers::default(), Counters::default());
        let mut full = tx.serve(&mut backend, &counters);
        let (mut offered, mut room) = (0, 0);
        for step in steps {
            let mut edge = false;
            match step {
                Step::Offer(count) => offered += usize::from(driver.offer(count)),
                Step::Look => driver.look(),
                Step::Backend(count) => {
                    backend.room += usize::from(count);
                    room += usize::from(count);
                    edge = full;
                }
                Step::Pause => edge = true,
            }
            // What the worker does, until there is nothing to wake it.
            let mut kicked = driver.kick.read().is_ok();
            while edge || kicked {
                if edge || !full {
                    full = tx.serve(&mut backend, &counters);
                }
                (edge, kicked) = (false, driver.kick.read().is_ok());
            }
            prop_assert_eq!(backend.sent, offered.min(room), "the device sleeps");
            prop_assert!(!driver.sleeps_in_vain());
        }
    }

    #[test]
    fn frames_that_arrive_and_buffers_for_them_never_wait_for_each_other(
        event_index in any::<bool>(), mergeable in any::<bool>(), usual in 60_usize..900,
        start in any::<u16>(), steps in steps()
    ) {
        let (mut driver, ring) = Driver::new(event_index, start, true);
        let mut rx = Receiver::new(ring, Offloads::default(), mergeable, usual);
        let (mut backend, counters) = (Numbers::default(), Counters::default());
        rx.serve(&mut backend, &counters);
        // What is to happen: frames in the order of their arrival, as long as there are buffers.
        let (mut expected, mut buffers, mut frames, mut dropped) = (VecDeque::new(), 0, 0, 0);
        for step in steps {
            let mut edge = false;
            match step {
                Step::Offer(count) => buffers += driver.offer(count),
                Step::Look => driver.look(),
                Step::Backend(needed) => {
                    let len = usize::from(needed) * BUFFER as usize - HEADER_LEN;
                    backend.arrived.push_back(len);
                    expected.push_back(needed);
                    edge = true;
                }
                Step::Pause => {
                    rx.drain();
                    edge = true;
                }
            }
            while let Some(needed) = expected.front() {
                if *needed > if mergeable { SIZE } else { 1 } {
                    // It may be known to be too large only when all buffers there can be are there.
                    if buffers < if mergeable { SIZE } else { 1 } {
                        break;
                    }
                    dropped += 1;
                } else if *needed <= buffers {
                    buffers -= needed;
                    frames += 1;
                } else {
                    break;
                }
                expected.pop_front();
            }
            let mut kicked = driver.kick.read().is_ok();
            while edge || kicked {
                rx.readable |= edge;
                rx.serve(&mut backend, &counters);
                (edge, kicked) = (false, driver.kick.read().is_ok());
            }
            let load = |counter: &AtomicU64| counter.load(Ordering::SeqCst);
            prop_assert_eq!(load(&counters.rx_frames), frames, "the device sleeps");
            prop_assert_eq!(load(&counters.rx_dropped_room), dropped);
            prop_assert!(!driver.sleeps_in_vain());
        }
    }
}
