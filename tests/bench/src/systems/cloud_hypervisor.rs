//! Cloud Hypervisor.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Guest, System, unsupported};

pub const NAME: &str = "cloud-hypervisor";

#[derive(Debug)]
pub struct CloudHypervisor(pub PathBuf);

impl System for CloudHypervisor {
    fn name(&self) -> &'static str {
        NAME
    }

    fn program(&self) -> &Path {
        &self.0
    }

    fn command(&self, guest: &Guest<'_>, _dir: &Path) -> io::Result<Command> {
        if guest.disk.is_some() {
            return unsupported("its disks are PCI devices, which the guest does not know");
        }
        let mut command = Command::new(&self.0);
        command.args(["--seccomp", "false", "--console", "off", "--serial", "tty", "--cpus", "boot=1"]);
        command.arg("--memory").arg(format!("size={}M", guest.memory_mib));
        command.arg("--kernel").arg(guest.elf).arg("--cmdline").arg(guest.cmdline);
        Ok(command)
    }
}
