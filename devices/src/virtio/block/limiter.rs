//! How much a guest may ask for.
//!
//! Each limit is a clock that runs ahead of time: a request moves it on by what it costs at the limit's rate, and requests
//! begin as long as it is not further ahead than the burst (the generic cell rate algorithm, ITU-T I.371, annex A). So it
//! is known exactly for how long the next one has to wait, and a request that is larger than a burst is paid for afterwards.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::options::Limits;

/// Parts of a second that costs are counted in: femtoseconds, in which that of a byte at 1 TiB/s is still exact to 0.2 %.
const UNIT: u128 = 1_000_000_000_000_000;

/// Limits of a disk, all of its queues together.
#[derive(Debug)]
pub struct Limiter {
    /// There is something to be limited, so that others need not take the lock.
    active: AtomicBool,
    clocks: Mutex<Clocks>,
}

#[derive(Debug)]
struct Clocks {
    limits: Limits,
    began: Instant,
    /// Of requests and of bytes, since it began.
    ahead: [u128; 2],
}

fn units(time: Duration) -> u128 {
    time.as_nanos() * (UNIT / 1_000_000_000)
}

impl Limiter {
    pub fn new(limits: Limits) -> Self {
        let clocks = Clocks { limits, began: Instant::now(), ahead: [0; 2] };
        Self { active: AtomicBool::new(is_limit(&limits)), clocks: Mutex::new(clocks) }
    }

    fn clocks(&self) -> MutexGuard<'_, Clocks> {
        self.clocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets other limits, and forgets what was used so far.
    pub fn set(&self, limits: Limits) {
        let mut clocks = self.clocks();
        *clocks = Clocks { limits, began: Instant::now(), ahead: [0; 2] };
        self.active.store(is_limit(&limits), Ordering::Release);
    }

    pub fn limits(&self) -> Limits {
        self.clocks().limits
    }

    /// Whether there are any.
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Acquire)
    }

    /// For how long nothing may begin, at `now`; `None` if something may.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        if !self.is_active() {
            return None;
        }
        let clocks = self.clocks();
        let allowed = units(now.saturating_duration_since(clocks.began) + clocks.limits.burst);
        let ahead = clocks.ahead.into_iter().max().unwrap_or(0).checked_sub(allowed).filter(|by| *by > 0)?;
        let nanos = u64::try_from(ahead.div_ceil(UNIT / 1_000_000_000)).unwrap_or(u64::MAX);
        Some(Duration::from_nanos(nanos))
    }

    /// A request for `bytes` begins at `now`.
    pub fn charge(&self, bytes: u64, now: Instant) {
        if !self.is_active() {
            return;
        }
        let mut clocks = self.clocks();
        let now = units(now.saturating_duration_since(clocks.began));
        let Limits { iops, bytes_per_second, .. } = clocks.limits;
        let costs = [(1, iops), (bytes, bytes_per_second)];
        for (clock, (amount, rate)) in clocks.ahead.iter_mut().zip(costs) {
            if let Some(rate) = rate {
                *clock = now.max(*clock) + u128::from(amount) * UNIT / u128::from(rate.max(1));
            }
        }
    }
}

fn is_limit(limits: &Limits) -> bool {
    limits.iops.is_some() || limits.bytes_per_second.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Lets requests of the given sizes begin as soon as they may, and says when the last one did.
    fn run(limits: Limits, sizes: &[u64]) -> Duration {
        let limiter = Limiter::new(limits);
        let began = limiter.clocks().began;
        let mut now = began;
        for size in sizes {
            while let Some(wait) = limiter.wait(now) {
                assert!(wait > Duration::ZERO);
                now += wait;
            }
            limiter.charge(*size, now);
        }
        now - began
    }

    #[test]
    fn without_limits_nothing_waits() {
        assert_eq!(run(Limits::default(), &[u64::MAX; 10]), Duration::ZERO);
    }

    #[test]
    fn requests_come_at_the_rate_after_a_burst() {
        let limits = Limits { iops: Some(100), bytes_per_second: None, burst: Duration::from_millis(100) };
        // Ten fit into the burst, and one that takes its last moment.
        assert_eq!(run(limits, &[0; 11]), Duration::ZERO);
        assert_eq!(run(limits, &[0; 111]), Duration::from_secs(1));
    }

    #[test]
    fn request_larger_than_a_burst_is_paid_for_afterwards() {
        let limits = Limits { iops: None, bytes_per_second: Some(1 << 20), burst: Duration::from_millis(1) };
        assert_eq!(run(limits, &[4 << 20, 512]), Duration::from_millis(3999));
    }

    #[test]
    fn what_was_not_used_is_kept_for_no_longer_than_a_burst() {
        let limits = Limits { iops: Some(1000), bytes_per_second: None, burst: Duration::from_millis(10) };
        let limiter = Limiter::new(limits);
        let later = limiter.clocks().began + Duration::from_secs(3600);
        let mut begun = 0;
        while limiter.wait(later).is_none() {
            limiter.charge(0, later);
            begun += 1;
        }
        assert_eq!(begun, 11);
    }

    #[test]
    fn other_limits_count_at_once() {
        let slow = Limits { iops: Some(1), bytes_per_second: None, burst: Duration::ZERO };
        let limiter = Limiter::new(slow);
        let now = Instant::now();
        limiter.charge(0, now);
        assert!(limiter.wait(now).is_some());
        limiter.set(Limits::default());
        assert!(limiter.wait(now).is_none() && !limiter.is_active());
    }

    #[allow(clippy::cast_precision_loss, reason = "to a billionth")]
    fn seconds(count: u64, rate: u64) -> f64 {
        count as f64 / rate as f64
    }

    proptest! {
        #[test]
        fn over_time_no_more_than_the_limits_and_no_less(
            iops in 1..2_000_000_u64,
            rate in 4096..(1_u64 << 40),
            burst in 0..200_u64,
            sizes in prop::collection::vec(1..2048_u64, 200..400),
        ) {
            let sizes: Vec<u64> = sizes.into_iter().map(|sectors| sectors * 512).collect();
            let burst = Duration::from_millis(burst);
            let limits = Limits { iops: Some(iops), bytes_per_second: Some(rate), burst };
            let took = run(limits, &sizes).as_secs_f64();
            // The last one may begin, whatever it costs.
            let (_, paid) = sizes.split_last().unwrap();
            let least = seconds(paid.len() as u64, iops).max(seconds(paid.iter().sum(), rate));
            // Now the one limit holds, now the other.
            let most: f64 = paid.iter().map(|size| seconds(1, iops).max(seconds(*size, rate))).sum();
            let burst = burst.as_secs_f64();
            // Waits are rounded up to nanoseconds.
            let slack = 1e-9 * seconds(sizes.len() as u64, 1) + 1e-6 * most;
            prop_assert!(took >= least - burst - slack, "{took} < {least} - {burst}");
            prop_assert!(took <= (most - burst).max(0.0) + slack, "{took} > {most} - {burst}");
        }
    }
}
