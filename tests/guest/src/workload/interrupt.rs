//! Interrupts: how long they take.

use core::sync::atomic::Ordering;

use crate::histogram::Histogram;
use crate::json::Line;
use crate::virtio::rng::Rng;
use crate::{Error, Machine, apic, cpu, interrupts};

/// `test=irq`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let clock = machine.clock;
    let count = machine.args.number("count", 1000)?;
    let via = machine.args.choice("via", &["rng", "ipi"])?;
    let mut times = Histogram::new();
    let received = if via == "rng" {
        let mut rng = Rng::open(&machine.args, 8, true)?;
        for _ in 0..count {
            let start = cpu::tsc();
            rng.read_by_interrupt()?;
            times.add(cpu::tsc() - start);
        }
        rng.device().interrupts()
    } else {
        apic::take_interrupts();
        let own = apic::id();
        let counter = interrupts::counter(interrupts::CALL);
        for seen in 0..count {
            let start = cpu::tsc();
            apic::send(own, apic::delivery::FIXED, interrupts::CALL);
            interrupts::wait(interrupts::CALL, seen);
            times.add(cpu::tsc() - start);
        }
        counter.load(Ordering::Relaxed)
    };
    let mut line = Line::result("irq");
    line.text("via", via).number("interrupts", received);
    times.report(&mut line, |cycles| clock.ns(cycles));
    line.send();
    Ok(())
}
