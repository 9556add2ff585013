//! The disks of a machine: opened in their modes, looked at and changed while the guest runs, decided upon when it has ended.
//!
//! ```text
//! open ─ configuration → image in its mode (files), the same for another medium (orders)
//! live ─ what stands behind a disk now; exchanged with nothing in flight
//!   ├ orders ── snapshot, size, medium, limits, retry, power-off
//!   └ jobs ──── commit, stream: threads beside the guest
//! power_off ─ redo logs committed, discarded or kept
//! ```

mod gone;
mod jobs;
mod live;
pub(super) mod open;
mod orders;
pub mod power_off;

use std::fmt::Display;
use std::sync::Arc;

use api::{DiskOrder, DiskStatus, Job, Refused};
use devices::virtio::block::BlockControl;

use crate::config::model::Disk;
use jobs::Jobs;
use live::LiveDisk;
use open::Medium;

pub use live::block_options;

/// All disks of a guest, in the order of its configuration.
#[derive(Debug, Default)]
pub struct Disks {
    guest: String,
    disks: Vec<Arc<LiveDisk>>,
    jobs: Arc<Jobs>,
}

impl Disks {
    /// None yet.
    pub fn new(guest: &str) -> Self {
        Self { guest: guest.to_owned(), ..Self::default() }
    }

    /// Adds the next, which shows `medium` and is controlled by `control`.
    pub fn add(&mut self, config: &Disk, medium: Medium, control: BlockControl) {
        let index = self.disks.len();
        self.disks.push(Arc::new(LiveDisk::new(index, &self.guest, config, medium, control)));
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.disks.len()
    }

    /// All of them as they are now.
    pub fn status(&self) -> Vec<DiskStatus> {
        self.disks.iter().map(|disk| disk.status()).collect()
    }

    /// Does `order` with the disk `index`.
    ///
    /// # Errors
    ///
    /// It cannot be done, or not now.
    pub fn order(&self, index: usize, order: DiskOrder) -> Result<Option<Job>, Refused> {
        match self.disks.get(index) {
            Some(disk) => orders::carry_out(disk, &self.jobs, order),
            None => Err(Refused(format!("guest {} has no disk {index}", self.guest))),
        }
    }

    /// The jobs that go on, and the latest that are over.
    pub fn jobs(&self) -> Vec<Job> {
        self.jobs.list()
    }

    /// Begins to end a job.
    pub fn cancel(&self, id: u64) {
        self.jobs.cancel(id);
    }

    /// Ends the jobs and closes the images; the devices have been stopped. Gives the redo logs.
    pub fn close(&self) -> Vec<power_off::Log> {
        self.jobs.end();
        self.disks.iter().filter_map(|disk| disk.close()).collect()
    }
}

/// An error and what caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next: &dyn Display = &error;
        text = format!("{text}: {next}");
        cause = error.source();
    }
    text
}
