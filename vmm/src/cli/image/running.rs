//! Images that guests of this host have: what is done with these is done by the guest's monitor.

use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use api::client::{self, Client};
use api::{DiskStatus, JobState};

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
    #[error("the {what} by guest {guest} was interrupted, and can be repeated; the disk reads as it did")]
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

/// Looks for the guest of this host that has the image at `path` as a disk, or as a disk's redo log. Guests that do not answer
/// are passed over.
pub fn find(path: &Path) -> Option<Running> {
    find_in(&Root::from_environment(), path)
}

fn find_in(root: &Root, path: &Path) -> Option<Running> {
    let wanted = inode(path)?;
    let is_wanted = |path: &Path| inode(path) == Some(wanted);
    root.list().ok()?.into_iter().find_map(|guest| {
        let status =
            Client::connect(&guest.socket(), LOOK_PATIENCE).and_then(|mut client| client.status()).ok()?;
        let has =
            |disk: &DiskStatus| is_wanted(&disk.path) || disk.more.redo.as_deref().is_some_and(is_wanted);
        let disk = status.disks.iter().position(has)?;
        let client = Client::connect(&guest.socket(), PATIENCE).ok()?;
        Some(Running { client, guest: guest.name().to_owned(), disk })
    })
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::metadata(path).ok().map(|about| (about.dev(), about.ino()))
}

impl Running {
    /// Makes a snapshot.
    pub fn snapshot(&mut self, name: &str, description: &str) -> Result<(), client::Error> {
        self.client.snapshot(self.disk, name, description)
    }

    /// Makes the disk larger.
    pub fn resize(&mut self, bytes: u64) -> Result<(), client::Error> {
        self.client.resize(self.disk, bytes)
    }

    /// Says how much its image may take, in bytes.
    pub fn set_max_size(&mut self, bytes: Option<u64>) -> Result<(), client::Error> {
        self.client.set_max_size(self.disk, bytes)
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

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::{Arc, Mutex};

    use api::server::Server;
    use api::{Control, DiskDetails, DiskOrder, Job, Refused, State, Status};

    use super::*;
    use crate::run_dir::Claim;

    /// A monitor whose jobs end, as they are told to, when they have been asked for twice.
    struct Monitor {
        disks: Vec<DiskStatus>,
        ends: JobState,
        asked: Mutex<u64>,
        orders: Mutex<Vec<String>>,
    }

    impl Control for Monitor {
        fn status(&self) -> Status {
            Status {
                name: "web".to_owned(),
                state: State::Running,
                pid: std::process::id(),
                version: String::new(),
                started: 0,
                cpus: 1,
                memory: 0,
                kernel: PathBuf::new(),
                serial: None,
                disks: self.disks.clone(),
                nets: Vec::new(),
            }
        }

        fn pause(&self) -> Result<(), Refused> {
            Ok(())
        }

        fn resume(&self) -> Result<(), Refused> {
            Ok(())
        }

        fn power_button(&self) -> Result<(), Refused> {
            Ok(())
        }

        fn stop(&self) -> Result<(), Refused> {
            Ok(())
        }

        fn disks(&self) -> usize {
            self.disks.len()
        }

        fn disk(&self, index: usize, order: DiskOrder) -> Result<Option<Job>, Refused> {
            let is_long = matches!(order, DiskOrder::Commit | DiskOrder::Stream);
            self.orders.lock().unwrap().push(format!("{index} {order:?}"));
            Ok(if is_long { self.jobs().pop() } else { None })
        }

        fn jobs(&self) -> Vec<Job> {
            let mut asked = self.asked.lock().unwrap();
            *asked += 1;
            let state = if *asked > 2 { self.ends } else { JobState::Running };
            let error = (state == JobState::Failed).then(|| "no space".to_owned());
            vec![Job { id: 1, what: "commit".to_owned(), disk: 0, state, done: *asked, total: 3, error }]
        }

        fn cancel(&self, _id: u64) {}
    }

    struct Place {
        dir: tempfile::TempDir,
        root: Root,
        monitor: Arc<Monitor>,
        _server: Server,
        _claim: Claim,
    }

    /// A directory with a guest that has `a.img`, and `b.img` with a redo log.
    fn place(ends: JobState) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(dir.path().join("run"));
        let [a, b, redo] = ["a.img", "b.img", "b.img.redo"].map(|name| dir.path().join(name));
        for path in [&a, &b, &redo] {
            std::fs::write(path, [0; 512]).unwrap();
        }
        let disk = |path, redo| DiskStatus {
            path,
            readonly: false,
            bytes: 512,
            more: DiskDetails { redo, ..DiskDetails::default() },
        };
        let disks = vec![disk(a, None), disk(b, Some(redo))];
        let monitor = Arc::new(Monitor { disks, ends, asked: Mutex::default(), orders: Mutex::default() });
        let claim = root.claim("web").unwrap();
        let server = Server::start(claim.listen().unwrap(), monitor.clone()).unwrap();
        Place { dir, root, monitor, _server: server, _claim: claim }
    }

    #[test]
    fn guest_is_found_by_any_name_of_its_disk_and_by_its_redo_log() {
        let place = place(JobState::Done);
        let path = |name: &str| place.dir.path().join(name);
        std::fs::hard_link(path("a.img"), path("other name")).unwrap();
        std::os::unix::fs::symlink(path("b.img"), path("link")).unwrap();
        std::fs::write(path("c.img"), [0; 512]).unwrap();
        for (name, disk) in [("a.img", 0), ("other name", 0), ("b.img", 1), ("link", 1), ("b.img.redo", 1)] {
            let running = find_in(&place.root, &path(name)).expect(name);
            assert_eq!((running.guest.as_str(), running.disk), ("web", disk), "{name}");
        }
        assert!(find_in(&place.root, &path("c.img")).is_none());
        assert!(find_in(&place.root, &path("missing")).is_none());
    }

    #[test]
    fn orders_go_to_the_disk_that_was_found() {
        let place = place(JobState::Done);
        let mut running = find_in(&place.root, &place.dir.path().join("b.img")).unwrap();
        running.snapshot("fresh", "as installed").unwrap();
        running.resize(1024).unwrap();
        assert_eq!(running.size().unwrap(), Some(512));
        let mut progress = Progress::begin("committing").unwrap();
        running.commit(&mut progress).unwrap();
        let orders = place.monitor.orders.lock().unwrap().join("; ");
        assert_eq!(
            orders,
            "1 Snapshot(Snapshot { name: \"fresh\", description: \"as installed\" }); 1 Resize(Resize { bytes: 1024 }); 1 Commit"
        );
    }

    #[test]
    fn job_that_fails_says_why_and_of_whom() {
        let place = place(JobState::Failed);
        let mut running = find_in(&place.root, &place.dir.path().join("a.img")).unwrap();
        let mut progress = Progress::begin("streaming").unwrap();
        let Err(Failure::Error(error, 1)) = running.stream(&mut progress) else { panic!("it succeeded") };
        assert_eq!(error.to_string(), "guest web could not commit: no space");
    }
}
