//! Processor time.

use core::arch::asm;

use crate::json::Line;
use crate::{Error, Machine, cpu};

/// Loops between two looks at the clock.
const ROUND: u64 = 100_000;

/// Runs `loops` times through the shortest loop there is, which takes one cycle of most processors.
pub fn spin(loops: u64) {
    // SAFETY: only a register changes.
    unsafe { asm!("2: dec {0}", "jnz 2b", inout(reg) loops => _, options(nomem, nostack)) };
}

/// `test=cpu`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let clock = machine.clock;
    let seconds = machine.args.number("seconds", 5)?;
    let (start, length) = (cpu::tsc(), clock.seconds(seconds));
    let (mut loops, mut gap, mut last) = (0, 0, start);
    while last - start < length {
        spin(ROUND);
        loops += ROUND;
        let now = cpu::tsc();
        gap = gap.max(now - last);
        last = now;
    }
    Line::result("cpu")
        .number("loops", loops)
        .number("loops_per_second", clock.rate(loops, last - start))
        .number("elapsed_ns", clock.ns(last - start))
        .number("gap_ns", clock.ns(gap))
        .send();
    Ok(())
}
