//! QEMU's `microvm` machine, stripped of what it can do without.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Disk, Format, Guest, System, unsupported};

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
        if let Some(disk) = guest.disk {
            add_disk(&mut command, disk)?;
        }
        Ok(command)
    }
}

fn add_disk(command: &mut Command, disk: Disk<'_>) -> io::Result<()> {
    let format = match disk.format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
        Format::Thin => return unsupported("it does not know our images"),
    };
    let cache = if disk.direct { "none" } else { "writeback" };
    // A comma in a value is doubled.
    let path = disk.path.to_string_lossy().replace(',', ",,");
    command.args(["-global", "virtio-mmio.force-legacy=false", "-object", "iothread,id=io"]);
    command.arg("-drive");
    command.arg(format!("id=disk,if=none,format={format},aio=io_uring,cache={cache},file={path}"));
    command.args(["-device", "virtio-blk-device,drive=disk,iothread=io"]);
    Ok(())
}
