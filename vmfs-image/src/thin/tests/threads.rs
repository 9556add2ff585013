//! Many at once.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const PART: u64 = 8 * CLUSTER;

/// Each thread has sectors of its own, mixed with those of the others in every cluster and every sub-cluster.
#[test]
fn threads_that_write_neighbouring_sectors_find_what_they_wrote() {
    const THREADS: u64 = 4;
    let dir = tempfile::tempdir().unwrap();
    let base: Arc<dyn Image> = {
        let base = make(&dir.path().join("base"), PART);
        write(&base, 0, &vec![0xbb; usize::try_from(PART).unwrap()]);
        drop(base);
        Arc::new(Thin::open(&dir.path().join("base"), &OpenOptions::default(), None).unwrap())
    };
    for round in 0..4_u64 {
        let path = dir.path().join(format!("top{round}"));
        let top = make_on(&path, PART, &base);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let (top, stop) = (&top, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    top.flush().unwrap();
                }
            });
            scope.spawn(move || {
                for at in (0..PART).step_by(4096 * 3) {
                    top.pull(at, 4096.min(PART - at)).unwrap();
                }
            });
            let writers: Vec<_> = (0..THREADS)
                .map(|thread| {
                    scope.spawn(move || {
                        let byte = u8::try_from(thread + 1).unwrap();
                        for (step, at) in (thread * 512..PART).step_by(512 * 8).enumerate() {
                            let bytes = [byte; 512];
                            match step % 5 {
                                0 => top.write_zeroes(at, 512, true).unwrap(),
                                1 if write_located(top, at, &bytes, true) => {}
                                _ => write(top, at, &bytes),
                            }
                            let wanted = if step % 5 == 0 { 0 } else { byte };
                            assert_eq!(read(top, at, 512), [wanted; 512], "at {at}");
                        }
                    })
                })
                .collect();
            for writer in writers {
                writer.join().unwrap();
            }
            stop.store(true, Ordering::Relaxed);
        });
        drop(top);
        let top = Thin::open(&path, &OpenOptions::default(), Some(Arc::clone(&base))).unwrap();
        for at in (0..PART).step_by(512) {
            let (sector, step) = (at / 512 % 8, at / 4096);
            let wanted = match sector {
                0..THREADS if step % 5 == 0 => 0,
                0..THREADS => u8::try_from(sector + 1).unwrap(),
                _ => 0xbb,
            };
            assert_eq!(read(&top, at, 512), [wanted; 512], "at {at}");
        }
    }
}

/// Space goes round between threads that fill and discard, while others hold tickets.
#[test]
fn clusters_that_are_discarded_are_not_reused_under_a_transfer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let size = 64 * CLUSTER;
    let max = 60 * CLUSTER;
    create(&path, &Create { max_size: Some(max), ..Create::new(size) }).unwrap();
    let thin = Thin::open(&path, &writable(), None).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let thin = &thin;
            scope.spawn(move || {
                let base = thread * 16 * CLUSTER;
                for round in 0..120_u64 {
                    let byte = u8::try_from(round % 250 + 1).unwrap();
                    let at = base + round * 7 % 16 * CLUSTER;
                    let bytes = vec![byte; 12 * 1024];
                    if !write_located(thin, at + 8192, &bytes, true) {
                        write(thin, at + 8192, &bytes);
                    }
                    if round % 9 == 0 {
                        thin.flush().unwrap();
                    }
                    let found = read_located(thin, at + 8192, bytes.len());
                    assert!(found.unwrap_or_else(|| read(thin, at + 8192, bytes.len())) == bytes);
                    // A read that began before the discard finds the old bytes, whatever happens in between.
                    let mut extents = Vec::new();
                    let ticket = thin.locate(at + 8192, 4096, Access::Read, &mut extents).unwrap();
                    thin.discard(base + round * 7 % 16 * CLUSTER, CLUSTER).unwrap();
                    thin.flush().unwrap();
                    let Place::File { offset, .. } = extents[0].place else { panic!("{extents:?}") };
                    let mut old = [0; 4096];
                    thin.files()[0].read_exact_at(&mut old, offset).unwrap();
                    assert!(old == [byte; 4096], "round {round}");
                    thin.finish(ticket, true);
                    assert_eq!(read(thin, at + 8192, 4096), [0; 4096]);
                }
            });
        }
    });
    thin.flush().unwrap();
    assert_eq!(thin.state().mapped, 0);
}

#[test]
fn flushes_at_the_same_time_share_commits_and_each_covers_what_was_done_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let thin = make(&path, 64 * CLUSTER);
    std::thread::scope(|scope| {
        for thread in 0..8_u64 {
            let (thin, path) = (&thin, &path);
            scope.spawn(move || {
                for round in 0..8_u64 {
                    let at = (thread * 8 + round) * CLUSTER;
                    write(thin, at, &[u8::try_from(thread + 1).unwrap(); 512]);
                    thin.flush().unwrap();
                    // What another process would find, without the lock.
                    let file = Arc::new(std::fs::File::open(path).unwrap());
                    let storage = crate::thin::storage::FileStorage::new(file, None, true);
                    let copy = Thin::open_on(Box::new(storage), path, false, None);
                    // The superblock may be being written at this moment, and what it names be given up.
                    if let Ok(copy) = copy {
                        let mut bytes = [0; 512];
                        if copy.read_at(at, &[VolatileSlice::from(&mut bytes[..])]).is_ok() {
                            assert_eq!(bytes, [u8::try_from(thread + 1).unwrap(); 512]);
                        }
                    }
                }
            });
        }
    });
    let generation = thin.state().generation;
    assert!((1..=64).contains(&generation), "{generation} commits");
}
