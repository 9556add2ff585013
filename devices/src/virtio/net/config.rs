//! Configuration space (virtio 1.2, section 5.1.4).

use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

const LEN: usize = 12;

/// The space as the driver reads it.
#[derive(Debug, Clone)]
pub struct Space([u8; LEN]);

impl Space {
    /// Describes a card with address `mac` and its cable plugged in. `mtu` counts only if the feature is offered.
    pub fn new(mac: [u8; 6], mtu: u16) -> Self {
        let mut space = Self([0; LEN]);
        space.0[..6].copy_from_slice(&mac);
        space.0[6..8].copy_from_slice(&VIRTIO_NET_S_LINK_UP.to_le_bytes()[..2]);
        space.0[8..10].copy_from_slice(&1_u16.to_le_bytes()); // max_virtqueue_pairs
        space.0[10..12].copy_from_slice(&mtu.to_le_bytes());
        space
    }

    /// Copies from `offset`; zeroes past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or_default();
        let len = from.len().min(data.len());
        data.fill(0);
        data[..len].copy_from_slice(&from[..len]);
    }
}
