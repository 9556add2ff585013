//! The test guest: one freestanding program that any monitor of x86 machines can boot, and that tests and measures
//! what it finds there. It takes its orders from the kernel command line (`test=NAME key=value …`, see
//! [`workload`]) and reports JSON lines on COM1: first `{"event":"hello",…}`, then `result`, `progress` or
//! `error` events.
//!
//! A stub in ring 0 (`ring0.s`) sets up the processor and drops to ring 3, where all the rest runs with every port
//! and all memory open to it: there is nothing to protect, and hosts that interpret ring 0 run ring 3 at full speed.

#![no_std]
#![no_main]

extern crate alloc;

mod acpi;
mod apic;
mod args;
mod boot;
mod clock;
mod cpu;
mod heap;
mod histogram;
mod interrupts;
mod json;
mod phys;
mod power;
mod processors;
mod random;
mod rt;
mod serial;
mod virtio;
mod workload;

use args::Args;
use boot::{BootInfo, Loader};
use clock::Clock;

core::arch::global_asm!(include_str!("ring0.s"));

/// What went wrong, as the `error` event says it.
type Error = alloc::string::String;

/// What a workload has to work with.
#[derive(Debug)]
struct Machine {
    boot: BootInfo,
    args: Args,
    clock: Clock,
}

/// First code in ring 3 of the first processor.
#[unsafe(no_mangle)]
extern "C" fn start(entry: u32, info: u64) -> ! {
    interrupts::open_ports();
    // The line's first byte comes before anything else, for those who time the start.
    let tsc = cpu::tsc();
    json::Line::new("hello").number("tsc", tsc).send();
    interrupts::load();
    serial::init();
    let loader = Loader::new(entry, info);
    heap::init(loader);
    let boot = BootInfo::new(loader);
    acpi::set_root(boot.rsdp);
    let args = Args::new(&boot.cmdline);
    let machine = Machine { boot, args, clock: Clock::find() };
    let end = workload::run(&machine).and_then(|()| power::End::parse(&machine.args));
    let end = end.unwrap_or_else(|error| {
        json::Line::new("error").text("test", machine.args.test()).text("message", &error).send();
        power::End::default()
    });
    power::end(end)
}
