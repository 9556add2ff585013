//! A disk (virtio 1.2, section 5.2) on an image.

mod config;
mod control;
mod device;
mod options;
mod request;
mod shared;
mod worker;

pub use control::BlockControl;
pub use device::Block;
pub use options::{BlockEvents, BlockOptions, Engine, Limits, MAX_QUEUES, OnError};
pub use shared::Counters;

/// Unit of addresses and sizes in the protocol, in bytes.
pub const SECTOR: u64 = 512;
