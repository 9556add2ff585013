//! Devices that a machine has because systems expect them: serial port, keyboard controller, power control.

pub mod power;
pub mod reset;
pub mod serial;

use std::fmt::Debug;

/// What a guest can ask of the machine around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Switch the machine off.
    PowerOff,
    /// Start it anew.
    Reset,
}

/// Who hears what a guest asks for. It is called on a vCPU thread and must not wait for the vCPUs.
pub trait Host: Send + Sync + Debug {
    /// The guest asks for `request`.
    fn request(&self, request: Request);
}
