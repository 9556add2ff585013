//! The device as its transport sees it.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::config::Space;
use super::disk::Disk;
use super::request::{ID_LEN, Target};
use super::worker::Server;
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::log_limit::LogLimit;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::worker::Worker;

const QUEUE_SIZES: [u16; 1] = [256];
/// Data pieces a request may have: the queue, less header and status.
pub(super) const SEGMENTS: u32 = 254;

/// A virtio disk.
#[derive(Debug)]
pub struct Block {
    disk: Arc<dyn Disk>,
    readonly: bool,
    id: [u8; ID_LEN],
    space: Space,
    /// Of all drivers that come and go.
    failures: Arc<LogLimit>,
    worker: Option<Worker<Server>>,
}

impl Block {
    /// A disk that shows `disk`, under the serial number `serial` (its first 20 bytes).
    #[must_use]
    pub fn new(disk: Arc<dyn Disk>, readonly: bool, serial: &str) -> Self {
        let mut id = [0; ID_LEN];
        let len = serial.len().min(ID_LEN);
        id[..len].copy_from_slice(&serial.as_bytes()[..len]);
        let space = Space::new(disk.sectors(), disk.block_size(), SEGMENTS);
        Self { disk, readonly, id, space, failures: Arc::default(), worker: None }
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let access = if self.readonly {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        access
            | 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_TOPOLOGY
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, interrupt } = activation;
        if let Some(queue) = queues.into_iter().next() {
            let queue = DeviceQueue::new(queue, memory, interrupt);
            let target = Target {
                disk: self.disk.clone(),
                readonly: self.readonly,
                write_through: features >> VIRTIO_BLK_F_FLUSH & 1 == 0,
                id: self.id,
                failures: self.failures.clone(),
            };
            self.worker = Some(Worker::spawn("block", Server { queue, target })?);
        }
        Ok(())
    }

    fn pause(&mut self) {
        self.worker.iter().for_each(Worker::pause);
    }

    fn resume(&mut self) {
        self.worker.iter().for_each(Worker::resume);
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
