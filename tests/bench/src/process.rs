//! A monitor while it runs: its output against the clock, its processes, its end.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::cpu::Times;
use crate::smaps;

/// Longest wait for a line of the guest.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// Longest wait for a monitor to come to rest.
const SETTLING: Duration = Duration::from_secs(2);
/// Time without a context switch that counts as rest.
const REST: Duration = Duration::from_millis(20);

/// A run that came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// Its output ended before the guest said what was waited for.
    #[error("ended with {status} before the guest's line; output: {output:?}; errors: {errors:?}")]
    Ended {
        /// How it ended.
        status: ExitStatus,
        /// What was on standard output.
        output: String,
        /// The end of standard error.
        errors: String,
    },
    /// The guest is silent.
    #[error("no line from the guest in {} s; output: {output:?}; errors: {errors:?}", patience.as_secs())]
    Silent {
        /// How long it was waited for.
        patience: Duration,
        /// What was on standard output.
        output: String,
        /// The end of standard error.
        errors: String,
    },
    /// The guest's line is not a JSON object.
    #[error("the guest's line is not a JSON object: {line:?}")]
    Line {
        /// The line.
        line: String,
    },
    /// The host does not tell.
    #[error("cannot read {path}: {source}")]
    Proc {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The memory of one process is not understood.
    #[error("process {pid}: {source}")]
    Smaps {
        /// The process.
        pid: u32,
        /// What is not understood.
        source: smaps::Error,
    },
}

/// A monitor with a guest in it. Killed when dropped, with all its children.
#[derive(Debug)]
pub struct Running {
    child: Child,
    output: ChildStdout,
    errors: std::path::PathBuf,
    started: Instant,
    /// Output that was not given out yet.
    text: Vec<u8>,
}

/// A line of the guest and when it began.
#[derive(Debug)]
pub struct FirstLine {
    /// From just before the process was started to the arrival of the line's first byte.
    pub after: Duration,
    /// The line, a JSON object.
    pub line: serde_json::Value,
}

impl Running {
    /// Starts `command` with nothing to read, a pipe for what it prints, and its errors in a file in `dir`.
    ///
    /// # Errors
    ///
    /// [`Error::Start`].
    pub fn start(mut command: Command, dir: &Path) -> Result<Self, Error> {
        let program = command.get_program().to_string_lossy().into_owned();
        let failed = |source| Error::Start { program: program.clone(), source };
        let errors = dir.join("stderr");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(File::create(&errors).map_err(failed)?);
        let started = Instant::now();
        let mut child = command.spawn().map_err(failed)?;
        let output = child.stdout.take().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        Ok(Running { child, output, errors, started, text: Vec::new() })
    }

    /// Waits for the guest's first line: the first on standard output that begins with a brace. (What some monitors
    /// print there themselves does not.)
    ///
    /// # Errors
    ///
    /// [`Error::Ended`], [`Error::Silent`] or [`Error::Line`].
    pub fn first_line(&mut self) -> Result<FirstLine, Error> {
        self.next_line(PATIENCE)
    }

    /// Waits at most `patience` for the guest's next line, as [`first_line`](Self::first_line) does for the first.
    ///
    /// # Errors
    ///
    /// As of `first_line`.
    pub fn next_line(&mut self, patience: Duration) -> Result<FirstLine, Error> {
        let mut first = None;
        let deadline = Instant::now() + patience;
        loop {
            first = first.or_else(|| line_start(&self.text).map(|at| (at, Instant::now())));
            if let Some((at, when)) = first
                && let Some(length) = self.text[at..].iter().position(|byte| *byte == b'\n')
            {
                let line: Vec<u8> = self.text.drain(..=at + length).skip(at).collect();
                let line = serde_json::from_slice(&line)
                    .map_err(|_| Error::Line { line: lossy(&line).trim_end().to_owned() })?;
                return Ok(FirstLine { after: when - self.started, line });
            }
            let mut chunk = [0; 512];
            match self.read(&mut chunk, deadline) {
                Ok(0) => return Err(self.ended()),
                Ok(length) => self.text.extend_from_slice(&chunk[..length]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    let output = lossy(&self.text);
                    return Err(Error::Silent { patience, output, errors: self.errors() });
                }
            }
        }
    }

    /// Processor time so far of all threads of the process and its children.
    ///
    /// # Errors
    ///
    /// [`Error::Proc`].
    pub fn processor_time(&self) -> Result<Times, Error> {
        Ok(Times::of(&tree(self.child.id())?))
    }

    fn read(&mut self, chunk: &mut [u8], deadline: Instant) -> io::Result<usize> {
        wait_readable(&self.output, deadline.saturating_duration_since(Instant::now()))?;
        self.output.read(chunk)
    }

    fn ended(&mut self) -> Error {
        match self.child.wait() {
            Ok(status) => Error::Ended { status, output: lossy(&self.text), errors: self.errors() },
            Err(source) => Error::Proc { path: format!("the status of process {}", self.child.id()), source },
        }
    }

    fn errors(&self) -> String {
        let text = fs::read(&self.errors).unwrap_or_default();
        lossy(&text[text.len().saturating_sub(400)..])
    }

    /// Pss in KiB of the process and all its children, guest memory of `guest_size` bytes left out, once they have come
    /// to rest.
    ///
    /// # Errors
    ///
    /// [`Error::Proc`] or [`Error::Smaps`].
    pub fn memory_beside_guest(&self, guest_size: u64) -> Result<u64, Error> {
        let pids = tree(self.child.id())?;
        settle(&pids);
        let mut sum = 0;
        let mut missing = None;
        let mut found = false;
        for pid in pids {
            let mappings = smaps::parse(&read(&format!("/proc/{pid}/smaps"))?)
                .map_err(|source| Error::Smaps { pid, source })?;
            match smaps::beside_guest(&mappings, guest_size) {
                Ok(kib) => (sum, found) = (sum + kib, true),
                // A helper process need not have the guest's memory.
                Err(source) => {
                    sum += smaps::total(&mappings);
                    missing = missing.or(Some(Error::Smaps { pid, source }));
                }
            }
        }
        match missing {
            Some(error) if !found => Err(error),
            _ => Ok(sum),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let root = self.child.id();
        let descendants = tree(root).unwrap_or_default().into_iter().filter(|pid| *pid != root);
        let descendants: Vec<OwnedFd> = descendants.filter_map(open).collect();
        let _ = self.child.kill();
        for process in &descendants {
            // SAFETY: the descriptor is open, and no signal information is passed.
            unsafe {
                libc::syscall(
                    libc::SYS_pidfd_send_signal,
                    process.as_raw_fd(),
                    libc::SIGKILL,
                    std::ptr::null::<u8>(),
                    0,
                );
            }
        }
        let _ = self.child.wait();
        // The next run begins when nothing is left of this one.
        for process in &descendants {
            let _ = wait_readable(process, SETTLING);
        }
    }
}

/// A descriptor of the process, readable once it has ended (pidfd_open(2)); `None` if it is gone.
fn open(pid: u32) -> Option<OwnedFd> {
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: it was just opened and belongs to nobody else.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Waits until `fd` is readable or at its end.
fn wait_readable(fd: &impl AsRawFd, patience: Duration) -> io::Result<()> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let timeout = i32::try_from(patience.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one pollfd is passed, and it outlives the call.
    match unsafe { libc::poll(&raw mut poll, 1, timeout) } {
        0 => Err(io::ErrorKind::TimedOut.into()),
        1.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Where the first line begins that starts with a brace.
fn line_start(text: &[u8]) -> Option<usize> {
    (0..text.len()).find(|at| text[*at] == b'{' && (*at == 0 || matches!(text[at - 1], b'\n' | b'\r')))
}

fn lossy(text: &[u8]) -> String {
    String::from_utf8_lossy(text).into_owned()
}

fn read(path: &str) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Proc { path: path.to_owned(), source })
}

/// The process and its descendants.
fn tree(root: u32) -> Result<Vec<u32>, Error> {
    let failed = |source| Error::Proc { path: "/proc".to_owned(), source };
    let mut children: HashMap<u32, Vec<u32>> = HashMap::new();
    for entry in fs::read_dir("/proc").map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may be gone by now.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        if let Some(parent) = parent(&stat) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while next < found.len() {
        found.extend(children.remove(&found[next]).unwrap_or_default());
        next += 1;
    }
    Ok(found)
}

/// `pid (name, which may hold anything) state parent …`
fn parent(stat: &str) -> Option<u32> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(1)?.parse().ok()
}

/// Waits until no thread of these processes runs or has run for a while; not for ever.
fn settle(pids: &[u32]) {
    let deadline = Instant::now() + SETTLING;
    let mut last = None;
    while Instant::now() < deadline {
        let now = activity(pids);
        if now.is_some() && now == last {
            return;
        }
        last = now;
        std::thread::sleep(REST);
    }
}

/// Number of context switches so far; `None` while a thread is running.
fn activity(pids: &[u32]) -> Option<u64> {
    let mut switches = 0;
    for pid in pids {
        for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
            let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
            for line in status.lines() {
                match line.split_once(':') {
                    Some(("State", state)) if state.trim_start().starts_with('R') => return None,
                    Some(("voluntary_ctxt_switches" | "nonvoluntary_ctxt_switches", count)) => {
                        switches += count.trim().parse::<u64>().ok()?;
                    }
                    _ => {}
                }
            }
        }
    }
    Some(switches)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (tempfile::TempDir, Running) {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.arg("-c").arg(script);
        let running = Running::start(command, dir.path()).unwrap();
        (dir, running)
    }

    #[test]
    fn first_line_is_found_behind_what_the_monitor_prints() {
        let (_dir, mut running) =
            shell(r#"echo 'version {1}'; printf '{"event":'; echo '"hello"}'; exec sleep 600"#);
        let first = running.first_line().unwrap();
        assert_eq!(first.line["event"], "hello");
        assert!(first.after > Duration::ZERO);
    }

    #[test]
    fn lines_come_one_after_another_whatever_lies_between() {
        let (_dir, mut running) = shell(r#"printf '{"n":1}\n{"n":2}\nnoise\n{"n":3}\n'; exec sleep 600"#);
        for n in 1..=3 {
            assert_eq!(running.next_line(PATIENCE).unwrap().line["n"], n);
        }
        assert!(matches!(running.next_line(Duration::from_millis(1)), Err(Error::Silent { .. })));
    }

    #[test]
    fn monitor_that_ends_is_reported_with_status_output_and_errors() {
        let (_dir, mut running) = shell("echo out; echo err >&2; exit 3");
        match running.first_line().unwrap_err() {
            Error::Ended { status, output, errors } => {
                assert_eq!((status.code(), output.as_str(), errors.as_str()), (Some(3), "out\n", "err\n"));
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn line_that_is_not_json_is_refused() {
        let (_dir, mut running) = shell("echo '{half'; exec sleep 600");
        assert!(matches!(running.first_line(), Err(Error::Line { line }) if line == "{half"));
    }

    #[test]
    fn program_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Running::start(Command::new("/nonexistent/monitor"), dir.path()).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/monitor"), "{error}");
    }

    #[test]
    fn children_are_found_and_killed_with_their_parent() {
        let (_dir, mut running) = shell(r#"sleep 600 & echo "{\"child\":$!}"; wait"#);
        let child = running.first_line().unwrap().line["child"].as_u64().unwrap();
        let child = u32::try_from(child).unwrap();
        let root = running.child.id();
        assert_eq!(tree(root).unwrap(), [root, child]);
        assert!(Path::new(&format!("/proc/{child}")).exists());
        drop(running);
        let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        let state = stat.rsplit_once(") ").map_or("gone", |(_, rest)| &rest[..1]);
        assert!(["gone", "Z", "X"].contains(&state), "child {child} is still there: {stat}");
        assert!(!Path::new(&format!("/proc/{root}")).exists());
    }

    #[test]
    fn process_without_guest_memory_is_an_error() {
        let (_dir, mut running) = shell(r"echo '{}'; exec sleep 600");
        running.first_line().unwrap();
        assert!(matches!(running.memory_beside_guest(128 << 20), Err(Error::Smaps { .. })));
    }

    #[test]
    fn parent_is_found_behind_any_name() {
        assert_eq!(parent("12 (a) S 7) R 42 1 2"), Some(42));
        assert_eq!(parent("12 (a"), None);
        assert_eq!(parent(""), None);
    }

    #[test]
    fn a_brace_counts_only_where_a_line_starts() {
        assert_eq!(line_start(b"a{\n{"), Some(3));
        assert_eq!(line_start(b"{"), Some(0));
        assert_eq!(line_start(b"a{b"), None);
    }
}
