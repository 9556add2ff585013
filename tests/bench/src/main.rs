//! Benchmarks of vmm beside its peers, one subcommand each.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use vmm_bench::start;

/// Benchmarks of vmm beside Firecracker, Cloud Hypervisor and QEMU's microvm.
#[derive(Debug, Parser)]
#[command(name = "vmm-bench", after_help = HELP)]
struct Cli {
    #[command(subcommand)]
    bench: Bench,
}

const HELP: &str = "\
Binaries are taken from VMM_BINARY (else beside this program), FIRECRACKER, CLOUD_HYPERVISOR and QEMU,
else from $PATH; a system that is not found is reported as skipped.";

#[derive(Debug, Subcommand)]
enum Bench {
    /// Process start to the guest's first byte, and memory beside the guest's own
    Start(start::Options),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().bench {
        Bench::Start(options) => start::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmm-bench: {error}");
            ExitCode::FAILURE
        }
    }
}
