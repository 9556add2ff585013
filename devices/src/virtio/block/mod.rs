//! A disk (virtio 1.2, section 5.2) on a raw file or block device.

mod config;
mod device;
mod disk;
mod lock;
mod request;
mod worker;

pub use device::Block;
pub use disk::{Disk, Raw};

use std::io;
use std::path::PathBuf;

/// Unit of addresses and sizes in the protocol, in bytes.
pub const SECTOR: u64 = 512;

/// A disk that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file does not open.
    #[error("cannot open disk {} for {}", path.display(), if *readonly { "reading" } else { "reading and writing" })]
    Open {
        /// The file.
        path: PathBuf,
        /// Whether only reading was asked for.
        readonly: bool,
        /// What the system answered.
        source: io::Error,
    },
    /// Neither file nor block device.
    #[error("disk {} is {kind}; a disk is a regular file or a block device", path.display())]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// The host itself uses the block device.
    #[error("disk {} is in use by this host: mounted, part of another device, or open exclusively", path.display())]
    Busy {
        /// The device.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("disk {} holds {size} bytes, which is less than one sector ({SECTOR} bytes)", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        size: u64,
    },
    /// Somebody else has it.
    #[error("disk {} is in use by {holder}; a disk has either one writer or any number of readers", path.display())]
    Locked {
        /// The file.
        path: PathBuf,
        /// Who holds the lock, as far as the kernel tells.
        holder: String,
    },
    /// There are no locks where it lies.
    #[error("cannot lock disk {}, and without a lock two guests could write to it", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// It cannot be examined.
    #[error("cannot examine disk {}", path.display())]
    Examine {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
}
