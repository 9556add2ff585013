//! A disk that guests get clones of.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::program::run;
use crate::{Error, Result};

/// The disk as it was made, which the template was converted from.
pub const ORIGINAL: &str = "root.ext4";
/// The disk that is cloned.
pub const TEMPLATE: &str = "template.img";
/// The clone.
pub const CLONE: &str = "demo.img";

/// What was done, as somebody at a terminal would have seen it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What was typed.
    pub command: String,
    /// What it said.
    pub output: String,
    /// How long it took.
    pub took: Duration,
}

/// Makes a template of [`ORIGINAL`] in the directory `dir`, and a clone of that, with the monitor's program `vmm`.
/// Those that were there are replaced.
///
/// # Errors
///
/// [`Error::File`] where what was there cannot be removed, and what the program says.
pub fn make(vmm: &Path, dir: &Path) -> Result<Vec<Step>> {
    // The clone first: its template stays as long as there is one.
    for name in [CLONE, TEMPLATE] {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::file("remove", &path)(error));
            }
            _ => {}
        }
    }
    let steps: [&[&str]; 2] =
        [&["convert", ORIGINAL, TEMPLATE, "--format", "thin"], &["clone", TEMPLATE, CLONE]];
    steps.into_iter().map(|args| step(vmm, dir, args)).collect()
}

fn step(vmm: &Path, dir: &Path, args: &[&str]) -> Result<Step> {
    let mut command = Command::new(vmm);
    command.arg("image").args(args).current_dir(dir);
    let started = Instant::now();
    let output = run(&mut command)?.trim().to_owned();
    let took = started.elapsed();
    Ok(Step { command: format!("vmm image {}", args.join(" ")), output, took })
}

/// The files that a guest needs to boot from the clone, with the names that they have beside each other.
#[must_use]
pub fn files(dir: &Path) -> Vec<(String, PathBuf)> {
    [ORIGINAL, TEMPLATE, CLONE].map(|name| (name.to_owned(), dir.join(name))).into()
}
