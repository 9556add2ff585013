//! Our monitor: `vmm --config vm.toml`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use super::{Format, Guest, System};

pub const NAME: &str = super::OURS;

#[derive(Debug)]
pub struct Vmm(pub PathBuf);

impl System for Vmm {
    fn name(&self) -> &'static str {
        NAME
    }

    fn program(&self) -> &Path {
        &self.0
    }

    fn command(&self, guest: &Guest<'_>, dir: &Path) -> io::Result<Command> {
        // A JSON string is a TOML string as well.
        let kernel = serde_json::to_string(guest.elf)?;
        let cmdline = serde_json::to_string(guest.cmdline)?;
        let mut config = format!(
            "[boot]\nkernel = {kernel}\ncmdline = {cmdline}\n[memory]\nsize = \"{}M\"\n",
            guest.memory_mib
        );
        if let Some(disk) = guest.disk {
            let path = serde_json::to_string(disk.path)?;
            let format = match disk.format {
                Format::Raw => "flat",
                Format::Qcow2 => "qcow2",
                Format::Thin => "thin",
            };
            let cache = if disk.direct { "none" } else { "writeback" };
            config += &format!("[[disk]]\npath = {path}\nformat = \"{format}\"\ncache = \"{cache}\"\n");
        }
        let path = dir.join("vm.toml");
        fs::write(&path, config)?;
        let mut command = Command::new(&self.0);
        command.arg("--config").arg(path).env("VMM_RUN_DIR", dir.join("run"));
        Ok(command)
    }
}
