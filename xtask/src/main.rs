//! Commands of the repository: `cargo xtask demo`, `test` and `bench`. They do all set-up themselves.

mod bench;
mod cargo;
mod demo;
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
    /// Boot stock Linux in the monitor, here or in an emulated host
    Demo(demo::Options),
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
    /// The guest in the emulated host, or the host itself.
    #[error(transparent)]
    Nested(#[from] vmm_nested::Error),
    /// The test guest, or its monitor.
    #[error(transparent)]
    Guest(#[from] vmm_tests::guest::Error),
    /// The test guest does not do what it should.
    #[error("the test guest reports {result}, and its monitor ended with {status}")]
    TestGuest {
        /// The guest's own words.
        result: String,
        /// How the monitor ended.
        status: std::process::ExitStatus,
    },
    /// Tests failed; they are listed already.
    #[error("{0} tests failed")]
    Tests(usize),
}

fn main() -> ExitCode {
    let outcome = match Line::parse().task {
        Task::Demo(options) => demo::run(&options),
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
