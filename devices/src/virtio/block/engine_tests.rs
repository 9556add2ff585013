//! How requests are carried out: at once, by io_uring, by calls that wait; limits, errors that wait, and being held.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};
use vmfs_image::{Cache, OpenOptions, flat, thin};

use super::tests::{Fake, SECTORS, header, range, status, write_one};
use super::*;
use crate::virtio::block::options::{BlockEvents, Engine, Limits, OnError};
use crate::virtio::test_driver::{Buffer, Driver};

const DISK: u64 = SECTORS * SECTOR;
const PATIENCE: Duration = Duration::from_secs(30);
/// For what is not to happen.
const WHILE: Duration = Duration::from_millis(50);

/// Kinds of image.
#[derive(Debug, Clone, Copy)]
enum Kind {
    Flat,
    FlatDirect,
    Thin,
    ThinDirect,
    Overlay,
}

const KINDS: [Kind; 5] = [Kind::Flat, Kind::FlatDirect, Kind::Thin, Kind::ThinDirect, Kind::Overlay];

fn writable(cache: Cache) -> OpenOptions {
    OpenOptions { writable: true, cache, ..OpenOptions::default() }
}

/// A disk of zeroes; an overlay lies on one of ones.
fn make(dir: &Path, kind: Kind) -> Arc<dyn Image> {
    let path = dir.join("disk.img");
    let cache =
        if matches!(kind, Kind::FlatDirect | Kind::ThinDirect) { Cache::None } else { Cache::Writeback };
    match kind {
        Kind::Flat | Kind::FlatDirect => flat::create(&path, DISK, flat::Preallocate::Sparse).unwrap(),
        Kind::Thin | Kind::ThinDirect => thin::create(&path, &thin::Create::new(DISK)).unwrap(),
        Kind::Overlay => {
            let below = dir.join("base.img");
            std::fs::write(&below, vec![1; usize::try_from(DISK).unwrap()]).unwrap();
            let base = vmfs_image::open(&below, &OpenOptions::default()).unwrap();
            let noted = (PathBuf::from("base.img"), base.format(), base.identity().unwrap());
            thin::create(&path, &thin::Create { backing: Some(noted), ..thin::Create::new(DISK) }).unwrap();
        }
    }
    vmfs_image::open(&path, &writable(cache)).unwrap()
}

fn start(image: Arc<dyn Image>, options: BlockOptions) -> (Driver, BlockControl) {
    let (block, control) = Block::new(image, options);
    (Driver::new(Box::new(block)), control)
}

/// For a driver that knows no flush.
fn start_without_flush(image: Arc<dyn Image>, options: BlockOptions) -> (Driver, BlockControl) {
    let (block, control) = Block::new(image, options);
    let features = block.features() & !(1 << VIRTIO_BLK_F_FLUSH);
    (Driver::with_features(Box::new(block), features), control)
}

#[derive(Debug, Clone)]
enum Step {
    Write {
        queue: u16,
        sector: u64,
        count: u64,
        byte: u8,
    },
    Read {
        queue: u16,
        sector: u64,
        count: u64,
    },
    Zero {
        queue: u16,
        sector: u64,
        count: u64,
        unmap: bool,
    },
    Discard {
        queue: u16,
        sector: u64,
        count: u64,
    },
    Flush {
        queue: u16,
    },
    /// What is in the page cache is gone.
    Forget,
    /// The disk is drained, and goes on.
    Drain,
}

fn step() -> impl Strategy<Value = Step> {
    let place = || {
        // Often whole sub-clusters.
        let unit = prop_oneof![Just(1_u64), Just(8), Just(8)];
        (unit, 0..SECTORS / 8, 1..10_u64).prop_map(|(unit, at, count)| {
            let sector = at * unit;
            (sector, (count * unit).min(SECTORS - sector))
        })
    };
    let queue = 0..3_u16;
    prop_oneof![
        6 => (queue.clone(), place(), any::<u8>()).prop_map(|(queue, (sector, count), byte)| Step::Write {
            queue, sector, count, byte
        }),
        6 => (queue.clone(), place()).prop_map(|(queue, (sector, count))| Step::Read { queue, sector, count }),
        1 => (queue.clone(), place(), any::<bool>()).prop_map(|(queue, (sector, count), unmap)| Step::Zero {
            queue, sector, count, unmap
        }),
        1 => (queue.clone(), place()).prop_map(|(queue, (sector, count))| Step::Discard {
            queue, sector, count
        }),
        1 => queue.prop_map(|queue| Step::Flush { queue }),
        1 => Just(Step::Forget),
        1 => Just(Step::Drain),
    ]
}

fn bytes(sectors: u64) -> usize {
    usize::try_from(sectors * SECTOR).unwrap()
}

fn forget(image: &dyn Image) {
    for file in image.files() {
        file.sync_all().unwrap();
        // SAFETY: no memory is involved.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    }
}

fn run(kind: Kind, engine: Engine, flushes: bool, steps: &[Step]) {
    let dir = tempfile::tempdir().unwrap();
    let image = make(dir.path(), kind);
    let first = if matches!(kind, Kind::Overlay) { 1 } else { 0 };
    let mut model = vec![first; usize::try_from(DISK).unwrap()];
    let start = if flushes { start } else { start_without_flush };
    let (mut driver, control) =
        start(image.clone(), BlockOptions { queues: 3, engine, ..BlockOptions::default() });
    for step in steps {
        let place = |sector: u64, count: u64| bytes(sector)..bytes(sector + count);
        match *step {
            Step::Write { queue, sector, count, byte } => {
                let data = vec![byte; bytes(count)];
                model[place(sector, count)].fill(byte);
                let used = driver.transfer(queue, &[header(1, sector), Buffer::Read(data), Buffer::Write(1)]);
                assert_eq!((status(&used), used.len), (0, 1));
            }
            Step::Read { queue, sector, count } => {
                let len = u32::try_from(bytes(count)).unwrap();
                // In two pieces, of which the second begins where it likes.
                let cut = len / 2 / 8 * 8;
                let buffers =
                    [header(0, sector), Buffer::Write(cut), Buffer::Write(len - cut), Buffer::Write(1)];
                let used = driver.transfer(queue, &buffers);
                assert_eq!((status(&used), used.len), (0, len + 1));
                assert!(used.written[..bytes(count)] == model[place(sector, count)], "{step:?}");
            }
            Step::Zero { queue, sector, count, unmap } => {
                let ranges = range(sector, u32::try_from(count).unwrap(), unmap.into());
                let used = driver.transfer(queue, &[header(13, 0), ranges, Buffer::Write(1)]);
                assert_eq!(status(&used), 0);
                model[place(sector, count)].fill(0);
            }
            Step::Discard { queue, sector, count } => {
                let ranges = range(sector, u32::try_from(count).unwrap(), 0);
                let used = driver.transfer(queue, &[header(11, 0), ranges, Buffer::Write(1)]);
                assert_eq!(status(&used), 0);
                // What is left there is up to the image.
                let len = u32::try_from(bytes(count)).unwrap();
                let used = driver.transfer(queue, &[header(0, sector), Buffer::Write(len), Buffer::Write(1)]);
                model[place(sector, count)].copy_from_slice(&used.written[..bytes(count)]);
            }
            Step::Flush { queue } => {
                assert_eq!(status(&driver.transfer(queue, &[header(4, 0), Buffer::Write(1)])), 0);
            }
            Step::Forget => forget(&*image),
            Step::Drain => {
                control.drain();
                control.resume();
            }
        }
    }
    let counters = control.counters();
    let count = |wanted: fn(&Step) -> bool| steps.iter().filter(|step| wanted(step)).count() as u64;
    assert_eq!(counters.errors, 0);
    assert_eq!(counters.writes, count(|step| matches!(step, Step::Write { .. })));
    assert_eq!(counters.flushes, count(|step| matches!(step, Step::Flush { .. })));
    drop(driver);
    assert_eq!(Arc::strong_count(&image), 2, "nobody but the control has it still");
    drop((control, image));
    let again = vmfs_image::open(&dir.path().join("disk.img"), &OpenOptions::default()).unwrap();
    let mut seen = vec![0xee; model.len()];
    again.read_at(0, &[vm_memory::VolatileSlice::from(&mut seen[..])]).unwrap();
    assert!(seen == model);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_image_holds_what_was_written_by_whatever_way(
        kind in prop::sample::select(&KINDS[..]), plain in prop::bool::weighted(0.25),
        flushes in prop::bool::weighted(0.7),
        steps in prop::collection::vec(step(), 1..60),
    ) {
        run(kind, if plain { Engine::Plain } else { Engine::Auto }, flushes, &steps);
    }
}

/// Makes `count` requests at once, each for a block of its own, with chains of three descriptors.
fn burst(driver: &mut Driver, write: bool, count: u16) {
    const AT: u64 = 0x20_0000;
    for n in 0..count {
        let base = AT + u64::from(n) * 0x2000;
        let mut head = [0_u8; 16];
        head[0] = write.into();
        head[8..].copy_from_slice(&(u64::from(n) * 8).to_le_bytes());
        driver.memory.write_slice(&head, GuestAddress(base)).unwrap();
        driver.memory.write_obj(0xff_u8, GuestAddress(base + 16)).unwrap();
        if write {
            driver
                .memory
                .write_slice(&[u8::try_from(n).unwrap() + 1; 4096], GuestAddress(base + 0x1000))
                .unwrap();
        }
        let first = n * 3;
        driver.descriptor(0, first, Descriptor::new(base, 16, 1, first + 1));
        let data = Descriptor::new(base + 0x1000, 4096, if write { 1 } else { 3 }, first + 2);
        driver.descriptor(0, first + 1, data);
        driver.descriptor(0, first + 2, Descriptor::new(base + 16, 1, 2, 0));
        driver.offer(0, first);
    }
    driver.kick(0);
    for _ in 0..count {
        let (head, len) = driver.wait_used(0, PATIENCE).expect("every request is answered");
        let n = u16::try_from(head).unwrap() / 3;
        let base = AT + u64::from(n) * 0x2000;
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(base + 16)).unwrap(), 0);
        assert_eq!(len, if write { 1 } else { 4097 });
        if !write {
            let mut data = [0; 4096];
            driver.memory.read_slice(&mut data, GuestAddress(base + 0x1000)).unwrap();
            assert!(data == [u8::try_from(n).unwrap() + 1; 4096]);
        }
    }
}

#[test]
fn requests_at_the_same_time_are_answered_each_with_its_own_data() {
    for kind in KINDS {
        for engine in [Engine::Auto, Engine::Plain] {
            let dir = tempfile::tempdir().unwrap();
            let image = make(dir.path(), kind);
            let (mut driver, control) =
                start(image.clone(), BlockOptions { engine, ..BlockOptions::default() });
            for round in 0..20 {
                burst(&mut driver, true, 5);
                if round % 3 == 0 {
                    forget(&*image);
                }
                burst(&mut driver, false, 5);
            }
            let counters = control.counters();
            assert_eq!(
                (counters.reads, counters.writes, counters.errors),
                (100, 100, 0),
                "{kind:?} {engine:?}"
            );
            assert_eq!(control.engine(), if engine == Engine::Plain { "plain" } else { "io_uring" });
        }
    }
}

#[test]
fn writes_of_a_driver_that_knows_no_flush_are_answered_whatever_the_way() {
    for kind in KINDS {
        for engine in [Engine::Auto, Engine::Plain] {
            let dir = tempfile::tempdir().unwrap();
            let image = make(dir.path(), kind);
            let (mut driver, control) =
                start_without_flush(image.clone(), BlockOptions { engine, ..BlockOptions::default() });
            burst(&mut driver, true, 5);
            burst(&mut driver, true, 5);
            burst(&mut driver, false, 5);
            assert_eq!(
                (control.counters().writes, control.counters().flushes),
                (10, 0),
                "{kind:?} {engine:?}"
            );
        }
    }
}

#[derive(Debug, Default)]
struct Told(Mutex<Vec<String>>);

impl BlockEvents for Told {
    fn stopped(&self, why: &str) {
        self.0.lock().unwrap().push(why.to_owned());
    }
}

fn wait_for(what: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn offer_write(driver: &mut Driver, sector: u64, data: Vec<u8>) {
    driver.chain(0, &[header(1, sector), Buffer::Read(data), Buffer::Write(1)]);
    driver.offer(0, 0);
    driver.kick(0);
}

#[test]
fn image_at_its_limit_holds_the_guests_writes_until_there_is_room() {
    for engine in [Engine::Auto, Engine::Plain] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let max_size = Some(12 << 16);
        thin::create(&path, &thin::Create { max_size, ..thin::Create::new(DISK) }).unwrap();
        let image = vmfs_image::open(&path, &writable(Cache::Writeback)).unwrap();
        let told = Arc::new(Told::default());
        let options = BlockOptions { events: told.clone(), engine, ..BlockOptions::default() };
        let (mut driver, control) = start(image.clone(), options);
        let mut written = 0;
        let held = loop {
            let sector = written * 128;
            assert!(sector < SECTORS, "the limit was never met");
            offer_write(&mut driver, sector, vec![7; 65_536]);
            let end = Instant::now() + PATIENCE;
            while control.waiting().is_none() && control.counters().writes == written {
                assert!(Instant::now() < end);
                std::thread::yield_now();
            }
            match control.waiting() {
                Some(why) => break why,
                None => assert!(driver.wait_used(0, PATIENCE).is_some()),
            }
            written += 1;
        };
        assert!(held.contains("max_size") && held.contains("disk.img"), "{held}");
        assert_eq!(*told.0.lock().unwrap(), [held]);
        assert!(driver.wait_used(0, WHILE).is_none());
        // In vain: it is tried, and waits again, of which somebody is told again.
        control.retry();
        wait_for(|| told.0.lock().unwrap().len() == 2);
        assert!(control.waiting().is_some());
        image.as_thin().unwrap().set_max_size(None).unwrap();
        control.retry();
        assert!(driver.wait_used(0, PATIENCE).is_some());
        assert_eq!((control.waiting(), control.counters().errors), (None, 0));
        let used = driver.transfer(0, &[header(0, written * 128), Buffer::Write(65_536), Buffer::Write(1)]);
        assert!(status(&used) == 0 && used.written[..65_536] == [7; 65_536]);
    }
}

fn fake(on_error: OnError) -> (Arc<Fake>, Driver, BlockControl) {
    let image = Arc::new(Fake::default());
    let (driver, control) = start(image.clone(), BlockOptions { on_error, ..BlockOptions::default() });
    (image, driver, control)
}

#[test]
fn errors_wait_where_that_is_wanted_and_requests_behind_them_too() {
    let (disk, mut driver, control) = fake(OnError::Pause);
    assert_eq!(write_one(&mut driver), 0);
    disk.fail_data.store(true, Ordering::SeqCst);
    offer_write(&mut driver, 0, vec![1; 512]);
    wait_for(|| control.waiting().is_some());
    // One that would succeed stays behind.
    driver.offer(0, 0);
    driver.kick(0);
    assert!(driver.wait_used(0, WHILE).is_none());
    disk.fail_data.store(false, Ordering::SeqCst);
    // Being held in between makes no difference.
    control.drain();
    control.resume();
    assert!(driver.wait_used(0, WHILE).is_none());
    control.retry();
    assert!(driver.wait_used(0, PATIENCE).is_some() && driver.wait_used(0, PATIENCE).is_some());
    assert_eq!((control.waiting(), control.counters().errors), (None, 0));
}

#[test]
fn what_a_guest_may_not_ask_for_is_told_it_and_does_not_wait() {
    let (_, mut driver, control) = fake(OnError::Pause);
    let used = driver.transfer(0, &[header(1, SECTORS), Buffer::Read(vec![1; 512]), Buffer::Write(1)]);
    assert_eq!((status(&used), control.waiting()), (1, None));
}

#[test]
fn flush_that_failed_is_told_and_does_not_wait_to_succeed_without_what_was_lost() {
    let (disk, mut driver, control) = fake(OnError::Pause);
    disk.fail_flush.store(true, Ordering::SeqCst);
    let used = driver.transfer(0, &[header(4, 0), Buffer::Write(1)]);
    assert_eq!((status(&used), control.waiting(), control.counters().errors), (1, None, 1));
}

#[test]
fn driver_that_resets_its_disk_leaves_nothing_waiting() {
    let (disk, mut driver, control) = fake(OnError::Pause);
    disk.fail_data.store(true, Ordering::SeqCst);
    offer_write(&mut driver, 0, vec![1; 512]);
    wait_for(|| control.waiting().is_some());
    driver.device.reset();
    assert_eq!(control.waiting(), None);
}

#[test]
fn another_medium_gets_what_waits_and_nobody_keeps_the_one_before() {
    let (disk, mut driver, control) = fake(OnError::Pause);
    disk.fail_data.store(true, Ordering::SeqCst);
    offer_write(&mut driver, 8, vec![9; 512]);
    wait_for(|| control.waiting().is_some());
    let dir = tempfile::tempdir().unwrap();
    let image = make(dir.path(), Kind::Flat);
    drop(control.swap(image.clone()).unwrap());
    assert!(driver.wait_used(0, PATIENCE).is_some());
    assert_eq!(Arc::strong_count(&disk), 1);
    let mut seen = [0; 512];
    image.files()[0].read_exact_at(&mut seen, 8 * 512).unwrap();
    assert_eq!(seen, [9; 512]);
    let readonly = vmfs_image::open(&dir.path().join("disk.img"), &OpenOptions::default());
    assert!(readonly.is_err(), "it is locked");
}

#[test]
fn drained_disk_begins_nothing_and_lets_go_of_its_image() {
    let dir = tempfile::tempdir().unwrap();
    let image = make(dir.path(), Kind::Thin);
    let (mut driver, control) = start(image.clone(), BlockOptions::default());
    burst(&mut driver, true, 5);
    control.drain();
    assert_eq!(Arc::strong_count(&image), 2, "the disk's own and this");
    offer_write(&mut driver, 0, vec![1; 512]);
    assert!(driver.wait_used(0, WHILE).is_none());
    control.resume();
    assert!(driver.wait_used(0, PATIENCE).is_some());
}

#[test]
fn limits_hold_requests_and_other_limits_let_them_go() {
    // So few that no test is as slow.
    let slow = Limits { iops: None, bytes_per_second: Some(1), burst: Duration::ZERO };
    let (_, mut driver, control) = fake(OnError::Report);
    control.set_limits(slow);
    assert_eq!(control.limits(), slow);
    assert_eq!(write_one(&mut driver), 0);
    offer_write(&mut driver, 0, vec![1; 512]);
    assert!(driver.wait_used(0, WHILE).is_none());
    // A pause ends though something waits, and the end of a disk does not wait either.
    control.drain();
    control.resume();
    assert!(driver.wait_used(0, WHILE).is_none());
    control.set_limits(Limits::default());
    assert!(driver.wait_used(0, PATIENCE).is_some());
    control.set_limits(slow);
    assert_eq!(write_one(&mut driver), 0);
    offer_write(&mut driver, 0, vec![1; 512]);
}

#[test]
fn requests_held_by_a_limit_go_on_by_themselves() {
    let (_, mut driver, control) = fake(OnError::Report);
    control.set_limits(Limits { iops: Some(200), bytes_per_second: None, burst: Duration::ZERO });
    let began = Instant::now();
    for _ in 0..11 {
        assert_eq!(write_one(&mut driver), 0);
    }
    // Ten waits of 5 ms each; never less, however slow the machine is.
    assert!(began.elapsed() >= Duration::from_millis(50));
}

/// Makes `io_uring_setup` fail for this thread and those that it starts, as a filter of system calls does.
fn refuse_io_uring() {
    let load_number = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
    let is_setup =
        libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: u32::try_from(libc::SYS_io_uring_setup).unwrap() };
    let answer = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
    let refuse = answer(libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs());
    let mut program = [load_number, is_setup, refuse, answer(libc::SECCOMP_RET_ALLOW)];
    let program = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: the calls take integers, and a program that outlives them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

#[test]
fn where_io_uring_is_refused_plain_calls_do_it_and_the_disk_says_so() {
    let refused = || {
        refuse_io_uring();
        for kind in KINDS {
            let dir = tempfile::tempdir().unwrap();
            let options = BlockOptions { queues: 2, ..BlockOptions::default() };
            let (mut driver, control) = start(make(dir.path(), kind), options);
            burst(&mut driver, true, 5);
            burst(&mut driver, false, 5);
            assert_eq!(control.engine(), "plain");
        }
    };
    std::thread::spawn(refused).join().unwrap();
}
