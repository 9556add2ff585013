//! Work that takes long: a bar for whoever watches, and an end for whoever interrupts.

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use vmm_sys_util::signal::register_signal_handler;

/// Work that is done sooner gets no bar.
const PATIENCE: Duration = Duration::from_millis(500);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// How far something is.
#[derive(Debug)]
pub struct Progress {
    began: Instant,
    what: &'static str,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Begins `what`, such as "copying". From here on SIGINT and SIGTERM end it cleanly instead of ending the process.
    pub fn begin(what: &'static str) -> Result<Self, vmm_sys_util::errno::Error> {
        for signal in [libc::SIGINT, libc::SIGTERM] {
            register_signal_handler(signal, interrupt)?;
        }
        Ok(Self::watched(what))
    }

    /// The same where signals are somebody else's affair.
    pub fn watched(what: &'static str) -> Self {
        Self { began: Instant::now(), what, bar: None }
    }

    /// So many bytes of so many are done; says whether to go on.
    pub fn report(&mut self, done: u64, total: u64) -> ControlFlow<()> {
        if INTERRUPTED.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        if self.bar.is_none() && self.began.elapsed() >= PATIENCE && io::stderr().is_terminal() {
            let bar = ProgressBar::new(total);
            let style = ProgressStyle::with_template(
                "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}",
            );
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_message(self.what);
            self.bar = Some(bar);
        }
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
        }
        ControlFlow::Continue(())
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
