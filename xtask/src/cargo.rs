//! Building with cargo, and running what was built.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// A program that could not be run, or did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It does not start.
    #[error("cannot run {program}")]
    Start {
        /// Which.
        program: String,
        /// What the system answered.
        source: io::Error,
    },
    /// It failed, and has said why.
    #[error("{program} failed")]
    Failed {
        /// Which, with its arguments.
        program: String,
    },
    /// Cargo did not say where it put a program.
    #[error("cargo built no program called {name}")]
    Absent {
        /// The program.
        name: String,
    },
}

/// A test program that cargo built.
#[derive(Debug)]
pub struct TestProgram {
    /// `package` or `package (test name)`.
    pub title: String,
    /// The program.
    pub path: PathBuf,
    /// The directory that its tests expect to run in.
    pub dir: PathBuf,
}

/// Root of the repository.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// Cargo in the root of the repository, with the part of a command line that follows its name.
pub fn cargo<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(args).current_dir(root());
    command
}

/// How `command` was called.
fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Runs `command` and expects it to succeed.
pub fn run(command: &mut Command) -> Result<(), Error> {
    let status = command.status().map_err(|source| Error::Start { program: describe(command), source })?;
    if status.success() { Ok(()) } else { Err(Error::Failed { program: describe(command) }) }
}

/// Runs `command`, which prints JSON messages, and collects them.
fn messages(mut command: Command) -> Result<Vec<Value>, Error> {
    let program = describe(&command);
    let start = |source| Error::Start { program: program.clone(), source };
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(start)?;
    let lines = child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines());
    let messages = lines.map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok()).collect();
    match child.wait() {
        Ok(status) if status.success() => Ok(messages),
        Ok(_) => Err(Error::Failed { program: program.clone() }),
        Err(source) => Err(start(source)),
    }
}

/// Builds program `name` of `package` for release, and says where it is.
pub fn release(package: &str, name: &str) -> Result<PathBuf, Error> {
    let args = [
        "build",
        "--release",
        "--message-format=json-render-diagnostics",
        "--package",
        package,
        "--bin",
        name,
    ];
    messages(cargo(args))?
        .iter()
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str())
        .map(PathBuf::from)
        .ok_or_else(|| Error::Absent { name: name.to_owned() })
}

/// Builds all test programs of the workspace.
pub fn test_programs() -> Result<Vec<TestProgram>, Error> {
    let args = ["test", "--workspace", "--no-run", "--message-format=json-render-diagnostics"];
    let built = messages(cargo(args))?;
    let program = |message: &Value| {
        let path = message["executable"].as_str()?;
        let dir = Path::new(message["manifest_path"].as_str()?).parent()?;
        let package = dir.strip_prefix(root()).unwrap_or(dir).display().to_string();
        let (kind, name) = (message["target"]["kind"][0].as_str()?, message["target"]["name"].as_str()?);
        let title = if kind == "lib" { package } else { format!("{package} ({kind} {name})") };
        Some(TestProgram { title, path: path.into(), dir: dir.to_owned() })
    };
    Ok(built.iter().filter(|message| message["profile"]["test"] == true).filter_map(program).collect())
}
