//! Work on disks that goes on beside the guest, each on a thread of its own.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use api::{JobState, Refused};
use vmfs_image::Error;
use vmfs_image::merge::{Job, Next};

use super::chain;
use super::live::LiveDisk;

/// Bytes of one step, between two of which a job can be cancelled.
const STEP: u64 = 4 << 20;
/// The longest that a job rests after a step, so that the guest has the storage for itself now and then.
const REST: Duration = Duration::from_millis(50);
/// So many jobs that are over are remembered.
const REMEMBERED: usize = 16;

/// All jobs of a guest.
#[derive(Debug, Default)]
pub struct Jobs {
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// The number of the latest.
    last: u64,
    /// None begins any more.
    closed: bool,
    /// By number.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    job: api::Job,
    cancel: Arc<Cancel>,
    thread: Option<JoinHandle<()>>,
}

/// Whether a job is to end.
#[derive(Debug, Default)]
struct Cancel {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Cancel {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    fn is_asked(&self) -> bool {
        *self.lock()
    }

    /// Rests for `time`, or until it is asked.
    fn rest(&self, time: Duration) {
        let rested = self.changed.wait_timeout_while(self.lock(), time, |asked| !*asked);
        drop(rested.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins `job`, which is called `what`, with `disk`.
    ///
    /// # Errors
    ///
    /// The guest is at its end, or there is no thread to be had.
    pub fn begin(
        self: &Arc<Self>,
        what: &str,
        disk: &Arc<LiveDisk>,
        job: Box<dyn Job>,
    ) -> Result<api::Job, Refused> {
        let mut table = self.lock();
        if table.closed {
            return Err(disk.refused("the guest is at its end"));
        }
        let id = table.last + 1;
        let cancel = Arc::new(Cancel::default());
        let (done, total) = job.progress();
        let about = api::Job {
            id,
            what: what.to_owned(),
            disk: disk.index,
            state: JobState::Running,
            done,
            total,
            error: None,
        };
        disk.set_job(Some(id));
        let (jobs, on, stop) = (Arc::clone(self), Arc::clone(disk), Arc::clone(&cancel));
        let started =
            thread::Builder::new().name(format!("job{id}")).spawn(move || jobs.run(id, &on, &stop, job));
        let thread = started.map_err(|error: io::Error| {
            disk.set_job(None);
            disk.refused(format_args!("no thread is to be had for a job: {error}"))
        })?;
        table.last = id;
        table.entries.push(Entry { job: about.clone(), cancel, thread: Some(thread) });
        Ok(about)
    }

    /// The thread of a job.
    fn run(&self, id: u64, disk: &LiveDisk, cancel: &Cancel, mut job: Box<dyn Job>) {
        let result = self.work(id, disk, cancel, &mut *job);
        let (done, total) = job.progress();
        // What it holds on to is free before the disk is.
        drop(job);
        disk.set_job(None);
        let (state, error) = match result {
            Ok(true) => (JobState::Done, None),
            Ok(false) => (JobState::Cancelled, None),
            Err(error) => {
                let why = chain(&error);
                tracing::warn!("job {id} with disk {} of guest {} failed: {why}", disk.index, disk.guest);
                (JobState::Failed, Some(why))
            }
        };
        let mut table = self.lock();
        if let Some(entry) = table.entries.iter_mut().find(|entry| entry.job.id == id) {
            let done = if state == JobState::Done { total } else { done };
            entry.job = api::Job { state, error, done, total, ..entry.job.clone() };
        }
        let over = table.entries.iter().filter(|entry| entry.job.state != JobState::Running).count();
        let mut surplus = over.saturating_sub(REMEMBERED);
        table.entries.retain(|entry| {
            let goes = surplus > 0 && entry.job.state != JobState::Running;
            surplus -= usize::from(goes);
            !goes
        });
    }

    /// Does all of a job, or as much as there is until it is cancelled. Says whether that was all.
    fn work(&self, id: u64, disk: &LiveDisk, cancel: &Cancel, job: &mut dyn Job) -> Result<bool, Error> {
        if cancel.is_asked() {
            return Ok(false);
        }
        loop {
            let began = Instant::now();
            match job.step(STEP)? {
                Next::Step => {
                    self.note(id, job.progress());
                    cancel.rest((began.elapsed() / 2).min(REST));
                    if cancel.is_asked() {
                        return Ok(false);
                    }
                }
                // What is merged by then is not to stay between, and after the last there is nothing to cancel.
                Next::Switch => disk.exchange(|| job.switch())?,
                Next::Done => return Ok(true),
            }
        }
    }

    fn note(&self, id: u64, (done, total): (u64, u64)) {
        if let Some(entry) = self.lock().entries.iter_mut().find(|entry| entry.job.id == id) {
            (entry.job.done, entry.job.total) = (done, total);
        }
    }

    /// Those that go on, and the latest that are over.
    pub fn list(&self) -> Vec<api::Job> {
        self.lock().entries.iter().map(|entry| entry.job.clone()).collect()
    }

    /// Begins to end one.
    pub fn cancel(&self, id: u64) {
        if let Some(entry) = self.lock().entries.iter().find(|entry| entry.job.id == id) {
            entry.cancel.ask();
        }
    }

    /// Cancels all, waits until they are over, and lets none begin.
    pub fn end(&self) {
        let threads: Vec<_> = {
            let mut table = self.lock();
            table.closed = true;
            table
                .entries
                .iter_mut()
                .filter_map(|entry| {
                    entry.cancel.ask();
                    entry.thread.take()
                })
                .collect()
        };
        for thread in threads {
            // A panic has been printed by its thread.
            drop(thread.join());
        }
    }
}
