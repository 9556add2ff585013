//! Requests as drivers write them (virtio 1.2, section 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::SECTOR;
use super::config::MAX_RANGE_SECTORS;
use super::disk::Disk;
use crate::virtio::chain::{Buffers, Chain, Error};

/// Most ranges of one discard or write-zeroes request.
pub const MAX_RANGES: u32 = 16;
/// Bytes of a range: sector, count, flags.
const RANGE_LEN: usize = 16;
/// Bytes of the disk's identifier.
pub const ID_LEN: usize = 20;

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

/// Serves one chain and says how many bytes it wrote to it.
///
/// # Errors
///
/// The chain has no room for a header or a status.
pub fn serve(mut chain: Chain<'_>, disk: &dyn Disk, readonly: bool, id: &[u8; ID_LEN]) -> Result<u32, Error> {
    let mut header = [0; 16];
    chain.readable.read(&mut header)?;
    let mut status = chain.writable.split_last(1)?;
    let [kind, _, sector_low, sector_high] = std::array::from_fn(|i| {
        u32::from_le_bytes([header[4 * i], header[4 * i + 1], header[4 * i + 2], header[4 * i + 3]])
    });
    let sector = u64::from(sector_high) << 32 | u64::from(sector_low);
    let room = chain.writable.len();
    let (outcome, written) = match kind {
        VIRTIO_BLK_T_IN => (read(disk, sector, &chain.writable), room),
        VIRTIO_BLK_T_OUT if !readonly => (write(disk, sector, &chain.readable), 0),
        VIRTIO_BLK_T_FLUSH => (outcome("flush", 0, disk.flush()), 0),
        VIRTIO_BLK_T_GET_ID => (identify(&mut chain.writable, id), room - chain.writable.len()),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !readonly => {
            (ranges(disk, kind, &mut chain.readable), 0)
        }
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => (Status::IoError, 0),
        _ => (Status::Unsupported, 0),
    };
    status.write(&[outcome as u8])?;
    let written = if outcome == Status::Ok { written } else { 0 };
    Ok(u32::try_from(written).unwrap_or(u32::MAX).saturating_add(1))
}

/// Byte offset of `sector`, if `len` bytes from there on lie on the disk and are whole sectors.
fn offset(disk: &dyn Disk, sector: u64, len: u64) -> Option<u64> {
    let end = sector.checked_add(len / SECTOR)?;
    (len.is_multiple_of(SECTOR) && end <= disk.sectors()).then(|| sector * SECTOR)
}

fn outcome(what: &str, sector: u64, result: std::io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) => {
            tracing::warn!("{what} of a disk at sector {sector} failed: {error}");
            Status::IoError
        }
    }
}

fn read(disk: &dyn Disk, sector: u64, into: &Buffers<'_>) -> Status {
    match offset(disk, sector, into.len() as u64) {
        Some(offset) => outcome("reading", sector, disk.read(offset, into)),
        None => Status::IoError,
    }
}

fn write(disk: &dyn Disk, sector: u64, from: &Buffers<'_>) -> Status {
    match offset(disk, sector, from.len() as u64) {
        Some(offset) => outcome("writing", sector, disk.write(offset, from)),
        None => Status::IoError,
    }
}

fn identify(into: &mut Buffers<'_>, id: &[u8; ID_LEN]) -> Status {
    // A driver with less room gets the beginning.
    let len = into.len().min(ID_LEN);
    match into.write(&id[..len]) {
        Ok(()) => Status::Ok,
        Err(_) => Status::IoError,
    }
}

fn ranges(disk: &dyn Disk, kind: u32, list: &mut Buffers<'_>) -> Status {
    let count = list.len() / RANGE_LEN;
    if count == 0 || !list.len().is_multiple_of(RANGE_LEN) || count > MAX_RANGES as usize {
        return Status::IoError;
    }
    for _ in 0..count {
        let mut range = [0; RANGE_LEN];
        if list.read(&mut range).is_err() {
            return Status::IoError;
        }
        let [low, high, sectors, flags] = std::array::from_fn(|i| {
            u32::from_le_bytes([range[4 * i], range[4 * i + 1], range[4 * i + 2], range[4 * i + 3]])
        });
        let sector = u64::from(high) << 32 | u64::from(low);
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        // Unknown flags, and unmap on a discard, are unsupported (section 5.2.6.2).
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || kind == VIRTIO_BLK_T_DISCARD && unmap {
            return Status::Unsupported;
        }
        let len = u64::from(sectors) * SECTOR;
        let Some(offset) = offset(disk, sector, len).filter(|_| sectors <= MAX_RANGE_SECTORS) else {
            return Status::IoError;
        };
        let done = match kind {
            VIRTIO_BLK_T_DISCARD => outcome("discarding", sector, disk.discard(offset, len)),
            _ => outcome("zeroing", sector, disk.write_zeroes(offset, len, unmap)),
        };
        if done != Status::Ok {
            return done;
        }
    }
    Status::Ok
}
