//! Images that may not grow any further.

use std::io::ErrorKind;

use super::*;

const MAX: u64 = 20 * CLUSTER;

fn limited(path: &Path, max: u64) -> Thin {
    create(path, &Create { max_size: Some(max), ..Create::new(1 << 40) }).unwrap();
    Thin::open(path, &writable(), None).unwrap()
}

/// Fills it with clusters far from each other, so that each has its own L2 page, and tells how many there were.
fn fill(thin: &Thin, distance: u64) -> u64 {
    for index in 0..1000 {
        let bytes = vec![u8::try_from(index % 255).unwrap() + 1; 4096];
        if write_located(thin, index * distance, &bytes, true) {
            continue;
        }
        match try_write(thin, index * distance, &bytes) {
            Ok(()) => {}
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::QuotaExceeded);
                return index;
            }
        }
    }
    panic!("the limit was never met");
}

#[test]
fn full_image_keeps_what_it_has_and_goes_on_once_there_is_room() {
    for distance in [CLUSTER, 512 * CLUSTER, 256 * 512 * CLUSTER] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let mut thin = limited(&path, MAX);
        let count = fill(&thin, distance);
        assert!(count >= 5, "{count} clusters");
        let check = |thin: &Thin, gone: u64| {
            for index in 0..count {
                let byte = if index < gone { 0 } else { u8::try_from(index % 255).unwrap() + 1 };
                assert_eq!(read(thin, index * distance, 4096), vec![byte; 4096], "cluster {index}");
            }
            assert_eq!(read(thin, count * distance, 4096), [0; 4096]);
        };
        check(&thin, 0);
        thin.flush().unwrap();
        drop(thin);
        assert!(std::fs::metadata(&path).unwrap().len() <= MAX);
        thin = Thin::open(&path, &writable(), None).unwrap();
        check(&thin, 0);
        // In place there is always room, again and again with flushes between.
        for round in 0..20 {
            assert!(write_located(&thin, 0, &[1; 4096], true) || try_write(&thin, 0, &[1; 4096]).is_ok());
            thin.flush().unwrap();
            let fresh = try_write(&thin, count * distance, &[9; 4096]);
            assert_eq!(fresh.unwrap_err().kind(), ErrorKind::QuotaExceeded, "round {round}");
        }
        // What is discarded makes room for as much.
        for index in 0..3 {
            thin.discard(index * distance, CLUSTER).unwrap();
        }
        check(&thin, 3);
        write(&thin, (count + 1) * distance, &[7; 4096]);
        thin.flush().unwrap();
        assert_eq!(read(&thin, (count + 1) * distance, 4096), [7; 4096]);
        check(&thin, 3);
        // And so does a higher limit.
        assert!(thin.set_max_size(Some(CLUSTER)).is_err());
        thin.set_max_size(Some(2 * MAX)).unwrap();
        write(&thin, (count + 2) * distance, &[8; 4096]);
        thin.set_max_size(None).unwrap();
        for index in 0..100 {
            write(&thin, (count + 3 + index) * distance, &[8; 4096]);
        }
        drop(thin);
        let thin = Thin::open(&path, &OpenOptions::default(), None).unwrap();
        check(&thin, 3);
        assert_eq!(thin.info().unwrap().max_size, None);
    }
}

#[test]
fn all_of_a_full_image_can_be_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let thin = limited(&dir.path().join("a"), MAX);
    let distance = 512 * CLUSTER;
    let count = fill(&thin, distance);
    thin.discard(0, thin.size()).unwrap();
    assert_eq!(read(&thin, (count - 1) * distance, 4096), [0; 4096]);
    assert_eq!(fill(&thin, distance), count);
}

#[test]
fn write_of_several_clusters_that_does_not_fit_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let thin = limited(&dir.path().join("a"), MAX);
    write(&thin, 0, &[1; 4096]);
    let large = vec![2; usize::try_from(2 * MAX).unwrap()];
    assert_eq!(try_write(&thin, 0, &large).unwrap_err().kind(), ErrorKind::QuotaExceeded);
    assert_eq!(read(&thin, 0, 8192), [[1; 4096], [0; 4096]].concat());
}

/// The root of 1 PiB takes 2 MiB, and each commit writes it anew.
#[test]
fn largest_disk_under_a_limit_takes_no_more_than_it_can_flush() {
    let size = 1 << 50;
    for clusters in [8, 40, 73, 80, 120] {
        let mut bytes = crate::thin::forge::empty(size, 16, clusters * CLUSTER);
        bytes.resize(usize::try_from(CLUSTER).unwrap(), 0);
        let memory = crate::thin::memory::Memory::new(&bytes);
        let thin = Thin::open_on(Box::new(memory.clone()), Path::new("memory"), true, None).unwrap();
        let mut written = 0;
        while try_write(&thin, written * (1 << 35), &[7; 4096]).is_ok() {
            written += 1;
            thin.flush().unwrap();
        }
        assert!(written > 0 || clusters < 72, "{clusters} clusters");
        thin.flush().unwrap();
        drop(thin);
        let again = Thin::open_on(Box::new(memory), Path::new("memory"), true, None).unwrap();
        for index in 0..written {
            assert_eq!(read(&again, index * (1 << 35), 4096), [7; 4096]);
            // What is there can be changed and given back.
            write(&again, index * (1 << 35), &[8; 512]);
        }
        again.discard(0, size).unwrap();
        again.flush().unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let create_with =
        |max| create(&dir.path().join("a"), &Create { max_size: Some(max), ..Create::new(size) });
    assert!(matches!(create_with(8 * CLUSTER), Err(crate::Error::Invalid { .. })));
    create_with(72 * CLUSTER).unwrap();
}
