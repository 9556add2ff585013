//! What the device, its threads and whoever controls it have in common.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use vmfs_image::Image;

use super::limiter::Limiter;
use super::options::{BlockOptions, Engine, MAX_QUEUES};
use super::pool::Pool;
use super::request::{Request, Status};
use super::worker::Server;
use crate::virtio::device::VirtioInterrupt;
use crate::virtio::log_limit::LogLimit;
use crate::virtio::worker::Worker;

/// What a disk has done since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Requests that read.
    pub reads: u64,
    /// Requests that wrote.
    pub writes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that discarded or zeroed.
    pub discards: u64,
    /// Bytes given to the guest.
    pub bytes_read: u64,
    /// Bytes taken from it.
    pub bytes_written: u64,
    /// Requests that the guest was told have failed; they count nowhere else.
    pub errors: u64,
}

/// [`Counters`] of a queue while they count. Its thread alone writes them; they have a cache line of their own.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Counting {
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
    errors: AtomicU64,
}

impl Counting {
    /// A request for `bytes` was answered so.
    pub fn count(&self, request: &Request, bytes: u64, status: Status) {
        let add = |counter: &AtomicU64, by: u64| {
            counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
        };
        match request {
            _ if status != Status::Ok => add(&self.errors, 1),
            Request::Read(_) => {
                add(&self.reads, 1);
                add(&self.bytes_read, bytes);
            }
            Request::Write(_) => {
                add(&self.writes, 1);
                add(&self.bytes_written, bytes);
            }
            Request::Flush => add(&self.flushes, 1),
            Request::Discard(_) | Request::Zero(_) => add(&self.discards, 1),
            Request::Identify | Request::Refused(_) => {}
        }
    }

    fn add_to(&self, sum: &mut Counters) {
        let add =
            |sum: &mut u64, counter: &AtomicU64| *sum = sum.wrapping_add(counter.load(Ordering::Relaxed));
        add(&mut sum.reads, &self.reads);
        add(&mut sum.writes, &self.writes);
        add(&mut sum.flushes, &self.flushes);
        add(&mut sum.discards, &self.discards);
        add(&mut sum.bytes_read, &self.bytes_read);
        add(&mut sum.bytes_written, &self.bytes_written);
        add(&mut sum.errors, &self.errors);
    }
}

/// The threads, and who wants them held.
#[derive(Debug, Default)]
pub(super) struct Threads {
    pub workers: Vec<Worker<Server>>,
    /// The way to the driver, while there is one.
    pub interrupt: Option<Arc<dyn VirtioInterrupt>>,
    /// By the transport.
    pub paused: bool,
    /// Number of those who drain.
    pub drains: usize,
}

impl Threads {
    pub fn held(&self) -> bool {
        self.paused || self.drains > 0
    }

    /// Has the threads held or not, as is wanted now.
    pub fn follow(&self) {
        for worker in &self.workers {
            if self.held() {
                worker.pause();
            } else {
                worker.resume();
            }
        }
    }
}

/// A disk.
#[derive(Debug)]
pub(super) struct Shared {
    pub options: BlockOptions,
    pub image: RwLock<Arc<dyn Image>>,
    pub threads: Mutex<Threads>,
    /// By queue.
    counting: [Counting; MAX_QUEUES as usize],
    pub limiter: Limiter,
    pub pool: Pool,
    /// Of all drivers that come and go.
    pub failures: LogLimit,
    /// Why requests wait because of an error, by queue.
    waiting: Mutex<BTreeMap<u16, String>>,
    /// How often they were to be tried again.
    pub retries: AtomicU64,
    /// Plain system calls are made.
    plain: AtomicBool,
}

impl Shared {
    pub fn new(image: Arc<dyn Image>, options: BlockOptions) -> Self {
        let limiter = Limiter::new(options.limits);
        let plain = AtomicBool::new(options.engine == Engine::Plain);
        Self {
            options,
            image: RwLock::new(image),
            threads: Mutex::default(),
            counting: Default::default(),
            limiter,
            pool: Pool::default(),
            failures: LogLimit::new(),
            waiting: Mutex::default(),
            retries: AtomicU64::new(0),
            plain,
        }
    }

    pub fn image(&self) -> Arc<dyn Image> {
        self.image.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether plain system calls are made.
    pub fn is_plain(&self) -> bool {
        self.plain.load(Ordering::Relaxed)
    }

    /// io_uring was refused with `error`: plain system calls are made from now on.
    pub fn fall_back(&self, error: &io::Error) {
        if !self.plain.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                "disk {} is served by plain system calls, one request at a time: io_uring is refused: {error}",
                self.image().path().display()
            );
        }
    }

    /// What `queue` counts with; there are [`MAX_QUEUES`] of them.
    pub fn counting(&self, queue: u16) -> &Counting {
        &self.counting[usize::from(queue) % self.counting.len()]
    }

    /// What all queues have done.
    pub fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        self.counting.iter().for_each(|counting| counting.add_to(&mut sum));
        sum
    }

    fn waits(&self) -> MutexGuard<'_, BTreeMap<u16, String>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests of `queue` wait because of `why`.
    pub fn stop(&self, queue: u16, why: String) {
        let mut waiting = self.waits();
        let is_first = waiting.is_empty();
        waiting.entry(queue).or_insert_with(|| why.clone());
        drop(waiting);
        if is_first {
            self.options.events.stopped(&why);
        }
    }

    /// Requests of `queue` no longer wait.
    pub fn go_on(&self, queue: u16) {
        self.waits().remove(&queue);
    }

    /// Why requests wait.
    pub fn why_waiting(&self) -> Option<String> {
        self.waits().values().next().cloned()
    }
}
