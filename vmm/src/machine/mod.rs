//! The machine: it wires memory, processors, interrupts, devices and firmware tables into one guest, runs it, and takes
//! it apart again. The parts do the work.
//!
//! ```text
//! files ─ opened and checked before anything is created
//!   │
//! build ─ memory, interrupt controllers, vCPUs, devices on their buses, kernel and tables in memory
//!   │
//! run ─── vCPU threads and device threads; the main thread waits for the end, signals and console input
//!   │
//! disks ─ what became of the guest's writes is decided, where there is something to decide
//! ```

mod build;
mod console;
mod control;
pub mod disks;
pub mod ending;
mod files;
mod main_loop;
mod signals;
mod slots;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use disks::open::Fresh;
use disks::power_off::{self, Attendant};
use ending::{Ending, Outcome};

use crate::config::Loaded;
use crate::run_dir::{self, Root};
use crate::{acpi, boot, config, interrupt, memory, vcpu};

/// A guest that cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration, or a file that it names.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] run_dir::Error),
    /// No KVM.
    #[error("cannot use /dev/kvm; `vmm doctor` says what to do")]
    Kvm(#[source] kvm_ioctls::Error),
    /// KVM refuses something that every guest needs.
    #[error("KVM does not {what}; `vmm doctor` says what this host lacks")]
    Refused {
        /// What it was asked to do.
        what: &'static str,
        /// What it answered.
        source: kvm_ioctls::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] vcpu::Error),
    /// The processor features.
    #[error(transparent)]
    Cpuid(#[from] vcpu::cpuid::Error),
    /// Interrupts.
    #[error(transparent)]
    Interrupt(#[from] interrupt::Error),
    /// Kernel or initial RAM disk.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// Firmware tables.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// A device's place.
    #[error(transparent)]
    Bus(#[from] devices::bus::Error),
    /// Something of the host that the monitor itself needs.
    #[error("cannot set up {what}")]
    Host {
        /// What.
        what: &'static str,
        /// What the system answered.
        source: io::Error,
    },
}

impl Error {
    /// Exit status of the contract: 2 for a wrong configuration, else 1.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        if matches!(self, Self::Config(_)) { 2 } else { 1 }
    }
}

/// For errors of the host.
fn host(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Host { what, source }
}

/// How a guest has ended.
#[derive(Debug)]
pub struct Ended {
    /// Why it runs no more.
    pub outcome: Outcome,
    /// What was to be done with its redo logs and was not.
    pub undone: Vec<power_off::Error>,
}

/// Runs the guest that `loaded` describes until its end, under its name in `root`. `attendant` hears of the end, and is asked.
///
/// The calling thread becomes the guest's main thread; signals that ask to end are blocked in it from then on.
///
/// # Errors
///
/// [`Error`] if the guest cannot be started. Nothing of it is left then.
pub fn run(loaded: &Loaded, root: &Root, attendant: &mut dyn Attendant) -> Result<Ended, Error> {
    // The claim below is what decides; this only puts "is running already" before "its disk is in use".
    if let Ok(guest) = root.find(&loaded.config.name) {
        return Err(run_dir::Error::Held { name: loaded.config.name.clone(), pid: guest.pid() }.into());
    }
    let mut fresh = Fresh::default();
    match start(loaded, root, &mut fresh) {
        Ok(running) => running.until_the_end(&loaded.config.name, attendant),
        Err(error) => {
            fresh.remove();
            Err(error)
        }
    }
}

/// A guest that has begun.
struct Running {
    signals: signals::EndSignals,
    ending: Arc<Ending>,
    machine: control::Machine,
    server: api::server::Server,
    /// Given back last.
    claim: run_dir::Claim,
}

fn start(loaded: &Loaded, root: &Root, fresh: &mut Fresh) -> Result<Running, Error> {
    let config = &loaded.config;
    let files = files::open(loaded, fresh)?;
    let signals = signals::EndSignals::block().map_err(host("the handling of signals"))?;
    let claim = root.claim(&config.name)?;
    let listener = claim.listen()?;
    let ending = Arc::new(Ending::new().map_err(host("an event descriptor"))?);
    let wrong = |key: &str, message: String| Error::Config(loaded.error(vec![loaded.problem(key, message)]));
    let console = console::Console::open(&config.serial)
        .map_err(|error| wrong("serial.output", format!("cannot be opened: {error}")))?;
    let built = build::build(config, files, &ending, console).map_err(|error| match error {
        Error::Boot(reason @ boot::Error::Cmdline { .. }) => wrong("boot.cmdline", reason.to_string()),
        Error::Cpuid(reason) => wrong("cpu.model", reason.to_string()),
        error => error,
    })?;
    let (controller, machine) = control::start(config, built, &ending)?;
    match api::server::Server::start(listener, controller) {
        Ok(server) => Ok(Running { signals, ending, machine, server, claim }),
        Err(error) => {
            machine.take_apart();
            Err(host("the control socket")(error))
        }
    }
}

impl Running {
    fn until_the_end(self, name: &str, attendant: &mut dyn Attendant) -> Result<Ended, Error> {
        let Self { signals, ending, mut machine, server, claim } = self;
        let served = main_loop::until_the_end(&ending, &signals, &mut machine);
        // The terminal is what it was from here on.
        let logs = machine.take_apart();
        served.map_err(host("the main loop"))?;
        let outcome = ending.take().unwrap_or(Outcome::Stopped);
        attendant.ended(&outcome);
        // Whoever wanted the end once may have said so twice.
        while signals.take().is_some() {}
        let undone =
            power_off::settle(name, logs, attendant, signals.as_raw_fd(), || signals.take().is_some());
        server.stop();
        drop(claim);
        Ok(Ended { outcome, undone })
    }
}
