//! The guest's console on a terminal, and on a pseudo-terminal of its own.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vmm_tests::guest::{self, Setup};

const DEADLINE: Duration = Duration::from_secs(60);

/// A terminal with a monitor on it.
struct Terminal {
    master: File,
    slave: File,
    child: Child,
    seen: Vec<u8>,
    dir: TempDir,
}

fn open_terminal() -> (File, File) {
    let (mut master, mut slave) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: both descriptors are filled; name, settings and size are not asked for or given.
    let opened =
        unsafe { libc::openpty(&raw mut master, &raw mut slave, none, std::ptr::null(), std::ptr::null()) };
    assert_eq!(opened, 0);
    // SAFETY: the descriptors were just opened and belong to nobody else.
    unsafe { (File::from_raw_fd(master), File::from_raw_fd(slave)) }
}

fn settings(file: &File) -> (u32, u32, u32, u32) {
    // SAFETY: an all-zero termios is a valid value to be overwritten.
    let mut termios: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the structure is filled.
    assert_eq!(unsafe { libc::tcgetattr(file.as_raw_fd(), &raw mut termios) }, 0);
    (termios.c_iflag, termios.c_oflag, termios.c_cflag, termios.c_lflag)
}

impl Terminal {
    /// Runs the test guest with `cmdline` on a new terminal.
    fn start(cmdline: &str) -> (Self, (u32, u32, u32, u32)) {
        let dir = TempDir::new().unwrap();
        let kernel = guest::elf().unwrap();
        let config = dir.path().join("on-terminal.toml");
        std::fs::write(&config, format!("[boot]\nkernel = {kernel:?}\ncmdline = {cmdline:?}\n")).unwrap();
        let (master, slave) = open_terminal();
        let before = settings(&slave);
        let stdio = || Stdio::from(OwnedFd::from(slave.try_clone().unwrap()));
        let mut command = Command::new(guest::vmm_binary().unwrap());
        command.arg("--config").arg(config).env("VMM_RUN_DIR", dir.path().join("run"));
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: between fork and exec only system calls are made.
        unsafe {
            command.pre_exec(|| {
                // A session of its own, with the terminal as its controlling one.
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        (Self { master, slave, child, seen: Vec::new(), dir }, before)
    }

    fn wait_for(&mut self, text: &str) {
        let until = Instant::now() + DEADLINE;
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            let left = i32::try_from(until.saturating_duration_since(Instant::now()).as_millis()).unwrap();
            let mut polled = libc::pollfd { fd: self.master.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: polled is one entry.
            let ready = unsafe { libc::poll(&raw mut polled, 1, left) };
            assert!(ready > 0, "{text:?} did not come, but {:?}", String::from_utf8_lossy(&self.seen));
            let mut chunk = [0; 1024];
            let len = self.master.read(&mut chunk).unwrap();
            self.seen.extend_from_slice(&chunk[..len]);
        }
        self.seen.clear();
    }

    fn type_in(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }

    fn ends(&mut self) -> std::process::ExitStatus {
        let until = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < until, "the monitor does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // It has ended already unless a test failed.
        self.child.kill().unwrap_or_default();
    }
}

const RAW_OFF: u32 = libc::ICANON | libc::ECHO | libc::ISIG;

#[test]
#[ignore = "needs /dev/kvm"]
fn terminal_is_raw_while_the_guest_has_it_and_restored_when_it_powers_off() {
    let (mut terminal, before) = Terminal::start("test=serial-echo");
    terminal.wait_for("hello");
    assert_eq!(settings(&terminal.slave).3 & RAW_OFF, 0);
    // What would interrupt a program on a terminal that is not raw is the guest's as well.
    terminal.type_in("a\u{3}b\n");
    terminal.wait_for("a\u{3}b");
    terminal.type_in("end\n");
    assert_eq!(terminal.ends().code(), Some(0));
    assert_eq!(settings(&terminal.slave), before);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn escape_key_helps_sends_itself_and_stops_the_guest() {
    let (mut terminal, before) = Terminal::start("test=serial-echo");
    terminal.wait_for("hello");
    terminal.type_in("\u{1d}?");
    terminal.wait_for("power button");
    terminal.type_in("x\u{1d}\u{1d}y\n");
    terminal.wait_for("x\u{1d}y");
    terminal.type_in("\u{1d}q");
    assert_eq!(terminal.ends().code(), Some(0));
    assert_eq!(settings(&terminal.slave), before);
    assert_eq!(std::fs::read_dir(terminal.dir.path().join("run")).unwrap().count(), 0);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn terminal_is_restored_after_signals_and_crashes() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGSEGV, libc::SIGABRT] {
        let (mut terminal, before) = Terminal::start("test=serial-echo");
        terminal.wait_for("hello");
        assert_eq!(settings(&terminal.slave).3 & RAW_OFF, 0);
        let pid = libc::pid_t::try_from(terminal.child.id()).unwrap();
        // SAFETY: kill takes numbers; the process is our child and has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        terminal.ends();
        assert_eq!(settings(&terminal.slave), before, "after signal {signal}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn pseudo_terminal_is_named_and_carries_both_ways() {
    let setup = Setup::new("test=serial-echo").unwrap().with("[serial]\noutput = \"pty\"\n");
    let name = setup.name().to_owned();
    let mut guest = setup.start().unwrap();
    let until = Instant::now() + DEADLINE;
    let status: serde_json::Value = loop {
        let output = guest.vmm(&["show", &name, "--json"]).unwrap();
        if output.status.success() {
            break serde_json::from_slice(&output.stdout).unwrap();
        }
        assert!(Instant::now() < until, "{}", guest.transcript());
    };
    let path = status["serial"].as_str().unwrap();
    assert!(path.starts_with("/dev/pts/"), "{path}");
    let mut pty = OpenOptions::new().read(true).write(true).open(path).unwrap();
    pty.write_all(b"some words\n").unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("some words") {
        let mut chunk = [0; 256];
        let len = pty.read(&mut chunk).unwrap();
        seen.extend_from_slice(&chunk[..len]);
    }
    pty.write_all(b"end\n").unwrap();
    assert_eq!(guest.exit_status().unwrap().code(), Some(0), "{}", guest.transcript());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn keys_of_the_monitor_work_though_the_guest_takes_no_input() {
    let (mut terminal, before) = Terminal::start("test=hello");
    terminal.wait_for("hello");
    terminal.type_in(&"x".repeat(300));
    terminal.type_in("\u{1d}q");
    assert_eq!(terminal.ends().code(), Some(0));
    assert_eq!(settings(&terminal.slave), before);
}
