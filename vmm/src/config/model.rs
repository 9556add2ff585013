//! What a checked configuration says, in the units the machine works in.
//!
//! Values of these types have passed every check that can be made without creating anything: a
//! [`Config`] is internally consistent, its paths are absolute, and the files behind them were
//! readable when it was made.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use vmfs_image::{Cache, Format};

pub use api::AtPowerOff;
pub use devices::virtio::block::OnError;
pub use vmfs_image::redo::Mode;

/// A guest as its `vm.toml` describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Name of the guest, unique on the host: 1 to 64 characters of `[A-Za-z0-9._-]`, the first alphanumeric.
    pub name: String,
    /// What is booted.
    pub boot: Boot,
    /// Virtual processors.
    pub cpu: Cpu,
    /// Guest memory.
    pub memory: Memory,
    /// Block devices in the order in which the guest sees them (`vda`, `vdb`, …).
    pub disks: Vec<Disk>,
    /// Network cards in the order in which the guest sees them.
    pub nets: Vec<Net>,
    /// The first serial port.
    pub serial: Serial,
    /// Whether a virtio entropy device is present (`rng = true`, the default).
    pub rng: bool,
}

/// `[boot]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Boot {
    /// Kernel image: ELF or bzImage.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line as configured; the machine appends what names its devices.
    pub cmdline: String,
}

/// `[cpu]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// Number of virtual processors, 1 to 64.
    pub count: u8,
    /// Which processor features the guest sees.
    pub model: CpuModel,
}

/// `cpu.model`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CpuModel {
    /// Everything the host's KVM offers.
    #[default]
    Host,
    /// The x86-64-v2 level of the x86-64 psABI and nothing above it.
    X86_64V2,
    /// The x86-64-v3 level of the x86-64 psABI and nothing above it.
    X86_64V3,
}

/// `[memory]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Memory {
    /// Size in bytes: a multiple of 2 MiB, 2 MiB up to 256 GiB (default 256 MiB).
    pub size: u64,
    /// What holds the guest's pages on the host.
    pub backing: Backing,
}

/// `memory.backing`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Backing {
    /// Private anonymous pages, huge ones advised (`"anonymous"`).
    #[default]
    Anonymous,
    /// A sealed memfd that can be handed to another process (`"memfd"`).
    Memfd,
    /// A memfd of huge pages from the host's reserve, of its default huge page size (`"hugetlbfs"`).
    Hugetlbfs,
}

/// `[[disk]]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Image file or block device.
    pub path: PathBuf,
    /// What becomes of what the guest writes.
    pub mode: Mode,
    /// Whether the guest may only read (`readonly`).
    pub readonly: bool,
    /// Serial number shown to the guest (`serial`), at most 20 ASCII characters; by default `disk<index>`.
    pub serial: String,
    /// Format of the image; absent: what its content says.
    pub format: Option<Format>,
    /// What stands between the guest's writes and the storage.
    pub cache: Cache,
    /// Number of queues, 1 to 16; by default one for each vCPU, at most 4.
    pub queues: u16,
    /// For how long at most a queue is looked at before its thread sleeps (`poll_us`): 0 to 1 ms.
    pub poll: Duration,
    /// What is done about errors of the storage.
    pub on_error: OnError,
    /// The most that the disk does.
    pub limits: Limits,
    /// What becomes of the redo log of an undoable disk at power-off.
    pub at_power_off: AtPowerOff,
}

/// `disk.iops`, `disk.bandwidth` and `disk.burst`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Requests a second, 1 to 10 million.
    pub iops: Option<u64>,
    /// Bytes a second, 4 KiB to 1 TiB.
    pub bandwidth: Option<u64>,
    /// How much of an allowance that was not used is kept, as the time it is for: 1 ms to 60 s.
    pub burst: Option<Duration>,
}

/// `[[net]]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Net {
    /// Name of the host's tap interface.
    pub tap: String,
    /// Address of the guest's card; by default derived from the guest's name and the card's index.
    pub mac: [u8; 6],
    /// Address that the host's end of the tap is given, with prefix length (`host_address = "10.0.0.1/24"`);
    /// absent: the tap is taken as it is.
    pub host_address: Option<(Ipv4Addr, u8)>,
}

/// `[serial]`
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Serial {
    /// The monitor's own standard input and output.
    #[default]
    Stdio,
    /// A new pseudo-terminal, whose name is in `vmm show`.
    Pty,
    /// Output appended to a file, no input.
    File(PathBuf),
    /// Nothing.
    Null,
}
