//! Places for virtio devices: a register window, an interrupt line, and an event per queue.

use std::sync::Arc;

use devices::GuestRam;
use devices::bus::Bus;
use devices::virtio::device::VirtioDevice;
use devices::virtio::mmio::{MmioTransport, QUEUE_NOTIFY, WINDOW};
use kvm_ioctls::VmFd;

use super::{Error, host};
use crate::acpi::VirtioMmio;
use crate::interrupt;

/// Where the first window lies: in the hole below 4 GiB, far from the interrupt controllers at its end.
const FIRST: u32 = 0xd000_0000;

/// The devices that have a place.
#[derive(Debug, Default)]
pub struct Slots {
    transports: Vec<Arc<MmioTransport>>,
    places: Vec<VirtioMmio>,
}

impl Slots {
    /// Gives `device` the next place and puts it on `bus`.
    ///
    /// # Errors
    ///
    /// KVM refuses a line or an event, or no place is left.
    pub fn add(
        &mut self,
        vm: &VmFd,
        bus: &mut Bus,
        memory: &Arc<GuestRam>,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), Error> {
        let index = self.places.len();
        let gsi = interrupt::device_lines().nth(index).ok_or(interrupt::Error::NoLineLeft)?;
        let len = u32::try_from(WINDOW).unwrap_or(u32::MAX);
        let base = FIRST + len * u32::try_from(index).unwrap_or_default();
        let line = Arc::new(interrupt::line(vm, gsi)?);
        let transport = MmioTransport::new(device, memory.clone(), line).map_err(host("a virtio device"))?;
        let transport = Arc::new(transport);
        for (queue, kick) in (0..).zip(transport.kicks()) {
            interrupt::notify_on_write(vm, kick, u64::from(base) + QUEUE_NOTIFY, queue)?;
        }
        bus.insert(base.into(), WINDOW, transport.clone())?;
        self.transports.push(transport);
        self.places.push(VirtioMmio { base, len, gsi });
        Ok(())
    }

    /// What the firmware tables say of the devices.
    pub fn places(&self) -> &[VirtioMmio] {
        &self.places
    }

    /// The devices themselves.
    pub fn into_transports(self) -> Vec<Arc<MmioTransport>> {
        self.transports
    }

    /// `cmdline` with the devices named on it, for kernels without ACPI (Linux,
    /// `Documentation/admin-guide/kernel-parameters.txt`, `virtio_mmio.device`). What follows ` -- ` is not the kernel's.
    pub fn name_on(&self, cmdline: &str) -> String {
        let (kernel, init) = match cmdline.split_once(" -- ") {
            Some((kernel, init)) => (kernel, Some(init)),
            None => (cmdline, None),
        };
        let devices = self
            .places
            .iter()
            .map(|place| format!("virtio_mmio.device={}K@{:#x}:{}", place.len >> 10, place.base, place.gsi));
        let words = std::iter::once(kernel.to_owned()).filter(|k| !k.is_empty()).chain(devices);
        let named = words.collect::<Vec<_>>().join(" ");
        init.map_or(named.clone(), |init| format!("{named} -- {init}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots() -> Slots {
        let place = |index: u32| VirtioMmio { base: FIRST + 0x1000 * index, len: 0x1000, gsi: 5 + index };
        Slots { transports: Vec::new(), places: vec![place(0), place(1)] }
    }

    const NAMES: &str = "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6";

    #[test]
    fn devices_are_named_after_what_the_user_gave() {
        assert_eq!(slots().name_on("console=ttyS0"), format!("console=ttyS0 {NAMES}"));
        assert_eq!(slots().name_on(""), NAMES);
        assert_eq!(Slots::default().name_on("quiet"), "quiet");
    }

    #[test]
    fn arguments_of_init_stay_behind_the_devices() {
        assert_eq!(slots().name_on("quiet -- single"), format!("quiet {NAMES} -- single"));
    }
}
