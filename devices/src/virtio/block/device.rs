//! The device as its transport sees it.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use vmfs_image::Image;

use super::SECTOR;
use super::config::Space;
use super::control::BlockControl;
use super::options::{BlockOptions, MAX_QUEUES};
use super::request::ID_LEN;
use super::shared::Shared;
use super::worker::Server;
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::queue::DeviceQueue;
use crate::virtio::worker::Worker;

const QUEUE_SIZE: u16 = 256;
/// Data pieces a request may have: the queue, less header and status.
pub(super) const SEGMENTS: u32 = 254;

/// A virtio disk.
#[derive(Debug)]
pub struct Block {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
    id: [u8; ID_LEN],
}

impl Block {
    /// A disk that shows `image`, and by what it is controlled.
    #[must_use]
    pub fn new(image: Arc<dyn Image>, options: BlockOptions) -> (Self, BlockControl) {
        let mut id = [0; ID_LEN];
        let len = options.serial.len().min(ID_LEN);
        id[..len].copy_from_slice(&options.serial.as_bytes()[..len]);
        let queue_sizes = vec![QUEUE_SIZE; options.queues.clamp(1, MAX_QUEUES).into()];
        let shared = Arc::new(Shared::new(image, options));
        (Self { shared: shared.clone(), queue_sizes, id }, BlockControl(shared))
    }
}

impl VirtioDevice for Block {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let access = if self.shared.options.readonly {
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
            | u64::from(self.queue_sizes.len() > 1) << VIRTIO_BLK_F_MQ
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let image = self.shared.image();
        let queues = u16::try_from(self.queue_sizes.len()).unwrap_or(1);
        Space::new(image.size() / SECTOR, image.block_size(), SEGMENTS, queues).read(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, interrupt } = activation;
        let mut threads = self.shared.threads();
        for queue in queues {
            let name = format!("block{}", queue.index);
            let write_through = features >> VIRTIO_BLK_F_FLUSH & 1 == 0;
            let queue = DeviceQueue::new(queue, memory.clone(), interrupt.clone());
            let server = Server::new(queue, self.shared.clone(), write_through, self.id);
            match server.and_then(|server| Worker::spawn_as(&name, server, threads.held())) {
                Ok(worker) => threads.workers.push(worker),
                Err(error) => {
                    threads.workers.clear();
                    return Err(error);
                }
            }
        }
        threads.interrupt = Some(interrupt);
        Ok(())
    }

    fn pause(&mut self) {
        let mut threads = self.shared.threads();
        threads.paused = true;
        threads.follow();
    }

    fn resume(&mut self) {
        let mut threads = self.shared.threads();
        threads.paused = false;
        threads.follow();
    }

    fn reset(&mut self) {
        let mut threads = self.shared.threads();
        threads.paused = false;
        threads.interrupt = None;
        threads.workers.clear();
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // The threads keep what they share with this alive, and so themselves.
        self.reset();
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

#[cfg(test)]
#[path = "engine_tests.rs"]
mod engine_tests;

#[cfg(test)]
#[path = "stress_tests.rs"]
mod stress_tests;
