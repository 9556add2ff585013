//! Where all vCPU threads of a guest are held, let go and ended together.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::kick::Target;

/// What the vCPUs are asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Run the guest.
    Run,
    /// Leave the guest, finish what device access is pending, and wait.
    Pause,
    /// Leave the guest for good.
    Stop,
}

/// After what time a vCPU that has not come is kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(20);

/// The gate of one guest.
///
/// `request` is what a vCPU reads between two runs; it is written only under the lock, so that a vCPU that goes
/// to sleep under the lock cannot miss a change of it.
#[derive(Debug)]
pub struct Gate {
    request: AtomicU8,
    counts: Mutex<Counts>,
    changed: Condvar,
    targets: Vec<Target>,
}

#[derive(Debug)]
struct Counts {
    /// vCPU threads that have not ended.
    alive: usize,
    /// Of these, how many wait at the gate.
    parked: usize,
}

impl Gate {
    /// A gate for `vcpus` threads, none of which has started.
    #[must_use]
    pub fn new(vcpus: usize) -> Self {
        Self {
            request: AtomicU8::new(Request::Run as u8),
            counts: Mutex::new(Counts { alive: vcpus, parked: 0 }),
            changed: Condvar::new(),
            targets: (0..vcpus).map(|_| Target::default()).collect(),
        }
    }

    /// What is asked now.
    #[must_use]
    pub fn request(&self) -> Request {
        match self.request.load(Ordering::SeqCst) {
            value if value == Request::Run as u8 => Request::Run,
            value if value == Request::Pause as u8 => Request::Pause,
            _ => Request::Stop,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the request; false if the vCPUs have been stopped, which cannot be taken back.
    fn ask(&self, request: Request) -> bool {
        let counts = self.lock();
        if self.request() == Request::Stop {
            return false;
        }
        self.request.store(request as u8, Ordering::SeqCst);
        self.changed.notify_all();
        drop(counts);
        if request != Request::Run {
            self.targets.iter().for_each(Target::kick);
        }
        true
    }

    /// Returns once every vCPU waits at the gate; false if they have been stopped instead.
    pub fn pause(&self) -> bool {
        if !self.ask(Request::Pause) {
            return false;
        }
        self.kick_until(|counts| counts.parked >= counts.alive || self.request() != Request::Pause);
        self.request() == Request::Pause
    }

    /// Waits for `done`. A vCPU that is in a system call of a device's, a write to a terminal that nobody reads say,
    /// loses the kick that interrupts it, and is kicked again until it comes out.
    fn kick_until(&self, done: impl Fn(&Counts) -> bool) {
        let mut counts = self.lock();
        while !done(&counts) {
            let (guard, timeout) =
                self.changed.wait_timeout(counts, KICK_AGAIN).unwrap_or_else(PoisonError::into_inner);
            counts = guard;
            if timeout.timed_out() {
                drop(counts);
                self.targets.iter().for_each(Target::kick);
                counts = self.lock();
            }
        }
    }

    /// Lets the vCPUs run on; false if they have been stopped.
    pub fn resume(&self) -> bool {
        self.ask(Request::Run)
    }

    /// Ends all vCPU threads; [`wait_ended`](Self::wait_ended) tells when they have.
    pub fn stop(&self) {
        self.ask(Request::Stop);
    }

    /// Returns once all vCPU threads have ended, which they do after [`stop`](Self::stop).
    pub fn wait_ended(&self) {
        self.kick_until(|counts| counts.alive == 0);
    }

    /// Expects `vcpus` threads less, because they could not be started.
    pub fn give_up(&self, vcpus: usize) {
        let mut counts = self.lock();
        counts.alive = counts.alive.saturating_sub(vcpus);
        self.changed.notify_all();
    }

    /// Called by the thread of vCPU `index` when it starts; the pass ends its membership when dropped.
    #[must_use]
    pub fn enter(&self, index: usize) -> Pass<'_> {
        let target = &self.targets[index];
        target.set_current();
        Pass { gate: self, target }
    }
}

/// A vCPU thread's membership of the gate.
#[derive(Debug)]
pub struct Pass<'a> {
    gate: &'a Gate,
    target: &'a Target,
}

impl Pass<'_> {
    /// Waits until the request is another than to pause.
    pub fn park(&self) {
        let mut counts = self.gate.lock();
        counts.parked += 1;
        self.gate.changed.notify_all();
        while self.gate.request() == Request::Pause {
            counts = self.gate.changed.wait(counts).unwrap_or_else(PoisonError::into_inner);
        }
        counts.parked -= 1;
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.target.clear();
        self.gate.lock().alive -= 1;
        self.gate.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    fn spawn(gate: &Arc<Gate>, index: usize, turns: &Arc<AtomicU64>) -> thread::JoinHandle<()> {
        let (gate, turns) = (gate.clone(), turns.clone());
        thread::spawn(move || {
            super::super::kick::install_handler().unwrap();
            let pass = gate.enter(index);
            loop {
                match gate.request() {
                    Request::Run => drop(turns.fetch_add(1, Ordering::SeqCst)),
                    Request::Pause => pass.park(),
                    Request::Stop => return,
                }
            }
        })
    }

    #[test]
    fn threads_stand_still_between_pause_and_resume_and_end_at_stop() {
        let gate = Arc::new(Gate::new(3));
        let turns = Arc::new(AtomicU64::new(0));
        let threads: Vec<_> = (0..3).map(|i| spawn(&gate, i, &turns)).collect();
        for _ in 0..200 {
            assert!(gate.pause());
            let before = turns.load(Ordering::SeqCst);
            thread::yield_now();
            assert_eq!(turns.load(Ordering::SeqCst), before, "a paused vCPU ran");
            assert!(gate.resume());
            while turns.load(Ordering::SeqCst) == before {
                thread::yield_now();
            }
        }
        gate.stop();
        gate.wait_ended();
        threads.into_iter().for_each(|t| t.join().unwrap());
        assert!(!gate.pause() && !gate.resume(), "a stopped guest neither pauses nor runs");
    }

    #[test]
    fn pause_before_the_threads_start_waits_for_them() {
        let gate = Arc::new(Gate::new(2));
        let turns = Arc::new(AtomicU64::new(0));
        let pausing = {
            let gate = gate.clone();
            thread::spawn(move || gate.pause())
        };
        while gate.request() != Request::Pause {
            thread::yield_now();
        }
        let threads: Vec<_> = (0..2).map(|i| spawn(&gate, i, &turns)).collect();
        assert!(pausing.join().unwrap());
        assert_eq!(turns.load(Ordering::SeqCst), 0);
        gate.stop();
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn stop_releases_whoever_waits_for_a_pause() {
        let gate = Arc::new(Gate::new(1)); // its thread never comes
        let pausing = {
            let gate = gate.clone();
            thread::spawn(move || gate.pause())
        };
        while gate.request() != Request::Pause {
            thread::yield_now();
        }
        gate.stop();
        assert!(!pausing.join().unwrap());
    }
}
