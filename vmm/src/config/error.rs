//! What can be wrong with a configuration.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A position in a file, both counted from 1; columns count characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Line.
    pub line: usize,
    /// Column.
    pub column: usize,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where the value, or else the key or section that it belongs to, stands.
    pub place: Place,
    /// The key with its section (`cpu.count`, `disk.0.path`); empty if the file is no TOML.
    pub key: String,
    /// The value as it stands in the file.
    pub given: Option<String>,
    /// What is wrong, or what would be right.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&*self.key, &self.given) {
            ("", _) => {}
            (key, None) => write!(f, "{key}: ")?,
            (key, Some(given)) => write!(f, "{key} = {given}: ")?,
        }
        f.write_str(&self.message)
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The file is none that could be a configuration.
    #[error("{}: a configuration is a regular file of UTF-8 text, at most {} KiB long", path.display(), super::schema::MAX_LEN >> 10)]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// Something is wrong with what it says.
    #[error("{}", list(path, problems))]
    Problems {
        /// The file.
        path: PathBuf,
        /// In the order of the file; at least one.
        problems: Vec<Problem>,
    },
}

fn list(path: &std::path::Path, problems: &[Problem]) -> String {
    let line = |problem: &Problem| {
        format!("{}:{}:{}: {problem}", path.display(), problem.place.line, problem.place.column)
    };
    problems.iter().map(line).collect::<Vec<_>>().join("\n")
}
