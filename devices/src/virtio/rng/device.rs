//! The device as its transport sees it.

use std::io;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::worker::Server;
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::queue::DeviceQueue;
use crate::virtio::worker::Worker;

const QUEUE_SIZES: [u16; 1] = [64];

/// A virtio entropy device.
#[derive(Debug, Default)]
pub struct Rng {
    worker: Option<Worker<Server>>,
}

impl VirtioDevice for Rng {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, queues, interrupt, .. } = activation;
        if let Some(queue) = queues.into_iter().next() {
            let server = Server::new(DeviceQueue::new(queue, memory, interrupt));
            self.worker = Some(Worker::spawn("rng", server)?);
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
