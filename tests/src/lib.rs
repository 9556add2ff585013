//! Integration tests of vmm against local KVM, and what they share.

pub mod disks;
pub mod guest;
pub mod terminal;
