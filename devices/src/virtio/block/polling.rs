//! For how long a thread looks for work before it sleeps.
//!
//! Waking a thread, and the exit of a processor that does it, cost more than many a request. So after its last request a
//! thread goes on looking for a while, if that has paid lately: a wake-up soon after it had gone to sleep makes the while
//! longer, one long after it shorter, down to none for a disk that is seldom used.

use std::time::{Duration, Instant};

/// The while to begin with.
const LEAST: Duration = Duration::from_micros(4);

/// The while, as it is at the time.
#[derive(Debug)]
pub struct Polling {
    most: Duration,
    window: Duration,
    asleep_since: Option<Instant>,
}

impl Polling {
    /// Looks for work for up to `most`; zero is not at all.
    pub fn new(most: Duration) -> Self {
        Self { most, window: Duration::ZERO, asleep_since: None }
    }

    /// For how long to look.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// The thread goes to sleep.
    pub fn sleeps(&mut self, now: Instant) {
        self.asleep_since = Some(now);
    }

    /// The thread was woken.
    pub fn wakes(&mut self, now: Instant) {
        let Some(since) = self.asleep_since.take() else { return };
        self.window = if now.saturating_duration_since(since) <= self.most {
            (self.window * 2).clamp(LEAST, self.most.max(LEAST)).min(self.most)
        } else if self.window <= LEAST {
            Duration::ZERO
        } else {
            self.window / 2
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Duration = Duration::from_micros(50);

    #[test]
    fn window_grows_with_short_sleeps_and_shrinks_with_long_ones() {
        let mut polling = Polling::new(MOST);
        let mut now = Instant::now();
        let mut sleep = |polling: &mut Polling, time: Duration| {
            polling.sleeps(now);
            now += time;
            polling.wakes(now);
            polling.window()
        };
        assert_eq!(sleep(&mut polling, Duration::from_millis(1)), Duration::ZERO);
        let grown: Vec<_> = (0..6).map(|_| sleep(&mut polling, Duration::from_micros(20))).collect();
        assert_eq!((grown[0], grown[5]), (LEAST, MOST));
        assert!(grown.is_sorted());
        let shrunk: Vec<_> = (0..6).map(|_| sleep(&mut polling, Duration::from_millis(1))).collect();
        assert_eq!(shrunk[5], Duration::ZERO);
        assert!(shrunk.is_sorted_by(|a, b| a >= b));
    }

    #[test]
    fn without_a_window_nothing_is_looked_for() {
        let mut polling = Polling::new(Duration::ZERO);
        let now = Instant::now();
        polling.sleeps(now);
        polling.wakes(now);
        assert_eq!(polling.window(), Duration::ZERO);
    }
}
