//! Our monitor: `vmm --config vm.toml`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use super::{Guest, System, unsupported};

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
            config += &format!("[[disk]]\npath = {}\n", serde_json::to_string(disk.path)?);
            if disk.direct {
                return unsupported("it has no cache modes yet");
            }
        }
        let path = dir.join("vm.toml");
        fs::write(&path, config)?;
        let mut command = Command::new(&self.0);
        command.arg("--config").arg(path).env("VMM_RUN_DIR", dir.join("run"));
        Ok(command)
    }
}
