//! The emulated host: a machine of QEMU's with a stock kernel, KVM on emulated AMD SVM, busybox, and an agent that
//! runs commands.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::artefacts::{Artefacts, copy, host_initramfs};
use crate::console::Console;
use crate::image;
use crate::job::Event;
use crate::packages::{Packages, cache_dir};
use crate::program::{describe, find};
use crate::protocol::{BODY_MAX, Frame, Kind, Start, Status};
use crate::{Error, Result};

/// What QEMU emulates, less what it emulates wrongly (seen with 7.2):
///
/// * nested paging: an exit for a nested page fault now and then saves the emulated host's instruction pointer and page
///   table as the guest's, which then hangs or dies. KVM does without (shadow paging), and is no slower here.
/// * XSAVE: a guest's XSETBV changes XCR0 although KVM intercepts it. KVM goes on with XCR0 as it is after a reset, and
///   the guest's processes lose their SSE registers.
const PROCESSOR: &str = "EPYC,+svm,-npt,-xsave,-xsaveopt,-xsavec,-xsaves,-xgetbv1,-avx,-avx2,-f16c,-fma";
/// From power-on to the agent; some seconds on an idle machine.
const BOOT_DEADLINE: Duration = Duration::from_secs(180);
const FILE_DEADLINE: Duration = Duration::from_secs(120);
/// How often it is looked whether QEMU still runs.
const WATCH: Duration = Duration::from_millis(100);
/// How much of the log goes into an error.
const TAIL: usize = 4000;

/// How the emulated host is made.
#[derive(Debug, Clone)]
pub struct Options {
    /// Name of its log, `nested/logs/<name>.log` below the build's target directory.
    pub name: String,
    /// Its agent: the program `l1-agent` of this crate.
    pub agent: PathBuf,
    /// Further programs and files, which it finds in `/data` under the names given here.
    pub files: Vec<(String, PathBuf)>,
    /// Memory in MiB.
    pub memory: u32,
    /// Processors.
    pub processors: u8,
}

impl Options {
    /// A host with 3 GiB and two processors that has `vmm` as `/data/vmm`.
    #[must_use]
    pub fn new(name: &str, agent: &Path, vmm: Option<&Path>) -> Self {
        let files = vmm.map(|vmm| ("vmm".to_owned(), vmm.to_owned())).into_iter().collect();
        Self { name: name.to_owned(), agent: agent.to_owned(), files, memory: 3072, processors: 2 }
    }
}

/// What a command left behind.
#[derive(Clone, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: Status,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }
}

impl fmt::Debug for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stderr = String::from_utf8_lossy(&self.stderr);
        write!(f, "{}; standard output:\n{}\nstandard error:\n{stderr}", self.status, self.text())
    }
}

/// The emulated host. Files for guests are in `/data`, which can only be read: `vmlinuz`, `vmlinux`, `initrd.img`,
/// `root.ext4`. It ends when this is dropped, or with the process.
#[derive(Debug)]
pub struct L1 {
    link: Arc<Link>,
    release: String,
    // Declared last: the machine ends after all that talks to it.
    machine: Machine,
}

impl L1 {
    /// Boots a host and waits for its agent.
    ///
    /// # Errors
    ///
    /// What is missing on this machine, and whatever keeps the host from booting, with the end of its log.
    pub fn boot(options: &Options) -> Result<Self> {
        let cache = cache_dir();
        let packages = Packages::get(&cache)?;
        let work = tempfile::tempdir_in(&cache).map_err(Error::file("create a directory in", &cache))?;
        let initrd = work.path().join("l1.img");
        host_initramfs(&packages, &initrd)?;
        let disk = data_disk(&packages, options, work.path())?;
        let logs = cache.join("logs");
        fs::create_dir_all(&logs).map_err(Error::file("create", &logs))?;
        let log = logs.join(format!("{}.log", options.name));
        let (near, far) = UnixStream::pair().map_err(Error::Channel)?;
        let machine = Machine::start(qemu(options, &packages.kernel, &initrd, &disk, &log, far)?)?;
        let (link, ready) = Link::open(near, log)?;
        let l1 = Self { link, release: packages.release, machine };
        match ready.recv_timeout(BOOT_DEADLINE) {
            // From here on QEMU has all files open that it needs.
            Ok(_) => Ok(l1),
            Err(RecvTimeoutError::Timeout) => Err(Error::Deadline {
                what: "agent in the emulated host".to_owned(),
                deadline: BOOT_DEADLINE,
                tail: l1.link.log_tail(),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(Error::Gone {
                who: format!("the emulated host ({})", l1.machine.last_words()),
                what: "its agent".to_owned(),
                tail: l1.link.log_tail(),
            }),
        }
    }

    /// Version of the kernel of host and guests, as in `uname -r`.
    #[must_use]
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Runs `command` with a shell and waits for its end. Its standard input is empty.
    ///
    /// # Errors
    ///
    /// [`Error::Deadline`]; [`Error::Gone`] where the host ended. A command that fails is no error here.
    pub fn run(&self, command: &str, deadline: Duration) -> Result<Output> {
        self.run_with(command, b"", deadline)
    }

    /// Runs `command` like [`L1::run`] and returns its standard output, without the line's end.
    ///
    /// # Errors
    ///
    /// Those of [`L1::run`], and [`Error::Command`] where the command fails.
    pub fn check(&self, command: &str, deadline: Duration) -> Result<String> {
        let output = self.run(command, deadline)?;
        if !output.status.success() {
            let text = output.text() + &String::from_utf8_lossy(&output.stderr);
            return Err(Error::Command {
                command: command.to_owned(),
                status: output.status.to_string(),
                output: text,
            });
        }
        Ok(output.text().trim_end().to_owned())
    }

    /// Starts `command` with a shell and a terminal of its own.
    ///
    /// # Errors
    ///
    /// [`Error::Channel`].
    pub fn spawn(&self, command: &str) -> Result<Console> {
        self.start(command, true)
    }

    /// Makes the file `path` with this content. Directories above it are made.
    ///
    /// # Errors
    ///
    /// Those of [`L1::check`].
    pub fn write_file(&self, path: &str, content: &[u8]) -> Result<()> {
        let command = format!("mkdir -p \"$(dirname '{path}')\" && cat >'{path}'");
        let output = self.run_with(&command, content, FILE_DEADLINE)?;
        if output.status.success() {
            return Ok(());
        }
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(Error::Command { command, status: output.status.to_string(), output: stderr })
    }

    /// The content of the file `path`.
    ///
    /// # Errors
    ///
    /// Those of [`L1::check`].
    pub fn read_file(&self, path: &str) -> Result<Vec<u8>> {
        let command = format!("cat '{path}'");
        let output = self.run(&command, FILE_DEADLINE)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        Err(Error::Command { command, status: output.status.to_string(), output: stderr })
    }

    fn run_with(&self, command: &str, input: &[u8], deadline: Duration) -> Result<Output> {
        let mut console = self.start(command, false)?;
        console.input(input);
        console.end_input();
        let status = console.exit_status(deadline)?;
        Ok(Output { status, stdout: console.output().to_vec(), stderr: console.errors().to_vec() })
    }

    fn start(&self, command: &str, terminal: bool) -> Result<Console> {
        let (channel, events) = self.link.add();
        let start = Start { command: command.to_owned(), terminal };
        let start = serde_json::to_vec(&start).map_err(|error| Error::Channel(error.into()))?;
        if start.len() > BODY_MAX {
            return Err(Error::Refused(format!("a command of {} bytes; at most {BODY_MAX}", start.len())));
        }
        self.link.send(channel, Kind::Start, &start);
        Ok(Console::there(command, Arc::clone(&self.link), channel, terminal, events))
    }
}

/// The disk image with programs and files, in the directory `work`.
fn data_disk(packages: &Packages, options: &Options, work: &Path) -> Result<PathBuf> {
    let content = work.join("data");
    Artefacts::make(packages, &content)?;
    copy(&options.agent, &content.join("l1-agent"))?;
    for (name, path) in &options.files {
        copy(path, &content.join(name))?;
    }
    let mut size = 16 << 20;
    for entry in fs::read_dir(&content).map_err(Error::file("list", &content))? {
        let entry = entry.and_then(|entry| entry.metadata()).map_err(Error::file("list", &content))?;
        // A tenth more is for what the file system needs itself.
        size += entry.len() + entry.len() / 10;
    }
    let disk = work.join("data.ext4");
    image::ext4(&disk, size.next_multiple_of(1 << 20), "data", &content)?;
    Ok(disk)
}

fn qemu(
    options: &Options,
    kernel: &Path,
    initrd: &Path,
    disk: &Path,
    log: &Path,
    agent: UnixStream,
) -> Result<Command> {
    let mut qemu = Command::new(find("qemu-system-x86_64", "qemu-system-x86")?);
    let value = |name: &str, path: &Path| {
        // A comma ends a value and is written twice in one.
        format!("{name}{}", path.display().to_string().replace(',', ",,"))
    };
    qemu.args(["-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", PROCESSOR])
        .args(["-m", &options.memory.to_string(), "-smp", &options.processors.to_string()])
        .args(["-nodefaults", "-display", "none", "-no-reboot", "-nic", "none"])
        .arg("-serial")
        .arg(value("file:", log))
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initrd)
        .args(["-append", "console=ttyS0 quiet panic=-1 mitigations=off cgroup_no_v1=all"])
        .arg("-drive")
        .arg(value("if=none,id=data,format=raw,readonly=on,file=", disk))
        .args(["-device", "virtio-blk-pci,drive=data"])
        // The socket is QEMU's standard input: a file descriptor that needs no preparation.
        .args(["-chardev", "socket,id=agent,fd=0", "-device", "virtio-serial-pci"])
        .args(["-device", "virtserialport,chardev=agent,name=agent"])
        .stdin(Stdio::from(OwnedFd::from(agent)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    Ok(qemu)
}

/// The process of QEMU. A thread of its own has started it and lives as long as it does, because the kernel kills
/// a process on request when the *thread* that started it ends.
#[derive(Debug)]
struct Machine {
    stop: Option<Sender<()>>,
    keeper: Option<JoinHandle<()>>,
    errors: Arc<Mutex<String>>,
}

impl Machine {
    fn start(mut qemu: Command) -> Result<Self> {
        let program = describe(&qemu);
        // SAFETY: the closure makes one system call on the child's own state; it neither allocates nor takes locks.
        unsafe {
            qemu.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let (stop, stopped) = channel();
        let (started, start) = channel();
        let errors = Arc::new(Mutex::new(String::new()));
        let words = Arc::clone(&errors);
        let keeper = thread::spawn(move || {
            let spawned = qemu.spawn();
            // It holds our copy of QEMU's end of the socket.
            drop(qemu);
            let mut child = match spawned {
                Ok(child) => child,
                Err(error) => return drop(started.send(Err(error))),
            };
            if started.send(Ok(())).is_err() {
                // Nobody waits any more: it is stopped at once below.
            }
            if let Some(mut stderr) = child.stderr.take() {
                thread::spawn(move || {
                    let mut text = String::new();
                    // What cannot be read is not there to be shown.
                    let _ = io::Read::read_to_string(&mut stderr, &mut text);
                    lock(&words).push_str(text.trim());
                });
            }
            // Either it ends by itself, or the other end of the channel goes with its owner.
            while stopped.recv_timeout(WATCH) == Err(RecvTimeoutError::Timeout) {
                if !matches!(child.try_wait(), Ok(None)) {
                    return;
                }
            }
            let _ = child.kill();
            let _ = child.wait();
        });
        match start.recv() {
            Ok(Ok(())) => Ok(Self { stop: Some(stop), keeper: Some(keeper), errors }),
            Ok(Err(source)) => Err(Error::Run { program, source }),
            Err(error) => Err(Error::Run { program, source: io::Error::other(error) }),
        }
    }

    /// What QEMU wrote to standard error before it ended.
    fn last_words(&self) -> String {
        let errors = lock(&self.errors);
        if errors.is_empty() { "without a word of QEMU".to_owned() } else { errors.clone() }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(keeper) = self.keeper.take() {
            let _ = keeper.join();
        }
    }
}

/// The connection to the agent.
#[derive(Debug)]
pub(crate) struct Link {
    socket: Mutex<UnixStream>,
    channels: Arc<Mutex<HashMap<u32, Sender<Event>>>>,
    next: AtomicU32,
    log: PathBuf,
}

impl Link {
    /// Starts to listen; the second value gets the agent's first message.
    fn open(socket: UnixStream, log: PathBuf) -> Result<(Arc<Self>, Receiver<Event>)> {
        let reader = socket.try_clone().map_err(Error::Channel)?;
        let (ready, is_ready) = channel();
        let channels = Arc::new(Mutex::new(HashMap::from([(0, ready)])));
        let known = Arc::clone(&channels);
        thread::spawn(move || receive(reader, &known));
        Ok((Arc::new(Self { socket: Mutex::new(socket), channels, next: AtomicU32::new(1), log }), is_ready))
    }

    /// A new channel, and what comes through it.
    fn add(&self) -> (u32, Receiver<Event>) {
        let channel_number = self.next.fetch_add(1, Ordering::Relaxed);
        let (send, events) = channel();
        lock(&self.channels).insert(channel_number, send);
        (channel_number, events)
    }

    /// Forgets a channel.
    pub(crate) fn close(&self, channel: u32) {
        lock(&self.channels).remove(&channel);
    }

    /// Sends `body` in as many frames as it takes. Should the host be gone, so are its answers, which tells.
    pub(crate) fn send(&self, channel: u32, kind: Kind, body: &[u8]) {
        let mut socket = lock(&self.socket);
        let frames = body.chunks(BODY_MAX).map(|part| Frame::new(channel, kind, part));
        let empty = body.is_empty().then(|| Frame::new(channel, kind, ""));
        for frame in frames.chain(empty) {
            if frame.write(&mut *socket).is_err() {
                return;
            }
        }
    }

    /// The end of what the host wrote to its console, for errors.
    pub(crate) fn log_tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let tail = String::from_utf8_lossy(&text[text.len().saturating_sub(TAIL)..]).replace('\r', "");
        format!("--- {}:\n{tail}", self.log.display())
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // The reader has a copy of the socket and would wait for ever.
        let _ = lock(&self.socket).shutdown(Shutdown::Both);
    }
}

/// Hands what the agent says to whom it concerns, until there is no agent; then nobody gets anything any more.
fn receive(mut socket: UnixStream, channels: &Mutex<HashMap<u32, Sender<Event>>>) {
    while let Ok(Some(Frame { channel, kind, body })) = Frame::read(&mut socket) {
        let event = match kind {
            Kind::Output | Kind::Ready => Event::Output(body),
            Kind::Errors => Event::Errors(body),
            Kind::Exit => match serde_json::from_slice(&body) {
                Ok(status) => Event::Exit(status),
                Err(error) => Event::Refused(format!("the agent makes no sense: {error}")),
            },
            Kind::Refused => Event::Refused(String::from_utf8_lossy(&body).into_owned()),
            Kind::Start | Kind::Input | Kind::EndOfInput | Kind::Signal => break,
        };
        // Nobody may be interested any more.
        if let Some(to) = lock(channels).get(&channel) {
            let _ = to.send(event);
        }
    }
    lock(channels).clear();
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
