//! Requests as drivers write them (virtio 1.2, section 5.2.6).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::SECTOR;
use super::config::{self, MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS};
use super::device::SEGMENTS;
use super::shared::Shared;
use crate::virtio::chain::{Buffers, Chain, Error};
use vmfs_image::Image;

/// Most ranges of one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 16;
/// Bytes of a range: sector, count, flags.
const RANGE_LEN: usize = 16;
/// Bytes of the disk's identifier.
pub const ID_LEN: usize = 20;

/// Most bytes that one request reads or writes: what a driver that keeps to the configuration space can ask for.
const MAX_BYTES: u64 = config::MAX_PIECE as u64 * SEGMENTS as u64;

/// What a request comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// Failed.
    IoError = 1,
    /// Not something this disk does.
    Unsupported = 2,
}

/// A disk as one driver uses it.
#[derive(Debug)]
pub struct Target {
    /// `None` while the thread is held, so that it keeps no image from being closed.
    pub image: Option<Arc<dyn Image>>,
    pub shared: Arc<Shared>,
    /// The driver knows no flush, so that what it has written must be stable when it is told so (section 5.2.6.2).
    pub write_through: bool,
    pub id: [u8; ID_LEN],
}

impl Target {
    /// Serves one chain and says how many bytes it wrote to it.
    ///
    /// # Errors
    ///
    /// The chain has no room for a header or a status.
    pub fn serve(&self, mut chain: Chain<'_>) -> Result<u32, Error> {
        let mut header = [0; 16];
        chain.readable.read(&mut header)?;
        let mut status = chain.writable.split_last(1)?;
        let [kind, _, sector_low, sector_high] = words(&header);
        let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
        let room = chain.writable.len();
        let readonly = self.shared.options.readonly;
        let (outcome, written) = match (kind, &self.image) {
            (_, None) => (Status::IoError, 0),
            (VIRTIO_BLK_T_IN, Some(image)) => (self.read(&**image, sector, &chain.writable), room),
            (VIRTIO_BLK_T_OUT, Some(image)) if !readonly => {
                (self.write(&**image, sector, &chain.readable), 0)
            }
            (VIRTIO_BLK_T_FLUSH, Some(image)) => {
                count(&self.shared.counting.flushes, 1);
                (self.outcome(&**image, "flushing", sector, image.flush()), 0)
            }
            (VIRTIO_BLK_T_GET_ID, _) => (self.identify(&mut chain.writable), room - chain.writable.len()),
            (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES, Some(image)) if !readonly => {
                (self.ranges(&**image, kind, &mut chain.readable), 0)
            }
            (VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES, _) => (Status::IoError, 0),
            _ => (Status::Unsupported, 0),
        };
        if outcome != Status::Ok {
            count(&self.shared.counting.errors, 1);
        }
        status.write(&[outcome as u8])?;
        let written = if outcome == Status::Ok { written } else { 0 };
        Ok(u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1))
    }

    /// Byte offset of `sector`, if `data` may go there or come from there in one request.
    fn transfer(image: &dyn Image, sector: u64, data: &Buffers<'_>) -> Option<u64> {
        let len = data.len() as u64;
        offset(image, sector, len).filter(|_| len <= MAX_BYTES)
    }

    fn outcome(&self, image: &dyn Image, what: &str, sector: u64, result: io::Result<()>) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.shared.failures.log(|dropped| {
                    let disk = image.path().display();
                    tracing::warn!("{what} disk {disk} at sector {sector} failed: {error}{dropped}");
                });
                Status::IoError
            }
        }
    }

    /// What becomes of a change of the disk: with a driver that knows no flush it must be stable as well.
    fn changed(&self, image: &dyn Image, result: io::Result<()>) -> io::Result<()> {
        result.and_then(|()| if self.write_through { image.flush() } else { Ok(()) })
    }

    fn read(&self, image: &dyn Image, sector: u64, into: &Buffers<'_>) -> Status {
        let Some(offset) = Self::transfer(image, sector, into) else { return Status::IoError };
        let counting = &self.shared.counting;
        count(&counting.reads, 1);
        count(&counting.bytes_read, into.len() as u64);
        self.outcome(image, "reading", sector, image.read_at(offset, into.pieces()))
    }

    fn write(&self, image: &dyn Image, sector: u64, from: &Buffers<'_>) -> Status {
        let Some(offset) = Self::transfer(image, sector, from) else { return Status::IoError };
        let counting = &self.shared.counting;
        count(&counting.writes, 1);
        count(&counting.bytes_written, from.len() as u64);
        let written = image.write_at(offset, from.pieces());
        self.outcome(image, "writing", sector, self.changed(image, written))
    }

    fn identify(&self, into: &mut Buffers<'_>) -> Status {
        // A driver with less room gets the beginning.
        let len = into.len().min(ID_LEN);
        match into.write(&self.id[..len]) {
            Ok(()) => Status::Ok,
            Err(_) => Status::IoError,
        }
    }

    fn ranges(&self, image: &dyn Image, kind: u32, list: &mut Buffers<'_>) -> Status {
        let count_of_ranges = list.len() / RANGE_LEN;
        if count_of_ranges == 0
            || !list.len().is_multiple_of(RANGE_LEN)
            || count_of_ranges > MAX_RANGES as usize
        {
            return Status::IoError;
        }
        count(&self.shared.counting.discards, 1);
        let discard = kind == VIRTIO_BLK_T_DISCARD;
        let limit = if discard { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS };
        for _ in 0..count_of_ranges {
            let mut range = [0; RANGE_LEN];
            if list.read(&mut range).is_err() {
                return Status::IoError;
            }
            let [low, high, sectors, flags] = words(&range);
            let sector = u64::from(high) << 32 | u64::from(low);
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            // Unknown flags, and unmap on a discard, are unsupported (section 5.2.6.2).
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && unmap {
                return Status::Unsupported;
            }
            let len = u64::from(sectors) * SECTOR;
            let Some(offset) = offset(image, sector, len).filter(|_| sectors <= limit) else {
                return Status::IoError;
            };
            let done = if discard {
                self.outcome(image, "discarding on", sector, image.discard(offset, len))
            } else {
                let result = image.write_zeroes(offset, len, unmap);
                self.outcome(image, "zeroing", sector, self.changed(image, result))
            };
            if done != Status::Ok {
                return done;
            }
        }
        Status::Ok
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Byte offset of `sector`, if `len` bytes from there on lie on the disk and are whole sectors.
fn offset(image: &dyn Image, sector: u64, len: u64) -> Option<u64> {
    let end = sector.checked_add(len / SECTOR)?;
    (len.is_multiple_of(SECTOR) && end <= image.size() / SECTOR).then(|| sector * SECTOR)
}

/// Four little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    std::array::from_fn(|i| {
        u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    })
}
