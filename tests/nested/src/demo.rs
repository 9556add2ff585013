//! A guest to look at: stock Linux with a disk, which is a clone of a template, and a network card, run from a `vm.toml`
//! that can be shown, on this machine or in the emulated host.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::guest::{COMMAND_DEADLINE, Guest};
use crate::packages::cache_dir;
use crate::program::{find, run};
use crate::template::{self, CLONE, ORIGINAL, Step, TEMPLATE};
use crate::{Artefacts, Console, Error, L1, Options, Packages, Result, Status};

/// The guest's configuration. The files it names are beside it.
pub const CONFIG: &str = include_str!("../files/demo.toml");

/// For what takes an emulated machine some time.
const LONG: Duration = Duration::from_secs(120);
/// Where the guest's files are in the emulated host.
const THERE: &str = "/tmp/demo";
/// How often keys and output are passed on.
const RELAY: Duration = Duration::from_millis(10);

/// Where the guest runs.
#[derive(Debug)]
pub enum Place {
    /// On this machine, which needs hardware virtualization.
    Here {
        /// Directory for the guest's files, which stay there.
        dir: PathBuf,
    },
    /// In the emulated host.
    Nested {
        /// The program `l1-agent` of this crate.
        agent: PathBuf,
    },
}

/// What a guest did when it was asked to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Version of its kernel.
    pub kernel: String,
    /// What it did on its disk.
    pub disk: String,
    /// Whom it reached through its network card.
    pub network: String,
    /// What its entropy device gave, in hexadecimal digits.
    pub entropy: String,
    /// What became of template and clone.
    pub clone: String,
}

/// Where the guest's files are.
#[derive(Debug)]
enum Home {
    Here { vmm: PathBuf, dir: PathBuf },
    // The host ends with it.
    There(L1),
}

impl Home {
    fn clone_after(&self) -> Result<String> {
        let same = self.image(&format!("compare {TEMPLATE} {ORIGINAL}"))?;
        expect("template and the disk that it was made of", "the same", &same)?;
        let info = self.image(&format!("info {CLONE} --json"))?;
        let parsed: Option<serde_json::Value> = serde_json::from_str(&info).ok();
        match parsed.and_then(|info| info["allocated"].as_u64()).map(|own| own >> 20) {
            Some(own) if own > 0 => {
                Ok(format!("{TEMPLATE} is what it was; {CLONE} has {own} MiB of its own"))
            }
            _ => Err(Error::Unexpected {
                what: format!("space of {CLONE}"),
                expected: "what the guest has written".to_owned(),
                found: info,
            }),
        }
    }

    /// What `vmm image` says of the guest's files.
    fn image(&self, args: &str) -> Result<String> {
        match self {
            Self::Here { vmm, dir } => {
                let mut command = Command::new(vmm);
                command.arg("image").args(args.split(' ')).current_dir(dir);
                Ok(run(&mut command)?.trim().to_owned())
            }
            Self::There(host) => host.check(&format!("cd {THERE} && vmm image {args}"), LONG),
        }
    }
}

/// A guest that runs, and where.
#[derive(Debug)]
pub struct Demo {
    console: Console,
    release: String,
    cloning: Vec<Step>,
    // Declared last: it ends after what runs in it.
    home: Home,
}

impl Demo {
    /// Makes the guest's files and starts it with the monitor `vmm`. Each long step is told to `progress` beforehand.
    ///
    /// # Errors
    ///
    /// What is missing on this machine, or keeps the emulated host from booting.
    pub fn start(vmm: &Path, place: &Place, progress: &mut dyn FnMut(&str)) -> Result<Self> {
        progress("getting a kernel and busybox from Debian's packages");
        let packages = Packages::get(&cache_dir())?;
        match place {
            Place::Here { dir } => {
                progress("making a disk, a template of it, and a clone of that for the guest");
                Artefacts::make(&packages, dir)?;
                let cloning = template::make(vmm, dir)?;
                let config = dir.join("vm.toml");
                fs::write(&config, CONFIG).map_err(Error::file("write", &config))?;
                progress("starting the guest");
                let console = Console::start("vmm", here(vmm, dir)?)?;
                let home = Home::Here { vmm: vmm.to_owned(), dir: dir.clone() };
                Ok(Self { console, release: packages.release, cloning, home })
            }
            Place::Nested { agent } => {
                progress("making a disk, a template of it, and a clone of that for the guest");
                let cache = cache_dir();
                let work =
                    tempfile::tempdir_in(&cache).map_err(Error::file("create a directory in", &cache))?;
                Artefacts::make(&packages, work.path())?;
                let cloning = template::make(vmm, work.path())?;
                progress("booting an emulated host");
                let mut options = Options::new("demo", agent, Some(vmm));
                options.files.extend(template::files(work.path()));
                let host = L1::boot(&options)?;
                host.write_file(&format!("{THERE}/vm.toml"), CONFIG.as_bytes())?;
                let files = [ORIGINAL, TEMPLATE, CLONE].map(|name| format!("/data/{name}")).join(" ");
                let copy = format!("cd {THERE} && ln -s /data/vmlinuz /data/initrd.img . && cp {files} .");
                host.check(&copy, LONG)?;
                progress("starting the guest in the emulated host");
                let console = host.spawn(&format!("exec vmm --config {THERE}/vm.toml"))?;
                Ok(Self { console, release: packages.release, cloning, home: Home::There(host) })
            }
        }
    }

    /// How the guest's disk was made, on this machine.
    #[must_use]
    pub fn cloning(&self) -> &[Step] {
        &self.cloning
    }

    /// What has become of template and clone, once the guest has ended.
    ///
    /// # Errors
    ///
    /// The template is not what it was, or the guest has written nothing to its clone.
    pub fn clone_after(&self) -> Result<String> {
        self.home.clone_after()
    }

    /// Waits for the guest's shell, has it show what it can do, and powers it off.
    ///
    /// # Errors
    ///
    /// What it cannot do.
    pub fn check(self, progress: &mut dyn FnMut(&str)) -> Result<Seen> {
        progress("waiting for the guest's shell");
        let mut guest = Guest::attach(self.console)?;
        progress("asking the guest for its kernel, disk, network and entropy");
        let seen = look(&mut guest, &self.release)?;
        guest.console().send("poweroff\n");
        let status = guest.console().exit_status(LONG)?;
        expect("end of the monitor", &Status::Code(0).to_string(), &status.to_string())?;
        Ok(Seen { clone: self.home.clone_after()?, ..seen })
    }

    /// Gives the guest's console to whoever sits at this terminal until the monitor ends, and returns how it did.
    /// Keys go to the guest as they are; Ctrl-] is for the monitor, which explains itself on Ctrl-] and `?`.
    ///
    /// # Errors
    ///
    /// [`Error::Run`] where this is no terminal, [`Error::Gone`] where the emulated host ended.
    pub fn interact(&mut self) -> Result<Status> {
        let terminal = |source| Error::Run { program: "a console on this terminal".to_owned(), source };
        let _raw = RawTerminal::enter().map_err(terminal)?;
        let mut keys = io::stdin().lock();
        let mut screen = io::stdout().lock();
        let mut buffer = [0; 4096];
        let mut more = true;
        while self.console.status().is_none() {
            while let Some(bytes) = self.console.next_output(RELAY)? {
                screen.write_all(&bytes).and_then(|()| screen.flush()).map_err(terminal)?;
            }
            if more && readable(&keys).map_err(terminal)? {
                let length = keys.read(&mut buffer).map_err(terminal)?;
                more = length > 0;
                self.console.input(&buffer[..length]);
            }
        }
        self.console.exit_status(LONG)
    }
}

/// The monitor in network and user namespaces of its own, where it may make a tap without being root, and from which
/// nothing is left.
fn here(vmm: &Path, dir: &Path) -> Result<Command> {
    let mut command = Command::new(find("unshare", "util-linux")?);
    command.args(["--user", "--map-root-user", "--net"]).arg(vmm).arg("--config").arg("vm.toml");
    command.current_dir(dir).env("VMM_RUN_DIR", dir.join("run"));
    Ok(command)
}

/// Has the guest do something with each of its devices.
fn look(guest: &mut Guest, release: &str) -> Result<Seen> {
    // What the kernel says to the console is not to stand between the answers.
    guest.check("dmesg -n 1", COMMAND_DEADLINE)?;
    let kernel = guest.check("uname -r", COMMAND_DEADLINE)?;
    expect("the guest's kernel", release, &kernel)?;

    let root = guest.check("grep ' / ' /proc/mounts | tail -n 1", COMMAND_DEADLINE)?;
    let root: Vec<&str> = root.split(' ').take(3).collect();
    expect("the guest's root file system", "/dev/vda / ext4", &root.join(" "))?;
    let write = "head -c 1048576 /dev/urandom >/tmp/demo && cp /tmp/demo /demo && sync";
    guest.check(write, LONG)?;
    let written = guest.check("sha256sum </tmp/demo", LONG)?;
    let read = guest.check("echo 3 >/proc/sys/vm/drop_caches && sha256sum </demo", LONG)?;
    expect("checksum of a file on the guest's disk", &written, &read)?;
    let size = guest.check("cat /sys/block/vda/size", COMMAND_DEADLINE)?;

    let ping = guest.check("ping -c 3 10.77.0.1", LONG)?;
    let received = ping.lines().find(|line| line.contains("packets received")).unwrap_or_default();

    let source = guest.check("cat /sys/class/misc/hw_random/rng_current", COMMAND_DEADLINE)?;
    let digits = "dd if=/dev/hwrng bs=16 count=1 2>/dev/null | xxd -p";
    let entropy = guest.check(digits, COMMAND_DEADLINE)?;
    if entropy.len() != 32 || entropy.bytes().all(|digit| digit == b'0') {
        expect("what the guest's entropy device gives", "32 digits", &entropy)?;
    }
    Ok(Seen {
        kernel,
        disk: format!(
            "1 MiB written to ext4 on /dev/vda ({size} sectors) and read back, sha256 {}",
            &read[..read.len().min(16)]
        ),
        network: format!("ping 10.77.0.1: {received}"),
        entropy: format!("{entropy} from {source}"),
        clone: String::new(),
    })
}

fn expect(what: &str, expected: &str, found: &str) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Unexpected { what: what.to_owned(), expected: expected.to_owned(), found: found.to_owned() })
}

/// Whether a read would not wait now, or within [`RELAY`].
fn readable(file: &impl AsRawFd) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let wait = i32::try_from(RELAY.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the pointer is to one structure, which lives until the call returns, and the count says one.
    match unsafe { libc::poll(&raw mut poll, 1, wait) } {
        count if count >= 0 => Ok(poll.revents != 0),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
    }
}

/// Standard input as a terminal that passes every key on; as it was before when this is dropped.
struct RawTerminal {
    before: libc::termios,
}

impl RawTerminal {
    fn enter() -> io::Result<Self> {
        // SAFETY: all zeros are valid values of the structure's integers.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a structure that lives until the call returns.
        if unsafe { libc::tcgetattr(0, &raw mut before) } < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut raw = before;
        // SAFETY: the pointer is to a structure that the system has filled in.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        // SAFETY: the pointer is to a structure that lives until the call returns.
        if unsafe { libc::tcsetattr(0, libc::TCSAFLUSH, &raw const raw) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // SAFETY: the pointer is to a structure that the system has filled in.
        unsafe { libc::tcsetattr(0, libc::TCSAFLUSH, &raw const self.before) };
    }
}
