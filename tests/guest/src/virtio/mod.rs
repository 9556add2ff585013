//! Virtio drivers (virtio 1.2): MMIO transport, split queues, disk, network card, entropy source.

pub mod block;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;

/// Device types (section 5).
pub mod kind {
    /// Network card.
    pub const NET: u32 = 1;
    /// Disk.
    pub const BLOCK: u32 = 2;
    /// Entropy source.
    pub const RNG: u32 = 4;
}

/// Feature bits of every device (section 6).
pub mod feature {
    /// Descriptors may point to tables of descriptors.
    pub const INDIRECT: u64 = 1 << 28;
    /// Both sides say when they next want to hear of each other.
    pub const EVENT_INDEX: u64 = 1 << 29;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
}
