//! Paravirtual and legacy devices of vmm; knows nothing of KVM.
//!
//! A device sees guest memory ([`GuestRam`]), an interrupt line ([`Interrupt`]) and a bus that calls it
//! ([`bus::BusDevice`]). Whoever builds a machine supplies these.

pub mod bus;
pub mod legacy;
pub mod virtio;

use std::fmt::Debug;
use std::io;

/// Guest memory as devices see it. One alias, so that dirty tracking of device writes is a change in one place.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// An edge-triggered interrupt line into the guest.
pub trait Interrupt: Send + Sync + Debug {
    /// Raises the line once.
    ///
    /// # Errors
    ///
    /// The error of the write that carries the interrupt (an eventfd, for instance).
    fn trigger(&self) -> io::Result<()>;
}

impl Interrupt for vmm_sys_util::eventfd::EventFd {
    fn trigger(&self) -> io::Result<()> {
        self.write(1)
    }
}
