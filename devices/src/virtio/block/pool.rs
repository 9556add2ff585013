//! Threads for calls that wait, so that a queue's own thread does not.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// Most threads of a disk.
const MOST: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    threads: Vec<JoinHandle<()>>,
    idle: usize,
    closed: bool,
}

#[derive(Default)]
struct Inner {
    state: Mutex<State>,
    changed: Condvar,
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Threads of a disk, made when they are wanted. Dropping it waits for what they do.
#[derive(Default)]
pub struct Pool(Arc<Inner>);

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.0.lock().threads.len()).finish()
    }
}

impl Pool {
    /// Does `job` on a thread of its own or after others; at once and here if there is no thread to be had.
    pub fn run(&self, job: Job) {
        let mut state = self.0.lock();
        state.jobs.push_back(job);
        if state.jobs.len() > state.idle && state.threads.len() < MOST {
            let inner = self.0.clone();
            match thread::Builder::new().name("block-io".to_owned()).spawn(move || work(&inner)) {
                Ok(thread) => state.threads.push(thread),
                Err(error) if state.threads.is_empty() => {
                    tracing::warn!("a disk waits for its storage itself: {error}");
                    let job = state.jobs.pop_back();
                    drop(state);
                    job.into_iter().for_each(|job| job());
                    return;
                }
                // Those there are do it.
                Err(_) => {}
            }
        }
        drop(state);
        self.0.changed.notify_one();
    }
}

fn work(inner: &Inner) {
    let mut state = inner.lock();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = inner.lock();
        } else if state.closed {
            return;
        } else {
            state.idle += 1;
            state = inner.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let threads = {
            let mut state = self.0.lock();
            state.closed = true;
            std::mem::take(&mut state.threads)
        };
        self.0.changed.notify_all();
        for thread in threads {
            // A panic has been printed by its thread.
            drop(thread.join());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    #[test]
    fn all_jobs_are_done_by_few_threads() {
        let done = Arc::new(AtomicUsize::new(0));
        let pool = Pool::default();
        for _ in 0..500 {
            let done = done.clone();
            pool.run(Box::new(move || {
                done.fetch_add(1, Ordering::SeqCst);
            }));
        }
        assert!(pool.0.lock().threads.len() <= MOST);
        drop(pool);
        assert_eq!(done.load(Ordering::SeqCst), 500);
    }

    #[test]
    fn job_that_waits_for_another_does_not_wait_in_vain() {
        let (sender, receiver) = mpsc::channel();
        let (told, end) = mpsc::channel();
        let pool = Pool::default();
        pool.run(Box::new(move || told.send(receiver.recv().unwrap()).unwrap()));
        pool.run(Box::new(move || sender.send(7).unwrap()));
        assert_eq!(end.recv().unwrap(), 7);
    }
}
