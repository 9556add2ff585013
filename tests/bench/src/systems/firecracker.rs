//! Firecracker without its API: `firecracker --no-api --config-file`.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use serde_json::json;

use super::{Disk, Format, Guest, System, unsupported};

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
        let drives = match guest.disk {
            None => json!([]),
            Some(Disk { direct: true, .. }) => {
                return unsupported("it has no mode that passes the page cache by");
            }
            Some(Disk { path, format: Format::Raw, .. }) => json!([{
                "drive_id": "disk", "path_on_host": path, "is_root_device": false, "is_read_only": false,
                "io_engine": "Async", "cache_type": "Writeback",
            }]),
            Some(_) => return unsupported("it has raw images only"),
        };
        let config = json!({
            "boot-source": {"kernel_image_path": guest.elf, "boot_args": guest.cmdline},
            "drives": drives,
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
