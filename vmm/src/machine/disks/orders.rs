//! What can be done with a disk while its guest runs.

use std::sync::Arc;

use api::{DiskLimits, DiskOrder, MaxSize, Medium, Refused, Resize, Snapshot};
use vmfs_image::image::{MAX_SIZE, SECTOR};
use vmfs_image::merge::{ActiveCommit, Stream};
use vmfs_image::snapshot::{self, About};
use vmfs_image::{Error, Format};

use super::chain;
use super::jobs::Jobs;
use super::live::LiveDisk;
use super::open::Fresh;
use crate::config::disk::check_limits;
use crate::config::model::{Limits, Mode};

/// Does `order` with `disk`.
///
/// # Errors
///
/// It cannot be done, or not now; the disk is what it was.
pub fn carry_out(
    disk: &Arc<LiveDisk>,
    jobs: &Arc<Jobs>,
    order: DiskOrder,
) -> Result<Option<api::Job>, Refused> {
    let done = match order {
        DiskOrder::Retry => {
            disk.control.retry();
            return Ok(None);
        }
        DiskOrder::Limits(limits) => return limit(disk, limits).map(|()| None),
        DiskOrder::AtPowerOff(choice) => return disk.set_at_power_off(choice.action).map(|()| None),
        DiskOrder::Snapshot(wanted) => alone(disk, || take_snapshot(disk, wanted)),
        DiskOrder::Resize(Resize { bytes }) => alone(disk, || resize(disk, bytes)),
        DiskOrder::Medium(medium) => alone(disk, || change_medium(disk, &medium)),
        DiskOrder::MaxSize(MaxSize { bytes }) => on_thread(disk, || {
            // Beside a job too, which may be what waits.
            let _alone = disk.order();
            set_max_size(disk, bytes)
        }),
        DiskOrder::Commit => return alone(disk, || commit(disk, jobs)).map(Some),
        DiskOrder::Stream => return alone(disk, || stream(disk, jobs)).map(Some),
    };
    done.map(|()| None)
}

/// Does what nothing else that changes the disk may come between.
fn alone<T: Send>(disk: &LiveDisk, act: impl FnOnce() -> Result<T, Refused> + Send) -> Result<T, Refused> {
    on_thread(disk, || {
        let _alone = disk.order();
        disk.refuse_job()?;
        act()
    })
}

fn on_thread<T: Send>(
    disk: &LiveDisk,
    act: impl FnOnce() -> Result<T, Refused> + Send,
) -> Result<T, Refused> {
    // The caller's stack is small, and opening images is not made for that.
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("disk".to_owned()).spawn_scoped(scope, act);
        let thread =
            thread.map_err(|error| disk.refused(format_args!("no thread is to be had for that: {error}")))?;
        thread
            .join()
            .unwrap_or_else(|_| Err(disk.refused("that was not finished, because of a mistake in vmm")))
    })
}

fn refused(disk: &LiveDisk) -> impl Fn(Error) -> Refused + '_ {
    |error| disk.refused(chain(&error))
}

fn limit(disk: &LiveDisk, wanted: DiskLimits) -> Result<(), Refused> {
    let DiskLimits { iops, bandwidth, burst } = wanted;
    let limits = Limits { iops, bandwidth, burst: burst.map(std::time::Duration::from_millis) };
    check_limits(&limits).map_err(|why| disk.refused(why))?;
    disk.set_limits(limits);
    Ok(())
}

/// Refuses what is done with images that the guest writes to by itself.
fn refuse_without_writing(disk: &LiveDisk, what: &str) -> Result<(), Refused> {
    let why = match disk.config.mode {
        _ if disk.config.readonly => "is only read",
        Mode::Nonpersistent => "is nonpersistent: what the guest writes is thrown away",
        _ => return Ok(()),
    };
    Err(disk.refused(format_args!("{what}, and this disk {why}")))
}

fn take_snapshot(disk: &LiveDisk, wanted: Snapshot) -> Result<(), Refused> {
    let what = "a snapshot is of what the guest writes";
    refuse_without_writing(disk, what)?;
    if disk.config.mode != Mode::Persistent {
        return Err(disk.refused(format_args!(
            "what the guest writes is in a redo log (mode \"{}\"), and snapshots are of images without one",
            disk.config.mode.as_str()
        )));
    }
    let mut about = About::default();
    about.running = true;
    about.description = wanted.description;
    let (path, options, image) =
        disk.look(|medium| (medium.path.clone(), medium.options.clone(), Arc::clone(&medium.opened.image)))?;
    let prepared = snapshot::prepare(&path, &image, &wanted.name, &about, &options).map_err(refused(disk))?;
    drop(image);
    disk.exchange(|| prepared.switch()).map_err(refused(disk))
}

fn resize(disk: &LiveDisk, bytes: u64) -> Result<(), Refused> {
    let image = disk.image()?;
    let now = image.size();
    if !(now..=MAX_SIZE).contains(&bytes) || !bytes.is_multiple_of(SECTOR) {
        return Err(disk.refused(format_args!(
            "{bytes} is no size that it can be given: a multiple of {SECTOR} bytes from {now}, which it has, to {MAX_SIZE}"
        )));
    }
    if bytes == now {
        return Ok(());
    }
    if !image.is_writable() {
        return Err(disk.refused("it is only read, and keeps its size"));
    }
    let grown = image.grow(bytes);
    // The guest may use what is there now, whatever else goes wrong.
    if image.size() != now {
        disk.control.size_changed();
    }
    let failed = |what, source| Error::Io { path: image.path().to_owned(), what, source };
    grown
        .map_err(|source| failed("enlarge", source))
        .and_then(|()| image.flush().map_err(|source| failed("make stable the size of", source)))
        .map_err(refused(disk))
}

fn set_max_size(disk: &LiveDisk, bytes: Option<u64>) -> Result<(), Refused> {
    let image = disk.image()?;
    if !image.is_writable() {
        return Err(disk.refused("it is only read, and takes nothing"));
    }
    let Some(thin) = image.as_thin() else {
        return Err(disk.refused("it is no thin image; only these have a max-size"));
    };
    let path = image.path().to_owned();
    let limited = thin.set_max_size(bytes).map_err(|source| Error::Io { path, what: "limit", source });
    limited.map_err(refused(disk))?;
    disk.control.retry();
    Ok(())
}

fn change_medium(disk: &LiveDisk, medium: &Medium) -> Result<(), Refused> {
    let Medium { path, format } = medium;
    if !path.is_absolute() {
        return Err(disk.refused(format_args!(
            "{} is a relative path, and the monitor has a directory of its own; give an absolute one",
            path.display()
        )));
    }
    let format = format.as_deref().map(str::parse::<Format>).transpose();
    let format = format.map_err(|why| disk.refused(format_args!("format {why}")))?;
    // Nothing is opened for a guest that is at its end.
    disk.image()?;
    let mut fresh = Fresh::default();
    let wanted = super::open::Wanted { path: path.clone(), format, ..disk.wanted() };
    let inserted = match wanted.open(&mut fresh) {
        Ok(medium) => disk.insert(medium).map_err(|source| Error::Io {
            path: path.clone(),
            what: "show the guest",
            source,
        }),
        Err(error) => Err(error),
    };
    if inserted.is_err() {
        fresh.remove();
    }
    inserted.map_err(refused(disk))
}

fn commit(disk: &Arc<LiveDisk>, jobs: &Arc<Jobs>) -> Result<api::Job, Refused> {
    refuse_without_writing(disk, "a commit is of what the guest writes")?;
    let (path, options, image) =
        disk.look(|medium| (medium.path.clone(), medium.options.clone(), Arc::clone(&medium.opened.image)))?;
    let job = ActiveCommit::start(&path, &image, &options).map_err(refused(disk))?;
    drop(image);
    jobs.begin("commit", disk, Box::new(job))
}

fn stream(disk: &Arc<LiveDisk>, jobs: &Arc<Jobs>) -> Result<api::Job, Refused> {
    refuse_without_writing(disk, "a stream is to what the guest writes")?;
    if disk.config.mode != Mode::Persistent {
        return Err(disk.refused(format_args!(
            "what the guest writes is in a redo log (mode \"{}\"), which is nothing without its image; commit it",
            disk.config.mode.as_str()
        )));
    }
    let job = Stream::start(&disk.image()?, None).map_err(refused(disk))?;
    jobs.begin("stream", disk, Box::new(job))
}
