//! Build, test, demo and benchmark commands of the vmm repository.

fn main() {}
