//! A KVM virtual machine monitor for consolidating servers.

pub mod acpi;
pub mod boot;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod interrupt;
pub mod machine;
pub mod memory;
pub mod run_dir;
pub mod terminal;
pub mod vcpu;
