//! Benchmarks of vmm beside its peers.

fn main() {}
