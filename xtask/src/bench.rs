//! `cargo xtask bench`: builds for release what is measured and what measures, and runs it.

use std::ffi::OsString;
use std::process::Command;

use crate::{Error, cargo};

/// Which benchmark, and its own options.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Name of the benchmark and its options: start or disk [--runs N] [--json]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true, value_name = "BENCH")]
    args: Vec<OsString>,
}

/// Runs the benchmark.
pub fn run(options: &Options) -> Result<(), Error> {
    eprintln!("xtask: building for release");
    let vmm = cargo::release("vmm", "vmm")?;
    // Found by the benchmark beside itself.
    cargo::release("vmm-bench", "floor")?;
    let bench = cargo::release("vmm-bench", "vmm-bench")?;
    Ok(cargo::run(Command::new(bench).args(&options.args).env("VMM_BINARY", vmm))?)
}
