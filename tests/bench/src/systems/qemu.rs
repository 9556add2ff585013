//! QEMU's `microvm` machine, stripped of what it can do without.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Guest, System};

pub const NAME: &str = "qemu";

#[derive(Debug)]
pub struct Qemu(pub PathBuf);

impl System for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn program(&self) -> &Path {
        &self.0
    }

    fn command(&self, guest: &Guest<'_>, _dir: &Path) -> io::Result<Command> {
        let mut command = Command::new(&self.0);
        command.args(["-M", "microvm,rtc=off,acpi=off", "-enable-kvm", "-smp", "1"]);
        // KVM without hardware extensions refuses an MSR that this feature brings with it.
        command.args(["-cpu", "host,-arch-capabilities"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
        command.arg("-m").arg(guest.memory_mib.to_string());
        command.arg("-kernel").arg(guest.elf).arg("-append").arg(guest.cmdline);
        Ok(command)
    }
}
