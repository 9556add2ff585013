//! How fast a guest executes kernel code: a loop in ring 0 of a tiny guest, beside the same loop on the host.
//!
//! A KVM without hardware virtualization (PVM, or an old processor in a state it cannot run) looks like any
//! other from its API. What it cannot hide is the time its instruction emulator takes.

use std::io;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::mmap::MmapRegion;

/// A guest whose loop runs slower than the host's by more than this factor is interpreted.
///
/// Hardware runs such a loop at the host's own speed (measured: 1 to 1.1 times as long); KVM's emulator takes about
/// a thousand times as long. The threshold is their geometric mean.
const INTERPRETED_FACTOR: u64 = 30;

/// ```text
/// 0: 49     1: dec  ecx
/// 1: 75 fd     jnz  1b
/// 3: e6 80     out  0x80, al
/// ```
///
/// Port 0x80 is that of a PC's self-test codes, and free for us to be told by that the loop is over.
const CODE: [u8; 5] = [0x49, 0x75, 0xfd, 0xe6, 0x80];
const DONE_PORT: u16 = 0x80;
const INSTRUCTIONS_PER_TURN: u64 = 2;

/// Turns of the shortest run: 0.2 ms where an emulator does a million instructions a second.
const FIRST_TURNS: u32 = 100;
const LAST_TURNS: u32 = 1 << 26;
/// A run counts if the loop took at least this long,
const LONG_ENOUGH: Duration = Duration::from_millis(1);
/// and this many times as long as what comes with it: entry, exit and reading the clock. Of a run on real hardware these
/// are a few microseconds; where that hardware is itself emulated, a millisecond or more, and unsteady.
const LOOP_TO_REST: u32 = 4;
/// Runs of that length, the shortest of which counts, since others had the processor during the others.
const REPEATS: usize = 3;
/// How often a result that says "interpreted" is looked at again.
const DOUBTS: usize = 2;

/// When a guest is not waited for any longer.
const GIVE_UP: Duration = Duration::from_secs(5);

const PAGE: usize = 4096;

/// Instructions a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rate(u64);

impl std::fmt::Display for Rate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (unit, name) = match self.0 {
            1_000_000_000.. => (1_000_000_000, "G"),
            1_000_000.. => (1_000_000, "M"),
            _ => (1_000, "k"),
        };
        let tenths = self.0 / (unit / 10);
        write!(f, "{}.{} {name}", tenths / 10, tenths % 10)
    }
}

/// What was measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Speed {
    /// In ring 0 of a guest.
    pub guest: Rate,
    /// On the host.
    pub host: Rate,
}

impl Speed {
    /// Whether an emulator, not the processor, executes ring 0.
    pub fn is_interpreted(self) -> bool {
        self.guest.0.saturating_mul(INTERPRETED_FACTOR) < self.host.0
    }
}

/// Why the guest did not do its loop.
#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    /// Could not be set up.
    #[error("KVM refuses {0}: {1}")]
    Refused(&'static str, kvm_ioctls::Error),
    /// No page.
    #[error("no page of memory for a guest: {0}")]
    Memory(vm_memory::mmap::MmapRegionError),
    /// Nobody to try it.
    #[error("no thread for a guest: {0}")]
    Thread(io::Error),
    /// Did not come back.
    #[error("a guest's loop of a few milliseconds had not ended after {} s", GIVE_UP.as_secs())]
    Stuck,
    /// Left the loop otherwise than by its end.
    #[error("a guest's loop ended with {0} instead of its last instruction")]
    Strayed(String),
}

/// Measures; 20 to 40 ms.
pub(super) fn measure(kvm: Kvm) -> Result<Speed, Error> {
    // On a thread of its own: a KVM that does not come back from a guest is the kind of thing to be found out.
    let (sender, receiver) = mpsc::sync_channel(1);
    let worker = thread::Builder::new().name("doctor".to_owned());
    worker.spawn(move || sender.send(measure_here(&kvm))).map_err(Error::Thread)?;
    receiver.recv_timeout(GIVE_UP).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(Error::Stuck),
        RecvTimeoutError::Disconnected => Err(Error::Strayed("a failure of this program".to_owned())),
    })
}

fn measure_here(kvm: &Kvm) -> Result<Speed, Error> {
    let mut guest = Guest::new(kvm)?;
    let host = rate(|turns| Ok(run_on_host(turns)))?;
    let mut speed = Speed { guest: rate(|turns| guest.run(turns))?, host };
    for _ in 0..DOUBTS {
        // Whatever disturbs a measurement makes it slower, never faster.
        if speed.is_interpreted() {
            speed.guest = speed.guest.max(rate(|turns| guest.run(turns))?);
        }
    }
    Ok(speed)
}

/// The rate of `run`, which does so many turns of the loop and says how long it took.
fn rate(mut run: impl FnMut(u32) -> Result<Duration, Error>) -> Result<Rate, Error> {
    let mut rest = run(1)?;
    for _ in 1..REPEATS {
        rest = rest.min(run(1)?);
    }
    let wanted = LONG_ENOUGH.max(rest * LOOP_TO_REST);
    let mut turns = FIRST_TURNS;
    let best = loop {
        let mut best = run(turns)?.saturating_sub(rest);
        if best >= wanted {
            for _ in 1..REPEATS {
                best = best.min(run(turns)?.saturating_sub(rest));
            }
        }
        // Half the length will do for those that seemed long enough once, so that chance does not lengthen the
        // measurement.
        if best >= wanted / 2 || turns >= LAST_TURNS {
            break best;
        }
        turns *= 4;
    };
    let nanoseconds = best.as_nanos().max(1);
    let rate = u128::from(turns - 1) * u128::from(INSTRUCTIONS_PER_TURN) * 1_000_000_000 / nanoseconds;
    Ok(Rate(u64::try_from(rate).unwrap_or(u64::MAX)))
}

fn run_on_host(turns: u32) -> Duration {
    let start = Instant::now();
    // SAFETY: counts a register down to zero and touches nothing else.
    unsafe {
        std::arch::asm!(
            "2: dec {turns:e}",
            "jnz 2b",
            turns = inout(reg) turns => _,
            options(nomem, nostack)
        );
    }
    start.elapsed()
}

/// One page with the loop in it, and one processor in flat 32-bit protected mode, which any virtualization hardware executes
/// itself (real mode is emulated on old processors).
///
/// It has interrupt controllers in the kernel as every guest has. A processor without one would be the odd one for KVM, which
/// then patches the host's kernel to be prepared for it: a stall for all guests that run already.
struct Guest {
    vcpu: VcpuFd,
    _vm: VmFd,
    // Last, so that it goes after the guest that it is mapped into.
    _memory: MmapRegion,
}

impl Guest {
    fn new(kvm: &Kvm) -> Result<Self, Error> {
        let refused = |what| move |error| Error::Refused(what, error);
        let memory = MmapRegion::new(PAGE).map_err(Error::Memory)?;
        // SAFETY: the mapping is a page long and writable, and nobody else knows it.
        unsafe { memory.as_ptr().copy_from_nonoverlapping(CODE.as_ptr(), CODE.len()) };
        let vm = create_vm(kvm).map_err(refused("to create a virtual machine"))?;
        // Intel's processors before 2010 need a place for this; the others ignore it or do without.
        vm.set_tss_address(0xfffb_d000).unwrap_or_default();
        let region = kvm_userspace_memory_region {
            memory_size: PAGE as u64,
            userspace_addr: memory.as_ptr() as usize as u64,
            ..Default::default()
        };
        // SAFETY: the region is the mapping, which outlives the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(refused("memory for a guest"))?;
        vm.create_irq_chip().map_err(refused("interrupt controllers for a guest"))?;
        let vcpu = vm.create_vcpu(0).map_err(refused("to create a virtual processor"))?;
        let mut sregs = vcpu.get_sregs().map_err(refused("a virtual processor's registers"))?;
        sregs.cs = flat(8, 0xb);
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
            *segment = flat(16, 3);
        }
        sregs.cr0 |= 1; // PE
        vcpu.set_sregs(&sregs).map_err(refused("protected mode"))?;
        Ok(Self { vcpu, _vm: vm, _memory: memory })
    }

    fn run(&mut self, turns: u32) -> Result<Duration, Error> {
        let regs = kvm_regs { rip: 0, rflags: 2, rcx: u64::from(turns), ..Default::default() };
        self.vcpu
            .set_regs(&regs)
            .map_err(|error| Error::Refused("a virtual processor's registers", error))?;
        let start = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(DONE_PORT, _)) => break,
                Ok(VcpuExit::Intr) => {}
                Ok(exit) => return Err(Error::Strayed(format!("{exit:?}"))),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(Error::Refused("to run a guest", error)),
            }
        }
        let elapsed = start.elapsed();
        // Registers may be set again only when KVM has finished the instruction, which it does at the next entry (Linux,
        // Documentation/virt/kvm/api.rst, section 5). This one does nothing else and says that it was interrupted.
        self.vcpu.set_kvm_immediate_exit(1);
        drop(self.vcpu.run());
        self.vcpu.set_kvm_immediate_exit(0);
        Ok(elapsed)
    }
}

/// Creates a virtual machine, which is interrupted by any signal and also by the kernel's own work for this thread.
fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    const TRIES: usize = 100;
    let mut result = kvm.create_vm();
    for _ in 1..TRIES {
        match &result {
            Err(error) if error.errno() == libc::EINTR => result = kvm.create_vm(),
            _ => break,
        }
    }
    result
}

/// A segment of 4 GiB from address 0 (Intel SDM volume 3, section 3.4.5).
fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A clock that takes `per_turn` nanoseconds a turn and `overhead` a run.
    fn clock(per_turn: u64, overhead: u64) -> impl FnMut(u32) -> Result<Duration, Error> {
        move |turns| Ok(Duration::from_nanos(u64::from(turns) * per_turn + overhead))
    }

    #[test]
    fn rate_is_that_of_the_loop_whatever_entry_and_exit_cost() {
        for overhead in [0, 5_000, 50_000, 2_000_000] {
            let Rate(rate) = rate(clock(1, overhead)).unwrap();
            assert_eq!(rate, 2_000_000_000, "overhead {overhead} ns");
        }
    }

    #[test]
    fn entry_and_exit_of_unsteady_cost_do_not_make_hardware_look_interpreted() {
        let mut runs = 0_u64;
        let unsteady = |turns: u32| {
            runs += 1;
            Ok(Duration::from_nanos(u64::from(turns) * 5 + 700_000 + runs * 7_919 % 900_000))
        };
        let guest = rate(unsteady).unwrap();
        assert!(!Speed { guest, host: Rate(600_000_000) }.is_interpreted(), "{guest:?}");
    }

    #[test]
    fn runs_during_which_something_else_had_the_processor_do_not_count() {
        for undisturbed in 0..REPEATS {
            let mut runs = 0;
            let noisy = |turns: u32| {
                let disturbance = if runs % REPEATS == undisturbed { 0 } else { 50_000_000 };
                runs += 1;
                Ok(Duration::from_nanos(u64::from(turns) + 2_000 + disturbance))
            };
            assert_eq!(rate(noisy).unwrap(), Rate(2_000_000_000));
        }
    }

    #[test]
    fn slow_clock_is_asked_for_few_turns() {
        let mut total = 0;
        rate(|turns| {
            total += turns;
            Ok(Duration::from_nanos(u64::from(turns) * 2000))
        })
        .unwrap();
        assert!(total < 20_000, "{total} turns of 2 µs");
    }

    #[test]
    fn clock_that_stands_still_ends_the_measurement() {
        assert!(rate(clock(0, 0)).unwrap() > Rate(1_000_000_000));
    }

    #[test]
    fn failure_of_a_run_is_handed_on() {
        assert!(matches!(rate(|_| Err(Error::Strayed("x".into()))), Err(Error::Strayed(_))));
    }

    #[test]
    fn guest_a_thousand_times_slower_is_interpreted_and_one_three_times_slower_is_not() {
        let host = Rate(3_000_000_000);
        assert!(Speed { guest: Rate(3_000_000), host }.is_interpreted());
        assert!(!Speed { guest: Rate(1_000_000_000), host }.is_interpreted());
        assert!(!Speed { guest: host, host }.is_interpreted());
    }

    #[test]
    fn rates_are_written_with_a_unit() {
        assert_eq!(Rate(4_649_000_000).to_string(), "4.6 G");
        assert_eq!(Rate(1_050_000).to_string(), "1.0 M");
        assert_eq!(Rate(1_234).to_string(), "1.2 k");
        assert_eq!(Rate(0).to_string(), "0.0 k");
    }

    #[test]
    #[ignore = "needs /dev/kvm"]
    fn loop_in_a_guest_runs_to_its_end() {
        let speed = measure(Kvm::new().unwrap()).unwrap();
        assert!(speed.guest > Rate(0) && speed.host > Rate(0), "{speed:?}");
    }
}
