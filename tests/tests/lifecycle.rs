//! A guest from start to end: started, seen, held, stopped, killed, and what is left of it then.

use std::fs;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::Value;
use vmm_tests::guest::{Guest, Setup};

fn echo() -> Guest {
    let mut guest = Setup::new("test=serial-echo").unwrap().start().unwrap();
    guest.wait_event("hello").unwrap();
    guest
}

fn echoes(guest: &mut Guest, text: &str) {
    guest.send(format!("{text}\n").as_bytes()).unwrap();
    guest.wait_line(text, |line| line.contains(text)).unwrap();
}

fn ok(guest: &Guest, args: &[&str]) -> String {
    let output = guest.vmm(args).unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn fails(guest: &Guest, args: &[&str], wanted: &str) {
    let output = guest.vmm(args).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
    assert!(said.contains(wanted), "{args:?}: {said}");
}

fn state(guest: &Guest) -> Value {
    serde_json::from_str(&ok(guest, &["show", guest.name(), "--json"])).unwrap()
}

fn nothing_left(run_dir: &Path) {
    assert_eq!(fs::read_dir(run_dir).unwrap().count(), 0, "something is left in {}", run_dir.display());
}

fn ends_well(guest: &mut Guest) {
    let status = guest.exit_status().unwrap();
    assert_eq!(status.code(), Some(0), "{}", guest.transcript());
    nothing_left(&guest.run_dir());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_that_powers_off_ends_the_monitor_with_status_0() {
    let mut guest = Setup::new("test=poweroff").unwrap().start().unwrap();
    ends_well(&mut guest);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_that_resets_by_either_way_ends_the_monitor_with_status_0() {
    for via in ["i8042", "acpi"] {
        let mut guest = Setup::new(&format!("test=reset via={via}")).unwrap().argument("-v").start().unwrap();
        ends_well(&mut guest);
        assert!(guest.log().contains("reset"), "{}", guest.transcript());
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn serial_port_leads_to_standard_input_and_output() {
    let mut guest = echo();
    echoes(&mut guest, "some words");
    let long = "x".repeat(2000);
    echoes(&mut guest, &long);
    guest.send(b"end\n").unwrap();
    ends_well(&mut guest);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_is_listed_and_shown_with_what_it_is() {
    let setup = Setup::new("test=serial-echo").unwrap();
    fs::write(setup.dir().join("disk.img"), vec![0; 1 << 20]).unwrap();
    let config =
        "[cpu]\ncount = 2\n[memory]\nsize = \"64M\"\n[[disk]]\npath = \"disk.img\"\nreadonly = true\n";
    let mut guest = setup.with(config).start().unwrap();
    guest.wait_event("hello").unwrap();
    let list: Value = serde_json::from_str(&ok(&guest, &["ps", "--json"])).unwrap();
    assert_eq!(list.as_array().unwrap().len(), 1);
    let status = state(&guest);
    assert_eq!(list[0]["name"], guest.name());
    assert_eq!(status["name"], guest.name());
    assert_eq!(status["pid"], guest.pid());
    assert_eq!((&status["cpus"], &status["memory"]), (&2.into(), &(64 << 20).into()));
    assert_eq!(status["disks"][0]["bytes"], 1 << 20);
    assert_eq!(status["disks"][0]["readonly"], true);
    for text in [ok(&guest, &["ps"]), ok(&guest, &["show", guest.name()])] {
        assert!(text.contains(guest.name()) && text.contains("64M") && text.contains("running"), "{text}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn paused_guest_stands_still_and_answers_after_it_is_resumed() {
    let mut guest = echo();
    for turn in 0..20 {
        ok(&guest, &["pause", guest.name()]);
        ok(&guest, &["pause", guest.name()]);
        assert_eq!(state(&guest)["state"], "paused");
        guest.send(format!("turn {turn}\n").as_bytes()).unwrap();
        fails(&guest, &["stop", guest.name()], "paused");
        ok(&guest, &["resume", guest.name()]);
        assert_eq!(state(&guest)["state"], "running");
        guest.wait_line("the turn", |line| line.contains(&format!("turn {turn}"))).unwrap();
    }
    guest.send(b"end\n").unwrap();
    ends_well(&mut guest);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn running_and_paused_guests_are_stopped_at_once() {
    for pause in [false, true] {
        let mut guest = echo();
        if pause {
            ok(&guest, &["pause", guest.name()]);
        }
        ok(&guest, &["stop", guest.name(), "--now"]);
        ends_well(&mut guest);
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_that_ignores_its_power_button_goes_on_and_stop_says_so() {
    let mut guest = echo();
    fails(&guest, &["stop", guest.name(), "--timeout", "1"], "has not powered off within 1 s");
    echoes(&mut guest, "still here");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn signals_that_ask_to_end_end_the_guest_and_leave_nothing() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        let mut guest = echo();
        let pid = libc::pid_t::try_from(guest.pid()).unwrap();
        // SAFETY: kill takes numbers; the process is our child and has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        ends_well(&mut guest);
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn killed_guest_leaves_nothing_behind() {
    let mut guest = echo();
    ok(&guest, &["kill", guest.name()]);
    assert_eq!(guest.exit_status().unwrap().code(), None, "it ended by itself");
    nothing_left(&guest.run_dir());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn successor_of_a_killed_monitor_starts_and_cleans_up() {
    let setup = Setup::new("test=serial-echo").unwrap().argument("-v");
    fs::write(setup.dir().join("disk.img"), vec![0; 4096]).unwrap();
    let setup = setup.with("[[disk]]\npath = \"disk.img\"\n");
    let mut first = setup.clone().start().unwrap();
    first.wait_event("hello").unwrap();
    first.kill().unwrap();
    assert!(fs::read_dir(first.run_dir()).unwrap().count() > 0, "a killed monitor cannot clean up");
    assert_eq!(ok(&first, &["ps", "--json"]).trim(), "[]");
    let mut second = setup.start().unwrap();
    second.wait_event("hello").unwrap();
    assert!(second.log().contains("cleaning up"), "{}", second.transcript());
    second.send(b"end\n").unwrap();
    ends_well(&mut second);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn second_monitor_of_a_name_is_refused_and_says_who_holds_it() {
    let setup = Setup::new("test=serial-echo").unwrap();
    let mut first = setup.clone().start().unwrap();
    first.wait_event("hello").unwrap();
    let mut second = setup.start().unwrap();
    assert_eq!(second.exit_status().unwrap().code(), Some(1));
    let said = second.log();
    assert!(said.contains(first.name()) && said.contains(&format!("process {}", first.pid())), "{said}");
    echoes(&mut first, "untouched");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn second_guest_with_the_same_disk_is_refused_and_says_who_holds_it() {
    let disk = "[[disk]]\npath = \"disk.img\"\n";
    let setup = Setup::new("test=serial-echo").unwrap();
    fs::write(setup.dir().join("disk.img"), vec![0; 4096]).unwrap();
    let other = setup.beside("test=poweroff").unwrap().with(disk);
    let mut first = setup.with(disk).start().unwrap();
    first.wait_event("hello").unwrap();
    let mut second = other.start().unwrap();
    assert_eq!(second.exit_status().unwrap().code(), Some(2));
    assert!(second.log().contains(&format!("process {}", first.pid())), "{}", second.log());
    assert!(second.log().contains("disk.0.path"), "{}", second.log());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn many_guests_run_side_by_side() {
    let first = Setup::new("test=serial-echo").unwrap();
    let mut guests = vec![first.clone().start().unwrap()];
    for _ in 0..7 {
        guests.push(first.beside("test=serial-echo").unwrap().start().unwrap());
    }
    for guest in &mut guests {
        guest.wait_event("hello").unwrap();
    }
    let list: Value = serde_json::from_str(&ok(&guests[0], &["ps", "--json"])).unwrap();
    assert_eq!(list.as_array().unwrap().len(), guests.len());
    for guest in &mut guests {
        guest.send(b"end\n").unwrap();
        assert_eq!(guest.exit_status().unwrap().code(), Some(0));
    }
    nothing_left(&guests[0].run_dir());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn output_goes_to_a_file_and_to_nowhere() {
    let setup = Setup::new("test=poweroff").unwrap();
    let file = setup.dir().join("console.log");
    fs::write(&file, "before\n").unwrap();
    let mut guest = setup.clone().with("[serial]\noutput = \"file:console.log\"\n").start().unwrap();
    ends_well(&mut guest);
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.starts_with("before\n") && text.contains("\"hello\""), "{text}");
    let mut guest = setup.with("[serial]\noutput = \"null\"\n").start().unwrap();
    ends_well(&mut guest);
    assert!(!guest.transcript().contains("\"hello\""), "{}", guest.transcript());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn log_goes_to_its_file_and_never_into_the_console() {
    let setup = Setup::new("test=poweroff").unwrap();
    let log = setup.dir().join("vmm.log");
    let mut guest = setup.argument("-v").argument("--log").argument("vmm.log").start().unwrap();
    ends_well(&mut guest);
    assert!(fs::read_to_string(&log).unwrap().contains("powered off"));
    assert_eq!(guest.log(), "");
    assert!(!guest.transcript().contains("powered off"), "{}", guest.transcript());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn console_that_nobody_reads_stops_neither_pause_nor_end() {
    let setup = Setup::new("test=serial-echo").unwrap();
    let dir = setup.dir().to_owned();
    let toml = dir.join("silent.toml");
    let kernel = vmm_tests::guest::elf().unwrap();
    fs::write(&toml, format!("[boot]\nkernel = {:?}\ncmdline = \"test=serial-echo\"\n", kernel)).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut child = std::process::Command::new(vmm_tests::guest::vmm_binary().unwrap())
        .env("VMM_RUN_DIR", dir.join("run"))
        .arg("--config")
        .arg(&toml)
        .stdin(std::process::Stdio::piped())
        .stdout(std::os::fd::OwnedFd::from(theirs))
        .spawn()
        .unwrap();
    // More than a socket holds, until the guest's input stands still as well.
    let mut input = child.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        let line = format!("{}\n", "y".repeat(99));
        while input.write_all(line.as_bytes()).is_ok() {}
    });
    let vmm = |args: &[&str]| {
        let mut command = std::process::Command::new(vmm_tests::guest::vmm_binary().unwrap());
        command.env("VMM_RUN_DIR", dir.join("run")).args(args).status().unwrap()
    };
    // Once no more comes, the guest's processor is held in a write.
    let (mut before, mut now) = (-1, 0);
    while now == 0 || now != before {
        before = now;
        std::thread::sleep(std::time::Duration::from_millis(300));
        // SAFETY: FIONREAD fills an integer.
        assert_eq!(unsafe { libc::ioctl(ours.as_raw_fd(), libc::FIONREAD, &raw mut now) }, 0);
    }
    assert!(vmm(&["pause", "silent"]).success());
    assert!(vmm(&["resume", "silent"]).success());
    assert!(vmm(&["stop", "silent", "--now"]).success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    writer.join().unwrap();
    drop(ours);
    nothing_left(&dir.join("run"));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn monitor_whose_output_and_messages_nobody_reads_still_ends_by_signal() {
    let dir = tempfile::TempDir::new().unwrap();
    let toml = dir.path().join("stuck.toml");
    let kernel = vmm_tests::guest::elf().unwrap();
    let cmdline = "test=cpu seconds=forever every=1";
    fs::write(&toml, format!("[boot]\nkernel = {kernel:?}\ncmdline = {cmdline:?}\n")).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let output = || std::process::Stdio::from(std::os::fd::OwnedFd::from(theirs.try_clone().unwrap()));
    let mut child = std::process::Command::new(vmm_tests::guest::vmm_binary().unwrap())
        .env("VMM_RUN_DIR", dir.path().join("run"))
        .args(["-v", "--config"])
        .arg(&toml)
        .stdin(std::process::Stdio::piped())
        .stdout(output())
        .stderr(output())
        .spawn()
        .unwrap();
    let (mut before, mut now) = (-1, 0);
    while now == 0 || now != before {
        before = now;
        std::thread::sleep(std::time::Duration::from_millis(300));
        // SAFETY: FIONREAD fills an integer.
        assert_eq!(unsafe { libc::ioctl(ours.as_raw_fd(), libc::FIONREAD, &raw mut now) }, 0);
    }
    child.stdin.as_mut().unwrap().write_all(b"input\n").unwrap();
    let pid = libc::pid_t::try_from(child.id()).unwrap();
    // SAFETY: kill takes numbers; the process is our child and has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if std::time::Instant::now() > until {
            child.kill().unwrap();
            panic!("the monitor does not end");
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(0));
    nothing_left(&dir.path().join("run"));
    drop(ours);
}
