//! A disk behind its MMIO window, driven as a guest drives it: registers, rings, interrupts, and nothing else.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::GuestRam;
use devices::bus::{Bus, BusDevice};
use devices::virtio::block::{Block, BlockOptions};
use devices::virtio::mmio::{MmioTransport, WINDOW};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BASE: u64 = 0xd000_0000;
const SECTORS: u64 = 4096;
const SIZE: u16 = 64;
const TABLE: u64 = 0x1000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Request `n` has its header, status and data in a slot of its own.
const SLOTS: u64 = 0x10_000;
const SLOT: u64 = 0x2000;
const EVENT_INDEX: u32 = 1 << 29;

struct Guest {
    bus: Bus,
    transport: Arc<MmioTransport>,
    line: EventFd,
    memory: Arc<GuestRam>,
    event_index: bool,
    offered: u16,
    seen: u16,
    free: Vec<u16>,
}

impl Guest {
    fn new(image: &tempfile::NamedTempFile) -> Self {
        let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap());
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let how = vmfs_image::OpenOptions { writable: true, ..Default::default() };
        let disk = vmfs_image::open(image.path(), &how).unwrap();
        let options = BlockOptions { serial: "end-to-end".to_owned(), ..BlockOptions::default() };
        let block = Box::new(Block::new(disk, options).0);
        let interrupt = Arc::new(line.try_clone().unwrap());
        let transport = Arc::new(MmioTransport::new(block, memory.clone(), interrupt).unwrap());
        let mut bus = Bus::default();
        bus.insert(BASE, WINDOW, transport.clone()).unwrap();
        Self { bus, transport, line, memory, event_index: false, offered: 0, seen: 0, free: Vec::new() }
    }

    fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        assert!(self.bus.read(BASE + register, &mut data));
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u64, value: u32) {
        assert!(self.bus.write(BASE + register, &value.to_le_bytes()));
    }

    /// Initializes the device in the order of section 3.1.1.
    fn start(&mut self, event_index: bool) {
        assert_eq!([self.read(0), self.read(4), self.read(8)], [0x7472_6976, 2, 2]);
        self.write(0x70, 0);
        assert_eq!(self.read(0x70), 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        for half in 0..2 {
            self.write(0x14, half);
            let offered = self.read(0x10);
            self.write(0x24, half);
            self.write(0x20, if event_index || half == 1 { offered } else { offered & !EVENT_INDEX });
        }
        self.write(0x70, 11);
        assert_eq!(self.read(0x70), 11, "the device accepts its own features");
        self.write(0x30, 0);
        assert_eq!(self.read(0x44), 0);
        assert!(self.read(0x34) >= u32::from(SIZE));
        self.write(0x38, SIZE.into());
        for (register, address) in [(0x80, TABLE), (0x90, AVAIL), (0xa0, USED)] {
            self.write(register, u32::try_from(address).unwrap());
            self.write(register + 4, 0);
        }
        self.memory.write_slice(&[0; 0x3000], GuestAddress(TABLE)).unwrap();
        self.write(0x44, 1);
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15);
        (self.event_index, self.offered, self.seen) = (event_index, 0, 0);
        self.free = (0..SIZE / 4).collect();
    }

    fn put<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(address)).unwrap();
    }

    fn get16(&self, address: u64) -> u16 {
        self.memory.load(GuestAddress(address), Ordering::SeqCst).unwrap()
    }

    /// Offers a read (`None`) or write of one sector, without a kick. Returns its slot.
    fn offer(&mut self, sector: u64, data: Option<u8>) -> u16 {
        let slot = self.free.pop().expect("a free slot");
        let at = SLOTS + u64::from(slot) * SLOT;
        self.put(at, [u32::from(data.is_some()), 0]);
        self.put(at + 8, sector);
        self.put(at + 16, 0xff_u8);
        self.memory.write_slice(&[data.unwrap_or(0); 512], GuestAddress(at + 0x1000)).unwrap();
        let head = slot * 4;
        let data_flags = if data.is_some() { 1 } else { 3 };
        for (index, address, len, flags) in
            [(0, at, 16, 1), (1, at + 0x1000, 512, data_flags), (2, at + 16, 1, 2_u16)]
        {
            let next = head + index + 1;
            let descriptor = TABLE + u64::from(head + index) * 16;
            self.put(descriptor, address);
            self.put(descriptor + 8, len);
            self.put(descriptor + 12, [flags, next]);
        }
        self.put(AVAIL + 4 + u64::from(self.offered % SIZE) * 2, head);
        self.offered = self.offered.wrapping_add(1);
        self.memory.store(self.offered, GuestAddress(AVAIL + 2), Ordering::SeqCst).unwrap();
        slot
    }

    /// Kicks if the device asks to be told of what was offered since `old`.
    fn kick(&self, old: u16) {
        std::sync::atomic::fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self.get16(USED + 4 + u64::from(SIZE) * 8);
            self.offered.wrapping_sub(event).wrapping_sub(1) < self.offered.wrapping_sub(old)
        } else {
            self.get16(USED) & 1 == 0
        };
        if wanted {
            self.write(0x50, 0);
        }
    }

    /// Sleeps until interrupted, unless requests have come back already, and returns the slots of those.
    fn wait(&mut self) -> Vec<u16> {
        loop {
            self.put(AVAIL + 4 + u64::from(SIZE) * 2, self.seen);
            std::sync::atomic::fence(Ordering::SeqCst);
            if self.get16(USED + 2) != self.seen {
                break;
            }
            let mut poll = libc::pollfd { fd: self.line.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one valid pollfd.
            let ready = unsafe { libc::poll(&raw mut poll, 1, 60_000) };
            assert_eq!(ready, 1, "no interrupt came for what the device has done, or it does nothing");
            self.line.read().unwrap();
            let cause = self.read(0x60);
            self.write(0x64, cause);
        }
        let mut done = Vec::new();
        while self.get16(USED + 2) != self.seen {
            let element = USED + 4 + u64::from(self.seen % SIZE) * 8;
            let [head, len]: [u32; 2] = self.memory.read_obj(GuestAddress(element)).unwrap();
            let slot = u16::try_from(head / 4).unwrap();
            let at = SLOTS + u64::from(slot) * SLOT;
            let kind: u32 = self.memory.read_obj(GuestAddress(at)).unwrap();
            let status: u8 = self.memory.read_obj(GuestAddress(at + 16)).unwrap();
            assert_eq!((status, len), (0, if kind == 0 { 513 } else { 1 }));
            self.seen = self.seen.wrapping_add(1);
            self.free.push(slot);
            done.push(slot);
        }
        done
    }

    fn data(&self, slot: u16) -> [u8; 512] {
        let mut data = [0; 512];
        let at = SLOTS + u64::from(slot) * SLOT + 0x1000;
        self.memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let data: Vec<u8> = (0..SECTORS).flat_map(|sector| [pattern(sector); 512]).collect();
    file.as_file().write_all_at(&data, 0).unwrap();
    file
}

fn pattern(sector: u64) -> u8 {
    u8::try_from(sector % 251).unwrap()
}

#[test]
fn capacity_is_read_from_the_configuration_space() {
    let image = image();
    let guest = Guest::new(&image);
    assert_eq!([guest.read(0x100), guest.read(0x104)], [u32::try_from(SECTORS).unwrap(), 0]);
}

#[test]
fn disk_written_and_read_after_two_initializations_holds_what_was_written() {
    let image = image();
    let mut guest = Guest::new(&image);
    for (turn, event_index) in [(1_u8, true), (2, false)] {
        guest.start(event_index);
        let old = guest.offered;
        guest.offer(10, Some(turn));
        guest.kick(old);
        guest.wait();
        let old = guest.offered;
        let [written, next] = [guest.offer(10, None), guest.offer(11, None)];
        guest.kick(old);
        let mut done = 0;
        while done < 2 {
            done += guest.wait().len();
        }
        assert_eq!((guest.data(written), guest.data(next)), ([turn; 512], [pattern(11); 512]));
    }
    guest.write(0x70, 0);
    let mut content = Vec::new();
    image.reopen().unwrap().read_to_end(&mut content).unwrap();
    assert!(content[10 * 512..11 * 512].iter().all(|b| *b == 2));
}

#[test]
fn every_request_comes_back_while_the_machine_is_paused_and_resumed_all_the_time() {
    let image = image();
    for event_index in [true, false] {
        let mut guest = Guest::new(&image);
        guest.start(event_index);
        let (transport, stop) = (guest.transport.clone(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    transport.pause();
                    transport.resume();
                    std::thread::yield_now();
                }
            });
            let (mut begun, mut sectors) = (0_u64, [0; SIZE as usize]);
            let mut done = 0;
            while done < 3000 {
                let old = guest.offered;
                let burst = 1 + begun % 7;
                for _ in 0..burst.min(guest.free.len() as u64) {
                    let sector = begun * 37 % SECTORS;
                    let slot = guest.offer(sector, None);
                    sectors[usize::from(slot)] = sector;
                    begun += 1;
                }
                guest.kick(old);
                for slot in guest.wait() {
                    assert_eq!(guest.data(slot), [pattern(sectors[usize::from(slot)]); 512]);
                    done += 1;
                }
            }
            stop.store(true, Ordering::SeqCst);
        });
    }
}

#[test]
fn reset_device_touches_neither_memory_nor_disk_until_it_is_started_again() {
    let image = image();
    let mut guest = Guest::new(&image);
    for turn in 0..50 {
        guest.start(true);
        let old = guest.offered;
        for sector in 0..10 {
            guest.offer(sector, Some(0xdd));
        }
        guest.kick(old);
        guest.write(0x70, 0);
        let content = || {
            let mut memory = vec![0; 0x5_0000];
            guest.memory.read_slice(&mut memory, GuestAddress(0)).unwrap();
            (memory, std::fs::read(image.path()).unwrap())
        };
        let before = content();
        guest.write(0x50, 0);
        std::thread::yield_now();
        assert!(before == content(), "turn {turn}");
        while guest.line.read().is_ok() {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Registers, rings and buffers as a guest that has lost its mind writes them.
    #[test]
    fn device_of_any_guest_is_usable_after_a_reset(
        begun in any::<bool>(),
        actions in prop::collection::vec(
            (prop_oneof![Just(0_u64), Just(1)], any::<prop::sample::Index>(), prop_oneof![any::<u32>(), 0_u32..64]),
            0..200),
    ) {
        let image = image();
        let mut guest = Guest::new(&image);
        if begun {
            guest.start(true);
        }
        for (kind, place, value) in actions {
            if kind == 0 {
                // Any register, and then a notification, as if something had been offered.
                let register = place.index(0x140 / 4) as u64 * 4;
                guest.transport.write(register, &value.to_le_bytes());
                guest.transport.write(0x50, &[0; 4]);
            } else {
                guest.put(TABLE + place.index(0x3000 / 4) as u64 * 4, value);
                guest.write(0x50, 0);
            }
        }
        guest.start(true);
        while guest.line.read().is_ok() {}
        let old = guest.offered;
        let slot = guest.offer(77, None);
        guest.kick(old);
        prop_assert_eq!(guest.wait(), [slot]);
    }
}
