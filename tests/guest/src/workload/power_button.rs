//! The power button of a hardware-reduced ACPI machine, by the interrupt of its generic event device.

use core::sync::atomic::Ordering;

use crate::json::Line;
use crate::{Error, Machine, apic, cpu, interrupts};

/// Interrupt of the generic event device, and the port where it tells what happened. Both are in the bytecode of
/// the DSDT, which this program does not read.
const GSI: u32 = 9;
const EVENTS: u16 = 0x604;
const BUTTON: u8 = 1;

/// `test=button`
pub fn run(_: &Machine) -> Result<(), Error> {
    let vector = apic::route(GSI).ok_or("the I/O APIC has no input for events")?;
    apic::take_interrupts();
    Line::new("ready").send();
    let counter = interrupts::counter(vector);
    loop {
        let seen = counter.load(Ordering::Acquire);
        if cpu::in8(EVENTS) & BUTTON != 0 {
            Line::result("button").number("interrupts", seen).send();
            return Ok(());
        }
        interrupts::wait(vector, seen);
    }
}
