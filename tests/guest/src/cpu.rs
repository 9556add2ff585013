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
    pub const WRITE_MSR: u64 = 2;
    pub const TRIPLE_FAULT: u64 = 3;
    pub const BAD_MMIO: u64 = 4;
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

/// Writes a model-specific register. What the register does not take is a fault that ends the guest.
pub fn write_msr(register: u32, value: u64) {
    call(service::WRITE_MSR, register.into(), value, 0);
}

/// Faults without a handler: the processor shuts down.
pub fn triple_fault() -> ! {
    loop {
        call(service::TRIPLE_FAULT, 0, 0, 0);
    }
}

/// Does to the device register at `address`, in ring 0, what KVM does not emulate: a compare-and-exchange of 16 bytes.
pub fn bad_mmio(address: u64) {
    call(service::BAD_MMIO, 0, address, 0);
}

/// Executes an undefined instruction.
pub fn undefined() {
    // SAFETY: the fault does not come back.
    unsafe { asm!("ud2") };
}
