//! Input of the serial port.

use crate::json::Line;
use crate::{Error, Machine, apic, interrupts, serial};

const END: &[u8] = b"end\n";

/// `test=serial-echo`
pub fn run(_: &Machine) -> Result<(), Error> {
    let vector = apic::route(serial::IRQ).ok_or("the I/O APIC has no input for the serial port")?;
    apic::take_interrupts();
    serial::interrupt_on_input();
    Line::new("ready").send();
    let (mut received, mut sum) = (0_u64, 0_u64);
    // How much of END the latest bytes are.
    let mut matched = 0;
    loop {
        let seen = interrupts::counter(vector).load(core::sync::atomic::Ordering::Acquire);
        while let Some(byte) = serial::get() {
            serial::put(byte);
            received += 1;
            sum = sum.wrapping_add(byte.into());
            let byte = if byte == b'\r' { b'\n' } else { byte };
            matched = if byte == END[matched] { matched + 1 } else { usize::from(byte == END[0]) };
            if matched == END.len() {
                Line::result("serial-echo").number("bytes", received).number("sum", sum).send();
                return Ok(());
            }
        }
        interrupts::wait(vector, seen);
    }
}
