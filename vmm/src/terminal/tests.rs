//! Raw mode on real terminals, and its end by every way out of a process.
//!
//! Signals, exits and job control need processes of their own: the tests start this test program again, with the name
//! of a part to play in the environment.

use std::env;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{self, Child, Command, ExitStatus, Stdio};
use std::ptr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::RawMode;
use super::restore::{action, set, settings};

const PART: &str = "VMM_TERMINAL_TEST_PART";
const ENTERED: &str = "raw mode entered";

/// Both sides of a terminal in its usual settings.
struct Tty {
    master: File,
    slave: OwnedFd,
}

impl Tty {
    fn new() -> Self {
        let (mut master, mut slave) = (-1, -1);
        // SAFETY: both integers are writable; name, settings and size are optional.
        let opened =
            unsafe { libc::openpty(&mut master, &mut slave, ptr::null_mut(), ptr::null(), ptr::null()) };
        assert_eq!(opened, 0, "{}", io::Error::last_os_error());
        for fd in [master, slave] {
            // SAFETY: takes a flag by value.
            assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
        }
        // SAFETY: both were just opened and belong to nobody else.
        let (master, slave) = unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) };
        Self { master, slave }
    }

    fn settings(&self) -> Settings {
        Settings::of(&self.slave)
    }
}

/// What can be compared of a terminal's settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Settings {
    input: libc::tcflag_t,
    output: libc::tcflag_t,
    control: libc::tcflag_t,
    local: libc::tcflag_t,
    keys: [libc::cc_t; libc::NCCS],
}

impl Settings {
    fn of(fd: &impl AsFd) -> Self {
        let of = settings(fd.as_fd()).unwrap();
        Self { input: of.c_iflag, output: of.c_oflag, control: of.c_cflag, local: of.c_lflag, keys: of.c_cc }
    }

    fn is_raw(&self) -> bool {
        self.local & (libc::ICANON | libc::ECHO | libc::ISIG | libc::IEXTEN) == 0
            && self.input & (libc::ICRNL | libc::IXON) == 0
    }
}

/// There is one raw mode to a process, and tests run side by side.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This program again, in the given part, with `stdin` as its standard input.
fn actor(part: &str, stdin: impl Into<Stdio>) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "terminal::tests::play_a_part", "--nocapture", "--ignored", "--test-threads=1"])
        .env(PART, part)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Reads the actor's output until a line ends with `text` (the test harness writes its own before it).
fn wait_for(child: &mut Child, text: &str) {
    // One byte at a time, so that nothing is taken off that a later reader is to see.
    let output = child.stdout.as_mut().unwrap();
    let (mut byte, mut line, mut all) = ([0], String::new(), String::new());
    while output.read(&mut byte).unwrap() == 1 {
        line.push(char::from(byte[0]));
        if byte[0] == b'\n' {
            if line.trim_end().ends_with(text) {
                return;
            }
            all.push_str(&std::mem::take(&mut line));
        }
    }
    let mut errors = String::new();
    child.stderr.as_mut().unwrap().read_to_string(&mut errors).unwrap();
    panic!("the actor ended without {text:?}: {all}{line}{errors}");
}

/// Starts `part` on a new terminal, checks that the terminal gets raw, lets `act` happen, and checks that at the actor's
/// end the terminal is as before. Returns how the actor ended, with its error output.
fn settings_are_put_back(part: &str, act: impl FnOnce(&mut File, &Child)) -> (ExitStatus, String) {
    let mut tty = Tty::new();
    let before = tty.settings();
    assert!(!before.is_raw());
    let mut child = actor(part, tty.slave.try_clone().unwrap()).spawn().unwrap();
    wait_for(&mut child, ENTERED);
    assert!(tty.settings().is_raw());
    act(&mut tty.master, &child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(tty.settings(), before);
    (output.status, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Types a key, upon which the actor goes on.
fn go(master: &mut File, _: &Child) {
    master.write_all(b"g").unwrap();
}

fn send(child: &Child, signal: libc::c_int) {
    let id = libc::pid_t::try_from(child.id()).unwrap();
    // SAFETY: the child has not been waited for, so that the number is its own.
    assert_eq!(unsafe { libc::kill(id, signal) }, 0);
}

/// Waits until `done`, which `child` brings about.
fn until(child: &mut Child, what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert_eq!(child.try_wait().unwrap(), None, "the child ended before it was {what}");
        assert!(start.elapsed() < Duration::from_secs(60), "not {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn anything_but_a_terminal_is_left_alone() {
    let _alone = alone();
    assert!(RawMode::enter(File::open("/dev/null").unwrap()).unwrap().is_none());
    assert!(RawMode::enter(io::pipe().unwrap().0).unwrap().is_none());
}

#[test]
fn terminal_is_raw_until_the_drop_and_then_as_before() {
    let _alone = alone();
    let tty = Tty::new();
    let before = tty.settings();
    for _ in 0..2 {
        let raw = RawMode::enter(&tty.slave).unwrap().unwrap();
        let during = tty.settings();
        assert!(during.is_raw() && raw.hold());
        assert_eq!(during.output, before.output, "output is processed as before");
        drop(raw);
        assert_eq!(tty.settings(), before);
    }
}

#[test]
fn keys_arrive_at_once_unchanged_and_without_echo() {
    let _alone = alone();
    let mut tty = Tty::new();
    let _raw = RawMode::enter(&tty.slave).unwrap().unwrap();
    let keys = b"\x03\x1a\x1c\x04\r\n\x13\x11\x16\x7f\x15\0\xff";
    tty.master.write_all(keys).unwrap();
    let mut seen = [0; 13];
    File::from(tty.slave.try_clone().unwrap()).read_exact(&mut seen).unwrap();
    assert_eq!(&seen, keys);
    File::from(tty.slave.try_clone().unwrap()).write_all(b"!").unwrap();
    let mut shown = [0];
    tty.master.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"!", "keys were echoed");
}

#[test]
fn keys_left_unread_by_the_guest_are_not_handed_to_the_shell() {
    let _alone = alone();
    let mut tty = Tty::new();
    let raw = RawMode::enter(&tty.slave).unwrap().unwrap();
    tty.master.write_all(b"rm -r .\n").unwrap();
    drop(raw);
    tty.master.write_all(b"ls\n").unwrap();
    let mut line = String::new();
    BufReader::new(File::from(tty.slave)).read_line(&mut line).unwrap();
    assert_eq!(line, "ls\n");
}

#[test]
fn second_terminal_at_a_time_is_refused_and_untouched() {
    let _alone = alone();
    let (one, other) = (Tty::new(), Tty::new());
    let before = other.settings();
    let _raw = RawMode::enter(&one.slave).unwrap().unwrap();
    assert_eq!(RawMode::enter(&other.slave).unwrap_err().kind(), io::ErrorKind::ResourceBusy);
    assert_eq!(other.settings(), before);
    assert!(one.settings().is_raw());
}

#[test]
fn signals_are_handled_as_before_afterwards_unless_somebody_took_them_over() {
    let _alone = alone();
    // No other test has to do with these two.
    let handler = |signal| action(signal).unwrap().sa_sigaction;
    let before = [libc::SIGPWR, libc::SIGSTKFLT].map(handler);
    let tty = Tty::new();
    let raw = RawMode::enter(&tty.slave).unwrap().unwrap();
    assert!(handler(libc::SIGPWR) != before[0] && handler(libc::SIGSTKFLT) != before[1]);
    // SAFETY: ignoring a signal runs no code.
    unsafe { libc::signal(libc::SIGSTKFLT, libc::SIG_IGN) };
    drop(raw);
    assert_eq!(handler(libc::SIGPWR), before[0]);
    assert_eq!(handler(libc::SIGSTKFLT), libc::SIG_IGN);
    // SAFETY: the default runs no code either.
    unsafe { libc::signal(libc::SIGSTKFLT, libc::SIG_DFL) };
}

#[test]
fn hung_up_terminal_is_no_reason_to_fail_at_the_end() {
    let _alone = alone();
    let tty = Tty::new();
    let raw = RawMode::enter(&tty.slave).unwrap().unwrap();
    drop(tty.master);
    assert!(raw.hold(), "its reader is to find out");
    drop(raw);
    assert!(RawMode::enter(&tty.slave).is_err());
}

#[test]
fn return_puts_the_settings_back() {
    assert!(settings_are_put_back("return", go).0.success());
}

#[test]
fn exit_from_another_thread_puts_the_settings_back() {
    assert_eq!(settings_are_put_back("exit", go).0.code(), Some(7));
}

#[test]
fn panic_that_unwinds_puts_the_settings_back() {
    let (status, errors) = settings_are_put_back("panic", go);
    assert!(!status.success() && errors.contains("a planned panic"), "{errors}");
}

#[test]
fn panic_that_aborts_puts_the_settings_back() {
    let (status, errors) = settings_are_put_back("abort", go);
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{errors}");
}

#[test]
fn fault_puts_the_settings_back_and_is_still_that_fault() {
    let (status, errors) = settings_are_put_back("fault", go);
    assert_eq!(status.signal(), Some(libc::SIGSEGV), "{errors}");
}

#[test]
fn stack_overflow_puts_the_settings_back_and_is_told_as_before() {
    let (status, errors) = settings_are_put_back("overflow", go);
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{errors}");
    assert!(errors.contains("overflowed its stack"), "{errors}");
}

#[test]
fn signals_that_end_the_process_put_the_settings_back_and_end_it() {
    for signal in [
        libc::SIGTERM,
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGABRT,
        libc::SIGUSR1,
        libc::SIGXCPU,
    ] {
        let (status, errors) = settings_are_put_back("wait", |_, child| send(child, signal));
        assert_eq!(status.signal(), Some(signal), "{errors}");
    }
}

#[test]
fn ignored_signal_stays_ignored() {
    let (status, errors) = settings_are_put_back("ignore", |master, child| {
        send(child, libc::SIGHUP);
        go(master, child);
    });
    assert!(status.success(), "{errors}");
}

#[test]
fn end_of_a_forked_child_leaves_the_terminal_raw() {
    let (status, errors) = settings_are_put_back("fork", go);
    assert!(status.success(), "{errors}");
}

/// The terminal of this one is that of a session, with a shell that moves jobs between foreground and background.
#[test]
fn terminal_changes_hands_with_the_foreground() {
    let tty = Tty::new();
    let mut shell = actor("shell", tty.slave.try_clone().unwrap());
    // SAFETY: between fork and exec only these two calls are made, which are safe there.
    unsafe {
        shell.pre_exec(|| {
            if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let output = shell.spawn().unwrap().wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Not a test of its own: what the processes that the tests above start do.
#[test]
#[ignore = "is the other process of the tests beside it"]
fn play_a_part() {
    match env::var(PART).as_deref() {
        Ok("shell") => be_the_shell(),
        Ok("job") => be_the_job(),
        Ok(part) => be_a_guest(part),
        Err(_) => {}
    }
}

/// Waits for a key; no line end has to follow it.
fn wait_for_go() {
    let mut key = [0];
    io::stdin().read_exact(&mut key).unwrap();
    assert_eq!(&key, b"g");
}

fn be_a_guest(part: &str) {
    if part == "ignore" {
        // SAFETY: ignoring a signal runs no code.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
    }
    let raw = RawMode::enter(io::stdin()).unwrap().unwrap();
    println!("\n{ENTERED}");
    wait_for_go();
    match part {
        "return" | "ignore" => {}
        "exit" => thread::spawn(|| process::exit(7)).join().unwrap(),
        "panic" => panic!("a planned panic"),
        "abort" => {
            // What a panic does in a release build.
            std::panic::set_hook(Box::new(|_| process::abort()));
            panic!("a planned panic");
        }
        "fault" => {
            // SAFETY: no memory that anybody uses is touched; a page without permissions is made for it.
            unsafe {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let page = libc::mmap(ptr::null_mut(), 4096, libc::PROT_NONE, flags, -1, 0);
                assert_ne!(page, libc::MAP_FAILED);
                ptr::read_volatile(page.cast::<u8>());
            }
        }
        "overflow" => assert_eq!(descend(0), 0),
        "fork" => die_in_a_child(),
        part => panic!("no part {part:?}"),
    }
    drop(raw);
}

#[inline(never)]
fn descend(depth: u64) -> u64 {
    let here = std::hint::black_box([depth; 64]);
    if here[0] == u64::MAX { 0 } else { descend(depth + 1) + here[63] }
}

fn die_in_a_child() {
    // SAFETY: the child only makes calls that are safe after a fork of a threaded process.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: as above.
        unsafe {
            libc::raise(libc::SIGTERM);
            libc::_exit(0);
        }
    }
    let mut status = 0;
    // SAFETY: child is a child of this process.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert!(libc::WIFSIGNALED(status));
    assert!(Settings::of(&io::stdin()).is_raw(), "the child put the settings back");
}

/// Enters raw mode on the terminal, and then answers each line of its other input.
fn be_the_job() {
    // The pipe that the shell gives orders through.
    // SAFETY: the shell left descriptor 3 open for this process alone.
    let orders = BufReader::new(unsafe { File::from_raw_fd(3) });
    let raw = RawMode::enter(io::stdin()).unwrap().unwrap();
    println!("\n{ENTERED}");
    for order in orders.lines() {
        match order.unwrap().as_str() {
            "hold?" => println!("{}", if raw.hold() { "held" } else { "not held" }),
            order => panic!("no order {order:?}"),
        }
    }
}

/// Starts a job in the background and moves it about, as `fg`, `bg` and `kill` do.
fn be_the_shell() {
    let terminal = io::stdin();
    let saved = settings(terminal.as_fd()).unwrap();
    let usual = Settings::of(&terminal);
    let is_raw = || Settings::of(&io::stdin()).is_raw();
    // SAFETY: ignoring a signal runs no code. A shell may take the terminal back from the background.
    unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
    let give_terminal_to = |group: libc::pid_t| {
        // SAFETY: the kernel checks the number.
        let given = unsafe { libc::tcsetpgrp(io::stdin().as_raw_fd(), group) };
        assert_eq!(given, 0, "{}", io::Error::last_os_error());
    };
    // SAFETY: has no preconditions.
    let shell = unsafe { libc::getpgrp() };

    let (orders, mut order) = io::pipe().unwrap();
    let mut command = actor("job", Stdio::inherit());
    let orders_fd = orders.as_raw_fd();
    // SAFETY: between fork and exec only these calls are made, which are safe there.
    unsafe {
        command.process_group(0).pre_exec(move || {
            libc::signal(libc::SIGTTOU, libc::SIG_DFL);
            if orders_fd == 3 {
                libc::fcntl(3, libc::F_SETFD, 0);
            } else if libc::dup2(orders_fd, 3) < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        });
    }
    let mut job = command.spawn().unwrap();
    drop(orders);
    let group = libc::pid_t::try_from(job.id()).unwrap();
    let stopped = || {
        let mut status = 0;
        // SAFETY: the job is a child of this process.
        let waited = unsafe { libc::waitpid(group, &raw mut status, libc::WUNTRACED) };
        waited == group && libc::WIFSTOPPED(status)
    };
    let mut ask = |job: &mut Child, answer| {
        writeln!(order, "hold?").unwrap();
        wait_for(job, answer);
    };

    wait_for(&mut job, ENTERED);
    assert_eq!(Settings::of(&terminal), usual, "entered in the background");
    ask(&mut job, "not held");
    assert_eq!(Settings::of(&terminal), usual, "asked in the background");

    give_terminal_to(group);
    ask(&mut job, "held");
    assert!(is_raw(), "asked in the foreground");

    send(&job, libc::SIGTSTP);
    assert!(stopped());
    assert_eq!(Settings::of(&terminal), usual, "stopped by SIGTSTP");
    send(&job, libc::SIGCONT);
    until(&mut job, "raw after SIGTSTP and SIGCONT", is_raw);
    ask(&mut job, "held");

    // A second time, since the handler has to be put back.
    send(&job, libc::SIGTSTP);
    assert!(stopped());
    assert_eq!(Settings::of(&terminal), usual, "stopped by SIGTSTP again");
    send(&job, libc::SIGCONT);
    until(&mut job, "raw after the second SIGTSTP and SIGCONT", is_raw);

    send(&job, libc::SIGSTOP);
    assert!(stopped());
    give_terminal_to(shell);
    set(terminal.as_raw_fd(), &saved).unwrap();
    send(&job, libc::SIGCONT);
    ask(&mut job, "not held");
    assert_eq!(Settings::of(&terminal), usual, "continued in the background");

    give_terminal_to(group);
    ask(&mut job, "held");
    assert!(is_raw(), "back in the foreground without a signal");

    // At its end in the background the terminal is another's.
    give_terminal_to(shell);
    drop(order);
    assert!(job.wait().unwrap().success());
    assert!(is_raw(), "the job changed a terminal that it did not have");
}
