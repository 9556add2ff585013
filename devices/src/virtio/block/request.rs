//! Requests as drivers write them (virtio 1.2, section 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::VolatileSlice;

use super::SECTOR;
use super::config::{self, MAX_DISCARD_SECTORS, MAX_ZERO_SECTORS};
use super::device::SEGMENTS;
use crate::virtio::chain::{Buffers, Chain, Error};

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

/// A part of the disk, in bytes: whole sectors that lie on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
    /// Its space is to be given back.
    pub unmap: bool,
}

/// What is asked for. Everything in it lies on the disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Request {
    /// All data of the chain, from this byte of the disk on.
    Read(u64),
    /// All data of the chain, to this byte of the disk.
    Write(u64),
    /// What was written before is to be stable.
    #[default]
    Flush,
    /// The serial number.
    Identify,
    /// The contents of the ranges no longer matter.
    Discard(Vec<Range>),
    /// The ranges are to read as zeroes.
    Zero(Vec<Range>),
    /// Something that is not done.
    Refused(Status),
}

/// A disk as a request has to fit it.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// Its size in bytes.
    pub size: u64,
    /// Nothing may be changed.
    pub readonly: bool,
}

impl Request {
    /// Takes header and status off `chain`, so that only data are left, and says what is asked for, and where the answer's
    /// status goes.
    ///
    /// # Errors
    ///
    /// The chain has no room for a header or a status.
    pub fn take<'m>(
        chain: &mut Chain<'m>,
        disk: impl FnOnce() -> Shape,
    ) -> Result<(Self, VolatileSlice<'m>), Error> {
        let mut header = [0; 16];
        chain.readable.read(&mut header)?;
        let status = chain.writable.take_last()?;
        let [kind, _, low, high] = words(&header);
        let sector = u64::from(high) << 32 | u64::from(low);
        let disk = disk();
        let refused = Self::Refused(Status::IoError);
        let request = match kind {
            VIRTIO_BLK_T_IN => transfer(disk, sector, &chain.writable).map_or(refused, Self::Read),
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::Identify,
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.readonly => refused,
            VIRTIO_BLK_T_OUT => transfer(disk, sector, &chain.readable).map_or(refused, Self::Write),
            VIRTIO_BLK_T_DISCARD => {
                ranges(disk, true, &mut chain.readable).map_or_else(Self::Refused, Self::Discard)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                ranges(disk, false, &mut chain.readable).map_or_else(Self::Refused, Self::Zero)
            }
            _ => Self::Refused(Status::Unsupported),
        };
        Ok((request, status))
    }

    /// What it does, for messages.
    pub fn doing(&self) -> &'static str {
        match self {
            Self::Read(_) => "reading",
            Self::Write(_) => "writing",
            Self::Flush => "flushing",
            Self::Identify => "identifying",
            Self::Discard(_) => "discarding on",
            Self::Zero(_) => "zeroing",
            Self::Refused(_) => "refusing",
        }
    }

    /// Where it begins, for messages.
    pub fn sector(&self) -> u64 {
        match self {
            Self::Read(offset) | Self::Write(offset) => offset / SECTOR,
            Self::Discard(ranges) | Self::Zero(ranges) => {
                ranges.first().map_or(0, |range| range.offset / SECTOR)
            }
            Self::Flush | Self::Identify | Self::Refused(_) => 0,
        }
    }
}

/// Byte offset of `sector`, if `data` may go there or come from there in one request.
fn transfer(disk: Shape, sector: u64, data: &Buffers<'_>) -> Option<u64> {
    let len = data.len() as u64;
    offset(disk, sector, len).filter(|_| len <= MAX_BYTES)
}

/// Byte offset of `sector`, if `len` bytes from there on lie on the disk and are whole sectors.
fn offset(disk: Shape, sector: u64, len: u64) -> Option<u64> {
    let end = sector.checked_add(len / SECTOR)?;
    (len.is_multiple_of(SECTOR) && end <= disk.size / SECTOR).then(|| sector * SECTOR)
}

fn ranges(disk: Shape, discard: bool, list: &mut Buffers<'_>) -> Result<Vec<Range>, Status> {
    let count = list.len() / RANGE_LEN;
    if count == 0 || !list.len().is_multiple_of(RANGE_LEN) || count > MAX_RANGES as usize {
        return Err(Status::IoError);
    }
    let most = if discard { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS };
    let range = |_| {
        let mut bytes = [0; RANGE_LEN];
        list.read(&mut bytes).map_err(|_| Status::IoError)?;
        let [low, high, sectors, flags] = words(&bytes);
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        // Unknown flags, and unmap on a discard, are unsupported (section 5.2.6.2).
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && unmap {
            return Err(Status::Unsupported);
        }
        let (sector, len) = (u64::from(high) << 32 | u64::from(low), u64::from(sectors) * SECTOR);
        let offset = offset(disk, sector, len).filter(|_| sectors <= most).ok_or(Status::IoError)?;
        Ok(Range { offset, len, unmap })
    };
    (0..count).map(range).collect()
}

/// Four little-endian words.
fn words(bytes: &[u8; 16]) -> [u32; 4] {
    std::array::from_fn(|i| {
        u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
    })
}
