//! The device as its transport sees it.

use std::io;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::ETHERNET_HEADER;
use super::backend::{Backend, Offloads};
use super::config::Space;
use super::counters::Counters;
use super::ring::Ring;
use super::rx::Receiver;
use super::tx::Transmitter;
use super::worker::{Server, Shared, lock};
use crate::virtio::device::{Activation, VirtioDevice};
use crate::virtio::log_limit::LogLimit;
use crate::virtio::worker::Worker;

/// `receiveq1`, `transmitq1` (section 5.1.2).
const QUEUE_SIZES: [u16; 2] = [256, 256];
const RX: u16 = 0;
/// A guest can start its card as often as it likes.
static COMPLAINTS: LogLimit = LogLimit::new();
/// Smallest MTU that may be offered (section 5.1.4.1).
const MIN_MTU: u16 = 68;
/// MTU of a network that says nothing about it.
const USUAL_MTU: u16 = 1500;

/// A virtio network card.
#[derive(Debug)]
pub struct Net {
    backend: Shared,
    features: u64,
    usual_frame: usize,
    space: Space,
    counters: Arc<Counters>,
    worker: Option<Worker<Server>>,
}

impl Net {
    /// A card with address `mac`, connected to `backend`.
    #[must_use]
    pub fn new(backend: Box<dyn Backend>, mac: [u8; 6]) -> Self {
        let offloads = backend.offloads().consistent();
        let mtu = backend.mtu().filter(|mtu| *mtu >= MIN_MTU);
        Self {
            features: features(offloads, mtu.is_some()),
            // With a VLAN tag.
            usual_frame: usize::from(mtu.unwrap_or(USUAL_MTU)) + ETHERNET_HEADER + 4,
            space: Space::new(mac, mtu.unwrap_or_default()),
            backend: Arc::new(Mutex::new(backend)),
            counters: Arc::default(),
            worker: None,
        }
    }

    /// What goes through the card.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        self.counters.clone()
    }
}

/// Features of a card whose back end can do `offloads`.
fn features(offloads: Offloads, mtu: bool) -> u64 {
    let Offloads { csum, tso4, tso6, ecn, ufo, uso } = offloads;
    let bit = |condition: bool, bit: u32| u64::from(condition) << bit;
    bit(true, VIRTIO_F_VERSION_1)
        | bit(true, VIRTIO_RING_F_EVENT_IDX)
        | bit(true, VIRTIO_RING_F_INDIRECT_DESC)
        | bit(true, VIRTIO_NET_F_MAC)
        | bit(true, VIRTIO_NET_F_STATUS)
        | bit(true, VIRTIO_NET_F_MRG_RXBUF)
        | bit(mtu, VIRTIO_NET_F_MTU)
        | bit(csum, VIRTIO_NET_F_CSUM)
        | bit(csum, VIRTIO_NET_F_GUEST_CSUM)
        | bit(tso4, VIRTIO_NET_F_HOST_TSO4)
        | bit(tso4, VIRTIO_NET_F_GUEST_TSO4)
        | bit(tso6, VIRTIO_NET_F_HOST_TSO6)
        | bit(tso6, VIRTIO_NET_F_GUEST_TSO6)
        | bit(ecn, VIRTIO_NET_F_HOST_ECN)
        | bit(ecn, VIRTIO_NET_F_GUEST_ECN)
        | bit(ufo, VIRTIO_NET_F_HOST_UFO)
        | bit(ufo, VIRTIO_NET_F_GUEST_UFO)
        | bit(uso, VIRTIO_NET_F_HOST_USO)
        | bit(uso, VIRTIO_NET_F_GUEST_USO4)
        | bit(uso, VIRTIO_NET_F_GUEST_USO6)
}

/// What a driver that has accepted `features` takes.
fn guest_offloads(features: u64) -> Offloads {
    let has = |bit: u32| features >> bit & 1 == 1;
    let offloads = Offloads {
        csum: has(VIRTIO_NET_F_GUEST_CSUM),
        tso4: has(VIRTIO_NET_F_GUEST_TSO4),
        tso6: has(VIRTIO_NET_F_GUEST_TSO6),
        ecn: has(VIRTIO_NET_F_GUEST_ECN),
        ufo: has(VIRTIO_NET_F_GUEST_UFO),
        // A back end knows but one kind of it.
        uso: has(VIRTIO_NET_F_GUEST_USO4) && has(VIRTIO_NET_F_GUEST_USO6),
    };
    offloads.consistent()
}

/// What a driver that has accepted `features` may ask for.
fn host_offloads(features: u64) -> Offloads {
    let has = |bit: u32| features >> bit & 1 == 1;
    let offloads = Offloads {
        csum: has(VIRTIO_NET_F_CSUM),
        tso4: has(VIRTIO_NET_F_HOST_TSO4),
        tso6: has(VIRTIO_NET_F_HOST_TSO6),
        ecn: has(VIRTIO_NET_F_HOST_ECN),
        ufo: has(VIRTIO_NET_F_HOST_UFO),
        uso: has(VIRTIO_NET_F_HOST_USO),
    };
    offloads.consistent()
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.space.read(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation { memory, features, queues, interrupt } = activation;
        let accepted = guest_offloads(features);
        {
            let mut backend = lock(&self.backend);
            if let Err(error) = backend.set_offloads(accepted) {
                let name = backend.name();
                COMPLAINTS.log(|dropped| {
                    tracing::warn!(
                        "{name} does not take over what its guest can do with frames: {error}{dropped}"
                    );
                });
            }
        }
        let mergeable = features >> VIRTIO_NET_F_MRG_RXBUF & 1 == 1;
        let (mut rx, mut tx) = (None, None);
        for queue in queues {
            let receives = queue.index == RX;
            let ring = Ring::new(queue, memory.clone(), interrupt.clone());
            if receives {
                rx = Some(Receiver::new(ring, accepted, mergeable, self.usual_frame));
            } else {
                tx = Some(Transmitter::new(ring, host_offloads(features)));
            }
        }
        let server = Server::new(self.backend.clone(), self.counters.clone(), rx, tx);
        self.worker = Some(Worker::spawn("net", server)?);
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
