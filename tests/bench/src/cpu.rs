//! Processor time of a monitor beside its guest's.
//!
//! Of a thread that runs no guest all time counts, as the scheduler measures it (`/proc/PID/task/TID/schedstat`, ns). Of a
//! thread that does (its guest time in `stat` grows) what it spent in the kernel counts, in clock ticks: that is where KVM
//! handles the guest's exits, while its time in user mode cannot be told from the guest's. Threads that the kernel lends to
//! io_uring are threads of the process, and count; the kernel's own (writeback, journal) do not.

use std::collections::HashMap;
use std::fs;
use std::time::Duration;

/// Times of one thread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Thread {
    run_ns: u64,
    system_ticks: u64,
    guest_ticks: u64,
}

/// Times of all threads of some processes, at one moment.
#[derive(Debug, Clone, Default)]
pub struct Times(HashMap<u32, Thread>);

impl Times {
    /// The times now. A thread that ends meanwhile is left out.
    #[must_use]
    pub fn of(pids: &[u32]) -> Self {
        let mut times = HashMap::new();
        for task in pids.iter().filter_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).ok()).flatten() {
            let Ok(task) = task else { continue };
            let id = task.file_name().to_str().and_then(|name| name.parse().ok());
            let text = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            if let (Some(id), Some(thread)) = (id, thread(&text("schedstat"), &text("stat"))) {
                times.insert(id, thread);
            }
        }
        Self(times)
    }

    /// What was spent beside the guest since `earlier`.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Duration {
        let spent = self.0.iter().map(|(id, now)| {
            let before = earlier.0.get(id).copied().unwrap_or_default();
            if now.guest_ticks > before.guest_ticks {
                ticks(now.system_ticks.saturating_sub(before.system_ticks))
            } else {
                Duration::from_nanos(now.run_ns.saturating_sub(before.run_ns))
            }
        });
        spent.sum()
    }
}

fn ticks(count: u64) -> Duration {
    // SAFETY: no memory is involved.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    let per_second = u64::try_from(per_second).unwrap_or(100).max(1);
    Duration::from_millis(count * 1000 / per_second)
}

/// `schedstat`: time on a processor in ns, and others. `stat`: fields 15 and 43 of proc_pid_stat(5), behind the name.
fn thread(schedstat: &str, stat: &str) -> Option<Thread> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse().ok();
    Some(Thread {
        run_ns: schedstat.split_ascii_whitespace().next()?.parse().ok()?,
        system_ticks: field(15)?,
        guest_ticks: field(43)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(threads: &[(u32, u64, u64, u64)]) -> Times {
        let thread =
            |&(id, run_ns, system_ticks, guest_ticks)| (id, Thread { run_ns, system_ticks, guest_ticks });
        Times(threads.iter().map(thread).collect())
    }

    #[test]
    fn fields_are_found_behind_any_name() {
        let numbers: Vec<String> = (4..=52).map(|n: u32| n.to_string()).collect();
        let stat = format!("7 (a) S 1) S {}", numbers.join(" "));
        assert_eq!(thread("123 4 5", &stat), Some(Thread { run_ns: 123, system_ticks: 15, guest_ticks: 43 }));
        assert_eq!(thread("123 4 5", "7 (a) S 1 2"), None);
        assert_eq!(thread("", &stat), None);
    }

    #[test]
    fn thread_that_runs_the_guest_counts_by_its_time_in_the_kernel_and_others_whole() {
        let before = times(&[(1, 1_000_000, 0, 0), (2, 5_000_000, 10, 100)]);
        let after = times(&[(1, 3_000_000, 0, 0), (2, 900_000_000, 11, 180), (3, 500_000, 0, 0)]);
        let beside = Duration::from_micros(2000 + 500) + ticks(1);
        assert_eq!(after.since(&before), beside);
        assert_eq!(before.since(&before), Duration::ZERO);
    }

    #[test]
    fn own_time_is_read() {
        assert!(!Times::of(&[std::process::id()]).0.is_empty());
        assert!(Times::of(&[]).0.is_empty());
    }
}
