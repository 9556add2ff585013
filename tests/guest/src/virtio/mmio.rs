//! Devices behind register windows (section 4.2), as `virtio_mmio.device=SIZE@BASE:IRQ` on the command line names them.

use alloc::format;
use core::sync::atomic::Ordering;

use super::feature;
use super::queue::Queue;
use crate::args::{Args, number};
use crate::{Error, apic, cpu, interrupts, phys};

mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESCRIPTORS: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const CONFIG: u64 = 0x100;
}

mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
/// Longest queues that are used.
const QUEUE_SIZE_LIMIT: u32 = 1024;

/// A device with its transport.
#[derive(Debug)]
pub struct Device {
    base: u64,
    irq: u32,
    features: u64,
    vector: Option<u8>,
}

/// Windows on the command line: base and interrupt.
fn windows(args: &Args) -> impl Iterator<Item = Result<(u64, u32), Error>> {
    args.all("virtio_mmio.device").map(|text| {
        let window = || {
            let (_, place) = text.split_once('@')?;
            let mut parts = place.split(':');
            let base = number(parts.next()?)?;
            let irq = u32::try_from(number(parts.next()?)?).ok()?;
            Some((base, irq))
        };
        window().ok_or_else(|| format!("virtio_mmio.device={text}: SIZE@BASE:IRQ is wanted"))
    })
}

/// Finds device number `index` of the type `kind`, counted in the order of the command line.
///
/// # Errors
///
/// There are fewer, or a window on the command line has no virtio device of version 2.
pub fn find(args: &Args, kind: u32, index: u64) -> Result<Device, Error> {
    let mut left = index;
    for window in windows(args) {
        let (base, irq) = window?;
        let read = |offset| phys::read32(base + offset);
        let (magic, version) = (read(register::MAGIC), read(register::VERSION));
        if (magic, version) != (MAGIC, VERSION) {
            return Err(format!(
                "at {base:#x} is no virtio device of version 2 (magic {magic:#x}, version {version})"
            ));
        }
        if read(register::DEVICE_ID) != kind {
            continue;
        }
        if left == 0 {
            return Ok(Device { base, irq, features: 0, vector: None });
        }
        left -= 1;
    }
    Err(format!("the machine has no virtio device number {index} of type {kind}"))
}

impl Device {
    /// Resets the device and agrees on those of the features `wanted` that it has.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn negotiate(&mut self, wanted: u64) -> Result<(), Error> {
        self.write(register::STATUS, 0);
        while self.read(register::STATUS) != 0 {
            cpu::relax();
        }
        self.write(register::STATUS, status::ACKNOWLEDGE);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        let mut offered = 0;
        for half in 0..2 {
            self.write(register::DEVICE_FEATURES_SELECT, half);
            offered |= u64::from(self.read(register::DEVICE_FEATURES)) << (32 * half);
        }
        self.features = offered & (wanted | feature::VERSION_1);
        for half in 0..2 {
            self.write(register::DRIVER_FEATURES_SELECT, half);
            self.write(register::DRIVER_FEATURES, low(self.features >> (32 * half)));
        }
        let features_ok = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        self.write(register::STATUS, features_ok);
        if self.read(register::STATUS) & status::FEATURES_OK == 0 {
            return Err(format!(
                "the device does not accept the features {:#x} of its {offered:#x}",
                self.features
            ));
        }
        Ok(())
    }

    /// Whether all bits of `features` have been agreed on.
    pub fn has(&self, features: u64) -> bool {
        self.features & features == features
    }

    /// What has been agreed on.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Sets up queue `index`, as long as the device allows.
    ///
    /// # Errors
    ///
    /// There is no such queue, or no memory for it.
    pub fn queue(&self, index: u32) -> Result<Queue, Error> {
        self.write(register::QUEUE_SELECT, index);
        let size = self.read(register::QUEUE_SIZE_MAX).min(QUEUE_SIZE_LIMIT);
        let size = u16::try_from(size).ok().filter(|size| *size > 0);
        let size = size.ok_or_else(|| format!("the device has no queue {index}"))?;
        let notify = self.base + register::QUEUE_NOTIFY;
        let queue = Queue::new(index, size, notify, self.features)?;
        self.write(register::QUEUE_SIZE, size.into());
        let (descriptors, driver, device) = queue.areas();
        self.write64(register::QUEUE_DESCRIPTORS, descriptors);
        self.write64(register::QUEUE_DRIVER, driver);
        self.write64(register::QUEUE_DEVICE, device);
        self.write(register::QUEUE_READY, 1);
        Ok(queue)
    }

    /// Makes the device begin.
    pub fn start(&self) {
        let all = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write(register::STATUS, all);
    }

    /// From now on the device is waited for by its interrupt.
    ///
    /// # Errors
    ///
    /// The I/O APIC has no such input.
    pub fn use_interrupt(&mut self) -> Result<(), Error> {
        let vector = apic::route(self.irq);
        self.vector = Some(vector.ok_or_else(|| format!("the I/O APIC has no input {}", self.irq))?);
        apic::take_interrupts();
        Ok(())
    }

    /// Waits until `queue` has something to take: by polling, or by the interrupt.
    pub fn wait(&self, queue: &mut Queue) {
        while !self.wait_once(queue) {}
    }

    /// As [`wait`](Self::wait), but any other interrupt ends it as well, and when polling nothing is
    /// waited for. Whether `queue` has something to take.
    pub fn wait_once(&self, queue: &mut Queue) -> bool {
        let Some(vector) = self.vector else {
            cpu::relax();
            return queue.has_used();
        };
        let counter = interrupts::counter(vector);
        let seen = counter.load(Ordering::Acquire);
        if queue.has_used_or_tells() {
            return true;
        }
        cpu::wait(counter, seen);
        if counter.load(Ordering::Acquire) != seen {
            self.write(register::INTERRUPT_ACK, self.read(register::INTERRUPT_STATUS));
        }
        queue.has_used()
    }

    /// Asks for an interrupt at the next that `queue` has to take, lets `begin` start it, and waits for the interrupt
    /// itself.
    pub fn wait_for_interrupt(&self, queue: &mut Queue, begin: impl FnOnce(&mut Queue)) {
        let Some(vector) = self.vector else { return };
        let seen = interrupts::counter(vector).load(Ordering::Acquire);
        queue.want_interrupt();
        begin(queue);
        interrupts::wait(vector, seen);
        self.write(register::INTERRUPT_ACK, self.read(register::INTERRUPT_STATUS));
    }

    /// Interrupts of the device so far.
    pub fn interrupts(&self) -> u64 {
        self.vector.map_or(0, |vector| interrupts::counter(vector).load(Ordering::Relaxed))
    }

    /// Takes note of a change of the configuration that the device has told of since the last time; whether there was one.
    pub fn take_change(&self) -> bool {
        const CHANGED: u32 = 2;
        let changed = self.read(register::INTERRUPT_STATUS) & CHANGED != 0;
        if changed {
            self.write(register::INTERRUPT_ACK, CHANGED);
        }
        changed
    }

    /// A field of the configuration, byte by byte, as little-endian number.
    pub fn config(&self, offset: u64, len: u64) -> u64 {
        let byte = |at| u64::from(phys::read8(self.base + register::CONFIG + offset + at)) << (8 * at);
        (0..len).map(byte).sum()
    }

    /// A field of the configuration of 32 bits.
    pub fn config32(&self, offset: u64) -> u32 {
        self.read(register::CONFIG + offset)
    }

    /// A field of the configuration of 64 bits, in two halves.
    pub fn config64(&self, offset: u64) -> u64 {
        u64::from(self.config32(offset)) | u64::from(self.config32(offset + 4)) << 32
    }

    fn read(&self, offset: u64) -> u32 {
        phys::read32(self.base + offset)
    }

    fn write(&self, offset: u64, value: u32) {
        phys::write32(self.base + offset, value);
    }

    fn write64(&self, offset: u64, value: u64) {
        self.write(offset, low(value));
        self.write(offset + 4, low(value >> 32));
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or_default()
}
