//! Network cards (section 5.1), without offloads.

use alloc::vec::Vec;
use alloc::{format, vec};

use super::mmio::{self, Device};
use super::queue::{Buffer, Queue};
use super::{feature, kind};
use crate::args::Args;
use crate::clock::Clock;
use crate::{Error, apic, heap, phys};

/// Feature bit: the configuration tells the card's address.
const MAC: u64 = 1 << 5;
/// Header before each frame.
const HEADER_LEN: u64 = 12;
/// Room for a frame and its header.
const ROOM: u64 = 2048;
/// Longest frame, without its checksum.
pub const FRAME_MAX: u64 = 1514;
/// Shortest frame that goes over a cable, without its checksum.
pub const FRAME_MIN: u64 = 60;

/// A card.
#[derive(Debug)]
pub struct Card {
    device: Device,
    receive: Queue,
    send: Queue,
    receive_room: u64,
    send_room: u64,
    /// Place of the buffer in each chain of the receive queue.
    received_in: Vec<u16>,
    /// Places for frames to be sent that are free, and by chain the place it uses.
    free: Vec<u16>,
    sent_from: Vec<u16>,
    mac: [u8; 6],
}

/// A frame in one of a card's places.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    slot: u16,
    address: u64,
    len: u64,
}

impl Place {
    /// The frame.
    pub fn frame(&mut self) -> &mut [u8] {
        phys::bytes_mut(self.address, self.len)
    }
}

impl Card {
    /// Opens the card that `net=` names (0 by default).
    ///
    /// # Errors
    ///
    /// There is no such card, it refuses, or memory is short.
    pub fn open(args: &Args, clock: Clock) -> Result<Self, Error> {
        let mut device = mmio::find(args, kind::NET, args.number("net", 0)?)?;
        device.negotiate(feature::EVENT_INDEX | MAC)?;
        let mac = match device.has(MAC) {
            true => device.config(0, 6),
            false => 0x0100_0000_5452, // any address that is local to its network
        };
        let (receive, send) = (device.queue(0)?, device.queue(1)?);
        if args.choice("wait", &["poll", "irq"])? == "irq" {
            device.use_interrupt()?;
            apic::tick(clock);
        }
        device.start();
        let rooms = |queue: &Queue| heap::zeroed(u64::from(queue.size()) * ROOM);
        let mut card = Self {
            receive_room: rooms(&receive)?,
            send_room: rooms(&send)?,
            received_in: vec![0; receive.size().into()],
            free: (0..send.size()).collect(),
            sent_from: vec![0; send.size().into()],
            mac: mac.to_le_bytes()[..6].try_into().unwrap_or_default(),
            device,
            receive,
            send,
        };
        for slot in 0..card.receive.size() {
            card.offer(slot)?;
        }
        card.receive.kick();
        Ok(card)
    }

    /// The card's address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How often the card was notified, of room for frames and of frames.
    pub fn notifications(&self) -> (u64, u64) {
        (self.receive.notifications(), self.send.notifications())
    }

    fn offer(&mut self, slot: u16) -> Result<(), Error> {
        let address = self.receive_room + u64::from(slot) * ROOM;
        let buffer = Buffer::write(address, u32::try_from(ROOM).unwrap_or_default());
        let head =
            self.receive.add(&[buffer]).ok_or("the card's receive queue has no room for its own buffers")?;
        self.received_in[usize::from(head)] = slot;
        Ok(())
    }

    /// Takes a received frame; it goes back by [`give_back`](Self::give_back).
    ///
    /// # Errors
    ///
    /// It is shorter than its header or longer than its room.
    pub fn receive(&mut self) -> Result<Option<Place>, Error> {
        let Some((head, len)) = self.receive.take() else { return Ok(None) };
        if !(HEADER_LEN..=ROOM).contains(&len.into()) {
            return Err(format!("the card has received {len} bytes, header included, into {ROOM}"));
        }
        let slot = self.received_in[usize::from(head)];
        let address = self.receive_room + u64::from(slot) * ROOM + HEADER_LEN;
        Ok(Some(Place { slot, address, len: u64::from(len) - HEADER_LEN }))
    }

    /// Gives the room of a received frame back to the card, which hears of it by [`kick`](Self::kick).
    ///
    /// # Errors
    ///
    /// The queue has no room for it.
    pub fn give_back(&mut self, place: Place) -> Result<(), Error> {
        self.offer(place.slot)
    }

    /// A free place for a frame of `len` bytes to be sent.
    pub fn place(&mut self, len: u64) -> Option<Place> {
        while let Some((head, _)) = self.send.take() {
            self.free.push(self.sent_from[usize::from(head)]);
        }
        let slot = self.free.pop()?;
        let address = self.send_room + u64::from(slot) * ROOM + HEADER_LEN;
        Some(Place { slot, address, len: len.min(ROOM - HEADER_LEN) })
    }

    /// Sends the frame in `place`. The card hears of it by [`kick`](Self::kick).
    ///
    /// # Errors
    ///
    /// The queue has no room for it.
    pub fn send(&mut self, place: Place) -> Result<(), Error> {
        let len = u32::try_from(HEADER_LEN + place.len).unwrap_or_default();
        // The header, from the start of the room, stays all zero: no offloads.
        let buffer = Buffer::read(place.address - HEADER_LEN, len);
        let head = self.send.add(&[buffer]).ok_or("the card's send queue has no room for a frame")?;
        self.sent_from[usize::from(head)] = place.slot;
        Ok(())
    }

    /// Tells the card of new frames and room.
    pub fn kick(&mut self) {
        self.send.kick();
        self.receive.kick();
    }

    /// Whether all that was sent has left.
    pub fn all_sent(&mut self) -> bool {
        while let Some((head, _)) = self.send.take() {
            self.free.push(self.sent_from[usize::from(head)]);
        }
        self.free.len() == usize::from(self.send.size())
    }

    /// Waits by interrupt for a frame to come in, a tenth of a second at most; when polling, does not wait. Whether
    /// a frame has come in.
    pub fn wait(&mut self) -> bool {
        self.device.wait_once(&mut self.receive)
    }
}
