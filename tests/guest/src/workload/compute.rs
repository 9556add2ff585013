//! Processor time.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::Stopwatch;
use crate::json::Line;
use crate::{Error, Machine, processors};

/// Loops between two looks at the clock.
const ROUND: u64 = 100_000;
/// Most processors.
const MAX: usize = 64;

/// A counter on a cache line of its own.
#[repr(align(64))]
struct Counter(AtomicU64);

static LOOPS: [Counter; MAX] = [const { Counter(AtomicU64::new(0)) }; MAX];
static STOP: AtomicBool = AtomicBool::new(false);

/// Runs `loops` times through the shortest loop there is, which takes one cycle of most processors.
fn spin(loops: u64) {
    // SAFETY: only a register changes.
    unsafe { asm!("2: dec {0}", "jnz 2b", inout(reg) loops => _, options(nomem, nostack)) };
}

/// Work of another processor: counts until it is told to stop.
pub fn count(number: u64) {
    let Some(counter) = usize::try_from(number).ok().and_then(|number| LOOPS.get(number)) else { return };
    while !STOP.load(Ordering::Relaxed) {
        spin(ROUND);
        counter.0.fetch_add(ROUND, Ordering::Relaxed);
    }
}

/// Counts on this processor until `watch` ends; then stops the others and gives the loops of all, this one's first.
pub fn count_until(watch: &mut Stopwatch, others: usize) -> impl Iterator<Item = u64> {
    let mut loops = 0;
    while watch.goes_on(loops) {
        spin(ROUND);
        loops += ROUND;
    }
    LOOPS[0].0.store(loops, Ordering::Relaxed);
    STOP.store(true, Ordering::Relaxed);
    LOOPS.iter().take(1 + others).map(|counter| counter.0.load(Ordering::Relaxed))
}

/// `test=cpu`
pub fn run(machine: &Machine) -> Result<(), Error> {
    // On one processor only, unless `cpus=` says otherwise.
    let others = if machine.args.number("cpus", 1)? > 1 {
        processors::others(&machine.args)?
    } else {
        Default::default()
    };
    processors::start(&others, machine.clock, count)?;
    let mut watch = Stopwatch::start(machine, Some(5))?;
    let loops: alloc::vec::Vec<u64> = count_until(&mut watch, others.len()).collect();
    let sum = loops.iter().sum();
    let mut line = Line::result("cpu");
    line.number("loops", sum).number("loops_per_second", machine.clock.rate(sum, watch.elapsed()));
    if !others.is_empty() {
        line.numbers("loops_by_cpu", loops);
    }
    watch.report(&mut line);
    line.send();
    Ok(())
}
