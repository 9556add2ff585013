//! Benchmarks of vmm beside its peers, one subcommand each.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vmm_bench::{disk, start};

/// Benchmarks of vmm beside Firecracker, Cloud Hypervisor and QEMU's microvm.
#[derive(Debug, Parser)]
#[command(name = "vmm-bench", after_help = HELP)]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

const HELP: &str = "\
Binaries are taken from VMM_BINARY (else beside this program), FIRECRACKER, CLOUD_HYPERVISOR, QEMU,
QEMU_IMG and FIO, else from $PATH; a system that is not found is reported as skipped.";

#[derive(Debug, Subcommand)]
enum Bench {
    /// Process start to the guest's first byte, and memory beside the guest's own
    Start(start::Options),
    /// Requests a second that a guest gets from its disk, and the processor time that each costs
    Disk(disk::Options),
}

fn main() -> ExitCode {
    let outcome: Result<(), Box<dyn std::error::Error>> = match Cli::parse().bench {
        Bench::Start(options) => start::run(&options).map_err(Into::into),
        Bench::Disk(options) => disk::run(&options).map_err(Into::into),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmm-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
