//! Entropy sources (section 5.4).

use super::mmio::{self, Device};
use super::queue::{Buffer, Queue};
use super::{feature, kind};
use crate::args::Args;
use crate::{Error, heap, phys};

/// An entropy source with room for one answer.
#[derive(Debug)]
pub struct Rng {
    device: Device,
    queue: Queue,
    data: u64,
    len: u32,
}

impl Rng {
    /// Opens the first source, to be asked for up to `len` bytes at a time; `interrupt` says how it is waited for.
    ///
    /// # Errors
    ///
    /// There is none, it refuses, or memory is short.
    pub fn open(args: &Args, len: u32, interrupt: bool) -> Result<Self, Error> {
        let mut device = mmio::find(args, kind::RNG, 0)?;
        device.negotiate(feature::EVENT_INDEX)?;
        let queue = device.queue(0)?;
        if interrupt {
            device.use_interrupt()?;
        }
        device.start();
        Ok(Self { device, queue, data: heap::zeroed(len.into())?, len })
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Asks, waits for the answer and gives it. A source may answer with fewer bytes.
    ///
    /// # Errors
    ///
    /// The answer is longer than the question.
    pub fn read(&mut self) -> Result<&[u8], Error> {
        self.ask()?;
        self.queue.kick();
        self.device.wait(&mut self.queue);
        self.answer()
    }

    /// As [`read`](Self::read), for an open with interrupt, which is waited for even if the answer is there before it.
    ///
    /// # Errors
    ///
    /// As of `read`.
    pub fn read_by_interrupt(&mut self) -> Result<&[u8], Error> {
        self.ask()?;
        self.device.wait_for_interrupt(&mut self.queue, Queue::kick);
        self.answer()
    }

    fn ask(&mut self) -> Result<(), Error> {
        let buffer = Buffer::write(self.data, self.len);
        self.queue.add(&[buffer]).ok_or("the source's queue is full")?;
        Ok(())
    }

    fn answer(&mut self) -> Result<&[u8], Error> {
        let (_, len) = self.queue.take().ok_or("the source's answer is gone")?;
        if len > self.len {
            return Err("the source says that it has written more than there was room for".into());
        }
        Ok(phys::bytes(self.data, len.into()))
    }
}
