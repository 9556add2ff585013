//! The command line: what the user asked for, done, and the one place where errors are printed and exit statuses chosen.

mod args;
mod attendant;
mod disk;
mod guests;
mod image;
mod log;
mod process;
mod run;

use std::error::Error;
use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use args::{Asked, Verb};

/// Exit status of a wrong command line or configuration.
const USAGE: u8 = 2;

/// Why a command did not do what it was asked for.
#[derive(Debug)]
enum Failure {
    /// An error, and the exit status that it leads to.
    Error(Box<dyn Error>, u8),
    /// It has been said already.
    Told(u8),
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Error(Box::new(error), 1)
    }
}

/// Runs the command line `args`, the program's name first.
#[must_use]
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let asked = match args::parse(args) {
        Ok(asked) => asked,
        Err(error) => {
            // Nothing can be done if it cannot be printed.
            error.print().unwrap_or_default();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE));
        }
    };
    match carry_out(asked) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Told(status)) => ExitCode::from(status),
        // Whoever reads the output has enough, as in `vmm ps | head -1`.
        Err(Failure::Error(error, _)) if is_closed_pipe(&*error) => ExitCode::SUCCESS,
        Err(Failure::Error(error, status)) => {
            report(&*error);
            ExitCode::from(status)
        }
    }
}

fn carry_out(asked: Asked) -> Result<(), Failure> {
    let Asked { verbosity, log, verb } = asked;
    log::start(verbosity, log.as_deref()).map_err(|error| Failure::Error(Box::new(error), USAGE))?;
    match verb {
        Verb::Run { config, at_power_off } => run::run(&config, at_power_off),
        Verb::Ps { json } => guests::ps(json),
        Verb::Show { name, json } => guests::show(&name, json),
        Verb::Pause { name } => guests::pause(&name),
        Verb::Resume { name } => guests::resume(&name),
        Verb::Stop { name, timeout, now } => guests::stop(&name, timeout, now),
        Verb::Kill { name } => guests::kill(&name),
        Verb::Disk(verb) => disk::carry_out(verb),
        Verb::Image(verb) => image::carry_out(verb),
        Verb::Doctor { json } => doctor(json),
        Verb::Completions { shell } => Ok(args::completions(shell)?),
    }
}

fn doctor(json: bool) -> Result<(), Failure> {
    let report = crate::doctor::examine();
    if json {
        print_json(&report)?;
    } else {
        writeln!(io::stdout(), "{report}")?;
    }
    if report.can_run_guests() { Ok(()) } else { Err(Failure::Told(1)) }
}

fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value)?;
    Ok(writeln!(io::stdout(), "{text}")?)
}

/// Prints an error with its chain. A cause that its effect's message repeats is left out.
fn report(error: &dyn Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let message = error.to_string();
        if !text.ends_with(&message) {
            text = format!("{text}: {message}");
        }
        cause = error.source();
    }
    log::say(&format!("vmm: {text}"));
}

fn is_closed_pipe(error: &(dyn Error + 'static)) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
