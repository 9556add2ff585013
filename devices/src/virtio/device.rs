//! The contract between a virtio device and its transport.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestRam;

/// How a device tells its driver that something happened. The transport implements it.
pub trait VirtioInterrupt: Send + Sync + Debug {
    /// Buffers of queue `index` were used.
    fn queue_used(&self, index: u16);
    /// The configuration space changed.
    fn config_changed(&self);
    /// The device can no longer go on and wants to be reset (`DEVICE_NEEDS_RESET`, virtio 1.2 section 2.1).
    fn needs_reset(&self);
}

/// A queue that the driver has made ready, and the event that says it was notified.
#[derive(Debug)]
pub struct ActiveQueue {
    /// Index among the device's queues.
    pub index: u16,
    /// Validated rings.
    pub queue: Queue,
    /// Signalled when the driver notifies the queue.
    pub kick: EventFd,
}

/// Everything a device is handed when its driver sets `DRIVER_OK`.
#[derive(Debug)]
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<GuestRam>,
    /// Features that the driver accepted; a subset of those offered.
    pub features: u64,
    /// The queues that the driver made ready. Queues it left alone are absent.
    pub queues: Vec<ActiveQueue>,
    /// The way back to the driver.
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// A virtio device behind a transport.
///
/// # Life
///
/// `activate → (pause → resume)* → reset → activate …`. The transport calls these one at a time. Threads of a
/// device exist only between `activate` and `reset`.
pub trait VirtioDevice: Send + Debug {
    /// Device ID (virtio 1.2 section 5): 1 network, 2 block, 4 entropy.
    fn device_id(&self) -> u32;

    /// Largest size of each queue, in descriptors; its length is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// Features offered, `VIRTIO_F_VERSION_1` included.
    fn features(&self) -> u64;

    /// Reads device configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes device configuration space; writes to read-only fields or past the end are ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: start serving the queues.
    ///
    /// # Errors
    ///
    /// What the device could not start; the transport then sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Stops serving and returns once nothing is in flight and no thread of the device touches guest memory.
    /// The queues stay with the device; notifications that arrive meanwhile are kept.
    fn pause(&mut self);

    /// Serves again after [`pause`](Self::pause), beginning with whatever was notified meanwhile.
    fn resume(&mut self);

    /// Stops serving for good, as `pause` does, and forgets the activation.
    fn reset(&mut self);
}
