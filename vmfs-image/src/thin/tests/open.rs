//! Opening, and what is refused.

use std::os::unix::fs::MetadataExt;

use super::*;
use crate::Cache;
use crate::image::Error;
use crate::thin::{peek_backing, peek_limits, peek_size, set_backing};

fn base(dir: &Path) -> Arc<dyn Image> {
    let path = dir.join("base");
    write(&make(&path, 1 << 20), 0, &[5; 8192]);
    Arc::new(Thin::open(&path, &OpenOptions::default(), None).unwrap())
}

#[test]
fn what_cannot_be_is_not_created() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let good = Create::new(1 << 20);
    let long = "x".repeat(1025).into();
    let identity = crate::Identity { size: 512, id: [0; 16], state: 0 };
    for bad in [
        Create { size: 0, ..good.clone() },
        Create { size: 513, ..good.clone() },
        Create { size: (1 << 50) + 512, ..good.clone() },
        Create { cluster_bits: 15, ..good.clone() },
        Create { cluster_bits: 22, ..good.clone() },
        Create { max_size: Some(7 * CLUSTER), ..good.clone() },
        Create { backing: Some((long, crate::Format::Flat, identity)), ..good.clone() },
        Create { backing: Some(("".into(), crate::Format::Flat, identity)), ..good.clone() },
    ] {
        assert!(matches!(create(&path, &bad), Err(Error::Invalid { .. })), "{bad:?}");
        assert!(!path.exists());
    }
    create(&path, &good).unwrap();
    assert!(matches!(create(&path, &good), Err(Error::Io { .. })));
    assert_eq!(peek_size(&path).unwrap(), 1 << 20);
    assert_eq!(peek_limits(&path).unwrap(), (CLUSTER, None));
    let limited = dir.path().join("limited");
    create(&limited, &Create { max_size: Some(9 * CLUSTER), ..good }).unwrap();
    assert_eq!(peek_limits(&limited).unwrap(), (CLUSTER, Some(9 * CLUSTER)));
}

#[test]
fn backing_that_is_missing_changed_or_another_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("top");
    let below = base(dir.path());
    drop(make_on(&path, 1 << 20, &below));
    let open = |below: Option<&Arc<dyn Image>>| Thin::open(&path, &writable(), below.cloned());
    assert_eq!(read(&open(Some(&below)).unwrap(), 0, 512), [5; 512]);
    assert!(matches!(open(None), Err(Error::Backing { .. })));
    let other: Arc<dyn Image> = Arc::new(make(&dir.path().join("other"), 1 << 20));
    assert!(matches!(open(Some(&other)), Err(Error::Backing { .. })));
    drop(below);
    write(&Thin::open(&dir.path().join("base"), &writable(), None).unwrap(), 0, &[6; 512]);
    let below: Arc<dyn Image> =
        Arc::new(Thin::open(&dir.path().join("base"), &OpenOptions::default(), None).unwrap());
    assert!(matches!(open(Some(&below)), Err(Error::Backing { .. })));
    // Until it is taken as it is now.
    let noted = peek_backing(&path).unwrap().unwrap();
    set_backing(&path, Some((&noted.path, noted.format, below.identity().unwrap()))).unwrap();
    assert_eq!(read(&open(Some(&below)).unwrap(), 0, 512), [6; 512]);
    set_backing(&path, None).unwrap();
    assert_eq!(read(&open(None).unwrap(), 0, 512), [0; 512]);
    assert_eq!(peek_backing(&path).unwrap(), None);
}

#[test]
fn image_that_is_read_is_not_touched() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let thin = make(&path, 1 << 30);
    write(&thin, 0, &[1; 4096]);
    drop(thin);
    // Space that a crash left behind the end.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[7; 4096], 100 * CLUSTER).unwrap();
    drop(file);
    let before = std::fs::read(&path).unwrap();
    let thin = Thin::open(&path, &OpenOptions::default(), None).unwrap();
    let refused = std::io::ErrorKind::PermissionDenied;
    assert_eq!(try_write(&thin, 0, &[1; 512]).unwrap_err().kind(), refused);
    assert_eq!(thin.discard(0, 4096).unwrap_err().kind(), refused);
    assert_eq!(thin.write_zeroes(0, 4096, true).unwrap_err().kind(), refused);
    assert_eq!(thin.grow(2 << 30).unwrap_err().kind(), refused);
    assert_eq!(thin.pull(0, 4096).unwrap_err().kind(), refused);
    assert!(!write_located(&thin, 0, &[1; 4096], true));
    assert_eq!(read_located(&thin, 0, 4096), None);
    assert_eq!(read(&thin, 0, 4096), [1; 4096]);
    assert_eq!(read_located(&thin, 0, 4096).unwrap(), [1; 4096]);
    thin.flush().unwrap();
    drop(thin);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    drop(Thin::open(&path, &writable(), None).unwrap());
    assert!(std::fs::metadata(&path).unwrap().len() < 100 * CLUSTER);
}

#[test]
fn ranges_outside_or_between_sectors_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let thin = make(&dir.path().join("a"), 10 * 512);
    for (at, len) in [(0, 11 * 512), (10 * 512, 512), (1, 512), (0, 511), (u64::MAX - 511, 512)] {
        let kind = std::io::ErrorKind::InvalidInput;
        assert_eq!(thin.discard(at, len).unwrap_err().kind(), kind);
        assert_eq!(thin.write_zeroes(at, len, false).unwrap_err().kind(), kind);
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        assert_eq!(thin.read_at(at, &[VolatileSlice::from(&mut bytes[..])]).unwrap_err().kind(), kind);
        assert_eq!(try_write(&thin, at, &bytes).unwrap_err().kind(), kind);
        for access in [Access::Read, Access::Write] {
            assert!(thin.locate(at, len, access, &mut Vec::new()).is_none());
        }
    }
    for size in [9 * 512, 10 * 512 + 1, u64::MAX, (1 << 50) + 512] {
        assert_eq!(thin.grow(size).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
    }
    thin.grow(1 << 50).unwrap();
    write(&thin, (1 << 50) - 512, &[3; 512]);
    thin.flush().unwrap();
    assert_eq!(read(&thin, (1 << 50) - 512, 512), [3; 512]);
}

#[test]
fn small_write_takes_a_sub_cluster_and_a_discard_gives_the_cluster_back() {
    // Beside the source, where the file system is one with holes.
    let dir = tempfile::tempdir_in(".").unwrap();
    let path = dir.path().join("a");
    let thin = make(&path, 1 << 30);
    let taken = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let before = taken();
    for at in 0..64 {
        write(&thin, at * CLUSTER, &[1; 512]);
    }
    thin.flush().unwrap();
    let after = taken();
    assert!(after - before <= 64 * SUB + 16 * SUB, "{} bytes", after - before);
    thin.discard(0, 64 * CLUSTER).unwrap();
    thin.flush().unwrap();
    assert!(taken() <= before + 16 * SUB, "{} bytes", taken() - before);
}

#[test]
fn every_cache_mode_keeps_what_was_written() {
    let dir = tempfile::tempdir_in(".").unwrap();
    for cache in [Cache::None, Cache::Writeback, Cache::Unsafe] {
        let path = dir.path().join(cache.as_str());
        create(&path, &Create::new(1 << 30)).unwrap();
        let options = OpenOptions { cache, ..writable() };
        let thin = match Thin::open(&path, &options, None) {
            Err(Error::Invalid { .. }) if cache == Cache::None => continue,
            thin => thin.unwrap(),
        };
        write(&thin, 12 * 4096, &[1; 4096]);
        write(&thin, 5 * CLUSTER + 512, &[2; 1024]);
        thin.flush().unwrap();
        assert_eq!(thin.flush_is_sync_of(), (cache != Cache::Unsafe).then_some(0));
        assert_eq!(read(&thin, 12 * 4096, 4096), [1; 4096]);
        drop(thin);
        let thin = Thin::open(&path, &OpenOptions::default(), None).unwrap();
        assert_eq!(read(&thin, 12 * 4096, 4096), [1; 4096]);
        assert_eq!(read(&thin, 5 * CLUSTER, 2048), [vec![0; 512], vec![2; 1024], vec![0; 512]].concat());
    }
}

#[test]
fn damaged_page_of_the_tree_is_an_error_where_it_is_needed_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let thin = make(&path, 1 << 40);
    let far = 1 << 39;
    write(&thin, 0, &[1; 4096]);
    write(&thin, far, &[2; 4096]);
    thin.flush().unwrap();
    let place = thin.state().tree.l1(0).unwrap().at[0].offset;
    drop(thin);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff], place + 100).unwrap();
    drop(file);
    let thin = Thin::open(&path, &writable(), None).unwrap();
    let mut bytes = [0; 512];
    for _ in 0..2 {
        let error = thin.read_at(0, &[VolatileSlice::from(&mut bytes[..])]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
        assert!(error.to_string().contains("L2 page"), "{error}");
    }
    assert!(try_write(&thin, 0, &[1; 512]).is_err());
    assert!(thin.discard(0, CLUSTER).is_err());
    assert_eq!(read(&thin, far, 4096), [2; 4096]);
    write(&thin, far + CLUSTER, &[3; 4096]);
    thin.flush().unwrap();
    assert_eq!(read(&thin, far + CLUSTER, 4096), [3; 4096]);
}

#[test]
fn pages_of_the_tree_are_forgotten_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    // Larger clusters make more disk of few bytes: not the bytes count here, but the pages.
    create(&path, &Create::new(1 << 50)).unwrap();
    let thin = Thin::open(&path, &writable(), None).unwrap();
    let count = 20_000;
    let distance = 512 * CLUSTER;
    for index in 0..count {
        let byte = u8::try_from(index % 251).unwrap() + 1;
        if !write_located(&thin, index * distance, &[byte; 4096], true) {
            write(&thin, index * distance, &[byte; 4096]);
        }
    }
    thin.flush().unwrap();
    for index in (0..count).step_by(97).chain((0..count).rev().step_by(89)) {
        let byte = u8::try_from(index % 251).unwrap() + 1;
        assert_eq!(read(&thin, index * distance, 512), [byte; 512], "at {index}");
    }
    assert!(thin.state().tree.kept() <= 16_384 + 64);
    assert_eq!(thin.state().mapped, count);
}
