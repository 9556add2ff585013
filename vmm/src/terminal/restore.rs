//! Putting a terminal's settings back on every way out of the process, the violent ones included.
//!
//! | way out | who puts the settings back |
//! | --- | --- |
//! | return, error, unwinding panic | `Drop` of [`RawMode`](super::RawMode) |
//! | `exit()` from anywhere | a function registered with `atexit` |
//! | panic that aborts, `abort()`, SIGSEGV and its like | [`on_fatal`], which then lets the signal have its effect |
//! | SIGTERM and the others that end a process which does not handle them | the same |
//! | SIGTSTP | [`on_stop`]; [`on_continue`] makes the terminal raw again |
//!
//! SIGKILL and `_exit()` leave no chance. SIGSTOP leaves none either, but a shell that does job control puts its own
//! settings in force then, and SIGCONT comes here again.
//!
//! Nothing is touched while another process group has the terminal: its settings are not ours to change then, and
//! the kernel would stop us for trying (SIGTTOU). Everything in this file that handlers reach is safe in
//! a signal handler (signal-safety(7)): it calls only `tcgetattr`, `tcsetattr`, `tcflush`, `tcgetpgrp`, `getpgrp`, `getpid`,
//! `pthread_sigmask`, `sigaction` and `raise`, and takes no locks and no memory.

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, RawFd};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};

/// Signals whose default is to end the process because of what it did itself. They are handled even where
/// somebody else handles them already: the standard library does, to tell stack overflows.
const FAULTS: [libc::c_int; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGABRT, libc::SIGSYS, libc::SIGTRAP];
/// Signals whose default is to end the process, for any other reason.
const REQUESTS: [libc::c_int; 15] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGPIPE,
    libc::SIGALRM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGPOLL,
    libc::SIGPWR,
    libc::SIGSTKFLT,
    libc::SIGXCPU,
    libc::SIGXFSZ,
];
const HANDLED: usize = FAULTS.len() + REQUESTS.len() + 2;

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// The terminal in use, or null. What it points to is never freed, because a handler may be at it on any thread.
static CURRENT: AtomicPtr<Terminal> = AtomicPtr::new(ptr::null_mut());

const UNKNOWN: u8 = 0;
const BEING_READ: u8 = 1;
const KNOWN: u8 = 2;

/// A terminal, and what to put back.
pub(super) struct Terminal {
    fd: RawFd,
    /// Children that were forked inherit handlers and memory, but have no say about the terminal.
    owner: libc::pid_t,
    /// `UNKNOWN`, `BEING_READ` or `KNOWN`: the state of `original`.
    known: AtomicU8,
    original: UnsafeCell<MaybeUninit<libc::termios>>,
    /// The settings may be another's, because another process group had the terminal meanwhile.
    doubtful: AtomicBool,
    /// What was done about signals before.
    before: [Option<(libc::c_int, Handler, libc::sigaction)>; HANDLED],
}

// SAFETY: `original` is written only by whoever moved `known` from UNKNOWN to BEING_READ, and read only after
// `known` is KNOWN; the other fields are atomic or do not change.
unsafe impl Sync for Terminal {}

impl std::fmt::Debug for Terminal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Terminal").field("fd", &self.fd).field("known", &self.known).finish_non_exhaustive()
    }
}

impl Terminal {
    /// Takes charge of the terminal `fd` and of signals, and makes it raw if it is this process's.
    ///
    /// # Errors
    ///
    /// Another terminal is in charge already ([`io::ErrorKind::ResourceBusy`]), or one of the system's.
    pub fn take(fd: BorrowedFd<'_>) -> io::Result<&'static Self> {
        // A descriptor of our own: the caller may close its one before the last handler has run.
        let own = fd.try_clone_to_owned()?;
        let terminal = Box::new(Self {
            fd: own.as_raw_fd(),
            // SAFETY: has no preconditions.
            owner: unsafe { libc::getpid() },
            known: AtomicU8::new(UNKNOWN),
            original: UnsafeCell::new(MaybeUninit::uninit()),
            doubtful: AtomicBool::new(true),
            before: handlers(),
        });
        let terminal = Box::into_raw(terminal);
        if CURRENT.compare_exchange(ptr::null_mut(), terminal, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            // SAFETY: the pointer came from Box::into_raw and was not shared.
            drop(unsafe { Box::from_raw(terminal) });
            return Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                "a terminal is in raw mode already, and only one can be",
            ));
        }
        let _: RawFd = own.into_raw_fd();
        // SAFETY: from here on it is never freed.
        let terminal = unsafe { &*terminal };
        static AT_EXIT: Once = Once::new();
        AT_EXIT.call_once(|| {
            // SAFETY: at_exit is a function for the whole life of the process. Where there is no memory to
            // register it, the other ways out remain.
            unsafe { libc::atexit(at_exit) };
        });
        for (signal, handler, _) in terminal.before.iter().flatten() {
            set_handler(*signal, *handler);
        }
        if let Err(error) = terminal.make_raw() {
            terminal.release();
            return Err(error);
        }
        Ok(terminal)
    }

    /// Puts the settings back and leaves signals as they were.
    pub fn release(&self) {
        self.put_back();
        self.leave_signals();
        CURRENT.store(ptr::null_mut(), Ordering::SeqCst);
    }

    /// What is done about signals is again what was done before, unless somebody else has taken them over since.
    fn leave_signals(&self) {
        for (signal, handler, before) in self.before.iter().flatten() {
            if action(*signal).is_some_and(|now| now.sa_sigaction == *handler as usize) {
                set_action(*signal, before);
            }
        }
    }

    /// Whether this process has the terminal. If so and another may have had it since, it is raw again afterwards.
    pub fn hold(&self) -> bool {
        if !self.is_ours() {
            self.doubtful.store(true, Ordering::SeqCst);
            return false;
        }
        // A terminal that takes no settings has hung up, and reading it will say so.
        !self.doubtful.load(Ordering::SeqCst) || self.make_raw().is_ok()
    }

    /// Makes the terminal raw if it is this process's.
    fn make_raw(&self) -> io::Result<()> {
        if !self.is_ours() {
            self.doubtful.store(true, Ordering::SeqCst);
            return Ok(());
        }
        let Some(mut settings) = self.original()? else { return Ok(()) };
        make_raw(&mut settings);
        set(self.fd, &settings)?;
        self.doubtful.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// The settings to go back to: those in force when this process first had the terminal. None if another thread
    /// is just finding out.
    fn original(&self) -> io::Result<Option<libc::termios>> {
        if self.known.compare_exchange(UNKNOWN, BEING_READ, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            // SAFETY: the descriptor is never closed.
            match settings(unsafe { BorrowedFd::borrow_raw(self.fd) }) {
                // SAFETY: this thread moved `known` to BEING_READ, so nobody else is at the cell.
                Ok(settings) => unsafe { (*self.original.get()).write(settings) },
                Err(error) => {
                    self.known.store(UNKNOWN, Ordering::SeqCst);
                    return Err(error);
                }
            };
            self.known.store(KNOWN, Ordering::SeqCst);
        }
        if self.known.load(Ordering::SeqCst) != KNOWN {
            return Ok(None);
        }
        // SAFETY: the cell was written before `known` became KNOWN, and is not written again.
        Ok(Some(unsafe { (*self.original.get()).assume_init() }))
    }

    /// Puts the settings back, and throws away what was typed for the guest and has not been read: a shell would
    /// take it for commands.
    fn put_back(&self) {
        if self.known.load(Ordering::SeqCst) == KNOWN
            && let Ok(Some(settings)) = self.original()
            && self.is_ours()
        {
            without_being_stopped(|| {
                // SAFETY: takes a queue's name by value. If it fails, so does what follows.
                unsafe { libc::tcflush(self.fd, libc::TCIFLUSH) };
                // A terminal that takes no settings has hung up, and nobody is left to care.
                set(self.fd, &settings).unwrap_or_default();
            });
        }
    }

    /// Whether this process may change the terminal: it is the one that took charge, and its process group is in the
    /// foreground, or the terminal is not that of its session, so that there is no job control on it.
    fn is_ours(&self) -> bool {
        // SAFETY: the descriptor is never closed; the other two have no preconditions.
        let (foreground, own, id) = unsafe { (libc::tcgetpgrp(self.fd), libc::getpgrp(), libc::getpid()) };
        id == self.owner && (foreground < 0 || foreground == own)
    }
}

/// What `fd` is set to; an error of kind `NotATerminal` (ENOTTY) if it is no terminal.
pub(super) fn settings(fd: BorrowedFd<'_>) -> io::Result<libc::termios> {
    let mut settings = MaybeUninit::uninit();
    // SAFETY: the kernel fills the structure, or the call fails.
    if unsafe { libc::tcgetattr(fd.as_raw_fd(), settings.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it succeeded.
    Ok(unsafe { settings.assume_init() })
}

/// Sets `fd` at once: to wait until output is out could take forever on a terminal that was halted (Ctrl-S).
pub(super) fn set(fd: RawFd, settings: &libc::termios) -> io::Result<()> {
    // SAFETY: settings is an initialised termios; the kernel checks the descriptor.
    let done = without_being_stopped(|| unsafe { libc::tcsetattr(fd, libc::TCSANOW, settings) });
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Every key comes at once and unchanged, and none has an effect here.
///
/// Output settings stay: guests end their lines with CR LF, which looks the same if the terminal adds another CR,
/// whereas the monitor's own messages, and guests that send bare LF, would run down the screen like stairs.
pub(super) fn make_raw(settings: &mut libc::termios) {
    settings.c_iflag &= !(libc::IGNBRK
        | libc::BRKINT
        | libc::PARMRK
        | libc::ISTRIP
        | libc::INLCR
        | libc::IGNCR
        | libc::ICRNL
        | libc::IXON);
    settings.c_lflag &= !(libc::ECHO | libc::ECHONL | libc::ICANON | libc::ISIG | libc::IEXTEN);
    settings.c_cflag = (settings.c_cflag & !(libc::CSIZE | libc::PARENB)) | libc::CS8;
    settings.c_cc[libc::VMIN] = 1;
    settings.c_cc[libc::VTIME] = 0;
}

/// Runs `act` without SIGTTOU, which would stop the process if the terminal is taken away in the middle.
fn without_being_stopped<T>(act: impl FnOnce() -> T) -> T {
    let set = only(libc::SIGTTOU);
    let mut before = set;
    // SAFETY: both are initialised signal sets.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut before) };
    let result = act();
    // SAFETY: as above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut()) };
    result
}

fn only(signal: libc::c_int) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set, and signal is one.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        set.assume_init()
    }
}

/// The signals to be handled, with their handlers and what is done about them now. One that is ignored stays so
/// (`nohup`), and one that somebody handles is left to him, [`FAULTS`] excepted.
fn handlers() -> [Option<(libc::c_int, Handler, libc::sigaction)>; HANDLED] {
    let mut handlers = [None; HANDLED];
    let faults = FAULTS.into_iter().map(|signal| (signal, on_fatal as Handler));
    let requests = REQUESTS.into_iter().map(|signal| (signal, on_fatal as Handler));
    let jobs = [(libc::SIGTSTP, on_stop as Handler), (libc::SIGCONT, on_continue as Handler)];
    for (slot, (signal, handler)) in handlers.iter_mut().zip(faults.chain(requests).chain(jobs)) {
        *slot = action(signal)
            .filter(|before| {
                before.sa_sigaction == libc::SIG_DFL
                    || (before.sa_sigaction != libc::SIG_IGN && FAULTS.contains(&signal))
            })
            .map(|before| (signal, handler, before));
    }
    handlers
}

/// What is done about `signal` now.
pub(super) fn action(signal: libc::c_int) -> Option<libc::sigaction> {
    // SAFETY: an all-zero sigaction is a valid value to be overwritten.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: a null new action only asks for the present one.
    let asked = unsafe { libc::sigaction(signal, ptr::null(), &raw mut action) };
    (asked == 0).then_some(action)
}

fn set_handler(signal: libc::c_int, handler: Handler) {
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    if FAULTS.contains(&signal) {
        // On the stack for handlers, as the fault may be that the thread's own has overflowed. Only then: that
        // stack does not hold two handlers, on processors with large registers.
        action.sa_flags |= libc::SA_ONSTACK;
    }
    // SAFETY: sa_mask is a signal set. No handler is to interrupt another.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    set_action(signal, &action);
}

fn set_action(signal: libc::c_int, action: &libc::sigaction) {
    // SAFETY: the action is either one of the handlers below, which are safe in a signal handler, or what was
    // in force before. It cannot fail for a signal that can be handled.
    unsafe { libc::sigaction(signal, action, ptr::null_mut()) };
}

fn current() -> Option<&'static Terminal> {
    // SAFETY: CURRENT is null or points to what is never freed.
    unsafe { CURRENT.load(Ordering::SeqCst).as_ref() }
}

extern "C" fn at_exit() {
    if let Some(terminal) = current() {
        terminal.put_back();
    }
}

/// Puts the settings back and lets the signal have the effect it would have had.
extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(terminal) = current() {
        terminal.put_back();
        // All of them: what was there before us may abort, and the stack for handlers does not hold many.
        terminal.leave_signals();
    }
    // SAFETY: the kernel hands in a valid siginfo.
    if faults_again(signal, unsafe { (*info).si_code }) {
        // The instruction is executed once more and meets what was there before us, with its own details.
        return;
    }
    // SAFETY: an all-zero sigaction is the default action.
    set_action(signal, &unsafe { std::mem::zeroed() });
    // SAFETY: takes effect when this handler returns, as the signal is blocked until then.
    unsafe { libc::raise(signal) };
}

/// Whether the signal comes again when the interrupted instruction is resumed: the processor raised it for that
/// instruction, and it was not sent (sigaction(2), `si_code`).
fn faults_again(signal: libc::c_int, code: libc::c_int) -> bool {
    // The memory error may be elsewhere than where the program is.
    const BUS_MCEERR_AO: libc::c_int = 5;
    match signal {
        libc::SIGSEGV | libc::SIGILL | libc::SIGFPE => code > 0,
        libc::SIGBUS => code > 0 && code != BUS_MCEERR_AO,
        _ => false,
    }
}

/// Puts the settings back and stops the process as SIGTSTP does.
extern "C" fn on_stop(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    keeping_errno(|| {
        let Some(terminal) = current() else { return };
        terminal.put_back();
        let set = only(signal);
        // SAFETY: an all-zero sigaction is the default action.
        set_action(signal, &unsafe { std::mem::zeroed() });
        // SAFETY: raise has no preconditions, and set is an initialised signal set. The process stops when the
        // signal is unblocked.
        unsafe {
            libc::raise(signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, ptr::null_mut());
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut());
        }
        if current().is_some() {
            set_handler(signal, on_stop);
        }
        // The kernel does not stop a process that has no shell to continue it.
        terminal.make_raw().unwrap_or_default();
    });
}

/// Makes the terminal raw again: the shell has put its own settings in force meanwhile.
extern "C" fn on_continue(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    keeping_errno(|| {
        if let Some(terminal) = current() {
            terminal.make_raw().unwrap_or_default();
        }
    });
}

/// The code that a handler interrupts may be about to look at `errno`.
fn keeping_errno(act: impl FnOnce()) {
    // SAFETY: the location is valid for the life of the thread.
    let errno = unsafe { *libc::__errno_location() };
    act();
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}
