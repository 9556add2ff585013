//! Configuration space (virtio 1.2, section 5.2.4).

use super::request::MAX_RANGES;

/// Most sectors of one range to discard: 1 GiB, which is a matter of metadata.
pub const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one range to zero: 16 MiB, because storage that cannot do it by itself is written to, and a pause
/// of the guest waits for the request.
pub const MAX_ZERO_SECTORS: u32 = 1 << 15;

/// Most bytes of one data piece. With the number of pieces it bounds what one request moves, and so how long a pause of
/// the guest waits for it.
pub const MAX_PIECE: u32 = 1 << 20;

const LEN: usize = 60;

/// The space as the driver reads it.
#[derive(Debug, Clone)]
pub struct Space([u8; LEN]);

impl Space {
    /// Describes a disk of `sectors` sectors whose storage works in blocks of `block_size` bytes, to a driver that may
    /// use `segments` pieces a request and `queues` queues.
    pub fn new(sectors: u64, block_size: u32, segments: u32, queues: u16) -> Self {
        let mut space = Self([0; LEN]);
        space.put(0, &sectors.to_le_bytes());
        space.put(8, &MAX_PIECE.to_le_bytes()); // size_max
        space.put(12, &segments.to_le_bytes());
        space.put(20, &block_size.to_le_bytes());
        // physical_block_exp: how many logical blocks, as a power of two, make one that is written without
        // reading first. Page caches and today's devices work in 4 KiB.
        let exponent = (4096 / block_size.clamp(512, 4096)).trailing_zeros();
        space.put(24, &exponent.to_le_bytes()[..1]);
        space.put(34, &queues.to_le_bytes()); // num_queues
        space.put(36, &MAX_DISCARD_SECTORS.to_le_bytes()); // max_discard_sectors
        space.put(40, &MAX_RANGES.to_le_bytes()); // max_discard_seg
        space.put(44, &8_u32.to_le_bytes()); // discard_sector_alignment: 4 KiB
        space.put(48, &MAX_ZERO_SECTORS.to_le_bytes()); // max_write_zeroes_sectors
        space.put(52, &MAX_RANGES.to_le_bytes()); // max_write_zeroes_seg
        space.put(56, &[1]); // write_zeroes_may_unmap
        space
    }

    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Copies from `offset`; zeroes past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let from = usize::try_from(offset).ok().and_then(|offset| self.0.get(offset..)).unwrap_or_default();
        let len = from.len().min(data.len());
        data.fill(0);
        data[..len].copy_from_slice(&from[..len]);
    }
}
