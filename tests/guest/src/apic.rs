//! Local APIC and I/O APIC through their registers in memory (SDM volume 3A, chapter 10; Intel 82093AA data sheet).

use crate::clock::Clock;
use crate::interrupts::{FIRST_VECTOR, SPURIOUS, TIMER, quiet};
use crate::{cpu, phys};

const LOCAL: u64 = 0xfee0_0000;
const ID: u64 = 0x20;
const SPURIOUS_VECTOR: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const TIMER_VECTOR: u64 = 0x320;
const TIMER_COUNT: u64 = 0x380;
const TIMER_NOW: u64 = 0x390;
const TIMER_DIVIDE: u64 = 0x3e0;

const ENABLED: u32 = 1 << 8;
const MASKED: u32 = 1 << 16;
const DIVIDE_BY_1: u32 = 0b1011;
const DELIVERY_PENDING: u32 = 1 << 12;

const IO: u64 = 0xfec0_0000;
const IO_SELECT: u64 = IO;
const IO_WINDOW: u64 = IO + 0x10;
const IO_VERSION: u32 = 1;
const IO_REDIRECTION: u32 = 0x10;

/// How a processor is to be interrupted by another.
pub mod delivery {
    /// With a vector.
    pub const FIXED: u32 = 0x4000;
    /// INIT, level asserted.
    pub const INIT: u32 = 0x4500;
    /// Start-up; the vector is the page where it begins.
    pub const START_UP: u32 = 0x4600;
}

/// Identification of this processor's local APIC.
pub fn id() -> u8 {
    phys::read32(LOCAL + ID).to_be_bytes()[0]
}

/// Switches this processor's local APIC on.
pub fn enable() {
    phys::write32(LOCAL + SPURIOUS_VECTOR, ENABLED | u32::from(SPURIOUS));
}

/// Takes interrupts on this, the first processor, from the local APIC only.
pub fn take_interrupts() {
    quiet();
    enable();
    cpu::enable_interrupts();
}

/// Connects `input` of the I/O APIC, edge-triggered, to this processor and gives its vector; `None` if there
/// is no such input.
pub fn route(input: u32) -> Option<u8> {
    let inputs = (io_read(IO_VERSION) >> 16 & 0xff) + 1;
    let vector = u8::try_from(input).ok()?.checked_add(FIRST_VECTOR)?;
    if input >= inputs || vector >= TIMER {
        return None;
    }
    io_write(IO_REDIRECTION + 2 * input + 1, u32::from(id()) << 24);
    io_write(IO_REDIRECTION + 2 * input, vector.into());
    Some(vector)
}

fn io_read(register: u32) -> u32 {
    phys::write32(IO_SELECT, register);
    phys::read32(IO_WINDOW)
}

fn io_write(register: u32, value: u32) {
    phys::write32(IO_SELECT, register);
    phys::write32(IO_WINDOW, value);
}

/// Sends an interrupt (see [`delivery`]) to the processor with local APIC `to`.
pub fn send(to: u8, how: u32, vector: u8) {
    phys::write32(LOCAL + COMMAND_HIGH, u32::from(to) << 24);
    phys::write32(LOCAL + COMMAND_LOW, how | u32::from(vector));
    while phys::read32(LOCAL + COMMAND_LOW) & DELIVERY_PENDING != 0 {
        cpu::relax();
    }
}

/// Prepares the timer and measures its frequency: ticks in `cycles` of the time stamp counter.
pub fn measure_timer(cycles: u64) -> u64 {
    phys::write32(LOCAL + TIMER_DIVIDE, DIVIDE_BY_1);
    phys::write32(LOCAL + TIMER_VECTOR, MASKED | u32::from(TIMER));
    phys::write32(LOCAL + TIMER_COUNT, u32::MAX);
    let start = cpu::tsc();
    let first = phys::read32(LOCAL + TIMER_NOW);
    cpu::spin(cycles);
    let last = phys::read32(LOCAL + TIMER_NOW);
    let took = cpu::tsc() - start;
    phys::write32(LOCAL + TIMER_COUNT, 0);
    phys::write32(LOCAL + TIMER_VECTOR, u32::from(TIMER));
    // What went by in the two reads is left out again.
    u64::from(first.saturating_sub(last)) * cycles / took.max(1)
}

/// Interrupts with the timer again and again, some ten times a second, for those who wait and are to look at the time.
pub fn tick(clock: Clock) {
    const PERIODIC: u32 = 1 << 17;
    let tenth = measure_timer(clock.cycles(1_000_000)).saturating_mul(100);
    phys::write32(LOCAL + TIMER_VECTOR, PERIODIC | u32::from(TIMER));
    start_timer(u32::try_from(tenth).unwrap_or(u32::MAX));
}

/// Starts the timer, which interrupts once after `ticks`.
pub fn start_timer(ticks: u32) {
    phys::write32(LOCAL + TIMER_COUNT, ticks);
}
