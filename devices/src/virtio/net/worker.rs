//! The thread of a card.

use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::EventSet;

use super::backend::Backend;
use super::counters::Counters;
use super::rx::Receiver;
use super::tx::Transmitter;
use crate::virtio::log_limit::LogLimit;
use crate::virtio::worker::{Poll, Work};

const RX_KICK: u64 = 0;
const TX_KICK: u64 = 1;
const BACKEND: u64 = 2;

/// Most frames, or looks at a queue, before the other direction, a pause among others, gets its turn.
pub const BATCH_FRAMES: usize = 64;
/// Bytes after which a batch ends, however few its frames: the driver has enough to begin with.
pub const BATCH_BYTES: usize = 256 << 10;

/// The back end, shared between the device and the thread of whoever is the driver at the time.
pub type Shared = Arc<Mutex<Box<dyn Backend>>>;

/// The back end, whatever has become of the thread that had it last.
pub fn lock(backend: &Shared) -> MutexGuard<'_, Box<dyn Backend>> {
    backend.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says once that the back end fails, until it has worked again.
#[derive(Debug, Default)]
pub struct Outage(bool);

impl Outage {
    /// Passing frames `way` ("to", "from") the back end called `name` has failed.
    pub fn begins(&mut self, way: &str, name: &str, error: &io::Error) {
        static OUTAGES: LogLimit = LogLimit::new();
        if !std::mem::replace(&mut self.0, true) {
            OUTAGES.log(|dropped| tracing::warn!("no frames go {way} {name}: {error}{dropped}"));
        }
    }

    /// Frames are passed.
    pub fn ends(&mut self) {
        self.0 = false;
    }
}

#[derive(Debug)]
pub struct Server {
    backend: Shared,
    fd: RawFd,
    counters: Arc<Counters>,
    rx: Option<Receiver>,
    tx: Option<Transmitter>,
    /// A frame waits for the back end to have room.
    full: bool,
}

impl Server {
    pub fn new(
        backend: Shared,
        counters: Arc<Counters>,
        rx: Option<Receiver>,
        tx: Option<Transmitter>,
    ) -> Self {
        let fd = lock(&backend).fd();
        Self { backend, fd, counters, rx, tx, full: false }
    }

    fn receive(&mut self) {
        if let Some(rx) = &mut self.rx {
            rx.serve(&mut **lock(&self.backend), &self.counters);
        }
    }

    fn transmit(&mut self, poll: &Poll) {
        let Some(tx) = &mut self.tx else { return };
        let full = tx.serve(&mut **lock(&self.backend), &self.counters);
        // A change looks at the descriptor anew, so that room made since the refusal is reported, too.
        if full || self.full {
            let room = if full { EventSet::OUT } else { EventSet::empty() };
            if let Err(error) = poll.modify(self.fd, EventSet::IN | EventSet::EDGE_TRIGGERED | room, BACKEND)
            {
                tracing::error!("a network card does not learn when it can send again: {error}");
            }
        }
        self.full = full;
    }
}

impl Work for Server {
    fn watch(&mut self, poll: &Poll) -> io::Result<()> {
        // Edge-triggered: while the guest has no buffers, frames that wait, or an interface that is gone, do not wake the
        // thread over and over, and no system call is spent on not watching it.
        poll.add(self.fd, EventSet::IN | EventSet::EDGE_TRIGGERED, BACKEND)?;
        if let Some(rx) = &self.rx {
            poll.add(rx.ring.kick_fd(), EventSet::IN, RX_KICK)?;
        }
        if let Some(tx) = &self.tx {
            poll.add(tx.ring.kick_fd(), EventSet::IN, TX_KICK)?;
        }
        Ok(())
    }

    fn ready(&mut self, token: u64, poll: &Poll) {
        match token {
            RX_KICK => {
                self.rx.iter().for_each(|rx| rx.ring.clear_kick());
                self.receive();
            }
            TX_KICK => {
                self.tx.iter().for_each(|tx| tx.ring.clear_kick());
                // While the back end is full there is no use in trying.
                if !self.full {
                    self.transmit(poll);
                }
            }
            _ => {
                self.rx.iter_mut().for_each(|rx| rx.readable = true);
                self.receive();
                if self.full {
                    self.transmit(poll);
                }
            }
        }
    }

    fn catch_up(&mut self, poll: &Poll) {
        self.ready(BACKEND, poll);
        self.transmit(poll);
    }

    fn drain(&mut self) {
        self.rx.iter_mut().for_each(Receiver::drain);
    }
}

#[cfg(test)]
#[path = "wakeup_tests.rs"]
mod tests;
