//! The other processors.

use alloc::vec::Vec;

use super::{Stopwatch, compute};
use crate::json::Line;
use crate::{Error, Machine, acpi, apic, processors};

/// `test=smp`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let others = processors::others(&machine.args)?;
    processors::start(&others, machine.clock, compute::count)?;
    let mut watch = Stopwatch::start(machine, Some(1))?;
    let loops: Vec<u64> = compute::count_until(&mut watch, others.len()).collect();
    let mut line = Line::result("smp");
    line.number("cpus", loops.len() as u64)
        .number("in_tables", acpi::processors().len() as u64)
        .numbers("apic_ids", core::iter::once(apic::id()).chain(others).map(u64::from))
        .flag("all_count", loops.iter().all(|loops| *loops > 0))
        .numbers("loops", loops);
    watch.report(&mut line);
    line.send();
    Ok(())
}
