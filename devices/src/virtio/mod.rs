//! Virtio 1.x devices: what every device is to its transport, and the transports themselves.

pub mod block;
pub mod chain;
pub mod device;
pub mod log_limit;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod test_driver;
pub mod worker;
