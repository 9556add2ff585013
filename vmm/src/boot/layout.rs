//! Where things lie in low guest memory before a kernel runs.
//!
//! The first megabyte is laid out as on a PC: conventional memory up to the extended BIOS data area, then what firmware
//! reserves. What is listed here is the monitor's until the kernel has read it; kernels are loaded above.

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Error, Kernel};

/// Global descriptor table of the 64-bit entry.
pub const GDT: u64 = 0x500;
/// PVH start information; its module and memory tables follow.
pub const START_INFO: u64 = 0x6000;
/// Module table of PVH.
pub const MODULES: u64 = 0x6100;
/// Memory table of PVH.
pub const MEMMAP: u64 = 0x6200;
/// `boot_params` of Linux.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack of the 64-bit entry, growing down.
pub const STACK: u64 = 0x8ff0;
/// Page tables of the 64-bit entry: one PML4, one PDPT, four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Command line, at most [`CMDLINE_MAX`] bytes with its terminator.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// End of conventional memory.
pub const EBDA: u64 = 0x9_fc00;
/// Root pointer of the ACPI tables (in the range that systems search, ACPI 6.5 section 5.2.5.1).
pub const RSDP: u64 = 0xe_0000;
/// Where a PC's processor begins after a reset, as real mode reaches it.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where memory goes on after the hole of the PC's first megabyte.
pub const HIGH_START: u64 = 0x10_0000;

/// RAM of the guest: `(start, end)` of each range.
pub fn ram(memory: &GuestRam) -> Vec<(u64, u64)> {
    memory.iter().map(|region| (region.start_addr().0, region.start_addr().0 + region.len())).collect()
}

/// What kernels are told of RAM: `(start, length, usable)`. Type 1 of E820 is usable, 2 is reserved.
pub fn memory_map(ram: &[(u64, u64)]) -> Vec<(u64, u64, bool)> {
    let mut map = vec![(0, EBDA, true), (EBDA, HIGH_START - EBDA, false)];
    for &(start, end) in ram {
        let start = start.max(HIGH_START);
        if end > start {
            map.push((start, end - start, true));
        }
    }
    map
}

/// Writes `object` to `address`.
pub fn put<T: vm_memory::ByteValued>(memory: &GuestRam, address: u64, object: T) -> Result<(), Error> {
    memory.write_obj(object, GuestAddress(address)).map_err(|_| Error::Memory { address })
}

/// Writes the whole of the firmware: a guest that starts it wants a reset, and gets one through the keyboard controller
/// (`mov al, 0xfe; out 0x64, al; hlt`). Linux reboots so where ACPI is hardware-reduced: it then expects the firmware to
/// be UEFI, and without that enters the BIOS (`arch/x86/kernel/reboot.c`).
pub fn write_firmware(memory: &GuestRam) -> Result<(), Error> {
    let code = [0xb0, 0xfe, 0xe6, 0x64, 0xf4];
    let address = RESET_VECTOR;
    memory.write_slice(&code, GuestAddress(address)).map_err(|_| Error::Memory { address })
}

/// Writes the command line with its terminator.
pub fn write_cmdline(memory: &GuestRam, kernel: &Kernel, cmdline: &str) -> Result<(), Error> {
    let max = kernel.cmdline_max().min(CMDLINE_MAX - 1);
    if cmdline.len() > max {
        return Err(Error::Cmdline { len: cmdline.len(), max });
    }
    let bytes = [cmdline.as_bytes(), &[0]].concat();
    memory.write_slice(&bytes, GuestAddress(CMDLINE)).map_err(|_| Error::Memory { address: CMDLINE })
}
