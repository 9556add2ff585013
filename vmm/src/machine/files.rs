//! The files that a configuration names, opened and checked before anything is created.

use std::path::Path;

use devices::virtio::net::Tap;

use super::disks::chain;
use super::disks::open::{self, Fresh, Medium, Wanted};
use crate::boot::{self, Initrd, Kernel};
use crate::config::{Error, Loaded, Problem};
use crate::memory;

/// Everything opened.
#[derive(Debug)]
pub struct Files {
    pub kernel: Kernel,
    pub initrd: Option<Initrd>,
    /// In the order of the configuration.
    pub disks: Vec<Medium>,
    /// Each with the address of the card that is plugged in.
    pub taps: Vec<(Tap, [u8; 6])>,
}

/// Opens them all, and looks whether the kernel fits into the guest; all problems are reported at once. Redo logs that had to
/// be made are noted in `fresh`.
pub fn open(loaded: &Loaded, fresh: &mut Fresh) -> Result<Files, Error> {
    let config = &loaded.config;
    let mut problems = Vec::new();
    let kernel = note(&mut problems, loaded, "boot.kernel", open_kernel(&config.boot.kernel));
    let initrd = config.boot.initrd.as_deref().map(Initrd::open).transpose();
    let initrd = note(&mut problems, loaded, "boot.initrd", initrd);
    if let (Some(kernel), Some(initrd)) = (&kernel, &initrd) {
        check_room(&mut problems, loaded, kernel, initrd.as_ref());
    }
    let mut disks = Vec::new();
    for (index, disk) in config.disks.iter().enumerate() {
        let wanted = Wanted::of(disk, &config.name);
        match wanted.clone().open(fresh) {
            Ok(medium) => disks.push(medium),
            Err(error) => {
                let key = format!("disk.{index}.{}", open::key(&wanted, &error));
                problems.push(loaded.problem(&key, chain(&error)));
            }
        }
    }
    // Opening a tap may make one, which is nothing to be done for a guest that is refused anyway.
    let mut taps = Vec::new();
    let nets = if problems.is_empty() { &config.nets[..] } else { &[] };
    for (index, net) in nets.iter().enumerate() {
        let tap = Tap::open(&net.tap, net.host_address);
        if let Some(tap) = note(&mut problems, loaded, &format!("net.{index}.tap"), tap) {
            taps.push((tap, net.mac));
        }
    }
    match (kernel, initrd) {
        (Some(kernel), Some(initrd)) if problems.is_empty() => Ok(Files { kernel, initrd, disks, taps }),
        _ => Err(loaded.error(problems)),
    }
}

fn open_kernel(path: &Path) -> Result<Kernel, boot::Error> {
    let kernel = Kernel::open(path)?;
    kernel.check_start()?;
    Ok(kernel)
}

/// Kernel and initial RAM disk have to fit into memory beside each other.
fn check_room(problems: &mut Vec<Problem>, loaded: &Loaded, kernel: &Kernel, initrd: Option<&Initrd>) {
    let ram: Vec<_> = memory::ranges(loaded.config.memory.size)
        .into_iter()
        .map(|(start, len)| (start, start + len))
        .collect();
    let placed = kernel.check_placement(&ram);
    let fits = match (&placed, initrd) {
        (Ok(()), Some(initrd)) => initrd.address(&ram, kernel).map(drop),
        _ => placed,
    };
    note(problems, loaded, "memory.size", fits);
}

/// Takes the value, or notes the error with its chain as a problem with `key`.
fn note<T, E>(problems: &mut Vec<Problem>, loaded: &Loaded, key: &str, result: Result<T, E>) -> Option<T>
where
    E: std::error::Error,
{
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            problems.push(loaded.problem(key, chain(&error)));
            None
        }
    }
}
