//! Requests as drivers write them (virtio 1.2, section 5.2.6).

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::SECTOR;
use super::config::{self, MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS};
use super::device::SEGMENTS;
use super::disk::Disk;
use crate::virtio::chain::{Buffers, Chain, Error};
use crate::virtio::log_limit::LogLimit;

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
    pub disk: Arc<dyn Disk>,
    pub readonly: bool,
    /// The driver knows no flush, so that what it has written must be stable when it is told so (section 5.2.6.2).
    pub write_through: bool,
    pub id: [u8; ID_LEN],
    /// A failing disk fails request after request.
    pub failures: Arc<LogLimit>,
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
        let (outcome, written) = match kind {
            VIRTIO_BLK_T_IN => (self.read(sector, &chain.writable), room),
            VIRTIO_BLK_T_OUT if !self.readonly => (self.write(sector, &chain.readable), 0),
            VIRTIO_BLK_T_FLUSH => (self.outcome("flushing", sector, self.disk.flush()), 0),
            VIRTIO_BLK_T_GET_ID => (self.identify(&mut chain.writable), room - chain.writable.len()),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !self.readonly => {
                (self.ranges(kind, &mut chain.readable), 0)
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => (Status::IoError, 0),
            _ => (Status::Unsupported, 0),
        };
        status.write(&[outcome as u8])?;
        let written = if outcome == Status::Ok { written } else { 0 };
        Ok(u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1))
    }

    /// Byte offset of `sector`, if `len` bytes from there on lie on the disk and are whole sectors.
    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        let end = sector.checked_add(len / SECTOR)?;
        (len.is_multiple_of(SECTOR) && end <= self.disk.sectors()).then(|| sector * SECTOR)
    }

    /// Byte offset of `sector`, if `data` may go there or come from there in one request.
    fn transfer(&self, sector: u64, data: &Buffers<'_>) -> Option<u64> {
        let len = data.len() as u64;
        self.offset(sector, len).filter(|_| len <= MAX_BYTES)
    }

    fn outcome(&self, what: &str, sector: u64, result: io::Result<()>) -> Status {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                self.failures.log(|dropped| {
                    let disk = self.disk.path().display();
                    tracing::warn!("{what} disk {disk} at sector {sector} failed: {error}{dropped}");
                });
                Status::IoError
            }
        }
    }

    /// What becomes of a change of the disk: with a driver that knows no flush it must be stable as well.
    fn changed(&self, result: io::Result<()>) -> io::Result<()> {
        result.and_then(|()| if self.write_through { self.disk.flush() } else { Ok(()) })
    }

    fn read(&self, sector: u64, into: &Buffers<'_>) -> Status {
        match self.transfer(sector, into) {
            Some(offset) => self.outcome("reading", sector, self.disk.read(offset, into)),
            None => Status::IoError,
        }
    }

    fn write(&self, sector: u64, from: &Buffers<'_>) -> Status {
        match self.transfer(sector, from) {
            Some(offset) => self.outcome("writing", sector, self.changed(self.disk.write(offset, from))),
            None => Status::IoError,
        }
    }

    fn identify(&self, into: &mut Buffers<'_>) -> Status {
        // A driver with less room gets the beginning.
        let len = into.len().min(ID_LEN);
        match into.write(&self.id[..len]) {
            Ok(()) => Status::Ok,
            Err(_) => Status::IoError,
        }
    }

    fn ranges(&self, kind: u32, list: &mut Buffers<'_>) -> Status {
        let count = list.len() / RANGE_LEN;
        if count == 0 || !list.len().is_multiple_of(RANGE_LEN) || count > MAX_RANGES as usize {
            return Status::IoError;
        }
        let discard = kind == VIRTIO_BLK_T_DISCARD;
        let limit = if discard { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS };
        for _ in 0..count {
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
            let Some(offset) = self.offset(sector, len).filter(|_| sectors <= limit) else {
                return Status::IoError;
            };
            let done = if discard {
                self.outcome("discarding on", sector, self.disk.discard(offset, len))
            } else {
                let result = self.disk.write_zeroes(offset, len, unmap);
                self.outcome("zeroing", sector, self.changed(result))
            };
            if done != Status::Ok {
                return done;
            }
        }
        Status::Ok
    }
}

/// Four little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    std::array::from_fn(|i| {
        u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    })
}
