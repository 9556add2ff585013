use super::*;
use crate::virtio::block::SECTOR;
use crate::virtio::test_driver::{Buffer, Driver, MEMORY, SIZE, Used};
use proptest::prelude::*;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use virtio_queue::desc::split::Descriptor;
use vm_memory::VolatileSlice;
use vmfs_image::{Format, Identity, Info, OpenOptions, Run, RunKind};

pub(super) const SECTORS: u64 = 2048;

fn image() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let data: Vec<u8> = (0..SECTORS * SECTOR).map(|i| (i / SECTOR % 251) as u8).collect();
    std::fs::write(file.path(), data).unwrap();
    file
}

fn driver(image: &tempfile::NamedTempFile, readonly: bool) -> Driver {
    Driver::new(Box::new(open(image, readonly).0))
}

fn open(image: &tempfile::NamedTempFile, readonly: bool) -> (Block, BlockControl) {
    let how = OpenOptions { writable: !readonly, ..OpenOptions::default() };
    let image = vmfs_image::open(image.path(), &how).unwrap();
    Block::new(image, BlockOptions { readonly, serial: "serial-1".to_owned(), ..BlockOptions::default() })
}

pub(super) fn header(kind: u32, sector: u64) -> Buffer {
    Buffer::Read([&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat())
}

pub(super) fn range(sector: u64, sectors: u32, flags: u32) -> Buffer {
    Buffer::Read([&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat())
}

pub(super) fn status(used: &Used) -> u8 {
    *used.written.last().unwrap()
}

#[test]
fn read_returns_the_sectors_asked_for_across_several_buffers() {
    let image = image();
    let mut driver = driver(&image, false);
    let used = driver.transfer(0, &[header(0, 7), Buffer::Write(300), Buffer::Write(724), Buffer::Write(1)]);
    assert_eq!((status(&used), used.len), (0, 1025));
    assert!(used.written[..512].iter().all(|b| *b == 7) && used.written[512..1024].iter().all(|b| *b == 8));
}

#[test]
fn written_sectors_are_in_the_file_and_flush_succeeds() {
    let image = image();
    let mut driver = driver(&image, false);
    let data = vec![0xa5; 1024];
    let used = driver.transfer(0, &[header(1, 3), Buffer::Read(data.clone()), Buffer::Write(1)]);
    assert_eq!((status(&used), used.len), (0, 1));
    assert_eq!(status(&driver.transfer(0, &[header(4, 0), Buffer::Write(1)])), 0);
    let mut seen = vec![0; 1024];
    image.as_file().read_exact_at(&mut seen, 3 * SECTOR).unwrap();
    assert_eq!(seen, data);
}

#[test]
fn header_and_status_may_share_or_split_buffers() {
    let image = image();
    let mut driver = driver(&image, false);
    let Buffer::Read(bytes) = header(0, 9) else { unreachable!() };
    let parts = [Buffer::Read(bytes[..5].to_vec()), Buffer::Read(bytes[5..].to_vec()), Buffer::Write(513)];
    let used = driver.transfer(0, &parts);
    assert_eq!((status(&used), used.written[0]), (0, 9));
}

#[test]
fn requests_past_the_end_or_of_part_sectors_fail_and_change_nothing() {
    let image = image();
    let before = std::fs::read(image.path()).unwrap();
    let mut driver = driver(&image, false);
    for sector in [SECTORS, SECTORS - 1, u64::MAX, u64::MAX / SECTOR, 1 << 55] {
        for kind in [0, 1] {
            let data = if kind == 0 { Buffer::Write(1024) } else { Buffer::Read(vec![1; 1024]) };
            assert_eq!(status(&driver.transfer(0, &[header(kind, sector), data, Buffer::Write(1)])), 1);
        }
    }
    assert_eq!(status(&driver.transfer(0, &[header(1, 0), Buffer::Read(vec![1; 100]), Buffer::Write(1)])), 1);
    drop(driver);
    assert_eq!(std::fs::read(image.path()).unwrap(), before);
}

#[test]
fn largest_piece_of_a_request_is_in_the_configuration() {
    let image = image();
    let driver = driver(&image, false);
    let mut config = [0; 4];
    driver.device.read_config(8, &mut config);
    assert_eq!(u32::from_le_bytes(config), 1 << 20);
    assert_eq!(driver.device.features() >> VIRTIO_BLK_F_SIZE_MAX & 1, 1);
}

#[test]
fn read_only_disk_refuses_every_change_and_offers_the_feature() {
    let image = image();
    let before = std::fs::read(image.path()).unwrap();
    let mut driver = driver(&image, true);
    assert_eq!(driver.device.features() >> VIRTIO_BLK_F_RO & 1, 1);
    assert_eq!(status(&driver.transfer(0, &[header(1, 0), Buffer::Read(vec![1; 512]), Buffer::Write(1)])), 1);
    for kind in [11, 13] {
        assert_eq!(status(&driver.transfer(0, &[header(kind, 0), range(0, 8, 0), Buffer::Write(1)])), 1);
    }
    assert_eq!(status(&driver.transfer(0, &[header(0, 0), Buffer::Write(512), Buffer::Write(1)])), 0);
    assert_eq!(std::fs::read(image.path()).unwrap(), before);
}

#[test]
fn serial_number_is_given_padded_with_zeroes() {
    let image = image();
    let used = driver(&image, false).transfer(0, &[header(8, 0), Buffer::Write(20), Buffer::Write(1)]);
    assert_eq!((status(&used), used.len), (0, 21));
    assert_eq!(&used.written[..20], b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn discard_gives_space_back_and_write_zeroes_clears() {
    let image = image();
    let blocks = image.as_file().metadata().unwrap().blocks();
    let mut driver = driver(&image, false);
    let used = driver.transfer(0, &[header(11, 0), range(0, 1024, 0), Buffer::Write(1)]);
    assert_eq!(status(&used), 0);
    assert!(image.as_file().metadata().unwrap().blocks() < blocks);
    let used = driver.transfer(0, &[header(13, 0), range(1024, 3, 0), range(1030, 2, 1), Buffer::Write(1)]);
    assert_eq!(status(&used), 0);
    let data = std::fs::read(image.path()).unwrap();
    let zero = |sector: usize| data[sector * 512..][..512].iter().all(|b| *b == 0);
    assert!([1024, 1025, 1026, 1030, 1031].into_iter().all(zero) && !zero(1027) && !zero(1032));
}

#[test]
fn unknown_requests_flags_and_oversized_ranges_are_refused() {
    let image = image();
    let mut driver = driver(&image, false);
    assert_eq!(status(&driver.transfer(0, &[header(99, 0), Buffer::Write(1)])), 2);
    assert_eq!(status(&driver.transfer(0, &[header(13, 0), range(0, 1, 4), Buffer::Write(1)])), 2);
    assert_eq!(status(&driver.transfer(0, &[header(11, 0), range(0, 1, 1), Buffer::Write(1)])), 2);
    assert_eq!(status(&driver.transfer(0, &[header(11, 0), range(u64::MAX, 1, 0), Buffer::Write(1)])), 1);
    assert_eq!(status(&driver.transfer(0, &[header(11, 0), range(0, u32::MAX, 0), Buffer::Write(1)])), 1);
    assert_eq!(status(&driver.transfer(0, &[header(11, 0), Buffer::Read(vec![0; 15]), Buffer::Write(1)])), 1);
}

#[test]
fn capacity_is_in_the_configuration_and_reads_past_it_are_zero() {
    let image = image();
    let driver = driver(&image, false);
    let mut data = [0xff; 8];
    driver.device.read_config(0, &mut data);
    assert_eq!(u64::from_le_bytes(data), SECTORS);
    driver.device.read_config(58, &mut data);
    assert_eq!(data, [0; 8]);
    driver.device.read_config(u64::MAX, &mut data);
    assert_eq!(data, [0; 8]);
}

#[test]
fn file_cut_short_while_in_use_fails_the_read_and_not_the_device() {
    let image = image();
    let mut driver = driver(&image, false);
    image.as_file().set_len(1024).unwrap();
    assert_eq!(status(&driver.transfer(0, &[header(0, 100), Buffer::Write(512), Buffer::Write(1)])), 1);
    assert_eq!(status(&driver.transfer(0, &[header(0, 0), Buffer::Write(512), Buffer::Write(1)])), 0);
}

/// Storage that counts flushes and fails at will.
#[derive(Debug, Default)]
pub(super) struct Fake {
    flushes: AtomicU64,
    pub(super) fail_data: AtomicBool,
    pub(super) fail_flush: AtomicBool,
}

impl Fake {
    fn answer(flag: &AtomicBool) -> io::Result<()> {
        if flag.load(Ordering::SeqCst) { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}

impl Image for Fake {
    fn path(&self) -> &Path {
        Path::new("fake.img")
    }
    fn format(&self) -> Format {
        Format::Flat
    }
    fn size(&self) -> u64 {
        SECTORS * SECTOR
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn is_writable(&self) -> bool {
        true
    }
    fn read_at(&self, _: u64, _: &[VolatileSlice<'_>]) -> io::Result<()> {
        Self::answer(&self.fail_data)
    }
    fn write_at(&self, _: u64, _: &[VolatileSlice<'_>]) -> io::Result<()> {
        Self::answer(&self.fail_data)
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Self::answer(&self.fail_flush)
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Self::answer(&self.fail_data)
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Self::answer(&self.fail_data)
    }
    fn run(&self, _: u64, len: u64) -> io::Result<Run> {
        Ok(Run { len, kind: RunKind::Data })
    }
    fn grow(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn info(&self) -> io::Result<Info> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn identity(&self) -> io::Result<Identity> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn fake() -> (Arc<Fake>, Block, BlockControl) {
    let image = Arc::new(Fake::default());
    let (block, control) = Block::new(image.clone(), BlockOptions::default());
    (image, block, control)
}

pub(super) fn write_one(driver: &mut Driver) -> u8 {
    status(&driver.transfer(0, &[header(1, 0), Buffer::Read(vec![1; 512]), Buffer::Write(1)]))
}

#[test]
fn driver_that_knows_no_flush_is_told_of_a_write_only_when_it_is_stable() {
    let (disk, block, _control) = fake();
    let without = block.features() & !(1 << VIRTIO_BLK_F_FLUSH);
    let mut driver = Driver::with_features(Box::new(block), without);
    assert_eq!(write_one(&mut driver), 0);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(status(&driver.transfer(0, &[header(13, 0), range(0, 1, 0), Buffer::Write(1)])), 0);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 2);
    disk.fail_flush.store(true, Ordering::SeqCst);
    assert_eq!(write_one(&mut driver), 1);
}

#[test]
fn driver_that_knows_flush_decides_itself_when_to() {
    let (disk, block, _control) = fake();
    let mut driver = Driver::new(Box::new(block));
    assert_eq!(write_one(&mut driver), 0);
    assert_eq!(disk.flushes.load(Ordering::SeqCst), 0);
    disk.fail_flush.store(true, Ordering::SeqCst);
    assert_eq!(status(&driver.transfer(0, &[header(4, 0), Buffer::Write(1)])), 1);
}

#[test]
fn failing_storage_fails_each_request_and_works_again_when_it_does() {
    let (disk, block, _control) = fake();
    let mut driver = Driver::new(Box::new(block));
    for (fail, wanted) in [(true, 1), (false, 0)] {
        disk.fail_data.store(fail, Ordering::SeqCst);
        assert_eq!(write_one(&mut driver), wanted);
        let used = driver.transfer(0, &[header(0, 0), Buffer::Write(512), Buffer::Write(1)]);
        assert_eq!(status(&used), wanted);
        for kind in [11, 13] {
            let used = driver.transfer(0, &[header(kind, 0), range(0, 8, 0), Buffer::Write(1)]);
            assert_eq!(status(&used), wanted);
        }
    }
    assert!(!driver.interrupts.needs_reset.load(Ordering::SeqCst));
}

#[test]
fn write_made_during_a_pause_reaches_the_disk_only_after_it() {
    let image = image();
    let mut driver = driver(&image, false);
    driver.device.pause();
    driver.chain(0, &[header(1, 0), Buffer::Read(vec![0xee; 512]), Buffer::Write(1)]);
    driver.offer(0, 0);
    driver.kick(0);
    assert!(driver.wait_used(0, Duration::from_millis(20)).is_none());
    assert_eq!(std::fs::read(image.path()).unwrap()[0], 0);
    driver.device.resume();
    assert!(driver.wait_used(0, Duration::from_secs(20)).is_some());
    assert_eq!(std::fs::read(image.path()).unwrap()[0], 0xee);
}

#[test]
fn available_index_that_runs_ahead_asks_for_a_reset() {
    let image = image();
    let mut driver = driver(&image, false);
    for _ in 0..2 * SIZE {
        driver.offer(0, 0);
    }
    driver.kick(0);
    let asked = (0..2000).any(|_| {
        std::thread::sleep(Duration::from_millis(5));
        driver.interrupts.needs_reset.load(Ordering::SeqCst)
    });
    assert!(asked);
}

fn descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![8 => 0x10_0000..MEMORY as u64, 1 => any::<u64>(), 1 => 0_u64..0x3000];
    let len = prop_oneof![6 => 0_u32..2000, 2 => Just(16_u32), 2 => Just(1_u32), 1 => any::<u32>()];
    (address, len, 0_u16..8, 0_u16..SIZE + 2).prop_map(|(a, l, f, n)| Descriptor::new(a, l, f, n))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn hostile_chains_are_answered_and_the_device_goes_on(
        chains in prop::collection::vec((prop::collection::vec(descriptor(), 1..6), 0_u16..SIZE, 0_u32..16), 1..12)
    ) {
        let image = image();
        let mut driver = driver(&image, false);
        for (descriptors, head, kind) in chains {
            for (index, descriptor) in (0_u16..).zip(descriptors) {
                driver.descriptor(0, index, descriptor);
            }
            // Descriptors often point here, so that requests begin like real ones.
            vm_memory::Bytes::write_obj(&*driver.memory, kind, vm_memory::GuestAddress(0x10_0000)).unwrap();
            driver.offer(0, head);
            driver.kick(0);
            prop_assert!(driver.wait_used(0, Duration::from_secs(20)).is_some(), "every chain is given back");
        }
        let used = driver.transfer(0, &[header(4, 0), Buffer::Write(1)]);
        prop_assert_eq!(status(&used), 0);
    }
}
