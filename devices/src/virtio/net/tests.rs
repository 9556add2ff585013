use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::net::backend::Pieces;
use crate::virtio::net::{HEADER_LEN, MAX_FRAME};
use crate::virtio::rng::Rng;
use crate::virtio::test_driver::{Driver, MEMORY, SIZE};

const TX: u16 = 1;
const WRITE: u16 = 2;
const NEXT: u16 = 1;
const LONG: Duration = Duration::from_secs(20);
/// Where buffers lie: those of receive chain `n` from `n` times the step on, those of transmit chains after them.
const BUFFERS: u64 = 0x10_0000;
const STEP: u64 = 0x2_0000;
const TX_BUFFERS: u64 = 0x30_0000;
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const PLAIN: [u8; HEADER_LEN] = [0; HEADER_LEN];
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// A back end whose cable ends in the test: a datagram is a header and a frame.
#[derive(Debug)]
struct Socket {
    socket: UnixDatagram,
    /// What every call fails with, unless 0.
    errno: Arc<AtomicI32>,
    accepted: Arc<Mutex<Option<Offloads>>>,
}

impl Socket {
    fn healthy(&self) -> io::Result<()> {
        match self.errno.load(Ordering::SeqCst) {
            0 => Ok(()),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

impl Backend for Socket {
    fn name(&self) -> &str {
        "socket"
    }
    fn mtu(&self) -> Option<u16> {
        Some(1400)
    }
    fn offloads(&self) -> Offloads {
        Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true }
    }
    fn set_offloads(&mut self, accepted: Offloads) -> io::Result<()> {
        *self.accepted.lock().unwrap() = Some(accepted);
        Ok(())
    }
    fn fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
    fn receive(
        &mut self,
        header: &mut [u8; HEADER_LEN],
        into: Pieces<'_>,
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        self.healthy()?;
        let mut data = vec![0; HEADER_LEN + MAX_FRAME + 1];
        let len = self.socket.recv(&mut data)?;
        let (front, frame) = data[..len].split_at(HEADER_LEN);
        header.copy_from_slice(front);
        let rest = &frame[into.copy_from(frame)..];
        let rest = &rest[..rest.len().min(overflow.len())];
        overflow[..rest.len()].copy_from_slice(rest);
        Ok(frame.len())
    }
    fn send(&mut self, header: &[u8; HEADER_LEN], frame: Pieces<'_>) -> io::Result<()> {
        self.healthy()?;
        let mut data = vec![0; frame.len()];
        assert_eq!(frame.copy_to(&mut data), data.len());
        self.socket.send(&[header, &data[..]].concat()).map(drop)
    }
}

struct Nic {
    driver: Driver,
    cable: UnixDatagram,
    counters: Arc<Counters>,
    errno: Arc<AtomicI32>,
    accepted: Arc<Mutex<Option<Offloads>>>,
    /// The back end's end of the cable.
    socket: UnixDatagram,
}

impl Nic {
    fn new() -> Self {
        Self::without(0)
    }

    /// With a driver that does not know the features `unknown`.
    fn without(unknown: u64) -> Self {
        let (socket, cable) = UnixDatagram::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        cable.set_read_timeout(Some(LONG)).unwrap();
        cable.set_write_timeout(Some(LONG)).unwrap();
        let other_end = socket.try_clone().unwrap();
        let (errno, accepted) = (Arc::<AtomicI32>::default(), Arc::<Mutex<_>>::default());
        let backend = Socket { socket, errno: errno.clone(), accepted: accepted.clone() };
        let net = Net::new(Box::new(backend), MAC);
        let (counters, features) = (net.counters(), net.features() & !unknown);
        let driver = Driver::with_features(Box::new(net), features);
        Self { driver, cable, counters, errno, accepted, socket: other_end }
    }

    /// Resets the device and starts it anew, with empty queues.
    fn restart(&mut self, unknown: u64) {
        let mut device: Box<dyn VirtioDevice> = Box::new(Rng::default());
        std::mem::swap(&mut device, &mut self.driver.device);
        device.reset();
        let features = device.features() & !unknown;
        self.driver = Driver::with_features(device, features);
    }

    /// Offers receive chain `head` with one buffer of `len` bytes, without a kick.
    fn post(&mut self, head: u16, len: u32) {
        let address = BUFFERS + u64::from(head) * STEP;
        self.driver.descriptor(0, head, Descriptor::new(address, len, WRITE, 0));
        self.driver.offer(0, head);
    }

    fn post_all(&mut self, heads: std::ops::Range<u16>, len: u32) {
        heads.for_each(|head| self.post(head, len));
        self.driver.kick(0);
    }

    fn arrive(&self, header: [u8; HEADER_LEN], frame: &[u8]) {
        self.cable.send(&[&header, frame].concat()).unwrap();
    }

    /// The next frame given to the guest: its header, contents, and the length of each of its chains.
    fn receive(&mut self) -> ([u8; HEADER_LEN], Vec<u8>, Vec<u32>) {
        let (mut bytes, mut lens) = (Vec::new(), Vec::new());
        let mut count = 1;
        while lens.len() < count {
            let (head, len) = self.driver.wait_used(0, LONG).expect("a frame for the guest");
            let mut part = vec![0; usize::try_from(len).unwrap()];
            let address = BUFFERS + u64::from(head) * STEP;
            self.driver.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            bytes.extend(part);
            lens.push(len);
            count = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
        }
        let frame = bytes.split_off(HEADER_LEN);
        (bytes.try_into().unwrap(), frame, lens)
    }

    /// Offers transmit chain `head` (and the descriptors after it) with `data` in pieces of the given sizes.
    fn offer(&mut self, head: u16, data: &[u8], sizes: &[usize]) {
        let mut at = TX_BUFFERS + u64::from(head) * 0x1000;
        self.driver.memory.write_slice(data, GuestAddress(at)).unwrap();
        let mut left = data.len();
        for (index, size) in (head..).zip(sizes.iter().copied().chain([usize::MAX])) {
            let len = size.min(left);
            left -= len;
            let next = if left > 0 { NEXT } else { 0 };
            let len = u32::try_from(len).unwrap();
            self.driver.descriptor(TX, index, Descriptor::new(at, len, next, index + 1));
            at += u64::from(len);
            if left == 0 {
                break;
            }
        }
        self.driver.offer(TX, head);
    }

    /// Sends one frame and waits until its chain is back.
    fn send(&mut self, header: [u8; HEADER_LEN], frame: &[u8]) {
        self.offer(0, &[&header, frame].concat(), &[HEADER_LEN]);
        self.driver.kick(TX);
        assert_eq!(self.driver.wait_used(TX, LONG), Some((0, 0)));
    }

    /// The next frame that the guest has sent.
    fn sent(&self) -> ([u8; HEADER_LEN], Vec<u8>) {
        let mut data = vec![0; HEADER_LEN + MAX_FRAME + 1];
        let len = self.cable.recv(&mut data).expect("a frame from the guest");
        data.truncate(len);
        let frame = data.split_off(HEADER_LEN);
        (data.try_into().unwrap(), frame)
    }

    /// `avail_event`: the device asks to be kicked when this chain is made available.
    fn avail_event(&self, queue: u16) -> u16 {
        let address = Driver::base(queue) + 0x800 + 4 + u64::from(SIZE) * 8;
        self.driver.memory.load(GuestAddress(address), Ordering::SeqCst).unwrap()
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < end, "{what} did not happen");
        std::thread::yield_now();
    }
}

fn wait_for_count(counter: &AtomicU64, wanted: u64) {
    wait_for("counting", || counter.load(Ordering::SeqCst) == wanted);
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| i.to_le_bytes()[0].wrapping_mul(7) ^ i.to_le_bytes()[1] ^ seed).collect()
}

/// A header in front of TCP over IPv4 to be cut into segments of 1448 bytes.
fn tso4() -> [u8; HEADER_LEN] {
    [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]
}

#[test]
fn configuration_space_shows_address_link_and_mtu() {
    let nic = Nic::new();
    let mut space = [0xff; 16];
    nic.driver.device.read_config(0, &mut space);
    assert_eq!(space, [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0x78, 5, 0, 0, 0, 0]);
    assert_eq!(nic.driver.device.device_id(), 1);
    assert!(nic.driver.device.features() >> VIRTIO_NET_F_MTU & 1 == 1);
}

#[test]
fn frame_from_the_guest_is_sent_whole_however_its_chain_is_cut() {
    let mut nic = Nic::new();
    for sizes in [&[][..], &[12], &[5, 3, 4, 1], &[13, 1], &[20, 30, 0, 900]] {
        let data = frame(1000, 3);
        nic.offer(2, &[&PLAIN, &data[..]].concat(), sizes);
        nic.driver.kick(TX);
        assert_eq!(nic.driver.wait_used(TX, LONG), Some((2, 0)));
        assert_eq!(nic.sent(), (PLAIN, data));
    }
    wait_for_count(&nic.counters.tx_frames, 5);
    assert_eq!(nic.counters.tx_bytes.load(Ordering::SeqCst), 5000);
}

#[test]
fn frame_for_the_guest_lies_behind_a_header_in_one_buffer() {
    for unknown in [0, MERGEABLE] {
        let mut nic = Nic::without(unknown);
        nic.post_all(0..2, 2000);
        nic.arrive(PLAIN, &frame(60, 1));
        assert_eq!(nic.receive(), ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], frame(60, 1), vec![72]));
        nic.arrive(PLAIN, &frame(1514, 2));
        assert_eq!(nic.receive().1, frame(1514, 2));
        wait_for_count(&nic.counters.rx_bytes, 1574);
    }
}

#[test]
fn large_frame_spans_as_many_buffers_as_it_needs() {
    let mut nic = Nic::new();
    nic.post_all(0..SIZE, 5000);
    nic.arrive(tso4(), &frame(MAX_FRAME, 9));
    let (header, data, lens) = nic.receive();
    assert_eq!(header, [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 14, 0]);
    assert!(data == frame(MAX_FRAME, 9));
    assert_eq!((lens.len(), lens[12], lens[13]), (14, 5000, 566));
    nic.arrive(PLAIN, &frame(100, 1));
    assert_eq!(nic.receive().1, frame(100, 1));
}

#[test]
fn frame_that_fills_its_buffers_to_the_last_byte_takes_no_further_one() {
    let mut nic = Nic::new();
    nic.post_all(0..4, 1000);
    nic.arrive(PLAIN, &frame(1988, 9));
    let (_, data, lens) = nic.receive();
    assert_eq!((data, lens), (frame(1988, 9), vec![1000, 1000]));
}

#[test]
fn frame_larger_than_the_buffers_offered_waits_for_more() {
    let mut nic = Nic::new();
    nic.post_all(0..2, 1000);
    nic.arrive(tso4(), &frame(5000, 5));
    nic.arrive(PLAIN, &frame(50, 6));
    wait_for("asking for a kick", || nic.avail_event(0) == 2);
    nic.driver.device.pause();
    nic.driver.device.resume();
    nic.post_all(2..4, 1000);
    assert!(nic.driver.wait_used(0, Duration::from_millis(20)).is_none());
    nic.post_all(4..7, 1000);
    let (_, data, lens) = nic.receive();
    assert_eq!((data, lens.len()), (frame(5000, 5), 6));
    assert_eq!(nic.receive().1, frame(50, 6));
}

#[test]
fn frame_larger_than_all_buffers_there_can_be_is_dropped_and_counted() {
    let mut nic = Nic::new();
    nic.post_all(0..SIZE, 100);
    nic.arrive(tso4(), &frame(5000, 5));
    nic.arrive(PLAIN, &frame(150, 6));
    assert_eq!(nic.receive().1, frame(150, 6));
    assert_eq!(nic.counters.rx_dropped_room.load(Ordering::SeqCst), 1);
}

#[test]
fn frame_larger_than_its_chain_is_dropped_by_a_driver_that_does_not_merge() {
    let mut nic = Nic::without(MERGEABLE);
    nic.post_all(0..4, 500);
    nic.arrive(PLAIN, &frame(489, 5));
    nic.arrive(PLAIN, &frame(488, 6));
    let (header, data, lens) = nic.receive();
    assert_eq!((header[10], data, lens), (1, frame(488, 6), vec![500]));
    assert_eq!(nic.counters.rx_dropped_room.load(Ordering::SeqCst), 1);
}

#[test]
fn buffer_too_small_for_a_header_is_given_back_unused() {
    let mut nic = Nic::new();
    nic.post(0, 11);
    nic.post(1, 500);
    nic.post(2, 0);
    nic.post(3, 500);
    nic.driver.kick(0);
    assert_eq!(nic.driver.wait_used(0, LONG), Some((0, 0)));
    nic.arrive(PLAIN, &frame(100, 5));
    assert_eq!(nic.receive().1, frame(100, 5));
    nic.arrive(PLAIN, &frame(100, 6));
    assert_eq!(nic.driver.wait_used(0, LONG), Some((2, 0)));
    assert_eq!(nic.receive().1, frame(100, 6));
}

#[test]
fn frames_that_are_too_short_or_too_long_are_dropped_in_both_directions() {
    let mut nic = Nic::new();
    nic.post_all(0..SIZE, 8000);
    for len in [0, 13, MAX_FRAME + 1] {
        nic.arrive(PLAIN, &frame(len, 1));
        nic.send(PLAIN, &frame(len, 1));
    }
    nic.offer(0, &[0; 11], &[]);
    nic.driver.kick(TX);
    assert_eq!(nic.driver.wait_used(TX, LONG), Some((0, 0)));
    nic.arrive(PLAIN, &frame(14, 2));
    nic.send(PLAIN, &frame(MAX_FRAME, 2));
    assert_eq!(nic.receive().1, frame(14, 2));
    assert!(nic.sent().1 == frame(MAX_FRAME, 2));
    let counters = &nic.counters;
    let dropped = [&counters.rx_dropped_length, &counters.tx_dropped_length];
    assert_eq!(dropped.map(|c| c.load(Ordering::SeqCst)), [3, 4]);
}

#[test]
fn header_that_was_not_negotiated_reaches_nobody() {
    let mut nic = Nic::without(1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_GUEST_CSUM);
    nic.post_all(0..SIZE, 2000);
    nic.send(tso4(), &frame(3000, 1));
    nic.send([0xfe; HEADER_LEN], &frame(3000, 1));
    nic.send(PLAIN, &frame(60, 2));
    assert_eq!(nic.sent(), (PLAIN, frame(60, 2)));
    nic.arrive([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], &frame(60, 3));
    nic.arrive([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &frame(60, 4));
    let (header, data, _) = nic.receive();
    assert_eq!((header[0], data), (0, frame(60, 4)));
    let counters = &nic.counters;
    let dropped = [&counters.rx_dropped_header, &counters.tx_dropped_header];
    assert_eq!(dropped.map(|c| c.load(Ordering::SeqCst)), [1, 2]);
}

#[test]
fn back_end_is_told_what_the_driver_can_take() {
    let mut nic = Nic::without(1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_TSO6);
    let all = Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true };
    assert_eq!(nic.accepted.lock().unwrap().take(), Some(Offloads { tso6: false, uso: false, ..all }));
    nic.restart(1 << VIRTIO_NET_F_GUEST_CSUM);
    assert_eq!(nic.accepted.lock().unwrap().take(), Some(Offloads::default()));
}

#[test]
fn frames_wait_while_the_back_end_is_full_and_go_in_order_when_there_is_room() {
    let mut nic = Nic::new();
    let (bytes, len) = (4096_i32, libc::socklen_t::try_from(size_of::<i32>()).unwrap());
    let fd = nic.socket.as_raw_fd();
    // SAFETY: the option is an int.
    let set =
        unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, (&raw const bytes).cast(), len) };
    assert_eq!(set, 0);
    for head in 0..SIZE {
        nic.offer(head, &[&PLAIN, &frame(100, head.to_le_bytes()[0])[..]].concat(), &[]);
    }
    nic.driver.kick(TX);
    let waits = |nic: &Nic| nic.counters.tx_waits.load(Ordering::SeqCst);
    wait_for("filling the cable", || waits(&nic) == 1);
    assert!((1..u64::from(SIZE)).contains(&nic.counters.tx_frames.load(Ordering::SeqCst)));
    // Neither kicks nor a pause gets anything through, or loses it.
    nic.driver.kick(TX);
    nic.driver.device.pause();
    nic.driver.device.resume();
    wait_for("trying again", || waits(&nic) > 1);
    for head in 0..SIZE {
        assert_eq!(nic.sent().1, frame(100, head.to_le_bytes()[0]));
        assert_eq!(nic.driver.wait_used(TX, LONG), Some((head.into(), 0)));
    }
    // It is watched as before.
    nic.post_all(0..1, 100);
    nic.arrive(PLAIN, &frame(50, 1));
    assert_eq!(nic.receive().1, frame(50, 1));
}

#[test]
fn driver_is_asked_to_kick_only_when_the_device_would_wait_for_it() {
    let mut nic = Nic::new();
    wait_for_count(&nic.counters.rx_waits, 1);
    nic.post_all(0..4, 100);
    for turn in 0..3 {
        nic.arrive(PLAIN, &frame(50, turn));
        assert_eq!(nic.receive().1, frame(50, turn));
    }
    assert_eq!(nic.avail_event(0), 0, "there are buffers left");
    nic.arrive(PLAIN, &frame(50, 0));
    nic.receive();
    wait_for("running out of buffers", || nic.avail_event(0) == 4);
    nic.send(PLAIN, &frame(50, 0));
    wait_for("waiting for the next frame to send", || nic.avail_event(TX) == 1);
}

#[test]
fn frames_handed_over_in_one_go_cost_one_interrupt() {
    for unknown in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut nic = Nic::without(unknown);
        nic.post_all(0..SIZE, 100);
        nic.driver.device.pause();
        (0..8).for_each(|turn| nic.arrive(PLAIN, &frame(50, turn)));
        let before = nic.driver.interrupts.used.load(Ordering::SeqCst);
        nic.driver.device.resume();
        (0..8).for_each(|turn| assert_eq!(nic.receive().1, frame(50, turn)));
        nic.driver.device.pause();
        assert_eq!(nic.driver.interrupts.used.load(Ordering::SeqCst), before + 1);
    }
}

#[test]
fn paused_card_passes_nothing_and_loses_nothing() {
    let mut nic = Nic::new();
    nic.post_all(0..SIZE, 100);
    let (mut head, mut seen) = (0, 0);
    for turn in 0..300_u16 {
        let seed = turn.to_le_bytes()[0];
        nic.driver.device.pause();
        nic.arrive(PLAIN, &frame(60, seed));
        nic.offer(0, &[&PLAIN, &frame(70, seed)[..]].concat(), &[7, 20]);
        nic.driver.kick(TX);
        let used: u16 =
            nic.driver.memory.load(GuestAddress(Driver::base(0) + 0x802), Ordering::SeqCst).unwrap();
        assert_eq!(used, seen, "paused");
        nic.driver.device.resume();
        if turn % 3 == 0 {
            nic.driver.device.pause();
            nic.driver.device.resume();
        }
        assert_eq!(nic.receive().1, frame(60, seed));
        assert_eq!(nic.sent().1, frame(70, seed));
        assert_eq!(nic.driver.wait_used(TX, LONG), Some((0, 0)));
        nic.post_all(head..head + 1, 100);
        head = (head + 1) % SIZE;
        seen += 1;
    }
}

#[test]
fn frames_that_wait_through_a_reset_are_for_the_next_driver() {
    let mut nic = Nic::new();
    (0..5).for_each(|turn| nic.arrive(PLAIN, &frame(60, turn)));
    for turn in 0..5 {
        nic.restart(if turn % 2 == 0 { MERGEABLE } else { 0 });
        nic.post_all(0..1, 100);
        assert_eq!(nic.receive().1, frame(60, turn));
        nic.send(PLAIN, &frame(60, turn));
        assert_eq!(nic.sent().1, frame(60, turn));
    }
    nic.driver.device.reset();
    nic.driver.device.reset();
    nic.driver.device.pause();
    nic.driver.device.resume();
}

#[test]
fn failing_back_end_costs_its_frames_and_no_more() {
    let mut nic = Nic::new();
    nic.post_all(0..4, 100);
    wait_for("looking for frames", || nic.avail_event(0) == 0);
    nic.errno.store(libc::EIO, Ordering::SeqCst);
    nic.send(PLAIN, &frame(60, 1));
    nic.send(PLAIN, &frame(60, 2));
    nic.arrive(PLAIN, &frame(60, 3));
    wait_for("failing", || nic.counters.rx_errors.load(Ordering::SeqCst) > 0);
    nic.errno.store(0, Ordering::SeqCst);
    nic.arrive(PLAIN, &frame(60, 4));
    assert_eq!([nic.receive().1, nic.receive().1], [frame(60, 3), frame(60, 4)]);
    nic.send(PLAIN, &frame(60, 5));
    assert_eq!(nic.sent().1, frame(60, 5));
    assert_eq!(nic.counters.tx_errors.load(Ordering::SeqCst), 2);
    assert!(!nic.driver.interrupts.needs_reset.load(Ordering::SeqCst));
}

#[test]
fn driver_sees_all_buffers_of_a_frame_at_once() {
    let mut nic = Nic::new();
    let index = GuestAddress(Driver::base(0) + 0x802);
    let mut total = 0_u16;
    for _ in 0..200 {
        nic.post_all(0..10, 200);
        nic.arrive(PLAIN, &frame(1900, 1));
        total += 10;
        wait_for("receiving", || {
            let seen: u16 = nic.driver.memory.load(index, Ordering::Acquire).unwrap();
            assert!(seen.is_multiple_of(10), "{seen}");
            seen == total
        });
        assert_eq!(nic.receive().1, frame(1900, 1));
    }
}

#[test]
fn head_that_is_no_descriptor_ends_the_queue_with_a_request_for_a_reset() {
    let mut nic = Nic::new();
    nic.driver.offer(TX, 99);
    nic.driver.kick(TX);
    wait_for("asking for a reset", || nic.driver.interrupts.needs_reset.load(Ordering::SeqCst));
    nic.restart(0);
    nic.send(PLAIN, &frame(60, 5));
    assert_eq!(nic.sent().1, frame(60, 5));
}

/// Bytes at the beginning of the buffers that hostile chains name.
const ARENA: u64 = 0x2_0000;

fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![12 => BUFFERS..BUFFERS + ARENA, 1 => (MEMORY as u64 - 100)..MEMORY as u64 + 100, 1 => Just(u64::MAX - 50)];
    let len = prop_oneof![6 => 0_u32..3000, 2 => 0_u32..20, 1 => any::<u32>()];
    // Indirect tables (flag 4) are rare, so that there are frames, too.
    let flags = prop_oneof![6 => 0_u16..4, 6 => Just(WRITE), 1 => 0_u16..8];
    (address, len, flags, 0..SIZE + 1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn hostile_chains_change_nothing_but_the_buffers_they_offer_and_the_card_goes_on(
        mergeable in any::<bool>(),
        table in prop::collection::vec(descriptor(), usize::from(SIZE)),
        heads in prop::collection::vec(0..SIZE, 1..usize::from(SIZE)),
        frames in prop::collection::vec((any::<[u8; HEADER_LEN]>(), 0_usize..6000), 0..8),
        noise in any::<u8>(),
    ) {
        let mut nic = Nic::without(if mergeable { 0 } else { MERGEABLE });
        let memory = nic.driver.memory.clone();
        let arena = usize::try_from(ARENA).unwrap();
        let before = vec![noise; arena];
        memory.write_slice(&before, GuestAddress(BUFFERS)).unwrap();
        let mut writable = vec![false; arena];
        // An indirect table lies in the arena, and says what the frames' bytes happen to say.
        let indirect = table.iter().any(|(_, _, flags, _)| flags & 4 != 0);
        for (index, (address, len, flags, next)) in (0..).zip(table) {
            for queue in [0, TX] {
                nic.driver.descriptor(queue, index, Descriptor::new(address, len, flags, next));
            }
            if flags & WRITE != 0 && address >= BUFFERS {
                let start = usize::try_from(address - BUFFERS).unwrap().min(arena);
                let end = start.saturating_add(usize::try_from(len).unwrap()).min(arena);
                writable[start..end].fill(true);
            }
        }
        for head in &heads {
            nic.driver.offer(0, *head);
        }
        nic.driver.kick(0);
        for (header, len) in frames {
            let header = if len % 2 == 0 { header } else { PLAIN };
            nic.arrive(header, &frame(len, noise ^ 0x5a));
        }
        nic.cable.set_nonblocking(true).unwrap();
        let mut sent = vec![0; HEADER_LEN + MAX_FRAME + 1];
        for head in &heads {
            nic.driver.offer(TX, *head);
            nic.driver.kick(TX);
            let used = nic.driver.wait_used(TX, LONG);
            prop_assert_eq!(used, Some((u32::from(*head), 0)));
            while nic.cable.recv(&mut sent).is_ok() {}
        }
        nic.driver.device.pause();
        let mut after = vec![0; arena];
        memory.read_slice(&mut after, GuestAddress(BUFFERS)).unwrap();
        let intact = (0..arena).all(|i| writable[i] || after[i] == noise);
        prop_assert!(intact || indirect, "bytes were written that no buffer holds");
        prop_assert!(!nic.driver.interrupts.needs_reset.load(Ordering::SeqCst));

        nic.restart(0);
        nic.cable.set_nonblocking(false).unwrap();
        nic.post_all(0..SIZE, 8000);
        nic.arrive(PLAIN, &frame(14, 0x77));
        while nic.receive().1 != frame(14, 0x77) {}
        nic.send(PLAIN, &frame(60, 5));
        prop_assert_eq!(nic.sent().1, frame(60, 5));
    }
}
