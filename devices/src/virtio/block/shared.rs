//! What the device, its threads and whoever controls it have in common.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use vmfs_image::Image;

use super::options::{BlockOptions, Limits};
use super::worker::Server;
use crate::virtio::device::VirtioInterrupt;
use crate::virtio::log_limit::LogLimit;
use crate::virtio::worker::Worker;

/// What a disk has done since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Requests that read, and were given their bytes.
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
    /// Requests that the guest was told have failed.
    pub errors: u64,
}

/// [`Counters`] while they count.
#[derive(Debug, Default)]
pub(super) struct Counting {
    pub reads: AtomicU64,
    pub writes: AtomicU64,
    pub flushes: AtomicU64,
    pub discards: AtomicU64,
    pub bytes_read: AtomicU64,
    pub bytes_written: AtomicU64,
    pub errors: AtomicU64,
}

impl Counting {
    pub fn read(&self) -> Counters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            reads: read(&self.reads),
            writes: read(&self.writes),
            flushes: read(&self.flushes),
            discards: read(&self.discards),
            bytes_read: read(&self.bytes_read),
            bytes_written: read(&self.bytes_written),
            errors: read(&self.errors),
        }
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
    pub counting: Counting,
    pub limits: Mutex<Limits>,
    /// Of all drivers that come and go.
    pub failures: LogLimit,
}

impl Shared {
    pub fn new(image: Arc<dyn Image>, options: BlockOptions) -> Self {
        let limits = Mutex::new(options.limits);
        Self {
            options,
            image: RwLock::new(image),
            threads: Mutex::default(),
            counting: Counting::default(),
            limits,
            failures: LogLimit::new(),
        }
    }

    pub fn image(&self) -> Arc<dyn Image> {
        self.image.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn threads(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
