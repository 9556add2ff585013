//! Programs of the host.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, Result};

/// Where `name` is installed: in `$PATH`, or where Debian keeps programs for administrators.
///
/// # Errors
///
/// [`Error::Missing`] names `package`, which has the program.
pub fn find(name: &str, package: &'static str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .ok_or(Error::Missing { program: name.to_owned(), package })
}

/// Runs `command` and returns its standard output.
///
/// # Errors
///
/// [`Error::Run`] where it does not start, [`Error::Program`] where it fails.
pub fn run(command: &mut Command) -> Result<String> {
    let program = describe(command);
    // Messages are compared and parsed.
    let output = command.env("LC_ALL", "C").output();
    let output = output.map_err(|source| Error::Run { program: program.clone(), source })?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(Error::Program { program, status: output.status.to_string(), stderr });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A command line as one would type it.
pub fn describe(command: &Command) -> String {
    let mut text = Path::new(command.get_program()).display().to_string();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy());
    }
    text
}
