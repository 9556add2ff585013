//! Random sequences of everything that an image can do.

use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::image::RunKind;

const SIZE: u64 = 40 * CLUSTER + 5 * 512;

#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64, u8),
    Located(u64, u64, u8, bool),
    Discard(u64, u64),
    Zero(u64, u64, bool),
    Pull(u64, u64),
    Flush,
    Grow(u64),
    Reopen,
    /// As after `kill -9`: what was not flushed may be gone.
    Crash,
    Flatten,
}

/// A range in units of `unit`, within a disk of the size at that time.
fn range(unit: u64) -> impl Strategy<Value = (u64, u64)> {
    (0..SIZE / unit, prop_oneof![3 => 1..12_u64, 1 => 1..400_u64])
        .prop_map(move |(at, len)| (at * unit, len * unit))
}

fn any_range() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![range(512), range(SUB), range(SUB), range(CLUSTER)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (any_range(), 1_u8..).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        6 => (any_range(), 1_u8.., prop::bool::weighted(0.9))
            .prop_map(|((at, len), byte, ok)| Step::Located(at, len, byte, ok)),
        3 => any_range().prop_map(|(at, len)| Step::Discard(at, len)),
        3 => (any_range(), any::<bool>()).prop_map(|((at, len), unmap)| Step::Zero(at, len, unmap)),
        2 => any_range().prop_map(|(at, len)| Step::Pull(at, len)),
        3 => Just(Step::Flush),
        1 => (0..20_u64).prop_map(|sectors| Step::Grow(sectors * 512 * 37)),
        2 => Just(Step::Reopen),
        1 => Just(Step::Crash),
        1 => Just(Step::Flatten),
    ]
}

/// Takes over what a discard has left: of each sector zeroes or its bytes.
fn discarded(model: &mut [u8], found: &[u8]) {
    for (old, found) in model.chunks_mut(512).zip(found.chunks(512)) {
        assert!(found == [0; 512] || found == old);
        old.copy_from_slice(found);
    }
}

/// Does `steps` to an image and to the model alike.
fn run(steps: &[Step], backing_size: Option<u64>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("top");
    let below: Option<Arc<dyn Image>> = backing_size.map(|size| {
        let base = make(&dir.path().join("base"), size);
        for at in (0..size).step_by(3 * 4096 + 512) {
            let byte = u8::try_from(at / 512 % 251).unwrap() + 1;
            write(&base, at, &vec![byte; usize::try_from((size - at).min(8192)).unwrap()]);
        }
        drop(base);
        Arc::new(Thin::open(&dir.path().join("base"), &OpenOptions::default(), None).unwrap())
            as Arc<dyn Image>
    });
    let mut backing = below.clone();
    let mut thin = match &below {
        Some(below) => make_on(&path, SIZE, below),
        None => make(&path, SIZE),
    };
    let mut model = vec![0_u8; usize::try_from(SIZE).unwrap()];
    if let Some(below) = &below {
        let len = model.len().min(usize::try_from(below.size()).unwrap());
        model[..len].copy_from_slice(&read(&**below, 0, len));
    }
    let mut flushed = thin.size();
    for step in steps {
        let size = thin.size();
        let clip = |at: u64, len: u64| (at.min(size - 512), len.min(size - at.min(size - 512)));
        let place = |at: u64, len: u64| usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
        match *step {
            Step::Write(at, len, byte) => {
                let (at, len) = clip(at, len);
                model[place(at, len)].fill(byte);
                write(&thin, at, &model[place(at, len)]);
            }
            Step::Located(at, len, byte, ok) => {
                let (at, len) = clip(at, len);
                let bytes = vec![byte; usize::try_from(len).unwrap()];
                if write_located(&thin, at, &bytes, ok) && ok {
                    model[place(at, len)].fill(byte);
                }
            }
            Step::Discard(at, len) => {
                let (at, len) = clip(at, len);
                thin.discard(at, len).unwrap();
                let found = read(&thin, at, usize::try_from(len).unwrap());
                discarded(&mut model[place(at, len)], &found);
            }
            Step::Zero(at, len, unmap) => {
                let (at, len) = clip(at, len);
                thin.write_zeroes(at, len, unmap).unwrap();
                model[place(at, len)].fill(0);
            }
            Step::Pull(at, len) => {
                let (at, len) = clip(at, len);
                thin.pull(at, len).unwrap();
            }
            Step::Flush => {
                thin.flush().unwrap();
                assert_eq!(thin.flush_is_sync_of(), Some(0));
                flushed = thin.size();
            }
            Step::Grow(by) => {
                thin.grow(size + by).unwrap();
                model.resize(usize::try_from(size + by).unwrap(), 0);
                flushed = thin.size();
            }
            Step::Reopen => {
                drop(thin);
                thin = Thin::open(&path, &writable(), backing.clone()).unwrap();
                flushed = thin.size();
            }
            Step::Crash => {
                thin.flush().unwrap();
                let half = thin.size() / 512 / 2 * 512;
                thin.discard(0, half).unwrap();
                std::mem::forget(thin);
                // The lock lives on with the file that was forgotten.
                let copy = dir.path().join("copy");
                std::fs::copy(&path, &copy).unwrap();
                std::fs::rename(&copy, &path).unwrap();
                thin = Thin::open(&path, &writable(), backing.clone()).unwrap();
                let half = usize::try_from(half).unwrap();
                discarded(&mut model[..half], &read(&thin, 0, half));
            }
            Step::Flatten => {
                thin.pull(0, thin.size()).unwrap();
                thin.set_backing(None).unwrap();
                drop(thin);
                backing = None;
                thin = Thin::open(&path, &writable(), None).unwrap();
            }
        }
        assert!(thin.size() >= flushed);
        let check = |what: &str, found: &[u8]| {
            if found == model {
                return;
            }
            if let Some(at) = (0..model.len()).find(|at| found[*at] != model[*at]) {
                panic!("{what} after {step:?}: byte {at} is {} instead of {}", found[at], model[at]);
            }
        };
        let found = read(&thin, 0, model.len());
        check("read", &found);
        if let Some(found) = read_located(&thin, 0, model.len()) {
            check("located", &found);
        }
    }
    let mut at = 0;
    while at < thin.size() {
        let run = thin.run(at, u64::MAX).unwrap();
        if run.kind == RunKind::Zero || run.kind == RunKind::Absent && backing.is_none() {
            assert!(
                model[usize::try_from(at).unwrap()..][..usize::try_from(run.len).unwrap()]
                    .iter()
                    .all(|b| *b == 0)
            );
        }
        at += run.len;
    }
    assert_eq!(at, thin.size());
    // Everything of its own gone, everything but the tree's few pages is free.
    thin.discard(0, thin.size()).unwrap();
    thin.flush().unwrap();
    let state = thin.state();
    assert_eq!(state.mapped, 0);
    let used = state.space.end - CLUSTER - (state.space.available() - (state.space.max - state.space.end));
    assert!(used <= 8 * SUB + CLUSTER, "{used} bytes are in use or lost");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn image_without_backing_is_as_the_model_says(steps in prop::collection::vec(step(), 1..40)) {
        run(&steps, None);
    }

    #[test]
    fn image_on_a_smaller_one_is_as_the_model_says(steps in prop::collection::vec(step(), 1..40)) {
        run(&steps, Some(20 * CLUSTER + 3 * 512));
    }

    #[test]
    fn image_on_a_larger_one_is_as_the_model_says(steps in prop::collection::vec(step(), 1..40)) {
        run(&steps, Some(SIZE + 10 * CLUSTER));
    }
}
