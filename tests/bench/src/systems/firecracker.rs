//! Firecracker without its API: `firecracker --no-api --config-file`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use serde_json::json;

use super::{Guest, System};

pub const NAME: &str = "firecracker";

#[derive(Debug)]
pub struct Firecracker(pub PathBuf);

impl System for Firecracker {
    fn name(&self) -> &'static str {
        NAME
    }

    fn program(&self) -> &Path {
        &self.0
    }

    fn command(&self, guest: &Guest<'_>, dir: &Path) -> io::Result<Command> {
        let config = json!({
            "boot-source": {"kernel_image_path": guest.elf, "boot_args": guest.cmdline},
            "drives": [],
            "machine-config": {"vcpu_count": 1, "mem_size_mib": guest.memory_mib},
        });
        let path = dir.join("firecracker.json");
        fs::write(&path, config.to_string())?;
        let mut command = Command::new(&self.0);
        // Its log goes to standard output; all that is asked for there is the guest's.
        command.args(["--no-api", "--no-seccomp", "--level", "Error", "--config-file"]).arg(path);
        Ok(command)
    }
}
