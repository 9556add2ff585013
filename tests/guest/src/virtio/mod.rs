//! Virtio drivers.
