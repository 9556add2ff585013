//! Programs of this source tree, built when they are needed, so that none that is run is older than its source.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::packages::workspace;
use crate::program::{describe, run};
use crate::{Error, Result};

/// Builds the program `name` of `package` in the way this crate was built, debug or release, and returns where it is.
///
/// # Errors
///
/// [`Error::Program`] with what the compiler says.
pub fn binary(package: &str, name: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace()).args([
        "build",
        "--message-format=json-render-diagnostics",
        "--package",
        package,
    ]);
    cargo.args(["--bin", name]);
    if !cfg!(debug_assertions) {
        cargo.arg("--release");
    }
    let messages = run(&mut cargo)?;
    executable(&messages, name).ok_or_else(|| Error::Program {
        program: describe(&cargo),
        status: "success".to_owned(),
        stderr: "it names no executable file".to_owned(),
    })
}

/// The executable file of program `name` among cargo's messages.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()).find_map(|message| {
        let matches = message["target"]["name"] == name;
        message["executable"].as_str().filter(|_| matches).map(PathBuf::from)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executable_is_found_among_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}
not json
{"reason":"compiler-artifact","target":{"name":"vmm"},"executable":"/t/debug/vmm"}"#;
        assert_eq!(executable(messages, "vmm"), Some(PathBuf::from("/t/debug/vmm")));
        assert_eq!(executable(messages, "libc"), None);
    }
}
