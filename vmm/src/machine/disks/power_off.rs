//! What becomes of redo logs once their guest has ended.

use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::path::PathBuf;

use api::AtPowerOff;
use vmfs_image::{OpenOptions, redo};

use super::super::ending::Outcome;

/// The redo log of a disk that is closed.
#[derive(Debug)]
pub struct Log {
    /// The disk's place among the guest's.
    pub disk: usize,
    /// The image.
    pub image: PathBuf,
    /// The log.
    pub file: PathBuf,
    /// How the image was opened.
    pub(super) options: OpenOptions,
    /// What it takes of its file system, in bytes; `None` if it holds nothing.
    pub holds: Option<u64>,
    /// What is to become of it; `None` for a log that always stays.
    pub(super) action: Option<AtPowerOff>,
}

/// Whoever sits by while a guest ends.
pub trait Attendant {
    /// The guest has ended.
    fn ended(&mut self, outcome: &Outcome);

    /// Says what is to become of a redo log: anything but [`AtPowerOff::Ask`]. `None` where nobody can be asked, or answers
    /// before `end` becomes readable.
    fn ask(&mut self, log: &Log, end: RawFd) -> Option<AtPowerOff>;

    /// So many bytes of so many of a log are committed.
    fn committing(&mut self, done: u64, total: u64);

    /// Nothing is committed any more.
    fn committed(&mut self);

    /// Something that has to be known.
    fn tell(&mut self, text: &str);
}

/// What was not done that should have been. The log stays.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be.
    #[error("disk {disk}: cannot {what} what the guest wrote; it stays in {}, and `vmm image {what} {}` tries again", file.display(), image.display())]
    Failed {
        /// The disk's place among the guest's.
        disk: usize,
        /// What should have been done.
        what: AtPowerOff,
        /// The log.
        file: PathBuf,
        /// The image.
        image: PathBuf,
        /// Why not.
        source: vmfs_image::Error,
    },
    /// Somebody wanted to wait no longer.
    #[error("disk {disk}: the commit was interrupted; {} stays, and `vmm image commit {}` finishes it", file.display(), image.display())]
    Interrupted {
        /// The disk's place among the guest's.
        disk: usize,
        /// The log.
        file: PathBuf,
        /// The image.
        image: PathBuf,
    },
}

/// Does with each of `logs`, which are those of `guest`, what it is to be done with it. `end` is readable when `interrupted` has
/// something to take, which ends what takes long.
pub fn settle(
    guest: &str,
    logs: Vec<Log>,
    attendant: &mut dyn Attendant,
    end: RawFd,
    mut interrupted: impl FnMut() -> bool,
) -> Vec<Error> {
    let mut errors = Vec::new();
    for log in logs {
        let Log { disk, image, file, options, .. } = &log;
        let action = decide(guest, &log, attendant, end);
        let done = match action {
            AtPowerOff::Commit => {
                // What was written must be stable before the log goes, whatever the guest had been told.
                let options = OpenOptions {
                    format: options.format,
                    owner: options.owner.clone(),
                    ..OpenOptions::default()
                };
                let committed = redo::commit_as(image, &options, &mut |done, total| {
                    attendant.committing(done, total);
                    if interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                });
                attendant.committed();
                committed
            }
            AtPowerOff::Discard => redo::discard(image),
            AtPowerOff::Keep | AtPowerOff::Ask => continue,
        };
        let (disk, file, image) = (*disk, file.clone(), image.clone());
        match done {
            Ok(()) => tracing::info!("disk {disk} of guest {guest}: {action} of {} is done", file.display()),
            Err(vmfs_image::Error::Interrupted { .. }) => {
                errors.push(Error::Interrupted { disk, file, image })
            }
            Err(source) => errors.push(Error::Failed { disk, what: action, file, image, source }),
        }
    }
    errors
}

fn decide(guest: &str, log: &Log, attendant: &mut dyn Attendant, end: RawFd) -> AtPowerOff {
    let stays = |why: &str| {
        let Log { disk, image, file, .. } = log;
        let (image, file) = (image.display(), file.display());
        format!(
            "disk {disk} of guest {guest}: what it wrote stays in {file}{why}; `vmm image commit {image}` or `vmm image \
             discard {image}` decides"
        )
    };
    match (log.action, log.holds) {
        (Some(AtPowerOff::Ask), None) => AtPowerOff::Discard,
        (Some(AtPowerOff::Ask), Some(_)) => match attendant.ask(log, end) {
            Some(AtPowerOff::Ask) | None => {
                attendant.tell(&stays(", since nobody has decided"));
                AtPowerOff::Keep
            }
            Some(action) => action,
        },
        (None | Some(AtPowerOff::Keep), _) => {
            tracing::info!("{}", stays(""));
            AtPowerOff::Keep
        }
        (Some(action), _) => action,
    }
}
