//! The thread of a device: it sleeps until something is ready, serves it, and can be held and ended from outside.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Token that no device may use.
const CONTROL: u64 = u64::MAX;
/// Most events taken from the kernel at once.
const BATCH: usize = 16;

/// What a device does on its thread.
pub trait Work: Send + 'static {
    /// Registers the descriptors to be watched, each with a token of the device's choice.
    ///
    /// # Errors
    ///
    /// That of the registration.
    fn watch(&mut self, poll: &Poll) -> io::Result<()>;

    /// The descriptor registered with `token` is ready.
    ///
    /// Pausing and stopping wait for this call, so that it must end whatever the guest does: work without bound
    /// is cut into pieces by leaving the descriptor ready.
    fn ready(&mut self, token: u64, poll: &Poll);

    /// Looks at everything once, as if all had become ready. Called when the thread starts and when it goes on
    /// after a pause.
    fn catch_up(&mut self, poll: &Poll);

    /// Finishes whatever is in flight; called before the thread is held or ends, at times also when it goes on.
    fn drain(&mut self) {}
}

/// What a device's thread waits for.
#[derive(Debug)]
pub struct Poll(Epoll);

impl Poll {
    /// Begins to watch `fd` for `events`, level-triggered.
    ///
    /// # Errors
    ///
    /// That of `epoll_ctl`.
    pub fn add(&self, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.0.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Watches `fd`, added before, for other `events`.
    ///
    /// # Errors
    ///
    /// That of `epoll_ctl`.
    pub fn modify(&self, fd: RawFd, events: EventSet, token: u64) -> io::Result<()> {
        self.0.ctl(ControlOperation::Modify, fd, EpollEvent::new(events, token))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

#[derive(Debug)]
struct State {
    wish: Wish,
    paused: bool,
    ended: bool,
}

struct Control {
    state: Mutex<State>,
    changed: Condvar,
    event: EventFd,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wish(&self, wish: Wish) {
        self.lock().wish = wish;
        self.changed.notify_all();
        // Only an overflow of the counter can fail, and then the event is signalled already.
        self.event.write(1).unwrap_or_default();
    }
}

/// Marks the thread as ended however it ends, so that nobody waits for it in vain.
struct EndGuard(Arc<Control>);

impl Drop for EndGuard {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

/// A device's thread, seen from outside. Dropping it stops the thread.
pub struct Worker<W> {
    control: Arc<Control>,
    thread: Option<JoinHandle<W>>,
}

impl<W> fmt::Debug for Worker<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Worker").field("state", &*self.control.lock()).finish()
    }
}

impl<W: Work> Worker<W> {
    /// Starts a thread called `name` (at most 15 characters are seen by tools) that does `work`.
    ///
    /// # Errors
    ///
    /// No descriptors or no thread are to be had, or `work` cannot watch what it needs.
    pub fn spawn(name: &str, work: W) -> io::Result<Self> {
        Self::spawn_as(name, work, false)
    }

    /// As [`spawn`](Self::spawn); with `held`, the work begins once the thread was told to [`resume`](Self::resume).
    ///
    /// # Errors
    ///
    /// As with `spawn`.
    pub fn spawn_as(name: &str, mut work: W, held: bool) -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let poll = Poll(Epoll::new()?);
        poll.add(event.as_raw_fd(), EventSet::IN, CONTROL)?;
        work.watch(&poll)?;
        let wish = if held { Wish::Pause } else { Wish::Run };
        let state = State { wish, paused: false, ended: false };
        let control = Arc::new(Control { state: Mutex::new(state), changed: Condvar::new(), event });
        let shared = control.clone();
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            let guard = EndGuard(shared);
            run(&mut work, &poll, &guard.0);
            work.drain();
            work
        })?;
        Ok(Self { control, thread: Some(thread) })
    }

    /// Returns once the thread is held and nothing is in flight.
    pub fn pause(&self) {
        self.control.wish(Wish::Pause);
        let mut state = self.control.lock();
        while !state.paused && !state.ended {
            state = self.control.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the thread go on after a pause.
    pub fn resume(&self) {
        self.control.wish(Wish::Run);
    }

    /// Ends the thread and gives back its work; `None` if the thread panicked.
    pub fn stop(mut self) -> Option<W> {
        self.control.wish(Wish::Stop);
        self.thread.take().and_then(|thread| thread.join().ok())
    }
}

impl<W> Drop for Worker<W> {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.control.wish(Wish::Stop);
            // A panic has been printed by its thread.
            drop(thread.join());
        }
    }
}

fn run<W: Work>(work: &mut W, poll: &Poll, control: &Control) {
    let mut events = [EpollEvent::default(); BATCH];
    if hold(work, control) == Wish::Stop {
        return;
    }
    work.catch_up(poll);
    loop {
        let count = match poll.0.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!("a device stops: waiting for its events failed: {error}");
                return;
            }
        };
        for event in &events[..count] {
            if event.data() != CONTROL {
                work.ready(event.data(), poll);
                continue;
            }
            control.event.read().unwrap_or_default();
            match hold(work, control) {
                Wish::Stop => return,
                _ => work.catch_up(poll),
            }
        }
    }
}

/// Stays here while a pause is wished; says what is wished then.
fn hold<W: Work>(work: &mut W, control: &Control) -> Wish {
    // Whatever is wished now, it may be a pause by the time the lock is taken.
    work.drain();
    let mut state = control.lock();
    while state.wish == Wish::Pause {
        state.paused = true;
        control.changed.notify_all();
        state = control.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    state.paused = false;
    state.wish
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Counter {
        kick: EventFd,
        served: Arc<AtomicU64>,
        drained: Arc<AtomicU64>,
    }

    impl Work for Counter {
        fn watch(&mut self, poll: &Poll) -> io::Result<()> {
            poll.add(self.kick.as_raw_fd(), EventSet::IN, 7)
        }
        fn ready(&mut self, token: u64, _: &Poll) {
            assert_eq!(token, 7);
            self.served.fetch_add(self.kick.read().unwrap_or(0), Ordering::SeqCst);
        }
        fn catch_up(&mut self, poll: &Poll) {
            self.ready(7, poll);
        }
        fn drain(&mut self) {
            self.drained.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn counter() -> (Worker<Counter>, EventFd, Arc<AtomicU64>, Arc<AtomicU64>) {
        let (served, drained) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let outside = kick.try_clone().unwrap();
        let work = Counter { kick, served: served.clone(), drained: drained.clone() };
        (Worker::spawn("counter", work).unwrap(), outside, served, drained)
    }

    fn wait_for(value: &AtomicU64, wanted: u64) {
        while value.load(Ordering::SeqCst) != wanted {
            thread::yield_now();
        }
    }

    #[test]
    fn kick_during_a_pause_is_served_after_it() {
        let (worker, kick, served, drained) = counter();
        kick.write(1).unwrap();
        wait_for(&served, 1);
        worker.pause();
        assert!(drained.load(Ordering::SeqCst) >= 1);
        kick.write(1).unwrap();
        assert_eq!(served.load(Ordering::SeqCst), 1);
        worker.resume();
        wait_for(&served, 2);
        let before = drained.load(Ordering::SeqCst);
        assert!(worker.stop().is_some());
        assert!(drained.load(Ordering::SeqCst) > before);
    }

    #[test]
    fn pause_and_resume_in_quick_turns_lose_no_kick() {
        let (worker, kick, served, _) = counter();
        for turn in 1..500 {
            worker.pause();
            kick.write(1).unwrap();
            worker.resume();
            if turn % 7 == 0 {
                wait_for(&served, turn);
            }
        }
        wait_for(&served, 499);
    }

    #[test]
    fn paused_worker_can_be_stopped() {
        let (worker, ..) = counter();
        worker.pause();
        assert!(worker.stop().is_some());
    }

    #[test]
    fn pause_and_stop_return_though_the_work_has_panicked() {
        #[derive(Debug)]
        struct Bad;
        impl Work for Bad {
            fn watch(&mut self, _: &Poll) -> io::Result<()> {
                Ok(())
            }
            fn ready(&mut self, _: u64, _: &Poll) {}
            fn catch_up(&mut self, _: &Poll) {
                panic!("told to");
            }
        }
        let worker = Worker::spawn("bad", Bad).unwrap();
        worker.pause();
        worker.resume();
        while !worker.control.lock().ended {
            thread::yield_now();
        }
        worker.pause();
        assert!(worker.stop().is_none());
    }

    #[test]
    fn descriptor_that_cannot_be_watched_is_refused_before_there_is_a_thread() {
        #[derive(Debug)]
        struct Closed;
        impl Work for Closed {
            fn watch(&mut self, poll: &Poll) -> io::Result<()> {
                poll.add(-1, EventSet::IN, 0)
            }
            fn ready(&mut self, _: u64, _: &Poll) {}
            fn catch_up(&mut self, _: &Poll) {}
        }
        let error = Worker::spawn("closed", Closed).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }
}
