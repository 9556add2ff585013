//! Ends that nobody wants.

use crate::{Error, Machine, cpu};

/// An address with neither memory nor a device: near the end of the low 4 GiB, below the firmware's place.
const NOWHERE: u64 = 0xfed8_0000;

/// `test=crash`
pub fn run(machine: &Machine) -> Result<(), Error> {
    match machine.args.choice("how", &["triple", "mmio", "fault"])? {
        "mmio" => cpu::bad_mmio(NOWHERE),
        "fault" => cpu::undefined(),
        _ => cpu::triple_fault(),
    }
    Err("the processor goes on".into())
}
