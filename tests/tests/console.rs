//! The guest's console on a terminal, and on a pseudo-terminal of its own.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use vmm_tests::guest::Setup;
use vmm_tests::terminal::Terminal;

const DEADLINE: Duration = Duration::from_secs(60);

const RAW_OFF: u32 = libc::ICANON | libc::ECHO | libc::ISIG;

#[test]
#[ignore = "needs /dev/kvm"]
fn terminal_is_raw_while_the_guest_has_it_and_restored_when_it_powers_off() {
    let (mut terminal, before) = Terminal::start("test=serial-echo");
    terminal.wait_for("hello");
    assert_eq!(terminal.flags().3 & RAW_OFF, 0);
    // What would interrupt a program on a terminal that is not raw is the guest's as well.
    terminal.type_in("a\u{3}b\n");
    terminal.wait_for("a\u{3}b");
    terminal.type_in("end\n");
    assert_eq!(terminal.ends().code(), Some(0));
    assert_eq!(terminal.flags(), before);
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
    assert_eq!(terminal.flags(), before);
    assert_eq!(std::fs::read_dir(terminal.dir().join("run")).unwrap().count(), 0);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn terminal_is_restored_after_signals_and_crashes() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGSEGV, libc::SIGABRT] {
        let (mut terminal, before) = Terminal::start("test=serial-echo");
        terminal.wait_for("hello");
        assert_eq!(terminal.flags().3 & RAW_OFF, 0);
        let pid = libc::pid_t::try_from(terminal.pid()).unwrap();
        // SAFETY: kill takes numbers; the process is our child and has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        terminal.ends();
        assert_eq!(terminal.flags(), before, "after signal {signal}");
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
    assert_eq!(terminal.flags(), before);
}
