use std::sync::atomic::Ordering;

use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::virtio::test_driver::Interrupts;

const SIZE: u16 = 8;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
const INDIRECT: u64 = 0x4000;
const DATA: u64 = 0x8000;
const MEMORY: u64 = 0x1_0000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const TABLE_INSIDE: u16 = 4;

/// The driver's end of a queue, without threads: whoever writes the test says who runs when.
struct Rig {
    memory: Arc<GuestRam>,
    interrupts: Arc<Interrupts>,
    kick: EventFd,
    queue: DeviceQueue,
    offered: u16,
    seen: u16,
    event_index: bool,
}

impl Rig {
    fn new(event_index: bool) -> Self {
        let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap());
        let interrupts = Arc::new(Interrupts::default());
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(TABLE)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        let active = ActiveQueue { index: 3, queue, kick: kick.try_clone().unwrap() };
        let queue = DeviceQueue::new(active, memory.clone(), interrupts.clone());
        let rig = Self { memory, interrupts, kick, queue, offered: 0, seen: 0, event_index };
        for index in 0..SIZE {
            rig.descriptor(TABLE, index, (DATA, 16, WRITE, 0));
        }
        rig
    }

    fn descriptor(&self, table: u64, index: u16, (address, len, flags, next): (u64, u32, u16, u16)) {
        let descriptor = RawDescriptor::from(Descriptor::new(address, len, flags, next));
        self.memory.write_obj(descriptor, GuestAddress(table + u64::from(index) * 16)).unwrap();
    }

    fn put(&self, address: u64, value: u16) {
        self.memory.write_obj(value.to_le(), GuestAddress(address)).unwrap();
    }

    fn get(&self, address: u64) -> u16 {
        u16::from_le(self.memory.read_obj(GuestAddress(address)).unwrap())
    }

    fn offer(&mut self, head: u16) {
        self.put(AVAIL + 4 + u64::from(self.offered % SIZE) * 2, head);
        self.offered = self.offered.wrapping_add(1);
        self.put(AVAIL + 2, self.offered);
    }

    /// Whether the device wants to be kicked after chains were offered since `old` (section 2.7.10.1).
    fn wants_kick(&self, old: u16) -> bool {
        if !self.event_index {
            return self.get(USED) & 1 == 0;
        }
        let event = self.get(USED + 4 + u64::from(SIZE) * 8);
        passed(event, self.offered, old)
    }

    /// Looks at what came back, and asks for an interrupt at the next one (`used_event`).
    fn look(&mut self) {
        self.seen = self.get(USED + 2);
        self.put(AVAIL + 4 + u64::from(SIZE) * 2, self.seen);
    }

    fn serve(&mut self) -> usize {
        let mut count = 0;
        self.queue.clear_kick();
        self.queue.serve(|chain| {
            count += 1;
            u32::try_from(chain.writable.len()).unwrap()
        });
        count
    }

    fn interrupts(&self) -> u64 {
        self.interrupts.used.swap(0, Ordering::SeqCst)
    }

    fn broken(&self) -> bool {
        self.interrupts.needs_reset.load(Ordering::SeqCst)
    }

    fn kicked(&self) -> bool {
        self.kick.read().is_ok()
    }
}

/// Whether going from `old` to `new` passes `event` (the formula of section 2.7.7.2).
fn passed(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[test]
fn chains_served_in_one_go_cost_one_interrupt() {
    for event_index in [true, false] {
        let mut rig = Rig::new(event_index);
        (0..SIZE).for_each(|head| rig.offer(head));
        assert_eq!(rig.serve(), 8);
        assert_eq!(rig.interrupts(), 1);
        assert_eq!(rig.serve(), 0);
        assert_eq!(rig.interrupts(), 0, "nothing new to tell");
    }
}

#[test]
fn driver_without_event_index_that_asks_for_no_interrupts_gets_none() {
    let mut rig = Rig::new(false);
    rig.put(AVAIL, 1);
    rig.offer(0);
    assert_eq!((rig.serve(), rig.interrupts()), (1, 0));
    rig.put(AVAIL, 0);
    rig.offer(0);
    assert_eq!((rig.serve(), rig.interrupts()), (1, 1));
}

#[test]
fn chain_offered_while_kicks_are_suppressed_is_served_all_the_same() {
    for event_index in [true, false] {
        let mut rig = Rig::new(event_index);
        rig.queue.suppress_kicks();
        rig.offer(0);
        assert!(rig.queue.allow_kicks());
        assert_eq!(rig.serve(), 1);
        assert!(!rig.queue.allow_kicks());
    }
}

#[test]
fn driver_that_never_stops_offering_does_not_keep_the_thread() {
    let mut rig = Rig::new(true);
    rig.offer(0);
    let memory = rig.memory.clone();
    let mut count = 1_u16;
    rig.queue.serve(|_| {
        // Another chain, as a second vCPU would offer it meanwhile.
        count = count.wrapping_add(1);
        memory.write_obj(count.to_le(), GuestAddress(AVAIL + 2)).unwrap();
        0
    });
    assert_eq!(usize::from(count), BUDGET + 1);
    assert!(rig.kicked(), "the rest is not forgotten");
    assert_eq!(rig.interrupts(), 1);
}

#[test]
fn chain_that_breaks_the_rules_is_given_back_with_an_interrupt() {
    for bad in [
        (u64::MAX, 16, 0, 0),            // not memory
        (MEMORY - 1, 2, WRITE, 0),       // past the end of memory
        (DATA, 16, NEXT, 0),             // a circle
        (DATA, 16, NEXT, SIZE),          // no such descriptor
        (DATA, 16, WRITE | NEXT, 1),     // then one to be read
        (INDIRECT, 15, TABLE_INSIDE, 0), // no whole table
        (MEMORY, 16, TABLE_INSIDE, 0),   // a table outside memory
        (INDIRECT, 0, TABLE_INSIDE, 0),  // an empty table
    ] {
        let mut rig = Rig::new(true);
        rig.descriptor(TABLE, 0, bad);
        rig.descriptor(TABLE, 1, (DATA, 16, 0, 0));
        rig.offer(0);
        assert_eq!(rig.serve(), 0, "{bad:x?}");
        assert_eq!((rig.get(USED + 2), rig.interrupts(), rig.broken()), (1, 1, false), "{bad:x?}");
        rig.look();
        rig.offer(2);
        assert_eq!((rig.serve(), rig.interrupts()), (1, 1), "the queue goes on");
    }
}

#[test]
fn ring_full_of_bad_chains_is_given_back_in_bounded_steps() {
    let mut rig = Rig::new(true);
    rig.descriptor(TABLE, 0, (DATA, 16, NEXT, 0));
    (0..SIZE).for_each(|_| rig.offer(0));
    assert_eq!((rig.serve(), rig.get(USED + 2), rig.interrupts()), (0, SIZE, 1));
}

#[test]
fn indirect_table_is_followed_and_one_inside_another_is_refused() {
    let mut rig = Rig::new(true);
    rig.descriptor(TABLE, 0, (INDIRECT, 48, TABLE_INSIDE, 0));
    rig.descriptor(INDIRECT, 0, (DATA, 100, NEXT, 2));
    rig.descriptor(INDIRECT, 2, (DATA, 11, WRITE | NEXT, 1));
    rig.descriptor(INDIRECT, 1, (DATA, 22, WRITE, 0));
    rig.offer(0);
    let memory = rig.memory.clone();
    let chain = rig.queue.pop(&memory).unwrap();
    assert_eq!((chain.head, chain.readable.len(), chain.writable.len()), (0, 100, 33));
    rig.descriptor(INDIRECT, 1, (INDIRECT, 16, TABLE_INSIDE, 0));
    rig.offer(0);
    assert!(rig.queue.pop(&memory).is_none());
    assert_eq!(rig.get(USED + 2), 1);
}

#[test]
fn head_outside_the_table_or_index_that_runs_ahead_breaks_the_queue_once() {
    for ahead in [false, true] {
        let mut rig = Rig::new(true);
        if ahead {
            rig.offer(0);
            assert_eq!((rig.serve(), rig.interrupts()), (1, 1));
            rig.put(AVAIL + 2, SIZE + 2);
        } else {
            rig.offer(SIZE);
        }
        assert_eq!(rig.serve(), 0);
        assert!(rig.broken());
        rig.interrupts.needs_reset.store(false, Ordering::SeqCst);
        rig.offer(0);
        assert_eq!((rig.serve(), rig.interrupts()), (0, 0));
        assert!(!rig.broken(), "said once");
    }
}

#[test]
fn chains_given_back_before_the_queue_broke_are_announced() {
    let mut rig = Rig::new(true);
    rig.offer(0);
    rig.offer(SIZE);
    assert_eq!((rig.serve(), rig.interrupts()), (1, 1));
    assert!(rig.broken());
}

#[test]
fn chain_put_back_is_popped_again() {
    let mut rig = Rig::new(true);
    rig.offer(5);
    let memory = rig.memory.clone();
    assert_eq!(rig.queue.pop(&memory).unwrap().head, 5);
    rig.queue.undo(1);
    assert_eq!(rig.queue.pop(&memory).unwrap().head, 5);
    assert!(rig.queue.pop(&memory).is_none());
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// The driver offers this many chains and kicks if asked to.
    Offer(u16),
    /// The driver looks at what came back.
    Look,
    /// The device's thread runs if it was kicked.
    Run,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![(1..=SIZE).prop_map(Step::Offer), Just(Step::Look), Just(Step::Run)]
}

proptest! {
    /// A driver and a device that each sleep until the other tells them never sleep both while there is work.
    #[test]
    fn neither_side_sleeps_while_it_has_work(
        event_index in any::<bool>(), start in any::<u16>(), steps in prop::collection::vec(step(), 1..60)
    ) {
        let mut rig = Rig::new(event_index);
        // Anywhere in the ring, so that the indices wrap.
        rig.queue.queue.set_next_avail(start);
        rig.queue.queue.set_next_used(start);
        (rig.offered, rig.seen) = (start, start);
        rig.put(AVAIL + 2, start);
        rig.put(USED + 2, start);
        rig.look();
        rig.serve();
        let (mut served, mut told) = (start, false);
        for step in steps {
            match step {
                Step::Offer(count) => {
                    let free = SIZE - rig.offered.wrapping_sub(rig.seen);
                    let old = rig.offered;
                    (0..count.min(free)).for_each(|_| rig.offer(0));
                    if rig.offered != old && rig.wants_kick(old) {
                        rig.kick.write(1).unwrap();
                    }
                }
                Step::Look => {
                    rig.look();
                    told = false;
                }
                Step::Run => {
                    // On a busy machine it takes several turns, for each of which the device kicks itself.
                    while rig.kicked() {
                        served = served.wrapping_add(u16::try_from(rig.serve()).unwrap());
                        told |= rig.interrupts() > 0;
                        prop_assert!(told || served == rig.seen, "the driver would sleep");
                    }
                    prop_assert_eq!(served, rig.offered, "the device would sleep");
                }
            }
        }
    }

    /// Whatever the descriptors, a chain either is memory of the guest or is given back.
    #[test]
    fn any_descriptors_are_served_or_given_back(
        table in prop::collection::vec(descriptor(), usize::from(SIZE)),
        indirect in prop::collection::vec(descriptor(), 8),
        heads in prop::collection::vec(0..SIZE, 1..20),
    ) {
        let mut rig = Rig::new(true);
        for (index, d) in (0..).zip(table) {
            rig.descriptor(TABLE, index, d);
        }
        for (index, d) in (0..).zip(indirect) {
            rig.descriptor(INDIRECT, index, d);
        }
        for head in &heads {
            rig.offer(*head);
            rig.queue.serve(|chain| {
                for buffers in [&chain.readable, &chain.writable] {
                    let pieces: usize = buffers.pieces().iter().map(|p| p.len()).sum();
                    assert_eq!(pieces, buffers.len());
                    assert!(buffers.iovecs().len() <= 1024);
                }
                0
            });
        }
        prop_assert_eq!(usize::from(rig.get(USED + 2)), heads.len());
        prop_assert!(!rig.broken());
    }
}

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![6 => DATA..MEMORY, 3 => INDIRECT..INDIRECT + 0x80, 1 => any::<u64>()];
    let len = prop_oneof![4 => 0_u32..0x1000, 3 => (0_u32..9).prop_map(|n| n * 16), 1 => any::<u32>()];
    (address, len, 0_u16..8, 0..SIZE + 1)
}

#[test]
fn table_of_endlessly_many_empty_descriptors_is_refused_before_its_end() {
    let mut rig = Rig::new(true);
    let count = 2049;
    rig.descriptor(TABLE, 0, (INDIRECT, u32::from(count) * 16, TABLE_INSIDE, 0));
    for index in 0..count {
        let goes_on = if index + 1 < count { NEXT } else { 0 };
        rig.descriptor(INDIRECT, index, (DATA, 0, goes_on, index + 1));
    }
    let memory = rig.memory.clone();
    rig.offer(0);
    assert!(rig.queue.pop(&memory).is_none());
    assert_eq!((rig.get(USED + 2), rig.broken()), (1, false));
    // One less is a chain like any other.
    rig.descriptor(INDIRECT, count - 2, (DATA, 0, 0, 0));
    rig.offer(0);
    assert!(rig.queue.pop(&memory).is_some());
}
