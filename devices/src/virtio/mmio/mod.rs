//! Virtio over MMIO, version 2 (virtio 1.2, section 4.2).

mod registers;
mod transport;

pub use registers::{QUEUE_NOTIFY, WINDOW};
pub use transport::MmioTransport;
