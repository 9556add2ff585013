//! Disks: discarding and zeroing ranges.

use alloc::format;

use crate::json::Line;
use crate::virtio::block::{Disk, Kind, Request, SECTOR, features};
use crate::{Error, Machine, phys};

/// Bytes a request when data is written and read.
const PIECE: u64 = 64 << 10;
/// Length of `struct virtio_blk_discard_write_zeroes`.
const RANGE_LEN: u32 = 16;
const FILL: u64 = 0x5a5a_a5a5_c3c3_3c3c;

/// `test=blk-discard`
pub fn discard(machine: &Machine) -> Result<(), Error> {
    run(machine, Kind::Discard, features::DISCARD, "blk-discard")
}

/// `test=blk-zeroes`
pub fn zero(machine: &Machine) -> Result<(), Error> {
    run(machine, Kind::WriteZeroes, features::WRITE_ZEROES, "blk-zeroes")
}

/// Fills the range, asks the disk to do `kind` with it, and counts the words that are zero afterwards.
fn run(machine: &Machine, kind: Kind, feature: u64, name: &str) -> Result<(), Error> {
    let args = &machine.args;
    let mut disk = Disk::open(args, 1, PIECE)?;
    if !disk.device().has(feature) {
        return Err(format!("the disk does not offer {name}"));
    }
    let (offset, span) = (args.number("offset", 0)?, args.number("span", 1 << 20)?);
    let pieces = |kind| {
        (offset..offset + span).step_by(phys::index(PIECE)).map(move |at| Request {
            kind,
            sector: at / SECTOR,
            len: u32::try_from(PIECE.min(offset + span - at)).unwrap_or_default(),
        })
    };
    disk.data(0).fill(FILL);
    for request in pieces(Kind::Write) {
        ok(disk.request(request)?, "writing")?;
    }
    let (first, count) = (offset / SECTOR, u32::try_from(span / SECTOR).map_err(|_| "span= is too long")?);
    disk.data(0)[..2].copy_from_slice(&[first, count.into()]);
    let status = disk.request(Request { kind, sector: 0, len: RANGE_LEN })?;
    let (mut zero, mut kept, mut other) = (0_u64, 0_u64, 0_u64);
    for request in pieces(Kind::Read) {
        ok(disk.request(request)?, "reading")?;
        for word in &disk.data(0)[..phys::index(u64::from(request.len) / 8)] {
            match *word {
                0 => zero += 1,
                FILL => kept += 1,
                _ => other += 1,
            }
        }
    }
    Line::result(name)
        .number("status", status.into())
        .number("zero_bytes", zero * 8)
        .number("kept_bytes", kept * 8)
        .number("other_bytes", other * 8)
        .send();
    Ok(())
}

fn ok(status: u8, what: &str) -> Result<(), Error> {
    if status == 0 { Ok(()) } else { Err(format!("{what} the disk fails with status {status}")) }
}
