//! Images that guests of this host have: what is done with these is done by the guest's monitor.

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use api::JobState;
use api::client::{self, Client};

use super::super::Failure;
use super::progress::Progress;
use crate::run_dir::Root;

/// How long a monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The same where one that hangs must not keep others from being looked at.
const LOOK_PATIENCE: Duration = Duration::from_secs(1);
/// How often is asked how far a job is.
const INTERVAL: Duration = Duration::from_millis(200);

/// A job that a monitor did not finish.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// It was given up.
    #[error("guest {guest} could not {what}: {why}")]
    Failed { guest: String, what: String, why: String },
    /// It was cancelled.
    #[error("guest {guest} did not finish to {what}: it was interrupted; the disk is as it was")]
    Cancelled { guest: String, what: String },
}

/// A disk of a guest that runs.
#[derive(Debug)]
pub struct Running {
    client: Client,
    /// The guest's name.
    pub guest: String,
    /// Which of its disks it is, from 0.
    disk: usize,
}

/// Looks for the guest of this host that has the image at `path` as a disk. Guests that do not answer are passed over.
pub fn find(path: &Path) -> Option<Running> {
    let wanted = inode(path)?;
    Root::from_environment().list().ok()?.into_iter().find_map(|guest| {
        let status =
            Client::connect(&guest.socket(), LOOK_PATIENCE).and_then(|mut client| client.status()).ok()?;
        let disk = status.disks.iter().position(|disk| inode(&disk.path) == Some(wanted))?;
        let client = Client::connect(&guest.socket(), PATIENCE).ok()?;
        Some(Running { client, guest: guest.name().to_owned(), disk })
    })
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|about| (about.dev(), about.ino()))
}

impl Running {
    /// Makes a snapshot.
    pub fn snapshot(&mut self, name: &str) -> Result<(), client::Error> {
        self.client.snapshot(self.disk, name)
    }

    /// Makes the disk larger.
    pub fn resize(&mut self, bytes: u64) -> Result<(), client::Error> {
        self.client.resize(self.disk, bytes)
    }

    /// Size of the disk in bytes.
    pub fn size(&mut self) -> Result<Option<u64>, client::Error> {
        Ok(self.client.status()?.disks.get(self.disk).map(|disk| disk.bytes))
    }

    /// Commits the redo log, to the end.
    pub fn commit(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        let job = self.client.commit(self.disk)?;
        self.wait(job, progress)
    }

    /// Copies what the disk lies on into it, to the end.
    pub fn stream(&mut self, progress: &mut Progress) -> Result<(), Failure> {
        let job = self.client.stream(self.disk)?;
        self.wait(job, progress)
    }

    fn wait(&mut self, mut job: api::Job, progress: &mut Progress) -> Result<(), Failure> {
        let mut cancelled = false;
        loop {
            let (guest, what) = (self.guest.clone(), job.what.clone());
            match job.state {
                JobState::Done => return Ok(()),
                JobState::Failed => {
                    let why = job.error.unwrap_or_else(|| "it does not say why".to_owned());
                    return Err(Error::Failed { guest, what, why }.into());
                }
                JobState::Cancelled => {
                    return Err(Failure::Error(Box::new(Error::Cancelled { guest, what }), 130));
                }
                JobState::Running => {}
            }
            if progress.report(job.done, job.total) == ControlFlow::Break(()) && !cancelled {
                self.client.cancel(job.id)?;
                cancelled = true;
            }
            std::thread::sleep(INTERVAL);
            job = self.client.job(job.id)?;
        }
    }
}
