//! How long things take: printed, and compared with nothing.

use std::time::{Duration, Instant};

use super::*;

/// A cheap sequence of numbers (Marsaglia's xorshift).
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn time(what: &str, threads: u64, image: &dyn Image, access: Access, blocks: u64) {
    const COUNT: u64 = 2_000_000;
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            scope.spawn(move || {
                let mut extents = Vec::new();
                let mut state = 0x9e37_79b9_7f4a_7c15 + thread;
                for _ in 0..COUNT {
                    extents.clear();
                    let at = next(&mut state) % blocks * SUB;
                    let ticket = image.locate(at, SUB, access, &mut extents).unwrap();
                    image.finish(ticket, true);
                }
            });
        }
    });
    report(what, began.elapsed(), COUNT);
}

fn report(what: &str, took: Duration, count: u64) {
    println!("{what}: {:.1} ns", took.as_secs_f64() * 1e9 / f64::from(u32::try_from(count).unwrap()));
}

#[test]
#[ignore = "prints how long things take"]
fn locate_and_finish() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let size = 4_u64 << 30;
    let thin = make(&dir.path().join("a"), size);
    let blocks = (512_u64 << 20) / SUB;
    let began = Instant::now();
    for at in 0..blocks {
        let mut extents = Vec::new();
        let ticket = loop {
            match thin.locate(at * SUB, SUB, Access::Write, &mut extents) {
                Some(ticket) => break ticket,
                None => thin.lengthen(0).unwrap(),
            }
        };
        thin.finish(ticket, true);
    }
    report("write, fresh, in order", began.elapsed(), blocks);
    let began = Instant::now();
    let mut state = 1;
    for _ in 0..blocks {
        let mut extents = Vec::new();
        let at = (size / 2) + next(&mut state) % ((size / 2) / SUB) * SUB;
        match thin.locate(at, SUB, Access::Write, &mut extents) {
            Some(ticket) => thin.finish(ticket, true),
            None => thin.lengthen(0).unwrap(),
        }
    }
    report("write, fresh, anywhere", began.elapsed(), blocks);
    thin.flush().unwrap();
    for threads in [1, 2] {
        time(&format!("read, {threads} threads"), threads, &thin, Access::Read, blocks);
        time(&format!("write, {threads} threads"), threads, &thin, Access::Write, blocks);
    }
    drop(thin);
    let below: Arc<dyn Image> =
        Arc::new(Thin::open(&dir.path().join("a"), &OpenOptions::default(), None).unwrap());
    read(&*below, 0, 4096);
    for page in 0..size / (512 * CLUSTER) {
        read(&*below, page * 512 * CLUSTER, 512);
    }
    let top = make_on(&dir.path().join("b"), size, &below);
    time("read of the backing, 1 thread", 1, &top, Access::Read, blocks);
}

#[test]
#[ignore = "prints how long things take"]
fn create_and_open_of_100_gib() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let size = 100_u64 << 30;
    let base = make(&dir.path().join("base"), size);
    for at in (0..size).step_by(32 << 20) {
        write(&base, at, &[1; 4096]);
    }
    drop(base);
    for round in 0..3 {
        let began = Instant::now();
        let base: Arc<dyn Image> =
            Arc::new(Thin::open(&dir.path().join("base"), &OpenOptions::default(), None).unwrap());
        report("open of the base", began.elapsed(), 1);
        let began = Instant::now();
        let top = make_on(&dir.path().join(format!("top{round}")), size, &base);
        report("create and open of a clone", began.elapsed(), 1);
        write(&top, 0, &[2; 4096]);
        let began = Instant::now();
        top.flush().unwrap();
        report("first flush", began.elapsed(), 1);
    }
}
