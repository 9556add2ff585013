//! The bare ioctl loop of `src/bin/floor.rs`: what any monitor must do at least.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Guest, System, unsupported};

pub const NAME: &str = crate::report::BASE;

#[derive(Debug)]
pub struct Floor(pub PathBuf);

impl System for Floor {
    fn name(&self) -> &'static str {
        NAME
    }

    fn program(&self) -> &Path {
        &self.0
    }

    fn command(&self, guest: &Guest<'_>, _dir: &Path) -> io::Result<Command> {
        if guest.disk.is_some() {
            return unsupported("it has no disks");
        }
        let mut command = Command::new(&self.0);
        command.arg(guest.elf).arg(guest.cmdline).arg(guest.memory_mib.to_string());
        Ok(command)
    }
}
