//! Work that takes long: a bar for whoever watches, and an end for whoever interrupts.

use std::fmt;
use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanDuration, ProgressBar, ProgressState, ProgressStyle};
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
            let bar = ProgressBar::new(total).with_elapsed(self.began.elapsed());
            let style =
                ProgressStyle::with_template("{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {pace}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).with_key("pace", show_pace));
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

/// How fast it goes and how long that will take. The bar's own rates take what was done before there was a bar for done in no
/// time.
fn show_pace(state: &ProgressState, out: &mut dyn fmt::Write) {
    let (rate, left) = pace(state.pos(), state.len().unwrap_or(0), state.elapsed());
    // A line that is not shown is no reason to end.
    let _ = write!(out, "{}/s {:#}", BinaryBytes(rate), HumanDuration(left));
}

/// Bytes a second if `done` of them took `elapsed`, and how long the rest of `total` takes at that.
fn pace(done: u64, total: u64, elapsed: Duration) -> (u64, Duration) {
    let milliseconds = elapsed.as_millis().max(1);
    let rate = u64::try_from(u128::from(done) * 1000 / milliseconds).unwrap_or(u64::MAX);
    (rate, Duration::from_secs(total.saturating_sub(done).checked_div(rate).unwrap_or(0)))
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pace_counts_from_the_beginning_of_the_work() {
        let second = Duration::from_secs(1);
        assert_eq!(pace(0, 100, Duration::ZERO), (0, Duration::ZERO));
        assert_eq!(pace(1 << 30, 3 << 30, second), (1 << 30, 2 * second));
        assert_eq!(pace(1 << 30, 3 << 30, second / 2), (2 << 30, second));
        assert_eq!(pace(5, 4, second), (5, Duration::ZERO));
        assert_eq!(pace(u64::MAX, u64::MAX, Duration::ZERO), (u64::MAX, Duration::ZERO));
    }
}
