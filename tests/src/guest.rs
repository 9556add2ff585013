//! Runs the test guest (`tests/guest`) and listens to what it reports.
//!
//! ```no_run
//! # fn main() -> Result<(), vmm_tests::guest::Error> {
//! use vmm_tests::guest::Setup;
//!
//! let setup = Setup::new("test=cpu seconds=1")?.with("[memory]\nsize = \"64M\"\n");
//! let mut guest = setup.start()?;
//! let result = guest.wait_event("result")?;
//! assert!(result["loops"].as_u64() > Some(0));
//! assert!(guest.exit_status()?.success());
//! # Ok(())
//! # }
//! ```
//!
//! Everything a guest leaves behind lies in a temporary directory, its run directory (`VMM_RUN_DIR`) included, and goes
//! with the last guest of that directory. Guests are killed when they are dropped.
//!
//! Environment: `VMM_BINARY` names the monitor to test (else it is the one built beside the test's own binary),
//! `VMM_TEST_GUEST` a test guest that is built already (else cargo builds it).

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// How long a guest may take for what is waited for, unless it is told otherwise.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// A build that takes longer is announced.
const SLOW_BUILD: Duration = Duration::from_secs(3);
const POLL: Duration = Duration::from_millis(5);
/// How long an ended monitor's output is waited for: somebody else may hold the other end open.
const SETTLE: Duration = Duration::from_secs(1);

/// A test guest that cannot be made, started, or understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest cannot be built.
    #[error("cannot build the test guest: {0}")]
    Build(String),
    /// There is no monitor to test.
    #[error("found no vmm binary beside {beside}; build it (cargo build -p vmm) or name it in VMM_BINARY")]
    NoBinary {
        /// The test's own binary.
        beside: PathBuf,
    },
    /// A file or process cannot be handled.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: String,
        /// What the system answered.
        source: io::Error,
    },
    /// The guest reported an error.
    #[error("the guest reports an error: {message}\n{transcript}")]
    Guest {
        /// The event.
        message: String,
        /// What guest and monitor had written up to then.
        transcript: String,
    },
    /// What was waited for did not come.
    #[error("{wanted} did not come {until}\n{transcript}")]
    Missing {
        /// What was waited for.
        wanted: String,
        /// When the waiting ended.
        until: String,
        /// What guest and monitor had written up to then.
        transcript: String,
    },
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let action = action.into();
    |source| Error::Io { action, source }
}

/// The test guest, an ELF file; built by cargo when it is asked for the first time in this process.
///
/// # Errors
///
/// [`Error::Build`].
pub fn elf() -> Result<PathBuf, Error> {
    static ELF: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    ELF.get_or_init(build).clone().map_err(Error::Build)
}

fn build() -> Result<PathBuf, String> {
    if let Some(path) = env::var_os("VMM_TEST_GUEST") {
        return Ok(path.into());
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guest");
    let target = source.join("target");
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--release", "--offline", "--locked", "--target-dir"]).arg(&target);
    // Run there, it reads the guest's own flags; those of the caller's build are not for it.
    cargo.current_dir(&source).stdin(Stdio::null());
    for (name, _) in env::vars_os().filter(|(name, _)| is_build_setting(name)) {
        cargo.env_remove(name);
    }
    let (done, waiting) = mpsc::channel::<()>();
    let announcer = thread::spawn(move || {
        if waiting.recv_timeout(SLOW_BUILD) == Err(RecvTimeoutError::Timeout) {
            eprintln!("building the test guest …");
        }
    });
    let output = cargo.output().map_err(|error| format!("cannot run cargo: {error}"));
    drop(done);
    // It does nothing that could panic but for writing to a closed stderr.
    announcer.join().unwrap_or_default();
    let output = output?;
    if !output.status.success() {
        return Err(format!(
            "cargo ended with {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ));
    }
    Ok(target.join("x86_64-unknown-linux-gnu/release/guest"))
}

/// Whether the environment variable `name` changes how cargo builds.
fn is_build_setting(name: &OsStr) -> bool {
    const NAMES: [&str; 4] =
        ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "RUSTC_WORKSPACE_WRAPPER", "RUSTC_WRAPPER"];
    const PREFIXES: [&str; 3] = ["CARGO_BUILD_", "CARGO_TARGET_", "CARGO_PROFILE_"];
    let name = name.to_string_lossy();
    NAMES.contains(&name.as_ref()) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// The monitor to test: `VMM_BINARY`, else `vmm` in the directory that cargo builds this test in, or beside it in that
/// of the other profile.
///
/// # Errors
///
/// [`Error::NoBinary`].
pub fn vmm_binary() -> Result<PathBuf, Error> {
    if let Some(path) = env::var_os("VMM_BINARY") {
        return Ok(path.into());
    }
    let beside = env::current_exe().map_err(io_error("find this test's own binary"))?;
    // …/<target>/<profile>/deps/<test>: the profile's own binary comes before the other's.
    let found = beside.ancestors().skip(1).take(3).find_map(|directory| {
        let places = ["vmm", "release/vmm", "debug/vmm"];
        places.iter().map(|place| directory.join(place)).find(|path| path.is_file())
    });
    found.ok_or(Error::NoBinary { beside })
}

/// A guest that is yet to be started.
#[derive(Debug, Clone)]
pub struct Setup {
    dir: Arc<TempDir>,
    name: String,
    boot: String,
    config: String,
    arguments: Vec<String>,
    monitor: Option<PathBuf>,
    deadline: Duration,
}

impl Setup {
    /// A guest with the command line `cmdline`, a temporary directory of its own, and otherwise the monitor's defaults.
    ///
    /// # Errors
    ///
    /// The guest cannot be built or the directory cannot be created.
    pub fn new(cmdline: &str) -> Result<Self, Error> {
        let dir = TempDir::with_prefix("vmm-test-").map_err(io_error("create a temporary directory"))?;
        Self::within(Arc::new(dir), cmdline)
    }

    /// A guest that shares the directory, and so the run directory, of this one.
    ///
    /// # Errors
    ///
    /// The guest cannot be built.
    pub fn beside(&self, cmdline: &str) -> Result<Self, Error> {
        Self::within(self.dir.clone(), cmdline)
    }

    fn within(dir: Arc<TempDir>, cmdline: &str) -> Result<Self, Error> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("guest{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let kernel = elf()?;
        let boot = format!(
            "[boot]\nkernel = {}\ncmdline = {}\n",
            quoted(&kernel.to_string_lossy()),
            quoted(cmdline)
        );
        Ok(Self {
            dir,
            name,
            boot,
            config: String::new(),
            arguments: Vec::new(),
            monitor: None,
            deadline: DEADLINE,
        })
    }

    /// Appends sections to the guest's `vm.toml`, which has `name` and `[boot]` already. Paths in it are relative
    /// to [`dir`](Self::dir).
    #[must_use]
    pub fn with(mut self, config: &str) -> Self {
        self.config.push_str(config);
        self.config.push('\n');
        self
    }

    /// Adds a key that belongs to no section, such as `rng = false`.
    #[must_use]
    pub fn with_top(mut self, key: &str) -> Self {
        self.boot = format!("{key}\n{}", self.boot);
        self
    }

    /// Replaces the section `[boot]`, and what was put before it.
    #[must_use]
    pub fn with_boot(mut self, config: &str) -> Self {
        self.boot = format!("[boot]\n{config}\n");
        self
    }

    /// Runs the guest with the monitor at `path` instead of the one that [`vmm_binary`] finds.
    #[must_use]
    pub fn monitor(mut self, path: &Path) -> Self {
        self.monitor = Some(path.to_owned());
        self
    }

    /// Adds an argument of the monitor's.
    #[must_use]
    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Sets how long the guest may take for each thing that is waited for (default [`DEADLINE`]).
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Directory of the guest's files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The guest's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs the monitor with the guest's configuration.
    ///
    /// # Errors
    ///
    /// There is no monitor, or it cannot be started.
    pub fn start(self) -> Result<Guest, Error> {
        let file = self.dir().join(format!("{}.toml", self.name));
        let text = format!("name = {}\n{}\n{}", quoted(&self.name), self.boot, self.config);
        fs::write(&file, text).map_err(io_error(format!("write {}", file.display())))?;
        let mut command = match &self.monitor {
            Some(monitor) => within_run_dir(monitor, &self.dir),
            None => vmm(&self.dir)?,
        };
        command.arg("--config").arg(file).args(&self.arguments);
        Guest::spawn(command, self.name, self.dir, self.deadline)
    }
}

/// The monitor's command with its run directory in `dir`.
fn vmm(dir: &TempDir) -> Result<Command, Error> {
    Ok(within_run_dir(&vmm_binary()?, dir))
}

fn within_run_dir(monitor: &Path, dir: &TempDir) -> Command {
    let mut command = Command::new(monitor);
    command.env("VMM_RUN_DIR", dir.path().join("run"));
    command
}

/// `text` as a string of TOML.
fn quoted(text: &str) -> String {
    // JSON's escapes are TOML's.
    Value::from(text).to_string()
}

/// A guest that runs, or has run.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
    seen: Vec<String>,
    log: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
    name: String,
    dir: Arc<TempDir>,
    deadline: Duration,
}

impl Guest {
    /// Runs `command`, whose standard output is a guest's serial port: any monitor's.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn spawn(
        mut command: Command,
        name: String,
        dir: Arc<TempDir>,
        deadline: Duration,
    ) -> Result<Self, Error> {
        command.current_dir(dir.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let program = command.get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().map_err(io_error(format!("run {program}")))?;
        let stdin = child.stdin.take();
        let (sender, lines) = mpsc::channel();
        let log = Arc::new(Mutex::new(String::new()));
        let mut readers = Vec::new();
        if let Some(stdout) = child.stdout.take() {
            readers.push(thread::spawn(move || {
                let mut reader = BufReader::new(stdout);
                let mut line = Vec::new();
                while reader.read_until(b'\n', &mut line).is_ok_and(|len| len > 0) {
                    let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
                    if sender.send(text).is_err() {
                        break;
                    }
                    line.clear();
                }
            }));
        }
        if let Some(mut stderr) = child.stderr.take() {
            let log = log.clone();
            readers.push(thread::spawn(move || {
                let mut part = [0; 4096];
                while let Ok(len @ 1..) = stderr.read(&mut part) {
                    let text = String::from_utf8_lossy(&part[..len]).into_owned();
                    log.lock().unwrap_or_else(PoisonError::into_inner).push_str(&text);
                }
            }));
        }
        Ok(Self { child, stdin, lines, seen: Vec::new(), log, readers, name, dir, deadline })
    }

    /// The guest's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Process of the monitor.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Directory of the guest's files.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Run directory of the monitor.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.dir().join("run")
    }

    /// What the monitor has written to standard error so far.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the guest has written, as far as it was waited for, and the monitor's log.
    #[must_use]
    pub fn transcript(&self) -> String {
        format!("--- guest {}:\n{}\n--- monitor:\n{}", self.name, self.seen.join("\n"), self.log())
    }

    /// Sends `input` to the guest's serial port.
    ///
    /// # Errors
    ///
    /// The monitor does not take it.
    pub fn send(&mut self, input: &[u8]) -> Result<(), Error> {
        let action = "write to the guest's serial port";
        let Some(stdin) = &mut self.stdin else {
            return Err(io_error(action)(io::ErrorKind::BrokenPipe.into()));
        };
        stdin.write_all(input).and_then(|()| stdin.flush()).map_err(io_error(action))
    }

    /// Runs another command of the monitor (`["pause", name]`) on this guest's run directory.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn vmm(&self, arguments: &[&str]) -> Result<Output, Error> {
        let action = format!("run vmm {}", arguments.join(" "));
        vmm(&self.dir)?.args(arguments).stdin(Stdio::null()).output().map_err(io_error(action))
    }

    /// The next line of the guest, whatever it is.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`].
    pub fn next_line(&mut self) -> Result<String, Error> {
        let until = Instant::now() + self.deadline;
        self.line_until("a line of output", until)
    }

    fn line_until(&mut self, wanted: &str, until: Instant) -> Result<String, Error> {
        let ended = match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(line) => {
                self.seen.push(line.clone());
                return Ok(line);
            }
            Err(RecvTimeoutError::Timeout) => format!("within {:?}", self.deadline),
            Err(RecvTimeoutError::Disconnected) => match self.wait_for_exit(until) {
                Ok(Some(status)) => format!("before the monitor ended with {status}"),
                _ => "before the monitor closed its output".to_owned(),
            },
        };
        Err(Error::Missing { wanted: wanted.to_owned(), until: ended, transcript: self.transcript() })
    }

    /// Waits for a line that `is_wanted`.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], which calls the line `wanted`.
    pub fn wait_line(&mut self, wanted: &str, is_wanted: impl Fn(&str) -> bool) -> Result<String, Error> {
        let until = Instant::now() + self.deadline;
        loop {
            let line = self.line_until(wanted, until)?;
            if is_wanted(&line) {
                return Ok(line);
            }
        }
    }

    /// Waits for the guest to report `event`.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`], or [`Error::Guest`] if an error is reported instead.
    pub fn wait_event(&mut self, event: &str) -> Result<Value, Error> {
        let until = Instant::now() + self.deadline;
        loop {
            let line = self.line_until(&format!("the event {event:?}"), until)?;
            let Ok(value) = serde_json::from_str::<Value>(&line) else { continue };
            match value["event"].as_str() {
                Some(name) if name == event => return Ok(value),
                Some("error") => {
                    // What follows may say more; it ends with the guest.
                    return Err(Error::Guest { message: line, transcript: self.transcript() });
                }
                _ => {}
            }
        }
    }

    /// Waits for the monitor to end.
    ///
    /// # Errors
    ///
    /// It does not, within the deadline.
    pub fn exit_status(&mut self) -> Result<ExitStatus, Error> {
        let ended = self.wait_for_exit(Instant::now() + self.deadline)?;
        self.seen.extend(self.lines.try_iter());
        ended.ok_or_else(|| Error::Missing {
            wanted: "the monitor's end".to_owned(),
            until: format!("within {:?}", self.deadline),
            transcript: self.transcript(),
        })
    }

    fn wait_for_exit(&mut self, until: Instant) -> Result<Option<ExitStatus>, Error> {
        loop {
            let ended = self.child.try_wait().map_err(io_error("wait for the monitor"))?;
            if ended.is_some() {
                self.settle();
            }
            if ended.is_some() || Instant::now() >= until {
                return Ok(ended);
            }
            thread::sleep(POLL);
        }
    }

    /// Lets what an ended monitor has written come in.
    fn settle(&self) {
        let until = Instant::now() + SETTLE;
        while !self.readers.iter().all(JoinHandle::is_finished) && Instant::now() < until {
            thread::sleep(POLL);
        }
    }

    /// Kills the monitor, which is given no chance to clean up.
    ///
    /// # Errors
    ///
    /// The system does not let us.
    pub fn kill(&mut self) -> Result<(), Error> {
        self.child.kill().and_then(|()| self.child.wait()).map(drop).map_err(io_error("kill the monitor"))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may be dead already; then there is nothing to do.
        self.kill().unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Guest {
        let dir = Arc::new(TempDir::new().unwrap());
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Guest::spawn(command, "shell".to_owned(), dir, Duration::from_secs(20)).unwrap()
    }

    #[test]
    fn guest_is_an_elf_with_a_pvh_note() {
        let elf = fs::read(elf().unwrap()).unwrap();
        assert_eq!(&elf[..4], b"\x7fELF");
        let note = [4_u32, 8, 18].map(u32::to_le_bytes).concat();
        assert!(elf.windows(note.len() + 4).any(|w| w.starts_with(&note) && w.ends_with(b"Xen\0")));
    }

    #[test]
    fn event_is_found_among_other_lines() {
        let mut guest = shell(r#"echo noise; echo '{"event":"hello"}'; echo '{"event":"result","n":7}'"#);
        assert_eq!(guest.wait_event("result").unwrap()["n"], 7);
        assert!(guest.exit_status().unwrap().success());
    }

    #[test]
    fn error_of_the_guest_is_not_waited_past() {
        let mut guest = shell(r#"echo '{"event":"error","message":"no disk"}'; exec sleep 100"#);
        let error = guest.wait_event("result").unwrap_err();
        assert!(matches!(&error, Error::Guest { message, .. } if message.contains("no disk")), "{error}");
    }

    #[test]
    fn monitor_that_ends_early_is_reported_with_its_log() {
        let mut guest = shell("echo why >&2; exit 3");
        let error = guest.wait_event("result").unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.contains("why"), "{error}");
    }

    #[test]
    fn input_reaches_the_guest() {
        let mut guest = shell("read line; echo got $line");
        guest.send(b"this\n").unwrap();
        guest.wait_line("the answer", |line| line == "got this").unwrap();
    }

    #[test]
    fn dropped_guest_is_dead() {
        let guest = shell("exec sleep 100");
        let process = PathBuf::from(format!("/proc/{}", guest.pid()));
        assert!(process.exists());
        drop(guest);
        assert!(!process.exists());
    }

    #[test]
    fn settings_of_the_callers_build_are_told_from_others() {
        let is = |name: &str| is_build_setting(OsStr::new(name));
        assert!(is("RUSTFLAGS") && is("CARGO_TARGET_DIR") && is("CARGO_BUILD_TARGET"));
        assert!(!is("CARGO_HOME") && !is("PATH") && !is("RUSTUP_TOOLCHAIN"));
    }
}
