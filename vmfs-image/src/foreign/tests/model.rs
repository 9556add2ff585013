//! Random changes, against a model in memory.

use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;

use super::qemu::{qemu_img, sample, try_qemu_img};
use crate::image::{Image, RunKind};
use crate::open::{Cache, OpenOptions};
use crate::test_image::{contents, read, write};

fn open(path: &Path, cache: Cache) -> Arc<dyn Image> {
    crate::open(path, &OpenOptions { writable: true, cache, ..OpenOptions::default() }).unwrap()
}

/// Runs are as long as the disk together, and what is zero or absent without a backing reads as zeroes.
fn check_runs(image: &dyn Image, model: &[u8]) {
    let mut at = 0;
    while at < image.size() {
        let run = image.run(at, image.size() - at).unwrap();
        let range = usize::try_from(at).unwrap()..usize::try_from(at + run.len).unwrap();
        if run.kind == RunKind::Zero || run.kind == RunKind::Absent && image.backing().is_none() {
            assert!(model[range].iter().all(|byte| *byte == 0), "{run:?} at {at}");
        }
        at += run.len;
    }
    assert_eq!(at, image.size());
}

#[derive(Debug, Clone)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    Flush,
    Freeze,
    Reopen,
    Grow(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let place = || (0..4096_u64, prop_oneof![4 => 1..16_u64, 1 => 16..1024_u64]);
    prop_oneof![
        8 => (place(), 1..=255_u8).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        3 => (place(), any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero(at, len, unmap)),
        3 => place().prop_map(|(at, len)| Op::Discard(at, len)),
        2 => Just(Op::Flush),
        1 => Just(Op::Freeze),
        1 => Just(Op::Reopen),
        1 => (0..512_u64).prop_map(Op::Grow),
    ]
}

fn follow(options: &str, with_backing: bool, cache: Cache, ops: &[Op]) {
    let dir = tempfile::tempdir_in(".").unwrap();
    let size = 4099 * 512;
    let mut model = vec![0; size];
    if with_backing {
        model = sample(size, 8);
        std::fs::write(dir.path().join("base"), &model).unwrap();
        qemu_img(dir.path(), &format!("create -q -f qcow2 -o {options} -F raw -b base image {size}"));
    } else {
        qemu_img(dir.path(), &format!("create -q -f qcow2 -o {options} image {size}"));
    }
    let path = dir.path().join("image");
    let mut image = open(&path, cache);
    for op in ops {
        let range = |at: u64, len: u64| (at * 512, len.min(image.size() / 512 - at) * 512);
        let of = |(offset, len): (u64, u64)| {
            usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap()
        };
        match *op {
            Op::Write(at, len, byte) => {
                let range = range(at, len);
                write(&*image, range.0, &vec![byte; usize::try_from(range.1).unwrap()]).unwrap();
                model[of(range)].fill(byte);
            }
            Op::Zero(at, len, unmap) => {
                let range = range(at, len);
                image.write_zeroes(range.0, range.1, unmap).unwrap();
                model[of(range)].fill(0);
            }
            Op::Discard(at, len) => {
                let range = range(at, len);
                image.discard(range.0, range.1).unwrap();
                let found = read(&*image, range.0, usize::try_from(range.1).unwrap());
                for (old, new) in model[of(range)].iter_mut().zip(found) {
                    assert!(new == *old || new == 0);
                    *old = new;
                }
            }
            Op::Flush => image.flush().unwrap(),
            Op::Freeze => {
                image.set_writable(false).unwrap();
                assert!(write(&*image, 0, &[0; 512]).is_err());
                image.set_writable(true).unwrap();
            }
            Op::Reopen => {
                drop(image);
                image = open(&path, cache);
            }
            Op::Grow(sectors) if !with_backing || model.len() >= size => {
                let new = image.size() + sectors * 512;
                image.grow(new).unwrap();
                model.resize(usize::try_from(new).unwrap(), 0);
            }
            Op::Grow(_) => {}
        }
    }
    assert!(contents(&*image) == model);
    check_runs(&*image, &model);
    drop(image);
    // Nothing is lost where nothing ended too early.
    let check = try_qemu_img(dir.path(), "check -f qcow2 image");
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    std::fs::write(dir.path().join("raw"), &model).unwrap();
    qemu_img(dir.path(), "compare -q -f qcow2 -F raw image raw");
    assert!(contents(&*open(&path, cache)) == model);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    #[ignore = "needs qemu-img"]
    fn changes_in_any_order_read_back_and_leave_what_qemu_finds_sound(
        ops in proptest::collection::vec(op(), 1..60),
        bits in 9..17_u32,
        is_old: bool,
        with_backing: bool,
        direct: bool,
    ) {
        let cache = if direct { Cache::None } else { Cache::Unsafe };
        let compat = if is_old { "0.10" } else { "1.1" };
        follow(&format!("cluster_size={},compat={compat}", 1 << bits), with_backing, cache, &ops);
    }
}

#[test]
#[ignore = "needs qemu-img"]
fn threads_at_once_do_not_mix_what_they_write() {
    const PART: u64 = 512 << 10;
    const THREADS: u64 = 4;
    for options in ["cluster_size=512", "cluster_size=64K"] {
        let dir = tempfile::tempdir().unwrap();
        qemu_img(dir.path(), &format!("create -q -f qcow2 -o {options} image {}", PART * THREADS));
        let image = open(&dir.path().join("image"), Cache::Unsafe);
        let models: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    let image = &image;
                    scope.spawn(move || {
                        let mut model = vec![0; usize::try_from(PART).unwrap()];
                        let mut state = thread * 7919 + 1;
                        for step in 0..400_u64 {
                            state = state
                                .wrapping_mul(6_364_136_223_846_793_005)
                                .wrapping_add(1_442_695_040_888_963_407);
                            // The parts lie between each other, sector by sector of 64.
                            let unit = (state >> 33) % (PART / 32768);
                            let offset = unit * 32768 * THREADS + thread * 32768;
                            let at = usize::try_from(unit * 32768).unwrap();
                            let len = usize::try_from(512 * (1 + (state >> 50) % 64)).unwrap();
                            let byte = u8::try_from(1 + step % 255).unwrap();
                            match step % 11 {
                                7 => {
                                    image.write_zeroes(offset, len as u64, true).unwrap();
                                    model[at..at + len].fill(0);
                                }
                                9 => image.flush().unwrap(),
                                10 => assert!(read(&**image, offset, len) == model[at..at + len]),
                                _ => {
                                    write(&**image, offset, &vec![byte; len]).unwrap();
                                    model[at..at + len].fill(byte);
                                }
                            }
                        }
                        model
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let found = contents(&*image);
        for (thread, model) in models.iter().enumerate() {
            for (unit, wanted) in model.chunks(32768).enumerate() {
                let offset = (unit * models.len() + thread) * 32768;
                assert!(
                    &found[offset..offset + 32768] == wanted,
                    "{options}: unit {unit} of thread {thread}"
                );
            }
        }
        drop(image);
        qemu_img(dir.path(), "check -f qcow2 image");
    }
}
