//! Many requests on many queues, on storage that does as it likes, while the disk is held, exchanged, limited and retried.

use std::fs::File;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, VolatileSlice};
use vmfs_image::{
    Access, Cache, Extent, Format, Identity, Image, Info, OpenOptions, Place, Run, RunKind, Ticket, flat,
    thin,
};

use super::*;
use crate::virtio::block::options::{Engine, Limits, OnError};
use crate::virtio::test_driver::Driver;

const QUEUES: u16 = 3;
/// Chains of a queue, each with a place of its own on the disk and in memory.
const CHAINS: u16 = 8;
const BLOCK: usize = 4096;
/// From one place to the next.
const STRIDE: u64 = 64 << 10;
const PLACES: u16 = QUEUES * CHAINS;
const PATIENCE: Duration = Duration::from_secs(60);

/// Numbers that are the same for the same seed.
#[derive(Debug)]
struct Dice(AtomicU64);

impl Dice {
    fn throw(&self, sides: u64) -> u64 {
        let mut x = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % sides
    }
}

/// A flat image with moods.
#[derive(Debug)]
struct Moody {
    below: Arc<dyn Image>,
    dice: Dice,
    /// It fails, now and then.
    fails: AtomicBool,
    /// Tickets that were not given back.
    tickets: Mutex<Vec<u64>>,
    last: AtomicU64,
    /// Calls that go on.
    inside: AtomicU64,
}

impl Moody {
    fn new(below: Arc<dyn Image>, seed: u64) -> Self {
        Self {
            below,
            dice: Dice(AtomicU64::new(seed)),
            fails: AtomicBool::new(true),
            tickets: Mutex::default(),
            last: AtomicU64::new(0),
            inside: AtomicU64::new(0),
        }
    }

    /// Takes its time, and fails where that is its mood.
    fn mood(&self) -> io::Result<()> {
        self.inside.fetch_add(1, Ordering::SeqCst);
        match self.dice.throw(64) {
            0 => std::thread::sleep(Duration::from_millis(1)),
            1..8 => std::thread::yield_now(),
            _ => {}
        }
        self.inside.fetch_sub(1, Ordering::SeqCst);
        if self.fails.load(Ordering::SeqCst) && self.dice.throw(32) == 0 {
            let code = match self.dice.throw(3) {
                0 => libc::ENOSPC,
                1 => libc::EDQUOT,
                _ => libc::EIO,
            };
            return Err(io::Error::from_raw_os_error(code));
        }
        Ok(())
    }

    fn is_left(&self) -> bool {
        self.tickets.lock().unwrap().is_empty() && self.inside.load(Ordering::SeqCst) == 0
    }
}

impl Image for Moody {
    fn path(&self) -> &Path {
        self.below.path()
    }
    fn format(&self) -> Format {
        Format::Flat
    }
    fn size(&self) -> u64 {
        self.below.size()
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn memory_alignment(&self) -> usize {
        // With two or more, nothing is taken from the page cache at once.
        1 + usize::from(self.dice.throw(2) == 0)
    }
    fn is_writable(&self) -> bool {
        true
    }
    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.mood()?;
        self.below.read_at(offset, into)
    }
    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.mood()?;
        self.below.write_at(offset, from)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.mood()?;
        self.below.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.below.discard(offset, len)
    }
    fn flush(&self) -> io::Result<()> {
        self.mood()
    }
    fn flush_is_sync_of(&self) -> Option<u16> {
        (self.dice.throw(2) == 0).then_some(0)
    }
    fn files(&self) -> &[Arc<File>] {
        self.below.files()
    }
    fn locate(&self, offset: u64, len: u64, _: Access, extents: &mut Vec<Extent>) -> Option<Ticket> {
        if self.dice.throw(4) == 0 {
            return None;
        }
        // In pieces, as an image of clusters has them.
        let mut at = 0;
        while at < len {
            let here = (len - at).min(512 << self.dice.throw(4));
            extents.push(Extent { len: here, place: Place::File { file: 0, offset: offset + at } });
            at += here;
        }
        let ticket = self.last.fetch_add(1, Ordering::SeqCst);
        self.tickets.lock().unwrap().push(ticket);
        Some(Ticket(ticket))
    }
    fn finish(&self, ticket: Ticket, _: bool) {
        let mut tickets = self.tickets.lock().unwrap();
        let at = tickets.iter().position(|ours| *ours == ticket.0).expect("it is ours, and given back once");
        tickets.swap_remove(at);
    }
    fn run(&self, _: u64, len: u64) -> io::Result<Run> {
        Ok(Run { len, kind: RunKind::Data })
    }
    fn grow(&self, size: u64) -> io::Result<()> {
        self.below.grow(size)
    }
    fn info(&self) -> io::Result<Info> {
        self.below.info()
    }
    fn identity(&self) -> io::Result<Identity> {
        self.below.identity()
    }
}

/// What the guest wants with a place.
#[derive(Debug, Clone, Copy)]
enum Wish {
    Write(u8),
    Read,
    Zero,
    Flush,
}

fn address(queue: u16, chain: u16) -> u64 {
    0x20_0000 + (u64::from(queue) * u64::from(CHAINS) + u64::from(chain)) * 0x2000
}

/// Makes a request for the chain's own place.
fn offer(driver: &mut Driver, queue: u16, chain: u16, wish: Wish) {
    let at = address(queue, chain);
    let place = u64::from(queue) * u64::from(CHAINS) + u64::from(chain);
    let mut head = [0_u8; 32];
    head[0] = match wish {
        Wish::Read => 0,
        Wish::Write(_) => 1,
        Wish::Flush => 4,
        Wish::Zero => 13,
    };
    let sector = place * STRIDE / SECTOR;
    head[8..16].copy_from_slice(&sector.to_le_bytes());
    head[16..24].copy_from_slice(&sector.to_le_bytes());
    head[24..28].copy_from_slice(&8_u32.to_le_bytes());
    driver.memory.write_slice(&head, GuestAddress(at)).unwrap();
    driver.memory.write_slice(&[0xff; BLOCK + 1], GuestAddress(at + 0x800)).unwrap();
    let (readable, writable) = match wish {
        Wish::Read => (16, 4097),
        Wish::Write(byte) => {
            driver.memory.write_slice(&[byte; BLOCK], GuestAddress(at + 16)).unwrap();
            driver.memory.write_obj(0xff_u8, GuestAddress(at + 0x1800)).unwrap();
            (16 + 4096, 1)
        }
        Wish::Zero => (32, 1),
        Wish::Flush => (16, 1),
    };
    let to = if matches!(wish, Wish::Write(_)) { at + 0x1800 } else { at + 0x800 };
    driver.descriptor(queue, chain * 2, Descriptor::new(at, readable, 1, chain * 2 + 1));
    driver.descriptor(queue, chain * 2 + 1, Descriptor::new(to, writable, 2, 0));
    driver.offer(queue, chain * 2);
}

/// Looks at what came back. Gives false for a flush that has failed, which nothing else may.
fn check(driver: &Driver, queue: u16, chain: u16, wish: Wish, model: &mut u8, len: u32) -> bool {
    let at = address(queue, chain);
    let status_at = match wish {
        Wish::Read => at + 0x1800,
        Wish::Write(_) => at + 0x1800,
        Wish::Zero | Wish::Flush => at + 0x800,
    };
    let status: u8 = driver.memory.read_obj(GuestAddress(status_at)).unwrap();
    if matches!(wish, Wish::Flush) && status == 1 {
        return false;
    }
    assert_eq!(status, 0, "{wish:?}");
    match wish {
        Wish::Read => {
            let mut seen = [0; BLOCK];
            driver.memory.read_slice(&mut seen, GuestAddress(at + 0x800)).unwrap();
            assert_eq!(len, 4097);
            assert!(seen == [*model; BLOCK], "{} and not {model}", seen[0]);
        }
        Wish::Write(byte) => *model = byte,
        Wish::Zero => *model = 0,
        Wish::Flush => {}
    }
    true
}

/// Does what is done with disks from outside, until told to stop.
fn meddle(control: &BlockControl, storage: &Storage, end: &AtomicBool, seed: u64) {
    let dice = Dice(AtomicU64::new(seed));
    while !end.load(Ordering::SeqCst) {
        match dice.throw(6) {
            0 => {
                control.drain();
                assert!(storage.is_left(), "nothing is in flight");
                control.resume();
            }
            1 => {
                let to = storage.images[usize::from(dice.throw(2) == 0)].clone();
                drop(control.swap(to).unwrap());
            }
            2 => {
                let iops = (dice.throw(2) == 0).then(|| 1000 + dice.throw(100_000));
                control.set_limits(Limits {
                    iops,
                    bytes_per_second: None,
                    burst: Duration::from_millis(dice.throw(2)),
                });
            }
            _ => {
                if let Some(thin) = storage.images[0].as_thin() {
                    // Less than it takes is refused.
                    let max_size = (dice.throw(4) > 0).then(|| (8 + dice.throw(16)) << 16);
                    thin.set_max_size(max_size).unwrap_or_default();
                }
                control.retry();
            }
        }
        std::thread::sleep(Duration::from_micros(dice.throw(3000)));
    }
}

/// The images that the disk shows in turns: two with moods, on one file, or a thin one that is short of space.
struct Storage {
    images: [Arc<dyn Image>; 2],
    moody: Vec<Arc<Moody>>,
}

impl Storage {
    fn new(dir: &Path, is_thin: bool, seed: u64) -> Self {
        let path = dir.join("disk.img");
        let size = u64::from(PLACES) * STRIDE;
        if is_thin {
            let max_size = Some(10 << 16);
            thin::create(&path, &thin::Create { max_size, ..thin::Create::new(size) }).unwrap();
        } else {
            flat::create(&path, size, flat::Preallocate::Sparse).unwrap();
        }
        let open = OpenOptions { writable: true, cache: Cache::Writeback, ..OpenOptions::default() };
        let below = vmfs_image::open(&path, &open).unwrap();
        if is_thin {
            return Self { images: [below.clone(), below], moody: Vec::new() };
        }
        let moody = [1, 2].map(|n| Arc::new(Moody::new(below.clone(), seed + n)));
        Self { images: moody.clone().map(|image| image as Arc<dyn Image>), moody: moody.to_vec() }
    }

    fn is_left(&self) -> bool {
        self.moody.iter().all(|image| image.is_left())
    }
}

fn storm(is_thin: bool, engine: Engine, write_through: bool, count: u64, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let storage = Storage::new(dir.path(), is_thin, seed);
    let options =
        BlockOptions { queues: QUEUES, engine, on_error: OnError::Pause, ..BlockOptions::default() };
    let (block, control) = Block::new(storage.images[0].clone(), options);
    let features = block.features() & !(u64::from(write_through) << VIRTIO_BLK_F_FLUSH);
    let mut driver = Driver::with_features(Box::new(block), features);
    let end = AtomicBool::new(false);
    let dice = Dice(AtomicU64::new(seed));
    let mut model = vec![0_u8; usize::from(PLACES)];
    let mut errors = 0;
    let mut asked: Vec<Option<Wish>> = vec![None; usize::from(PLACES)];
    std::thread::scope(|scope| {
        let meddler = scope.spawn(|| meddle(&control, &storage, &end, seed + 3));
        let (mut made, mut answered) = (0, 0);
        let mut last = Instant::now();
        while answered < count {
            for queue in 0..QUEUES {
                let mut kick = false;
                for chain in 0..CHAINS {
                    let place = usize::from(queue * CHAINS + chain);
                    if made < count && asked[place].is_none() && dice.throw(2) == 0 {
                        let wish = match dice.throw(12) {
                            0..5 => Wish::Write(u8::try_from(1 + dice.throw(200)).unwrap()),
                            5..10 => Wish::Read,
                            10 => Wish::Zero,
                            _ => Wish::Flush,
                        };
                        offer(&mut driver, queue, chain, wish);
                        asked[place] = Some(wish);
                        (made, kick) = (made + 1, true);
                    }
                }
                if kick {
                    driver.kick(queue);
                }
                while let Some((head, len)) = driver.wait_used(queue, Duration::ZERO) {
                    let chain = u16::try_from(head).unwrap() / 2;
                    let place = usize::from(queue * CHAINS + chain);
                    let wish = asked[place].take().expect("what was asked for once is answered once");
                    errors += u64::from(!check(&driver, queue, chain, wish, &mut model[place], len));
                    (answered, last) = (answered + 1, Instant::now());
                }
            }
            if dice.throw(1000) == 0 {
                driver.device.pause();
                assert!(storage.is_left(), "nothing is in flight");
                driver.device.resume();
            }
            assert!(
                last.elapsed() < PATIENCE,
                "no answer: {asked:?}, waiting {:?}, limits {:?}",
                control.waiting(),
                control.limits()
            );
            std::thread::yield_now();
        }
        end.store(true, Ordering::SeqCst);
        meddler.join().unwrap();
    });
    assert_eq!(control.counters().errors, errors);
    drop(driver);
    storage.moody.iter().for_each(|image| image.fails.store(false, Ordering::SeqCst));
    let image = control.image();
    for (place, byte) in (0_u64..).zip(model) {
        let mut seen = [0xff; BLOCK];
        image.read_at(place * STRIDE, &[VolatileSlice::from(&mut seen[..])]).unwrap();
        assert!(seen == [byte; BLOCK]);
    }
}

#[test]
fn whatever_goes_on_each_request_is_answered_once_and_right() {
    let rounds = std::env::var("STORM").map_or(1, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        for kind in 0..8 {
            let engine = if kind & 1 == 0 { Engine::Auto } else { Engine::Plain };
            storm(kind & 4 != 0, engine, kind & 2 != 0, 1000, round * 100 + 7);
        }
    }
}
