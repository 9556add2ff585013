//! Waiting for the host to have nothing else to do, so that a run is not measured together with somebody's build.

use std::fs;
use std::time::{Duration, Instant};

/// Time between two looks.
const INTERVAL: Duration = Duration::from_millis(3);
/// Looks in a row that must find nobody else running.
const LOOKS: u32 = 4;

/// Waits until only this thread has been running for a while, at most as long as `patience`; whether it came to that.
#[must_use]
pub fn wait(patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    let mut quiet = 0;
    while quiet < LOOKS {
        let others =
            fs::read_to_string("/proc/stat").ok().and_then(|stat| running(&stat)).is_none_or(|n| n > 1);
        quiet = if others { 0 } else { quiet + 1 };
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(INTERVAL);
    }
    true
}

/// Number of threads that run or could, on all processors (`procs_running`, proc_stat(5)).
fn running(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("procs_running "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_threads_are_found_among_the_other_counts() {
        assert_eq!(running("cpu 1 2\nprocesses 9\nprocs_running 3\nprocs_blocked 4\n"), Some(3));
        assert_eq!(running("procs_running many\n"), None);
        assert_eq!(running("cpu 1 2\n"), None);
        assert!(fs::read_to_string("/proc/stat").is_ok_and(|stat| running(&stat) >= Some(1)));
    }

    #[test]
    fn no_patience_is_no_quiet() {
        assert!(!wait(Duration::ZERO));
    }
}
