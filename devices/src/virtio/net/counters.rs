//! What has gone through a card.

use std::sync::atomic::{AtomicU64, Ordering};

/// What has gone through a card since it was made, resets included. Only ever counts up. `rx` is towards the guest; bytes
/// are those of frames, without virtio headers.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames handed to the guest.
    pub rx_frames: AtomicU64,
    /// Their bytes.
    pub rx_bytes: AtomicU64,
    /// Frames dropped because the guest's buffers are too small for them, or all of them together are.
    pub rx_dropped_room: AtomicU64,
    /// Frames dropped because they are shorter than an Ethernet header or longer than 64 KiB and one.
    pub rx_dropped_length: AtomicU64,
    /// Frames dropped because their header asks for what the driver has not agreed to.
    pub rx_dropped_header: AtomicU64,
    /// How many times frames had to wait for the guest to offer buffers.
    pub rx_waits: AtomicU64,
    /// How many times a frame could not be had for another reason than that there was none.
    pub rx_errors: AtomicU64,
    /// Frames taken from the guest and sent.
    pub tx_frames: AtomicU64,
    /// Their bytes.
    pub tx_bytes: AtomicU64,
    /// Frames dropped because they are shorter than an Ethernet header or longer than 64 KiB and one.
    pub tx_dropped_length: AtomicU64,
    /// Frames dropped because their header is wrong, or asks for what was not negotiated.
    pub tx_dropped_header: AtomicU64,
    /// Frames that the back end has refused.
    pub tx_errors: AtomicU64,
    /// How many times a frame had to wait for the back end to have room.
    pub tx_waits: AtomicU64,
}

/// Adds `count`.
pub fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(u64::try_from(count).unwrap_or_default(), Ordering::Relaxed);
}
