//! Interrupt lines into the guest: the in-kernel interrupt controllers, and an eventfd for each line.

use std::io;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{IoEventAddress, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Interrupt of the first serial port.
pub const SERIAL_GSI: u32 = 4;
/// Interrupt of the generic event device (power button).
pub const GED_GSI: u32 = 9;
/// Number of inputs of the I/O APIC that KVM emulates.
const IOAPIC_PINS: u32 = 24;

/// Interrupt hardware that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No interrupt controllers.
    #[error(
        "KVM cannot create the interrupt controllers in the kernel; `vmm doctor` says what this host lacks"
    )]
    Irqchip(#[source] kvm_ioctls::Error),
    /// No timer.
    #[error("KVM cannot create the interval timer in the kernel; `vmm doctor` says what this host lacks")]
    Pit(#[source] kvm_ioctls::Error),
    /// No descriptor for a line.
    #[error("cannot create an event descriptor; see the limit on open files (ulimit -n)")]
    EventFd(#[source] io::Error),
    /// KVM does not take the descriptor.
    #[error("KVM does not connect interrupt line {gsi} to an event descriptor")]
    Irqfd {
        /// The line.
        gsi: u32,
        /// What KVM answered.
        source: kvm_ioctls::Error,
    },
    /// KVM does not take a notification address.
    #[error("KVM does not turn writes to {address:#x} into events")]
    Ioeventfd {
        /// Guest-physical address of the register.
        address: u64,
        /// What KVM answered.
        source: kvm_ioctls::Error,
    },
    /// More devices than lines.
    #[error("the machine has only {} interrupt lines for devices", device_lines().count())]
    NoLineLeft,
}

/// Creates local APICs, I/O APIC, PIC and PIT in the kernel. Comes before the vCPUs.
///
/// # Errors
///
/// [`Error::Irqchip`] or [`Error::Pit`].
pub fn create_controllers(vm: &VmFd) -> Result<(), Error> {
    vm.create_irq_chip().map_err(Error::Irqchip)?;
    // The speaker port is answered by KVM as well, so that its polling by old kernels costs no exit to us.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(Error::Pit)
}

/// A new event descriptor that raises line `gsi` when it is written.
///
/// # Errors
///
/// [`Error::EventFd`] or [`Error::Irqfd`].
pub fn line(vm: &VmFd, gsi: u32) -> Result<EventFd, Error> {
    let event = EventFd::new(EFD_NONBLOCK).map_err(Error::EventFd)?;
    vm.register_irqfd(&event, gsi).map_err(|source| Error::Irqfd { gsi, source })?;
    Ok(event)
}

/// Makes a 32-bit write of `value` to `address` signal `event` without leaving the kernel.
///
/// # Errors
///
/// [`Error::Ioeventfd`].
pub fn notify_on_write(vm: &VmFd, event: &EventFd, address: u64, value: u32) -> Result<(), Error> {
    vm.register_ioevent(event, &IoEventAddress::Mmio(address), value)
        .map_err(|source| Error::Ioeventfd { address, source })
}

/// Lines free for devices, ascending: what the I/O APIC has, less the ISA lines with a fixed use (timer,
/// keyboard, cascade, two serial ports) and the generic event device's.
pub fn device_lines() -> impl Iterator<Item = u32> {
    (5..IOAPIC_PINS).filter(|gsi| *gsi != GED_GSI)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_lines_leave_out_serial_and_event_device() {
        let lines: Vec<_> = device_lines().collect();
        assert_eq!(lines.len(), 18);
        assert!(!lines.contains(&SERIAL_GSI) && !lines.contains(&GED_GSI));
        assert!(lines.iter().all(|gsi| (5..24).contains(gsi)));
    }
}
