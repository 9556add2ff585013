//! A running machine as it is controlled from outside: paused, resumed, asked to power off, stopped; and its disks.

use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use api::{Control, DiskOrder, Job, NetStatus, Refused, State, Status};
use devices::legacy::power::Power;
use devices::legacy::serial::Serial;
use devices::virtio::mmio::MmioTransport;
use kvm_ioctls::VmFd;

use super::Error;
use super::build::Built;
use super::console::Console;
use super::disks::{Disks, power_off};
use super::ending::{Ending, Outcome};
use crate::config::address::show_mac;
use crate::config::model::{Config, Net};
use crate::vcpu::{End, Surroundings};

/// What the control socket reaches. It lives as long as a connection does, which may be longer than the machine.
pub struct Controller {
    /// But for what changes.
    status: Status,
    ending: Arc<Ending>,
    around: Arc<Surroundings>,
    devices: Vec<Arc<MmioTransport>>,
    power: Arc<Power>,
    disks: Disks,
    /// Held while the machine goes from one state to another, so that two commands do not interleave.
    paused: Mutex<bool>,
}

impl Debug for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller").field("name", &self.status.name).finish_non_exhaustive()
    }
}

/// What the main thread keeps of a running machine.
#[derive(Debug)]
pub struct Machine {
    /// Closed last.
    _vm: VmFd,
    controller: Arc<Controller>,
    threads: Vec<JoinHandle<()>>,
    pub serial: Arc<Serial>,
    pub console: Console,
}

/// Lets the processors of `built` run.
pub fn start(
    config: &Config,
    built: Built,
    ending: &Arc<Ending>,
) -> Result<(Arc<Controller>, Machine), Error> {
    let Built { vm, vcpus, around, devices, power, serial, console, disks } = built;
    let controller = Arc::new(Controller {
        status: describe(config, console.place().to_owned()),
        ending: ending.clone(),
        around: around.clone(),
        devices,
        power,
        disks,
        paused: Mutex::new(false),
    });
    let mut machine =
        Machine { _vm: vm, controller: controller.clone(), threads: Vec::new(), serial, console };
    let mut missing = vcpus.len();
    for vcpu in vcpus {
        let ending = ending.clone();
        let started = vcpu.start(around.clone(), move |end| {
            ending.report(match end {
                End::PowerOff => Outcome::PowerOff,
                End::Reset => Outcome::Reset,
                End::Crash(diagnosis) => Outcome::Crashed(diagnosis),
            });
        });
        match started {
            Ok(thread) => machine.threads.push(thread),
            Err(error) => {
                around.gate.give_up(missing);
                machine.take_apart();
                return Err(error.into());
            }
        }
        missing -= 1;
    }
    Ok((controller, machine))
}

fn describe(config: &Config, serial: String) -> Status {
    let started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let net = |net: &Net| NetStatus { tap: net.tap.clone(), mac: show_mac(net.mac) };
    Status {
        name: config.name.clone(),
        state: State::Running,
        pid: std::process::id(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        started,
        cpus: config.cpu.count,
        memory: config.memory.size,
        kernel: config.boot.kernel.clone(),
        serial: Some(serial),
        disks: Vec::new(),
        nets: config.nets.iter().map(net).collect(),
    }
}

impl Machine {
    /// Presses the power button.
    pub fn press_power_button(&self) {
        if let Err(Refused(reason)) = self.controller.power_button() {
            tracing::warn!("{reason}");
        }
    }

    /// Ends whatever still runs of it, and closes what it had open. Gives its redo logs.
    pub fn take_apart(self) -> Vec<power_off::Log> {
        self.controller.ending.report(Outcome::Stopped);
        self.controller.around.gate.stop();
        self.controller.around.gate.wait_ended();
        for thread in self.threads {
            // A panic has been printed by its thread.
            drop(thread.join());
        }
        // No vCPU runs, so that nobody starts a device again.
        self.controller.devices.iter().for_each(|device| device.stop());
        self.controller.disks.close()
    }
}

impl Controller {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.paused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refuse_at_the_end(&self) -> Result<(), Refused> {
        if self.ending.is_reported() {
            return Err(Refused(format!("guest {} is at its end", self.status.name)));
        }
        Ok(())
    }

    fn ended_meanwhile(&self) -> Refused {
        Refused(format!("guest {} came to its end meanwhile", self.status.name))
    }
}

impl Control for Controller {
    fn status(&self) -> Status {
        let paused = self.paused.try_lock().is_ok_and(|paused| *paused);
        let state = match (self.ending.is_reported(), paused) {
            (true, _) => State::Stopping,
            (_, true) => State::Paused,
            _ => State::Running,
        };
        let mut status = self.status.clone();
        status.state = state;
        status.disks = self.disks.status();
        status
    }

    fn pause(&self) -> Result<(), Refused> {
        let mut paused = self.lock();
        self.refuse_at_the_end()?;
        if *paused {
            return Ok(());
        }
        if !self.around.gate.pause() {
            return Err(self.ended_meanwhile());
        }
        // Processors first: nothing starts a device behind our back while the devices finish.
        self.devices.iter().for_each(|device| device.pause());
        *paused = true;
        Ok(())
    }

    fn resume(&self) -> Result<(), Refused> {
        let mut paused = self.lock();
        self.refuse_at_the_end()?;
        if !*paused {
            return Ok(());
        }
        self.devices.iter().for_each(|device| device.resume());
        *paused = false;
        if self.around.gate.resume() { Ok(()) } else { Err(self.ended_meanwhile()) }
    }

    fn power_button(&self) -> Result<(), Refused> {
        self.refuse_at_the_end()?;
        if *self.lock() {
            return Err(Refused(format!(
                "guest {0} is paused and cannot see its power button; `vmm resume {0}` first",
                self.status.name
            )));
        }
        self.power.press_button().map_err(|error| Refused(format!("the power button is stuck: {error}")))
    }

    fn stop(&self) -> Result<(), Refused> {
        self.ending.report(Outcome::Stopped);
        Ok(())
    }

    fn disks(&self) -> usize {
        self.disks.count()
    }

    fn disk(&self, index: usize, order: DiskOrder) -> Result<Option<Job>, Refused> {
        self.refuse_at_the_end()?;
        self.disks.order(index, order)
    }

    fn jobs(&self) -> Vec<Job> {
        self.disks.jobs()
    }

    fn cancel(&self, id: u64) {
        self.disks.cancel(id);
    }
}
