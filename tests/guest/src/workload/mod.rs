//! The workloads, one of which `test=` on the command line names.
//!
//! Sizes and counts may end in K, M or G (powers of 1024). When a workload is done, the machine is switched off, or
//! `then=` says what else: `reset`, `idle`. Workloads that end by themselves send one `result`; times in it are in
//! nanoseconds (`_ns`) by the time stamp counter. What lasts `seconds=` may last `forever` as well. Those that wait
//! for somebody else send `ready` first.
//!
//! | `test=` | what happens | keys |
//! | --- | --- | --- |
//! | `hello` (default) | says hello and sleeps | |
//! | `poweroff` | switches off through ACPI, else resets | |
//! | `reset` | resets | `via=i8042`, `acpi` |
//! | `button` | switches off when the power button is pressed | |
//! | `panic` | fails in its own code | |
//! | `crash` | stops a processor for good | `how=triple`, `mmio` (an instruction that no monitor can complete), `fault` |
//! | `boot` | tells what the loader passed | |
//! | `acpi` | walks and checks the firmware's tables | |
//! | `cpuid` | tells what the processor says of itself | |
//! | `cpu` | counts loops a second | `seconds=5`, `cpus=` (default: one), `every=` ms between `progress` events |
//! | `memory` | writes to all of `size=64M`, then dirties pages | `seconds=5`, `rate=0` MB/s (0: as fast as can be), `area=` bytes (default: `size`), `every=` |
//! | `timer` | lateness of the local APIC's timer | `count=1000`, `interval=1000` µs |
//! | `irq` | time from asking for an interrupt to its being seen | `via=rng`, `ipi`; `count=1000` |
//! | `smp` | starts the other processors, which count | `cpus=` (default: those of the firmware's table), `seconds=1` |
//! | `serial-echo` | sends back what comes in on COM1, up to a line `end` | |
//! | `rng` | reads entropy | `bytes=4096`, `size=64` bytes a request |
//! | `blk-info` | capacity, block size, serial number, features | `disk=0` |
//! | `blk-read`, `blk-write` | requests for `seconds=5`, or `count=` of them | see below |
//! | `blk-verify` | writes `count=1000` requests and reads them back | see below; `phase=both`, `write`, `read` |
//! | `blk-discard`, `blk-zeroes` | discards or zeroes the range, and reads it back | `offset=`, `span=1M` |
//! | `blk-serve` | does with a range what lines on COM1 say: `write SEED`, `read SEED`, `zeroes` (reads those), `size`, `changed` (waits for a change of the configuration), `end` | see below |
//! | `net-tx` | sends frames | see below; `seconds=5` or `count=` |
//! | `net-rx` | counts frames | see below; `seconds=` or `count=` |
//! | `net-echo` | sends frames back, answers ARP and ping | see below; `ip=` |
//! | `net-ping` | sends frames one by one and waits for each to come back | see below; `count=1000`, `timeout=1000` ms |
//!
//! Disks: `disk=0`, `mode=random`, `sequential` or `once` (each place once, in random order), `size=4096` bytes a request,
//! `depth=1`, `offset=0` and `span=` in bytes (default: all), `seed=1`, `flush=0` (1: flush at the end), `flush-every=0`
//! (a flush after so many requests, which at `depth=1` are done by then; `iops` counts no flushes), `wait=poll` or `irq`,
//! `indirect=0`, `no-event-index=0`.
//!
//! Network cards: `net=0`, `size=60` bytes a frame, `peer=` address (default: everybody), `rate=0` frames a second
//! (0: as fast as can be), `wait=poll` or `irq`. Frames have the EtherType 88B5 (for local experiments),
//! and a sequence number of 64 bits after it.

mod block;
mod block_range;
mod block_serve;
mod boot;
mod compute;
mod crash;
mod entropy;
mod ether;
mod firmware;
mod identify;
mod interrupt;
mod memory;
mod network;
mod power_button;
mod respond;
mod serial_echo;
mod smp;
mod timer;

use alloc::format;

use crate::clock::Clock;
use crate::json::Line;
use crate::{Error, Machine, cpu, power};

/// Runs the workload that the command line names.
///
/// # Errors
///
/// What the workload could not do, or that there is no such workload.
pub fn run(machine: &Machine) -> Result<(), Error> {
    match machine.args.test() {
        "hello" => power::idle(),
        "poweroff" => Ok(()),
        "reset" => match machine.args.choice("via", &["i8042", "acpi"])? {
            "acpi" => power::reset_by_acpi(),
            _ => power::reset(),
        },
        "button" => power_button::run(machine),
        "panic" => panic!("as the command line wants it"),
        "crash" => crash::run(machine),
        "boot" => boot::run(machine),
        "acpi" => firmware::run(machine),
        "cpuid" => identify::run(machine),
        "cpu" => compute::run(machine),
        "memory" => memory::run(machine),
        "timer" => timer::run(machine),
        "irq" => interrupt::run(machine),
        "smp" => smp::run(machine),
        "serial-echo" => serial_echo::run(machine),
        "rng" => entropy::run(machine),
        "blk-info" => block::info(machine),
        "blk-read" => block::read(machine),
        "blk-write" => block::write(machine),
        "blk-verify" => block::verify(machine),
        "blk-discard" => block_range::discard(machine),
        "blk-zeroes" => block_range::zero(machine),
        "blk-serve" => block_serve::run(machine),
        "net-tx" => network::send(machine),
        "net-rx" => network::receive(machine),
        "net-ping" => network::ping(machine),
        "net-echo" => respond::run(machine),
        other => Err(format!("test={other}: there is no such workload")),
    }
}

/// Time that a workload spends, and what interrupted it.
#[derive(Debug)]
struct Stopwatch {
    clock: Clock,
    start: u64,
    last: u64,
    end: u64,
    gap: u64,
    every: u64,
    progress: u64,
}

impl Stopwatch {
    /// Runs for `seconds=`, by default `default` of them or for ever, with `progress` events as `every=` says.
    fn start(machine: &Machine, default: Option<u64>) -> Result<Self, Error> {
        let clock = machine.clock;
        let seconds = match machine.args.text("seconds", "") {
            "" => default,
            "forever" => None,
            _ => Some(machine.args.number("seconds", 0)?),
        };
        let every = clock.cycles(machine.args.number("every", 0)?.saturating_mul(1_000_000));
        let start = cpu::tsc();
        let end = seconds.map_or(u64::MAX, |seconds| start.saturating_add(clock.seconds(seconds)));
        Ok(Self { clock, start, last: start, end, gap: 0, every, progress: start.saturating_add(every) })
    }

    /// Looks at the clock, after `done` things; false if time is over.
    fn goes_on(&mut self, done: u64) -> bool {
        let now = cpu::tsc();
        self.gap = self.gap.max(now.saturating_sub(self.last));
        self.last = now;
        if self.every > 0 && now >= self.progress {
            let mut line = Line::new("progress");
            line.number("tsc", now).number("done", done).number("gap_ns", self.clock.ns(self.gap)).send();
            // The time that the line took is nobody's interruption.
            self.last = cpu::tsc();
            self.progress = self.last.saturating_add(self.every);
        }
        now < self.end
    }

    /// Cycles up to the last look.
    fn elapsed(&self) -> u64 {
        self.last.saturating_sub(self.start).max(1)
    }

    /// Adds the time, and the largest gap between two looks, to `line`.
    fn report(&self, line: &mut Line) {
        line.number("elapsed_ns", self.clock.ns(self.elapsed())).number("gap_ns", self.clock.ns(self.gap));
    }
}
