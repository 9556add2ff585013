//! `vmm disk`: disks of guests that run.

use std::path::PathBuf;
use std::time::Duration;

use api::{AtPowerOff, DiskLimits};
use clap::Subcommand;
use vmfs_image::Format;

use super::{Failure, guests};
use crate::config;

/// What to do with a disk.
#[derive(Debug, Subcommand)]
pub enum DiskVerb {
    /// Try again what waits since the storage failed or was full
    #[command(after_help = "Example: vmm disk retry web")]
    Retry {
        #[command(flatten)]
        which: Which,
    },
    /// Limit a disk; what is not given is unlimited from now on
    #[command(after_help = "Example: vmm disk limits web 1 --iops 500 --bandwidth 20M")]
    Limits {
        #[command(flatten)]
        which: Which,
        /// Most requests a second
        #[arg(long, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
        iops: Option<u64>,
        /// Most bytes a second, as in 20M
        #[arg(long, value_name = "SIZE", value_parser = config::parse_size)]
        bandwidth: Option<u64>,
        /// How much of what was not used is kept for later, as the time it is for: 1ms to 60s
        #[arg(long, value_name = "TIME", value_parser = config::parse_time)]
        burst: Option<Duration>,
    },
    /// Put another image behind a disk: a changed medium
    #[command(after_help = "Example: vmm disk medium web 1 tools.img")]
    Medium {
        /// Name of the guest
        name: String,
        /// Which of its disks, from 0, in the order of its configuration
        disk: usize,
        /// The image
        path: PathBuf,
        /// What kind it is; without, its first bytes tell
        #[arg(long)]
        format: Option<Format>,
    },
    /// Say what becomes of an undoable disk's redo log when the guest powers off
    #[command(after_help = "Example: vmm disk at-power-off web 0 discard")]
    AtPowerOff {
        /// Name of the guest
        name: String,
        /// Which of its disks, from 0, in the order of its configuration
        disk: usize,
        /// ask, commit, discard or keep
        #[arg(value_parser = str::parse::<AtPowerOff>)]
        action: AtPowerOff,
    },
}

/// A disk of a guest.
#[derive(Debug, clap::Args)]
pub struct Which {
    /// Name of the guest
    name: String,
    /// Which of its disks, from 0, in the order of its configuration
    #[arg(default_value_t = 0)]
    disk: usize,
}

/// Does what the verb says.
pub fn carry_out(verb: DiskVerb) -> Result<(), Failure> {
    match verb {
        DiskVerb::Retry { which } => Ok(guests::connect_to(&which.name)?.retry(which.disk)?),
        DiskVerb::Limits { which, iops, bandwidth, burst } => {
            let burst = burst.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
            let limits = DiskLimits { iops, bandwidth, burst };
            Ok(guests::connect_to(&which.name)?.set_limits(which.disk, limits)?)
        }
        DiskVerb::Medium { name, disk, path, format } => {
            // The monitor has a directory of its own.
            let path = std::path::absolute(path)?;
            Ok(guests::connect_to(&name)?.change_medium(disk, &path, format.map(Format::as_str))?)
        }
        DiskVerb::AtPowerOff { name, disk, action } => {
            Ok(guests::connect_to(&name)?.at_power_off(disk, action)?)
        }
    }
}
