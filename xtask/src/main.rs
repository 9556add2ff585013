//! Commands of the repository: `cargo xtask demo`, `test` and `bench`. They do all set-up themselves.

mod bench;
mod cargo;
mod needs;
mod results;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Commands of the vmm repository")]
struct Line {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run all tests: unit, property, local KVM and nested, installing what they need
    Test(test::Options),
    /// Measure vmm beside its peers
    Bench(bench::Options),
}

/// A task that failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// A build, or a program that a task consists of.
    #[error(transparent)]
    Cargo(#[from] cargo::Error),
    /// Tests failed; they are listed already.
    #[error("{0} tests failed")]
    Tests(usize),
    /// A requirement of a test that this program cannot check.
    #[error("{test} needs {need:?}, which is none of the requirements known: {}", needs::known().join(", "))]
    UnknownNeed {
        /// The test.
        test: String,
        /// What it says it needs.
        need: String,
    },
}

fn main() -> ExitCode {
    let outcome = match Line::parse().task {
        Task::Test(options) => test::run(&options),
        Task::Bench(options) => bench::run(&options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            eprintln!("xtask: {text}");
            ExitCode::FAILURE
        }
    }
}
