//! Disks (section 5.2).

use alloc::vec::Vec;
use alloc::{format, vec};

use super::mmio::{self, Device};
use super::queue::{Buffer, Queue};
use super::{feature, kind};
use crate::args::Args;
use crate::{Error, heap, phys};

/// Bytes of a sector, in which places and lengths are counted whatever the disk's blocks are.
pub const SECTOR: u64 = 512;
/// Length of a disk's serial number.
pub const ID_LEN: u32 = 20;

/// Feature bits.
pub mod features {
    /// The disk can only be read.
    pub const READ_ONLY: u64 = 1 << 5;
    /// The configuration tells the size of blocks.
    pub const BLOCK_SIZE: u64 = 1 << 6;
    /// There is a cache, which can be flushed.
    pub const FLUSH: u64 = 1 << 9;
    /// Ranges can be discarded.
    pub const DISCARD: u64 = 1 << 13;
    /// Ranges can be zeroed.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// What is asked of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Read data.
    Read,
    /// Write data.
    Write,
    /// Make what was written durable.
    Flush,
    /// Tell the serial number: [`ID_LEN`] bytes of data.
    GetId,
    /// Forget a range, which the data describes.
    Discard,
    /// Zero a range, which the data describes.
    WriteZeroes,
}

impl Kind {
    fn number(self) -> u32 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Flush => 4,
            Self::GetId => 8,
            Self::Discard => 11,
            Self::WriteZeroes => 13,
        }
    }
}

/// A request.
#[derive(Debug, Clone, Copy)]
pub struct Request {
    /// What is to be done.
    pub kind: Kind,
    /// Where, in sectors.
    pub sector: u64,
    /// Length of the data in bytes.
    pub len: u32,
}

/// What was asked, and what came of it.
#[derive(Debug, Clone, Copy)]
pub struct Done {
    /// Number of the request's place.
    pub slot: u16,
    /// The request.
    pub request: Request,
    /// The disk's answer: 0 is success, 1 an error, 2 "cannot"; others do not exist.
    pub status: u8,
    /// When the request was made, in cycles.
    pub since: u64,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    request: Request,
    since: u64,
}

/// A disk with places for requests, each with room for data.
#[derive(Debug)]
pub struct Disk {
    device: Device,
    queue: Queue,
    slots: Vec<Option<Slot>>,
    /// By descriptor: the slot whose chain begins there.
    by_head: Vec<u16>,
    headers: u64,
    data: u64,
    data_len: u64,
}

/// Distance of two request headers; the status byte lies behind the header.
const HEADER_ROOM: u64 = 32;
const HEADER_LEN: u32 = 16;
const STATUS_OFFSET: u64 = 16;
/// What a status byte is before the device writes one.
const NO_STATUS: u8 = 0xff;

impl Disk {
    /// Opens the disk that `disk=` names (0 by default), for up to `depth` requests (fewer if the queue is
    /// shorter) of up to `data_len` bytes.
    ///
    /// # Errors
    ///
    /// There is no such disk, it refuses, or memory is short.
    pub fn open(args: &Args, depth: u64, data_len: u64) -> Result<Self, Error> {
        let mut device = mmio::find(args, kind::BLOCK, args.number("disk", 0)?)?;
        let indirect = if args.flag("indirect")? { feature::INDIRECT } else { 0 };
        let event_index = if args.flag("no-event-index")? { 0 } else { feature::EVENT_INDEX };
        device.negotiate(
            event_index
                | indirect
                | features::READ_ONLY
                | features::BLOCK_SIZE
                | features::FLUSH
                | features::DISCARD
                | features::WRITE_ZEROES,
        )?;
        if indirect != 0 && !device.has(indirect) {
            return Err("the disk has no indirect descriptors".into());
        }
        let queue = device.queue(0)?;
        if args.choice("wait", &["poll", "irq"])? == "irq" {
            device.use_interrupt()?;
        }
        device.start();
        let depth = depth.clamp(1, queue.room(3).into());
        let data_len = data_len.next_multiple_of(SECTOR);
        let slots = vec![None; phys::index(depth)];
        let by_head = vec![0; queue.size().into()];
        let headers = heap::zeroed(depth * HEADER_ROOM)?;
        let data = heap::zeroed(depth * data_len)?;
        Ok(Self { device, queue, slots, by_head, headers, data, data_len })
    }

    /// Number of sectors.
    pub fn sectors(&self) -> u64 {
        self.device.config64(0)
    }

    /// Bytes of a block: what requests are aligned to.
    pub fn block_size(&self) -> u64 {
        if self.device.has(features::BLOCK_SIZE) { self.device.config32(20).into() } else { SECTOR }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How often the disk was notified.
    pub fn notifications(&self) -> u64 {
        self.queue.notifications()
    }

    /// How many requests there can be at a time.
    pub fn depth(&self) -> u16 {
        u16::try_from(self.slots.len()).unwrap_or(u16::MAX)
    }

    /// The room for data of `slot`, which the disk is not using.
    pub fn data(&mut self, slot: u16) -> &mut [u64] {
        phys::words(self.data_address(slot), self.data_len / 8)
    }

    fn data_address(&self, slot: u16) -> u64 {
        self.data + u64::from(slot) * self.data_len
    }

    /// Makes a request in the free place `slot`. The disk hears of it by [`kick`](Self::kick).
    ///
    /// # Errors
    ///
    /// The queue is full: with places as many as it has room for, that is the disk's fault.
    pub fn submit(&mut self, slot: u16, request: Request, now: u64) -> Result<(), Error> {
        let header = self.headers + u64::from(slot) * HEADER_ROOM;
        phys::store(header, request.kind.number());
        phys::store(header + 8, request.sector);
        phys::store(header + STATUS_OFFSET, NO_STATUS);
        let written = matches!(request.kind, Kind::Read | Kind::GetId);
        let first = Buffer::read(header, HEADER_LEN);
        let data = Buffer { address: self.data_address(slot), len: request.len, written };
        let last = Buffer::write(header + STATUS_OFFSET, 1);
        let head = if request.len == 0 {
            self.queue.add(&[first, last])
        } else {
            self.queue.add(&[first, data, last])
        };
        let head = head.ok_or("the disk's queue is full though it has used all requests")?;
        self.by_head[usize::from(head)] = slot;
        self.slots[usize::from(slot)] = Some(Slot { request, since: now });
        Ok(())
    }

    /// Tells the disk of new requests.
    pub fn kick(&mut self) {
        self.queue.kick();
    }

    /// Waits until a request is done.
    pub fn wait(&mut self) {
        self.device.wait(&mut self.queue);
    }

    /// Takes a request that is done.
    ///
    /// # Errors
    ///
    /// The disk says so of a request that was never made.
    pub fn take(&mut self) -> Result<Option<Done>, Error> {
        let Some((head, _)) = self.queue.take() else { return Ok(None) };
        let slot = self.by_head[usize::from(head)];
        let Some(Slot { request, since }) = self.slots[usize::from(slot)].take() else {
            return Err(format!("the disk has used chain {head}, which it was not given"));
        };
        let status = phys::load(self.headers + u64::from(slot) * HEADER_ROOM + STATUS_OFFSET);
        Ok(Some(Done { slot, request, status, since }))
    }

    /// Makes a request and waits for it; there must be no others. Gives the status.
    ///
    /// # Errors
    ///
    /// As of [`submit`](Self::submit) and [`take`](Self::take).
    pub fn request(&mut self, request: Request) -> Result<u8, Error> {
        self.submit(0, request, 0)?;
        self.kick();
        loop {
            self.wait();
            if let Some(done) = self.take()? {
                return Ok(done.status);
            }
        }
    }
}
