//! The interrupt descriptor table, the TSS, and what happens at an interrupt or a fault.
//!
//! Handlers run in ring 0 and so are as short as can be: an interrupt counts itself and tells the local APIC; who waits
//! for it watches the counter. A fault goes back to ring 3, which reports it. Every gate has a stack of its own
//! (SDM volume 3A, section 6.14.5).

use core::arch::naked_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{cpu, json, phys, power};

/// Interrupt vectors from here on are counted.
pub const FIRST_VECTOR: u8 = 0x20;
/// How many are.
pub const COUNTED: usize = 32;
/// Vector of the local APIC's timer; those below it belong to the inputs of the I/O APIC.
pub const TIMER: u8 = 0x38;
/// Vector that processors send each other.
pub const CALL: u8 = 0x39;
/// Vector of interrupts that went away before they were taken.
pub const SPURIOUS: u8 = 0xff;

/// Vector of services: a breakpoint, because hosts that interpret ring 0 do not pass on other `int`s.
const SERVICE: u8 = 3;
const FAULTS: usize = 32;
const CODE_SELECTOR: u16 = 0x08;
const STACK_LEN: usize = 4096;

/// A 64-bit TSS (SDM volume 3A, figure 8-11) that opens all ports, and the stacks it names.
#[repr(C, packed(4))]
struct Tss {
    _reserved: u32,
    ring_stacks: [u64; 3],
    _reserved2: u64,
    gate_stacks: [u64; 7],
    _reserved3: [u16; 5],
    ports: u16,
    port_map: [u8; 8192],
    _port_map_end: u8,
}

const PORT_MAP: u16 = 104;
const _: () = assert!(core::mem::offset_of!(Tss, port_map) == PORT_MAP as usize);
/// Limit of a TSS: its size less one.
pub const TSS_LIMIT: u64 = 104 + 8192;
const _: () = assert!(size_of::<Tss>() as u64 > TSS_LIMIT);

/// What a processor needs to take interrupts. All zero before [`prepare`].
#[repr(C, align(16))]
pub struct Processor {
    tss: UnsafeCell<Tss>,
    stacks: UnsafeCell<[[u8; STACK_LEN]; 3]>,
}

// SAFETY: after `prepare` only processors read and write it, each its own.
unsafe impl Sync for Processor {}

/// The first processor's, whose TSS the image's descriptor table names.
#[unsafe(no_mangle)]
static boot_tss: Processor = {
    // SAFETY: integers, for which zero is a value.
    unsafe { core::mem::zeroed() }
};

core::arch::global_asm!(".globl tss_limit", ".set tss_limit, {}", const TSS_LIMIT);

#[repr(C, align(16))]
struct Idt(UnsafeCell<[[u64; 2]; 256]>);

// SAFETY: written once, before the other processors run.
unsafe impl Sync for Idt {}

#[unsafe(no_mangle)]
static idt: Idt = Idt(UnsafeCell::new([[0; 2]; 256]));

/// How many interrupts came in, by vector.
static COUNTS: [AtomicU64; COUNTED] = [const { AtomicU64::new(0) }; COUNTED];

unsafe extern "C" {
    fn service();
}

/// Makes ports usable on the first processor.
pub fn open_ports() {
    let tss = boot_tss.tss.get();
    // SAFETY: the TSS is only used by the processor, which looks this field up at each access to a port.
    unsafe { (&raw mut (*tss).ports).write_unaligned(PORT_MAP) };
}

/// Fills in `processor`, zeroed memory, and gives the address of its TSS.
pub fn prepare(processor: &'static Processor) -> u64 {
    let tss = processor.tss.get();
    let stacks = phys::address(processor.stacks.get());
    let end = |index: u64| stacks + (index + 1) * STACK_LEN as u64;
    // SAFETY: the processor does not take interrupts yet, and so does not use these fields.
    unsafe {
        (&raw mut (*tss).ring_stacks).write_unaligned([end(0), 0, 0]);
        (&raw mut (*tss).gate_stacks).write_unaligned([end(0), end(1), end(2), 0, 0, 0, 0]);
        (&raw mut (*tss).ports).write_unaligned(PORT_MAP);
    }
    phys::address(tss)
}

/// Fills the descriptor table and prepares the first processor.
pub fn load() {
    prepare(&boot_tss);
    // Stacks by their number in `gate_stacks`, from 1: services, interrupts, faults.
    for (vector, handler) in (FIRST_VECTOR..).zip(INTERRUPTS) {
        gate(vector, handler as *const (), 2, 0);
    }
    gate(SPURIOUS, spurious as *const (), 2, 0);
    for (vector, handler) in (0..).zip(FAULT_HANDLERS) {
        gate(vector, handler as *const (), 3, 0);
    }
    gate(SERVICE, service as *const (), 1, 3);
}

/// An interrupt gate (SDM volume 3A, figure 6-8), which turns interrupts off.
fn gate(vector: u8, handler: *const (), stack: u64, from_ring: u64) {
    let address = phys::address(handler);
    let low = address & 0xffff
        | u64::from(CODE_SELECTOR) << 16
        | stack << 32
        | (0x8e | from_ring << 5) << 40
        | (address >> 16 & 0xffff) << 48;
    let entry = idt.0.get().cast::<[u64; 2]>();
    // SAFETY: a vector is below 256; nobody else runs yet.
    unsafe { entry.add(vector.into()).write([low, address >> 32]) };
}

#[unsafe(naked)]
extern "C" fn interrupt<const N: usize>() {
    // The write to the EOI register of the local APIC (its value does not matter) needs no register that
    // would have to be saved.
    naked_asm!(
        "lock inc qword ptr [{counts} + {offset}]",
        "movabs [0xfee000b0], eax",
        "iretq",
        counts = sym COUNTS,
        offset = const N * 8,
    )
}

#[unsafe(naked)]
extern "C" fn spurious() {
    naked_asm!("iretq")
}

/// Pushes an error code where the processor does not, and the vector.
#[unsafe(naked)]
extern "C" fn fault<const N: usize>() {
    naked_asm!(
        ".if (0x60227d00 >> {n}) & 1",
        ".else",
        "push 0",
        ".endif",
        "push {n}",
        "jmp {rest}",
        n = const N,
        rest = sym fault_rest,
    )
}

/// Hands vector, error code and address over to ring 3, which begins anew on the stack it had (below the red zone).
#[unsafe(naked)]
extern "C" fn fault_rest() {
    naked_asm!(
        "pop rdi",
        "pop rsi",
        "mov rdx, [rsp]",
        "mov rcx, cr2",
        "mov r8, [rsp + 24]",
        "sub r8, 256",
        "and r8, -16",
        "sub r8, 8",
        "push 0x1b",
        "push r8",
        "push 2",
        "push 0x23",
        "push offset {report}",
        "iretq",
        report = sym report_fault,
    )
}

extern "C" fn report_fault(vector: u64, code: u64, rip: u64, address: u64) -> ! {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    if REPORTED.swap(true, Ordering::Relaxed) {
        // What makes the report, or switches off, is at fault itself.
        cpu::triple_fault();
    }
    json::Line::new("error")
        .text("message", "a fault of the processor")
        .number("vector", vector)
        .number("code", code)
        .number("rip", rip)
        .number("address", address)
        .send();
    power::power_off()
}

macro_rules! handlers {
    ($handler:ident: $($n:literal)*) => { [$($handler::<$n>),*] };
}

type Handler = extern "C" fn();
static INTERRUPTS: [Handler; COUNTED] = handlers!(interrupt:
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);
static FAULT_HANDLERS: [Handler; FAULTS] = handlers!(fault:
    0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31);

/// The counter of `vector`, one of those that are counted.
pub fn counter(vector: u8) -> &'static AtomicU64 {
    &COUNTS[usize::from(vector - FIRST_VECTOR)]
}

/// Masks the old interrupt controllers, whose vectors would be taken for faults.
pub fn quiet() {
    cpu::out8(0x21, 0xff);
    cpu::out8(0xa1, 0xff);
}

/// Halts until the counter of `vector` is past `seen` and gives its value.
pub fn wait(vector: u8, seen: u64) -> u64 {
    let counter = counter(vector);
    loop {
        let now = counter.load(Ordering::Acquire);
        if now != seen {
            return now;
        }
        cpu::wait(counter, seen);
    }
}

/// Halts until any interrupt.
pub fn wait_for_any() {
    static NEVER: AtomicU64 = AtomicU64::new(0);
    cpu::wait(&NEVER, 0);
}
