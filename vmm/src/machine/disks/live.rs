//! A disk of a guest that runs: what stands behind it, and its being exchanged.
//!
//! Two locks: `order` is held while something is done that may take long, and must not meet another of its kind; `state` for
//! moments only, so that the disk can always be looked at.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api::{AtPowerOff, DiskDetails, DiskLimits, DiskStatus, Refused};
use devices::virtio::block::{self, BlockControl, BlockEvents, BlockOptions};
use vmfs_image::redo::{self, Opened};
use vmfs_image::{Error, Image, Run, RunKind};

use super::gone::Gone;
use super::open::{Medium, Wanted};
use super::power_off::Log;
use crate::config::model::{Disk, Limits, Mode};

/// A disk.
#[derive(Debug)]
pub struct LiveDisk {
    /// Its place among the guest's disks.
    pub index: usize,
    pub guest: String,
    /// As the guest was started with it. Its path, format, limits and end may be others by now.
    pub config: Disk,
    pub control: BlockControl,
    order: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// `None` once it is closed.
    medium: Option<Medium>,
    /// What was last to be said of it.
    last: Option<DiskStatus>,
    /// Work goes on with it.
    job: Option<u64>,
    limits: Limits,
    at_power_off: AtPowerOff,
}

/// Says what is to be known of a disk while its guest runs.
#[derive(Debug)]
struct Events {
    guest: String,
    index: usize,
}

impl BlockEvents for Events {
    fn stopped(&self, why: &str) {
        let Self { guest, index } = self;
        tracing::warn!(
            "disk {index} of guest {guest} waits: {why}; `vmm disk retry {guest} {index}` tries again"
        );
    }
}

/// How the disk `index` of `guest` is shown and served.
pub fn block_options(disk: &Disk, guest: &str, index: usize) -> BlockOptions {
    BlockOptions {
        serial: disk.serial.clone(),
        readonly: disk.readonly,
        queues: disk.queues,
        poll: disk.poll,
        cache: disk.cache,
        on_error: disk.on_error,
        limits: device_limits(disk.limits),
        events: Arc::new(Events { guest: guest.to_owned(), index }),
        ..BlockOptions::default()
    }
}

fn device_limits(limits: Limits) -> block::Limits {
    let Limits { iops, bandwidth, burst } = limits;
    let default = block::Limits::default();
    block::Limits { iops, bytes_per_second: bandwidth, burst: burst.unwrap_or(default.burst) }
}

impl LiveDisk {
    pub fn new(index: usize, guest: &str, config: &Disk, medium: Medium, control: BlockControl) -> Self {
        let state = State {
            medium: Some(medium),
            last: None,
            job: None,
            limits: config.limits,
            at_power_off: config.at_power_off,
        };
        Self {
            index,
            guest: guest.to_owned(),
            config: config.clone(),
            control,
            order: Mutex::default(),
            state: Mutex::new(state),
        }
    }

    /// Held while something is done that nothing else may come between.
    pub fn order(&self) -> MutexGuard<'_, ()> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A refusal that names the disk.
    pub fn refused(&self, why: impl std::fmt::Display) -> Refused {
        Refused(format!("disk {} of guest {}: {why}", self.index, self.guest))
    }

    /// Gives what `look` sees of what stands behind it.
    ///
    /// # Errors
    ///
    /// It is closed.
    pub fn look<T>(&self, look: impl FnOnce(&Medium) -> T) -> Result<T, Refused> {
        let state = self.state();
        state.medium.as_ref().map(look).ok_or_else(|| self.refused("the guest is at its end"))
    }

    /// What the guest reads and, if it may, writes.
    pub fn image(&self) -> Result<Arc<dyn Image>, Refused> {
        self.look(|medium| Arc::clone(&medium.opened.image))
    }

    /// Refuses what cannot be done beside a job.
    pub fn refuse_job(&self) -> Result<(), Refused> {
        match self.state().job {
            None => Ok(()),
            Some(id) => Err(self.refused(format_args!("job {id} goes on with it; wait for it or cancel it"))),
        }
    }

    /// From here on, or no longer, the job goes on with it.
    pub fn set_job(&self, job: Option<u64>) {
        self.state().job = job;
    }

    /// Lets the guest go on with the image that `make` gives while nothing is in flight. What it had is closed by whoever
    /// made the new one.
    ///
    /// # Errors
    ///
    /// That of `make`; the guest goes on with what it had.
    pub fn exchange(&self, make: impl FnOnce() -> Result<Arc<dyn Image>, Error>) -> Result<(), Error> {
        self.control.drain();
        let exchanged = make().and_then(|new| {
            let shown = self.control.swap(Arc::clone(&new));
            if let Some(medium) = &mut self.state().medium {
                medium.opened.image = Arc::clone(&new);
            }
            shown.map(drop).map_err(|source| Error::Io {
                path: new.path().to_owned(),
                what: "show the guest",
                source,
            })
        });
        self.control.resume();
        exchanged
    }

    /// What is to be opened as another medium.
    pub fn wanted(&self) -> Wanted {
        Wanted::of(&self.config, &self.guest)
    }

    /// Puts another medium behind it. The one before is closed, and its redo log stays if it holds anything.
    ///
    /// # Errors
    ///
    /// The device refuses it; then it is closed.
    pub fn insert(&self, medium: Medium) -> io::Result<()> {
        drop(self.control.swap(Arc::clone(&medium.opened.image))?);
        let old = self.state().medium.replace(medium);
        let is_undone = |old: &Medium| self.config.mode == Mode::Undoable && holds(&old.opened).is_none();
        // Closed, but for its path.
        let undone = old.filter(is_undone).map(|old| old.path);
        if let Some(path) = undone
            && let Err(error) = redo::discard(&path)
        {
            tracing::warn!("an empty redo log is left over: {error}");
        }
        Ok(())
    }

    pub fn set_limits(&self, limits: Limits) {
        // Not with the state held: the device may be busy for as long as its storage is.
        self.state().limits = limits;
        self.control.set_limits(device_limits(limits));
    }

    /// Says what becomes of its redo log.
    ///
    /// # Errors
    ///
    /// There is no choice.
    pub fn set_at_power_off(&self, action: AtPowerOff) -> Result<(), Refused> {
        let why = match self.config.mode {
            Mode::Undoable => {
                self.state().at_power_off = action;
                return Ok(());
            }
            Mode::Append => "its redo log stays until `vmm image commit` or `vmm image discard`",
            Mode::Nonpersistent => "what the guest writes is always thrown away",
            Mode::Persistent => "what the guest writes is in the image, and there is no redo log",
        };
        let mode = self.config.mode.as_str();
        Err(self.refused(format_args!("there is no choice at power-off in mode \"{mode}\": {why}")))
    }

    /// The disk as it is now.
    pub fn status(&self) -> DiskStatus {
        let state = self.state();
        match (&state.medium, &state.last) {
            (Some(medium), _) => self.describe(&state, medium),
            (None, Some(last)) => DiskStatus {
                more: DiskDetails { counters: self.counters(), ..last.more.clone() },
                ..last.clone()
            },
            (None, None) => DiskStatus {
                path: self.config.path.clone(),
                readonly: self.config.readonly,
                bytes: 0,
                more: DiskDetails::default(),
            },
        }
    }

    fn describe(&self, state: &State, medium: &Medium) -> DiskStatus {
        let Disk { mode, readonly, serial, queues, cache, on_error, .. } = &self.config;
        let opened = &medium.opened;
        let shown = opened.base.as_ref().unwrap_or(&opened.image);
        let info = opened.image.info().ok();
        DiskStatus {
            path: medium.path.clone(),
            readonly: *readonly,
            bytes: opened.image.size(),
            more: DiskDetails {
                serial: serial.clone(),
                format: shown.format().as_str().to_owned(),
                mode: mode.as_str().to_owned(),
                redo: opened.redo.clone(),
                backing: vmfs_image::names_below(&**shown, shown.path()),
                allocated: info.as_ref().map(|info| info.allocated),
                max_size: info.and_then(|info| info.max_size),
                queues: *queues,
                engine: self.control.engine().to_owned(),
                cache: cache.as_str().to_owned(),
                on_error: on_error.as_str().to_owned(),
                limits: DiskLimits {
                    iops: state.limits.iops,
                    bandwidth: state.limits.bandwidth,
                    burst: state.limits.burst.map(milliseconds),
                },
                counters: self.counters(),
                waiting: self.control.waiting(),
                at_power_off: (*mode == Mode::Undoable).then_some(state.at_power_off),
            },
        }
    }

    fn counters(&self) -> api::Counters {
        let block::Counters { reads, writes, flushes, discards, bytes_read, bytes_written, errors } =
            self.control.counters();
        api::Counters { reads, writes, flushes, discards, bytes_read, bytes_written, errors }
    }

    /// Closes its images, once no job goes on with it and its device has been stopped. Gives the redo log, if it has one of
    /// which is to be decided.
    pub fn close(&self) -> Option<Log> {
        let _alone = self.order();
        let mut state = self.state();
        let medium = state.medium.take()?;
        state.last = Some(self.describe(&state, &medium));
        let Medium { path, options, opened } = medium;
        let empty = Arc::new(Gone::of(&*opened.image));
        if let Err(error) = self.control.swap(empty) {
            tracing::warn!("disk {} stays open: {error}", self.index);
        }
        let file = opened.redo.clone()?;
        Some(Log {
            disk: self.index,
            image: path,
            file,
            options,
            holds: holds(&opened),
            action: (self.config.mode == Mode::Undoable).then_some(state.at_power_off),
        })
    }
}

/// What a redo log takes, in bytes; `None` if the disk is without it what it is with it.
fn holds(opened: &Opened) -> Option<u64> {
    let (image, base) = (&opened.image, opened.base.as_ref()?);
    let is_between = image.backing().is_none_or(|below| !Arc::ptr_eq(below, base));
    let mut at = 0;
    while !is_between && at < image.size() && image.size() == base.size() {
        match image.run(at, image.size() - at) {
            Ok(Run { len, kind: RunKind::Absent }) if len > 0 => at += len,
            _ => break,
        }
    }
    (at < image.size()).then(|| image.info().map_or(0, |info| info.allocated))
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
