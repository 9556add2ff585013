//! Virtual processors: what they are, and the threads that run them.

pub mod cpuid;
pub mod diagnosis;
pub mod gate;
mod kick;
mod msrs;

use std::io;
use std::sync::Arc;
use std::thread;

use devices::GuestRam;
use devices::bus::Bus;
use kvm_bindings::{CpuId, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_regs, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use diagnosis::Diagnosis;
use gate::{Gate, Request};

/// A vCPU that cannot be made or started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No vCPU.
    #[error("KVM cannot create vCPU {id}")]
    Create {
        /// Which.
        id: u8,
        /// What KVM answered.
        source: kvm_ioctls::Error,
    },
    /// State refused.
    #[error("KVM does not take the {what} of vCPU {id}")]
    State {
        /// Which vCPU.
        id: u8,
        /// Which part of its state.
        what: &'static str,
        /// What KVM answered.
        source: kvm_ioctls::Error,
    },
    /// No signal handler.
    #[error("cannot install the handler of the signal that interrupts vCPUs")]
    Signal(#[source] io::Error),
    /// No thread.
    #[error("cannot start the thread of vCPU {id}; see the limits on processes and memory")]
    Thread {
        /// Which vCPU.
        id: u8,
        /// What the system answered.
        source: io::Error,
    },
}

/// Why a vCPU left the guest for good by itself.
#[derive(Debug)]
pub enum End {
    /// KVM reports that the guest asked to be powered off.
    PowerOff,
    /// KVM reports that the guest asked for a reset.
    Reset,
    /// It cannot go on.
    Crash(Box<Diagnosis>),
}

/// What a running vCPU reaches.
#[derive(Debug)]
pub struct Surroundings {
    /// Guest memory.
    pub memory: Arc<GuestRam>,
    /// Devices by port.
    pub ports: Bus,
    /// Devices by guest-physical address.
    pub mmio: Bus,
    /// Where the vCPU is held and ended.
    pub gate: Gate,
}

/// A vCPU that does not run yet.
#[derive(Debug)]
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
}

impl Vcpu {
    /// Creates vCPU `id`, whose APIC has the same number.
    ///
    /// # Errors
    ///
    /// [`Error::Create`].
    pub fn create(vm: &VmFd, id: u8) -> Result<Self, Error> {
        let fd = vm.create_vcpu(u64::from(id)).map_err(|source| Error::Create { id, source })?;
        Ok(Self { id, fd })
    }

    /// Frequency of the guest's TSC in kHz, where KVM tells.
    #[must_use]
    pub fn tsc_khz(&self) -> Option<u32> {
        self.fd.get_tsc_khz().ok().filter(|khz| *khz > 0)
    }

    /// Sets what every vCPU starts with: `cpuid` with this vCPU's own numbers, and MSRs.
    ///
    /// # Errors
    ///
    /// [`Error::State`].
    pub fn set_up(&self, cpuid: &mut CpuId) -> Result<(), Error> {
        cpuid::for_vcpu(cpuid, self.id);
        self.fd.set_cpuid2(cpuid).map_err(|source| Error::State {
            id: self.id,
            what: "CPUID table",
            source,
        })?;
        msrs::set_initial(&self.fd);
        Ok(())
    }

    /// Sets the state in which the boot processor enters the kernel: `configure` changes its reset state.
    ///
    /// # Errors
    ///
    /// [`Error::State`].
    pub fn set_entry(&self, configure: impl FnOnce(&mut kvm_regs, &mut kvm_sregs)) -> Result<(), Error> {
        let failed = |what| move |source| Error::State { id: self.id, what, source };
        let mut regs = kvm_regs { rflags: 2, ..Default::default() };
        let mut sregs = self.fd.get_sregs().map_err(failed("segment registers"))?;
        configure(&mut regs, &mut sregs);
        self.fd.set_sregs(&sregs).map_err(failed("segment registers"))?;
        self.fd.set_regs(&regs).map_err(failed("registers"))
    }

    /// Starts the thread. `ended` is called, on it, when the vCPU ends by itself; not when it is stopped.
    ///
    /// # Errors
    ///
    /// [`Error::Signal`] or [`Error::Thread`].
    pub fn start(
        self,
        around: Arc<Surroundings>,
        ended: impl FnOnce(End) + Send + 'static,
    ) -> Result<thread::JoinHandle<()>, Error> {
        kick::install_handler().map_err(Error::Signal)?;
        let Self { id, mut fd } = self;
        thread::Builder::new()
            .name(format!("vcpu{id}"))
            .spawn(move || {
                let pass = around.gate.enter(usize::from(id));
                let end = run(id, &mut fd, &around, &pass);
                if let Some(end) = end {
                    ended(end);
                }
            })
            .map_err(|source| Error::Thread { id, source })
    }
}

/// Runs until the vCPU is asked to stop (`None`) or ends by itself.
fn run(id: u8, fd: &mut VcpuFd, around: &Surroundings, pass: &gate::Pass<'_>) -> Option<End> {
    let kicks = kick::Guard::enter(fd);
    loop {
        kicks.rearm();
        let request = around.gate.request();
        match request {
            Request::Run => {}
            // Enter once more without executing anything: it completes the device access that the last exit
            // was about, so that the vCPU waits, and is saved, between two instructions.
            Request::Pause => fd.set_kvm_immediate_exit(1),
            Request::Stop => return None,
        }
        match step(id, fd, around) {
            Ok(Step::Served) => {}
            Ok(Step::Interrupted) if request == Request::Pause => {
                pass.park();
                // Tells the guest's watchdog that it stood still. A guest without kvm-clock has nothing to be told.
                fd.kvmclock_ctrl().unwrap_or_default();
            }
            Ok(Step::Interrupted) => {}
            Err(end) => return Some(end),
        }
    }
}

enum Step {
    /// An access was served.
    Served,
    /// The guest was left without one.
    Interrupted,
}

fn step(id: u8, fd: &mut VcpuFd, around: &Surroundings) -> Result<Step, End> {
    let exit = match fd.run() {
        Ok(exit) => exit,
        Err(error) => {
            return match error.errno() {
                // A processor that waits to be started by another reports EAGAIN when it is interrupted.
                libc::EINTR | libc::EAGAIN => Ok(Step::Interrupted),
                _ => Err(crash(id, fd, around, &format!("cannot be run by KVM ({error})"))),
            };
        }
    };
    match exit {
        VcpuExit::MmioRead(address, data) => {
            around.mmio.read(address, data);
            Ok(Step::Served)
        }
        VcpuExit::MmioWrite(address, data) => {
            around.mmio.write(address, data);
            Ok(Step::Served)
        }
        VcpuExit::IoIn(port, data) => {
            let (start, len) = (data.as_mut_ptr(), data.len());
            let width = port_width(fd);
            // SAFETY: start and len are the exit's data in the vCPU's kvm_run mapping, which stays in place;
            // looking up the access width took a second borrow of it, which has ended.
            let data = unsafe { std::slice::from_raw_parts_mut(start, len) };
            for item in data.chunks_mut(width) {
                around.ports.read(port.into(), item);
            }
            Ok(Step::Served)
        }
        VcpuExit::IoOut(port, data) => {
            let (start, len) = (data.as_ptr(), data.len());
            let width = port_width(fd);
            // SAFETY: as for IoIn.
            let data = unsafe { std::slice::from_raw_parts(start, len) };
            for item in data.chunks(width) {
                around.ports.write(port.into(), item);
            }
            Ok(Step::Served)
        }
        VcpuExit::Intr => Ok(Step::Interrupted),
        VcpuExit::SystemEvent(kind, _) if kind == KVM_SYSTEM_EVENT_SHUTDOWN => Err(End::PowerOff),
        VcpuExit::SystemEvent(kind, _) if kind == KVM_SYSTEM_EVENT_RESET => Err(End::Reset),
        VcpuExit::Shutdown => {
            Err(crash(id, fd, around, "met a fault while it handled a double fault (triple fault)"))
        }
        VcpuExit::FailEntry(reason, cpu) => {
            let what = format!(
                "was refused by host processor {cpu}: its state is not one that can be entered (hardware reason {reason:#x})"
            );
            Err(crash(id, fd, around, &what))
        }
        VcpuExit::InternalError => {
            let what = internal_error(fd);
            Err(crash(id, fd, around, &what))
        }
        other => {
            let what = format!("left the guest for a reason that this monitor does not know: {other:?}");
            Err(crash(id, fd, around, &what))
        }
    }
}

/// Bytes of one item of the port access that `fd` has just exited for: 1, 2 or 4. String instructions bring
/// several items at once.
fn port_width(fd: &mut VcpuFd) -> usize {
    // SAFETY: KVM has filled this arm of the union, since the exit is a port access.
    let size = unsafe { fd.get_kvm_run().__bindgen_anon_1.io.size };
    usize::from(size).max(1)
}

fn internal_error(fd: &mut VcpuFd) -> String {
    // SAFETY: KVM has filled this arm of the union, since the exit is an internal error.
    let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
    match suberror {
        1 => "came to an instruction that KVM has to emulate and cannot".to_owned(),
        2 => "took an exception while KVM delivered another".to_owned(),
        3 => "left the guest while KVM delivered an interrupt or exception".to_owned(),
        4 => "left the guest for a reason that KVM does not know".to_owned(),
        other => format!("met an internal error of KVM (suberror {other})"),
    }
}

fn crash(id: u8, fd: &VcpuFd, around: &Surroundings, what: &str) -> End {
    End::Crash(Box::new(Diagnosis::take(fd, &around.memory, format!("vCPU {id} {what}"))))
}
