//! What can be wrong with a kernel or an initial RAM disk.

use std::io;
use std::path::PathBuf;

/// A kernel or initial RAM disk that cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not open.
    #[error("cannot open {what} {}", path.display())]
    Open {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// It cannot be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// It is no file.
    #[error("{what} {} is not a regular file", path.display())]
    Kind {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("{what} {} is empty", path.display())]
    Empty {
        /// Kernel or initrd.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// Not an image of a known kind.
    #[error("kernel {} is neither an ELF file nor a bzImage", path.display())]
    Unknown {
        /// The file.
        path: PathBuf,
    },
    /// An ELF that is not a kernel for this machine.
    #[error("kernel {} cannot be booted: {reason}", path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// A bzImage that cannot be entered in any way.
    #[error("bzImage {} cannot be booted: {reason}", path.display())]
    Bzimage {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        reason: String,
    },
    /// It needs more memory than there is, or other addresses.
    #[error("kernel {} needs guest memory from {start:#x} to {end:#x}, and the guest has none there", path.display())]
    Placement {
        /// The file.
        path: PathBuf,
        /// First address.
        start: u64,
        /// Address after the last.
        end: u64,
    },
    /// It wants to lie where the machine keeps its own things.
    #[error("{} cannot be a kernel for this machine: it would be loaded at {start:#x}, and kernels begin at 1 MiB or above", path.display())]
    Low {
        /// The file.
        path: PathBuf,
        /// First address.
        start: u64,
    },
    /// The initial RAM disk does not fit.
    #[error("initrd {} of {} MiB does not fit into guest memory beside the kernel, which ends at {} MiB", path.display(), size.div_ceil(1 << 20), kernel_end.div_ceil(1 << 20))]
    InitrdSize {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
        /// Where the kernel ends.
        kernel_end: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {len} bytes with what the machine adds; this kernel takes {max}")]
    Cmdline {
        /// Its length in bytes.
        len: usize,
        /// The most there may be.
        max: usize,
    },
    /// Memory below 1 MiB is missing.
    #[error("guest memory at {address:#x}, which is needed to boot, cannot be written")]
    Memory {
        /// Guest-physical address.
        address: u64,
    },
}
