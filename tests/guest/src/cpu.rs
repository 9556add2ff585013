//! Instructions that Rust has no words for. All of them are harmless to memory.

use core::arch::{asm, x86_64};

/// Time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: rdtsc only reads the counter.
    unsafe { x86_64::_rdtsc() }
}

/// `cpuid`: eax, ebx, ecx, edx.
pub fn id(leaf: u32, subleaf: u32) -> [u32; 4] {
    let r = x86_64::__cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// Tells the processor that this is a waiting loop.
pub fn relax() {
    core::hint::spin_loop();
}

/// Waits for `cycles` of the time stamp counter.
pub fn spin(cycles: u64) {
    let start = tsc();
    while tsc().wrapping_sub(start) < cycles {
        relax();
    }
}

/// Reads a byte from `port`.
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: no device of these machines writes to memory because of a port.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes a byte to `port`.
pub fn out8(port: u16, value: u8) {
    // SAFETY: as in in8.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Services of ring 0, numbered as in the table `services` of ring0.s.
mod service {
    pub const WAIT: u64 = 0;
    pub const ENABLE_INTERRUPTS: u64 = 1;
    pub const DISABLE_INTERRUPTS: u64 = 2;
    pub const READ_MSR: u64 = 3;
    pub const WRITE_MSR: u64 = 4;
    pub const SET_XCR0: u64 = 5;
    pub const FLUSH_TLB: u64 = 6;
    pub const TRIPLE_FAULT: u64 = 7;
}

/// Calls `service` with what it wants in rcx, rdi and rsi; gives back edx:eax.
fn call(service: u64, rcx: u64, rdi: u64, rsi: u64) -> u64 {
    let (low, high): (u64, u64);
    // SAFETY: the services change no other registers, and no memory.
    unsafe {
        asm!("int3", inout("rax") service => low, inout("rcx") rcx => _, out("rdx") high, in("rdi") rdi,
             in("rsi") rsi);
    }
    high << 32 | low & 0xffff_ffff
}

/// Halts until an interrupt comes in, unless `counter` is no longer `seen` (nothing is lost in between).
/// Interrupts must have been enabled for their handlers to count in `counter`.
pub fn wait(counter: &core::sync::atomic::AtomicU64, seen: u64) {
    call(service::WAIT, 0, core::ptr::from_ref(counter).addr() as u64, seen);
}

/// Takes interrupts from now on.
pub fn enable_interrupts() {
    call(service::ENABLE_INTERRUPTS, 0, 0, 0);
}

/// Holds interrupts back from now on.
pub fn disable_interrupts() {
    call(service::DISABLE_INTERRUPTS, 0, 0, 0);
}

/// Reads a model-specific register. One that does not exist is a fault that ends the guest.
pub fn read_msr(register: u32) -> u64 {
    call(service::READ_MSR, register.into(), 0, 0)
}

/// Writes a model-specific register. What the register does not take is a fault that ends the guest.
pub fn write_msr(register: u32, value: u64) {
    call(service::WRITE_MSR, register.into(), value, 0);
}

/// Enables the extended states `mask` (bits of XCR0).
pub fn set_xcr0(mask: u32) {
    call(service::SET_XCR0, mask.into(), 0, 0);
}

/// Makes changes of page tables count.
pub fn flush_tlb() {
    call(service::FLUSH_TLB, 0, 0, 0);
}

/// Faults without a handler: the processor shuts down.
pub fn triple_fault() -> ! {
    loop {
        call(service::TRIPLE_FAULT, 0, 0, 0);
    }
}
