//! What can go wrong while guests are prepared and driven.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// An error of this crate.
#[derive(thiserror::Error)]
pub enum Error {
    /// A program that is needed is not installed.
    #[error("{program} is not installed; install Debian's package {package}")]
    Missing {
        /// The program.
        program: String,
        /// The Debian package with it.
        package: &'static str,
    },
    /// Packages are missing and may not be installed by this user.
    #[error("missing packages; run as root: apt-get install {}", packages.join(" "))]
    Packages {
        /// What to install.
        packages: Vec<&'static str>,
    },
    /// The archive does not have what is looked for.
    #[error(
        "no package {name} in apt's lists; the archive must be Debian's, and apt-get update must have been run"
    )]
    Archive {
        /// What was looked for.
        name: String,
    },
    /// A program said that it failed.
    #[error("{program} failed ({status}): {stderr}")]
    Program {
        /// The program with its arguments.
        program: String,
        /// How it ended.
        status: String,
        /// What it wrote to standard error.
        stderr: String,
    },
    /// A program did not start.
    #[error("cannot run {program}")]
    Run {
        /// The program with its arguments.
        program: String,
        /// What the system answered.
        source: io::Error,
    },
    /// A file could not be read, written or made.
    #[error("cannot {action} {}", path.display())]
    File {
        /// Read, write, create, …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A kernel module that neither exists nor is built in.
    #[error("kernel {release} has no module {name}")]
    Module {
        /// Version of the kernel.
        release: String,
        /// The module.
        name: String,
    },
    /// The emulated host, or a program on a console, did not do something in time.
    #[error("no {what} within {} s\n{tail}", deadline.as_secs())]
    Deadline {
        /// What was waited for.
        what: String,
        /// How long.
        deadline: Duration,
        /// The end of what was seen instead.
        tail: String,
    },
    /// The emulated host or a program ended while something was expected of it.
    #[error("{who} ended while {what} was expected\n{tail}")]
    Gone {
        /// Who ended.
        who: String,
        /// What was expected.
        what: String,
        /// The end of what it wrote.
        tail: String,
    },
    /// The connection to the emulated host broke, or makes no sense.
    #[error("talking to the emulated host")]
    Channel(#[source] io::Error),
    /// The agent in the emulated host refused a command.
    #[error("the emulated host refuses: {0}")]
    Refused(String),
    /// A command in a guest or in the emulated host failed.
    #[error("{command:?} ended with {status}: {output}")]
    Command {
        /// The command.
        command: String,
        /// How it ended.
        status: String,
        /// What it wrote.
        output: String,
    },
    /// A guest did something else than it should.
    #[error("{what}: expected {expected}, found {found}")]
    Unexpected {
        /// What was looked at.
        what: String,
        /// What would be right.
        expected: String,
        /// What it is.
        found: String,
    },
}

/// A result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// For `map_err` on what is done to a file.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }
}

/// The error with all its causes, as text: consoles are quoted in it, and shall be readable where a test fails.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
