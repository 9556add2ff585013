//! What the loader passed.

use crate::boot::RAM;
use crate::json::Line;
use crate::{Error, Machine, phys};

/// FNV-1a of 64 bits (Fowler, Noll, Vo; `draft-eastlake-fnv`).
fn fnv(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// `test=boot`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let boot = &machine.boot;
    let ram = boot.map.iter().filter(|range| range.kind == RAM);
    let mut line = Line::result("boot");
    line.text("entry", boot.entry.name())
        .text("cmdline", &boot.cmdline)
        .number("ram", ram.map(|range| range.end - range.start).sum())
        .numbers("map_start", boot.map.iter().map(|range| range.start))
        .numbers("map_end", boot.map.iter().map(|range| range.end))
        .numbers("map_type", boot.map.iter().map(|range| range.kind.into()))
        .number("rsdp", boot.rsdp.unwrap_or(0))
        .number("tsc_khz", machine.clock.khz())
        .text("clock", machine.clock.source());
    if let Some((address, len)) = boot.initrd {
        line.number("initrd", address).number("initrd_len", len);
        line.number("initrd_fnv", fnv(phys::bytes(address, len)));
    }
    line.send();
    Ok(())
}
