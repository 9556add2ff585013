//! The local APIC's timer.

use crate::histogram::Histogram;
use crate::json::Line;
use crate::{Error, Machine, apic, cpu, interrupts};

/// Time over which the timer's frequency is measured, in nanoseconds.
const MEASURED: u64 = 10_000_000;
const NS_PER_S: u64 = 1_000_000_000;

/// `test=timer`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let clock = machine.clock;
    let count = machine.args.number("count", 1000)?;
    let interval = machine.args.number("interval", 1000)?.saturating_mul(1000);
    apic::take_interrupts();
    let ticks_per_s = apic::measure_timer(clock.cycles(MEASURED)) * (NS_PER_S / MEASURED);
    let ticks =
        u32::try_from(ticks_per_s / 1000 * (interval / 1000) / 1000).map_err(|_| "interval= is too long")?;
    if ticks == 0 {
        return Err("the local APIC's timer does not run, or interval= is too short".into());
    }
    let interval = clock.cycles(interval);
    let (mut late, mut early, mut seen) = (Histogram::new(), 0, 0);
    for _ in 0..count {
        let due = cpu::tsc() + interval;
        apic::start_timer(ticks);
        seen = interrupts::wait(interrupts::TIMER, seen);
        let now = cpu::tsc();
        early += u64::from(now < due);
        late.add(now.saturating_sub(due));
    }
    let mut line = Line::result("timer");
    line.number("timer_hz", ticks_per_s).number("early", early);
    late.report(&mut line, |cycles| clock.ns(cycles));
    line.number("tsc_khz", clock.khz()).text("clock", clock.source()).send();
    Ok(())
}
