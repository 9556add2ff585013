//! The other processors: woken by INIT and start-up interrupts (SDM volume 3A, section 8.4), they come through the
//! trampoline and the first processor's way into ring 3.

use alloc::format;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use crate::args::Args;
use crate::clock::Clock;
use crate::interrupts::{self, Processor, TSS_LIMIT};
use crate::{Error, acpi, apic, cpu, heap, phys};

/// Page below 1 MiB where the trampoline lies: conventional memory that loaders leave alone.
const TRAMPOLINE: u64 = 0x1_0000;
const TRAMPOLINE_PAGE: u8 = 0x10;
const STACK_LEN: u64 = 64 << 10;
/// Room in the descriptor table.
const OTHERS_MAX: usize = 63;
/// Selector of the first of the other processors' TSSs.
const FIRST_TSS_SELECTOR: u64 = 0x48;
const START_PATIENCE_NS: u64 = 2_000_000_000;
const INIT_DELAY_NS: u64 = 200_000;
const REPEAT_DELAY_NS: u64 = 20_000_000;

/// `rip`, `cs`, `rflags`, `rsp`, `ss` with which a processor enters ring 3.
type Frame = core::cell::UnsafeCell<[u64; 5]>;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static entry_frame: Frame;
    static entry_tss: core::cell::UnsafeCell<u32>;
    static gdt_other_tss: core::cell::UnsafeCell<[[u64; 2]; OTHERS_MAX]>;
}

/// What a processor does: gets its number, 1 for the first of the others.
pub type Work = fn(number: u64);

/// Work of the processor that is started, and how many have begun.
static WORK: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());
static BEGUN: AtomicU64 = AtomicU64::new(0);

/// Local APICs of the other processors: `cpus=N` counts them (with this one), else the firmware's table lists them.
///
/// # Errors
///
/// The number is none, or too large.
pub fn others(args: &Args) -> Result<Vec<u8>, Error> {
    let count = args.number("cpus", 0)?;
    let mut ids = match u8::try_from(count) {
        Ok(0) => acpi::processors(),
        Ok(count) => (0..count).collect(),
        Err(_) => return Err(format!("cpus={count}: at most 64 are wanted")),
    };
    let own = apic::id();
    ids.retain(|id| *id != own);
    if ids.len() > OTHERS_MAX {
        return Err(format!("{} processors are more than the 64 that this program can use", ids.len() + 1));
    }
    Ok(ids)
}

/// Starts the processors with the local APICs `ids`, each of which does `work` and then sleeps. Done once.
///
/// # Errors
///
/// A processor does not come, or memory is short.
pub fn start(ids: &[u8], clock: Clock, work: Work) -> Result<(), Error> {
    let code = (&raw const trampoline, &raw const trampoline_end);
    let len = phys::address(code.1) - phys::address(code.0);
    phys::bytes_mut(TRAMPOLINE, len).copy_from_slice(phys::bytes(phys::address(code.0), len));
    WORK.store(work as *mut (), Ordering::Release);
    apic::enable();
    for (id, number) in ids.iter().zip(1_u64..) {
        prepare(number)?;
        apic::send(*id, apic::delivery::INIT, 0);
        cpu::spin(clock.cycles(INIT_DELAY_NS));
        let start = cpu::tsc();
        let mut next = 0;
        while BEGUN.load(Ordering::Acquire) < number {
            let waited = clock.ns(cpu::tsc() - start);
            if waited >= START_PATIENCE_NS {
                return Err(format!("the processor with local APIC {id} does not start"));
            }
            // One start-up interrupt should do; a second is for processors that were not ready.
            if waited >= next && next <= REPEAT_DELAY_NS {
                apic::send(*id, apic::delivery::START_UP, TRAMPOLINE_PAGE);
                next += REPEAT_DELAY_NS;
            }
            cpu::relax();
        }
    }
    Ok(())
}

/// Makes stacks and TSS for processor `number` and points the entry to them.
fn prepare(number: u64) -> Result<(), Error> {
    let processor = heap::zeroed(size_of::<Processor>() as u64)?;
    let processor = core::ptr::with_exposed_provenance::<Processor>(phys::index(processor));
    // SAFETY: zeroed memory is a Processor; it is aligned to a page and nobody else's.
    let tss = interrupts::prepare(unsafe { &*processor });
    let stack = heap::zeroed(STACK_LEN)?;
    // SDM volume 3A, figure 8-4: an available 64-bit TSS.
    let descriptor = [TSS_LIMIT | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56, tss >> 32];
    let index = phys::index(number - 1);
    // SAFETY: `others` gives no more processors than there is room for; the processor that will read these is not
    // started yet, and the one before has come past them.
    unsafe {
        gdt_other_tss.get().cast::<[u64; 2]>().add(index).write_volatile(descriptor);
        let frame = entry_frame.get().cast::<u64>();
        frame.write_volatile(phys::address(begin as *const ()));
        frame.add(3).write_volatile(stack + STACK_LEN - 8);
        let selector = u32::try_from(FIRST_TSS_SELECTOR + 16 * (number - 1)).unwrap_or_default();
        entry_tss.get().write_volatile(selector);
    }
    Ok(())
}

/// First code in ring 3 of another processor.
extern "C" fn begin() -> ! {
    apic::enable();
    // Processors are started one after the other.
    let number = BEGUN.load(Ordering::Relaxed) + 1;
    let work = WORK.load(Ordering::Acquire);
    BEGUN.store(number, Ordering::Release);
    // SAFETY: `start` stores a Work before it starts processors.
    let work = unsafe { core::mem::transmute::<*mut (), Work>(work) };
    work(number);
    loop {
        interrupts::wait_for_any();
    }
}
