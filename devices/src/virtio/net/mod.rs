//! A network card (virtio 1.2, section 5.1) with one pair of queues.
//!
//! ```text
//!  guest ── receive queue ──┐                     ┌── Tap: an interface of the host
//!                           ├── worker ── Backend ┤
//!  guest ── transmit queue ─┘                     └── …
//! ```
//!
//! Frames go between guest memory and the [`Backend`] without a copy in between. Whatever says how a frame is to be
//! treated (checksum to be filled in, segments to be cut) is checked on its way, in both directions, against what was
//! negotiated: see [`Header`].

mod backend;
mod config;
mod counters;
mod device;
mod header;
mod interface;
mod ring;
mod rx;
mod tap;
mod tx;
mod worker;

pub use backend::{Backend, Offloads, Pieces};
pub use counters::Counters;
pub use device::Net;
pub use header::{HEADER_LEN, Header};
pub use tap::Tap;

use std::io;

/// Bytes of an Ethernet header: two addresses and a type. No frame is shorter.
pub const ETHERNET_HEADER: usize = 14;
/// Longest frame in bytes: a packet of 64 KiB, to be cut into segments later, behind an Ethernet header with a VLAN tag.
pub const MAX_FRAME: usize = (64 << 10) + ETHERNET_HEADER + 4;

/// A network interface of the host that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No interface can be called so.
    #[error(
        "{name:?} cannot be the name of a tap: 1 to 15 printable ASCII characters, without space, '/', ':' or '%'"
    )]
    Name {
        /// What was given.
        name: String,
    },
    /// The host has no driver for taps.
    #[error("cannot open tap {name}: /dev/net/tun is missing or has no driver; try `modprobe tun`")]
    NoDriver {
        /// The interface.
        name: String,
        /// What the system answered.
        source: io::Error,
    },
    /// Not allowed.
    #[error(
        "no permission to {what} of tap {name}: it takes CAP_NET_ADMIN, or a tap made ready beforehand \
         (ip tuntap add {name} mode tap user \"$USER\"; ip link set {name} up)"
    )]
    Permission {
        /// The interface.
        name: String,
        /// What was being done.
        what: &'static str,
        /// What the system answered.
        source: io::Error,
    },
    /// Another kind of interface.
    #[error("network interface {name} is not a tap but {kind}")]
    Kind {
        /// The interface.
        name: String,
        /// What it is, as far as the kernel tells.
        kind: String,
    },
    /// A tap that several processes can share.
    #[error("tap {name} has several queues; a tap of one queue is needed (ip tuntap add {name} mode tap)")]
    MultiQueue {
        /// The interface.
        name: String,
    },
    /// Somebody else has it.
    #[error("tap {name} is in use: {holder} has it open")]
    Busy {
        /// The interface.
        name: String,
        /// Who has it, as far as the kernel tells.
        holder: String,
    },
    /// An impossible prefix.
    #[error("tap {name} cannot have an address with a prefix of {prefix} bits; 1 to 32 are possible")]
    Prefix {
        /// The interface.
        name: String,
        /// What was given.
        prefix: u8,
    },
    /// The system refuses.
    #[error("cannot {what} of tap {name}")]
    SetUp {
        /// The interface.
        name: String,
        /// What was being done.
        what: &'static str,
        /// What the system answered.
        source: io::Error,
    },
}
