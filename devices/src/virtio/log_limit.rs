//! A bound on what a guest can make its monitor log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Messages let through in one [`WINDOW`].
const BURST: u32 = 10;
/// Length of a window.
const WINDOW: Duration = Duration::from_secs(10);

#[derive(Debug)]
struct Window {
    began: Option<Instant>,
    passed: u32,
    dropped: u64,
}

/// Lets a burst of messages through and drops the rest for a while; one for each place that logs what a guest can
/// provoke.
#[derive(Debug)]
pub struct LogLimit(Mutex<Window>);

impl Default for LogLimit {
    fn default() -> Self {
        Self::new()
    }
}

impl LogLimit {
    /// A limit that has seen nothing yet.
    #[must_use]
    pub const fn new() -> Self {
        Self(Mutex::new(Window { began: None, passed: 0, dropped: 0 }))
    }

    /// Logs by `log`, which is told how many messages were dropped since the last one, unless there were too many.
    pub fn log(&self, log: impl FnOnce(Dropped)) {
        if let Some(dropped) = self.permit(Instant::now()) {
            log(Dropped(dropped));
        }
    }

    fn permit(&self, now: Instant) -> Option<u64> {
        let mut window = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if window.began.is_none_or(|began| now.saturating_duration_since(began) >= WINDOW) {
            (window.began, window.passed) = (Some(now), 0);
        }
        if window.passed == BURST {
            window.dropped += 1;
            return None;
        }
        window.passed += 1;
        Some(std::mem::take(&mut window.dropped))
    }
}

/// How many messages were dropped; shows itself as something to append to the next one, empty for none.
#[derive(Debug, Clone, Copy)]
pub struct Dropped(u64);

impl std::fmt::Display for Dropped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            0 => Ok(()),
            count => write!(f, " ({count} messages like this one were dropped)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_passes_the_rest_is_dropped_and_counted_in_the_next_window() {
        let (limit, start) = (LogLimit::new(), Instant::now());
        for _ in 0..BURST {
            assert_eq!(limit.permit(start), Some(0));
        }
        for _ in 0..5 {
            assert_eq!(limit.permit(start + WINDOW / 2), None);
        }
        assert_eq!(limit.permit(start + WINDOW), Some(5));
        assert_eq!(limit.permit(start + WINDOW), Some(0));
    }

    #[test]
    fn number_of_dropped_messages_is_shown_only_if_there_were_some() {
        assert_eq!(Dropped(0).to_string(), "");
        assert!(Dropped(3).to_string().contains("3 messages"));
    }
}
