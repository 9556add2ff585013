//! A disk (virtio 1.2, section 5.2) on an image.
//!
//! ```text
//!  BlockControl ──▶ Shared: image, limits, counters, who waits ◀── Block (the device as its transport sees it)
//!                      │
//!     one Server a queue, on a thread of its own (worker)
//!        │  takes chains ─▶ Request in a Slot
//!        ├─▶ Mover: data of files ─ at once from and to the page cache ─ else Ring (io_uring)
//!        ├─▶ Pool: calls that wait (commits, discards, what the image cannot locate)
//!        └─▶ answers, by one interrupt for many
//! ```

mod calls;
mod config;
mod control;
mod device;
mod limiter;
mod mover;
mod options;
mod polling;
mod pool;
mod request;
mod ring;
mod shared;
mod slot;
mod worker;

pub use control::BlockControl;
pub use device::Block;
pub use options::{BlockEvents, BlockOptions, Engine, Limits, MAX_QUEUES, OnError};
pub use shared::Counters;

/// Unit of addresses and sizes in the protocol, in bytes.
pub const SECTOR: u64 = 512;
