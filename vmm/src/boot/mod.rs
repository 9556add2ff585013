//! Kernels: recognised and checked before a guest is made, then placed into its memory, and entered.
//!
//! | image | entered |
//! | --- | --- |
//! | ELF with a Xen PVH note | 32-bit, paging off, `start_info` in `ebx` (Xen, `docs/misc/pvh`) |
//! | ELF without | 64-bit, `boot_params` in `rsi` (Linux, `Documentation/arch/x86/boot.rst`) |
//! | bzImage | its payload is unpacked here and booted as the ELF it is; failing that, its own 64-bit entry |

mod bzimage;
mod elf;
mod error;
mod initrd;
mod kernel;
mod layout;
mod linux64;
mod payload;
mod pvh;

pub use error::Error;
pub use initrd::Initrd;
pub use kernel::Kernel;
pub use layout::RSDP;

use devices::GuestRam;
use kvm_bindings::{kvm_regs, kvm_sregs};

/// The state in which the boot processor enters what was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Xen PVH.
    Pvh {
        /// Entry point, below 4 GiB.
        rip: u64,
    },
    /// The 64-bit entry of Linux.
    Linux64 {
        /// Entry point.
        rip: u64,
    },
}

impl Entry {
    /// Changes the processor's reset state into the one of this entry.
    pub fn configure(&self, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
        match self {
            Self::Pvh { rip } => pvh::configure(*rip, regs, sregs),
            Self::Linux64 { rip } => linux64::configure(*rip, regs, sregs),
        }
    }
}

/// Puts `kernel`, `initrd` and `cmdline` into `memory`, with all that the kernel needs to be told. `acpi`
/// says whether there are ACPI tables at [`RSDP`].
///
/// # Errors
///
/// [`Error`]; what `memory` holds then is undefined.
pub fn load(
    memory: &GuestRam,
    kernel: &mut Kernel,
    initrd: Option<&mut Initrd>,
    cmdline: &str,
    acpi: bool,
) -> Result<Entry, Error> {
    let ranges = layout::ram(memory);
    kernel.place(memory)?;
    let initrd = initrd.map(|initrd| initrd.place(memory, &ranges, kernel)).transpose()?;
    layout::write_cmdline(memory, kernel, cmdline)?;
    layout::write_firmware(memory)?;
    match kernel.entry() {
        entry @ Entry::Pvh { .. } => {
            pvh::write_start_info(memory, &ranges, initrd, acpi)?;
            Ok(entry)
        }
        entry @ Entry::Linux64 { .. } => {
            linux64::write_boot_params(memory, &ranges, kernel.setup_header(), initrd, cmdline, acpi)?;
            Ok(entry)
        }
    }
}

#[cfg(test)]
mod tests;
