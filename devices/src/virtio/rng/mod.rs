//! Entropy for the guest from the host's generator (virtio 1.2, section 5.4).

mod device;
mod worker;

pub use device::Rng;
