//! What the keys of `[[disk]]` mean.

use std::path::Path;
use std::time::Duration;

use vmfs_image::{Cache, Format};

use super::model::{AtPowerOff, Disk, Limits, Mode, OnError};
use super::reader::{Keys, Reader, Section};
use super::schema::file;
use super::{size, time};

const DISK: Keys = Keys {
    known: &[
        "path",
        "mode",
        "readonly",
        "serial",
        "format",
        "cache",
        "queues",
        "poll_us",
        "on_error",
        "iops",
        "bandwidth",
        "burst",
        "at_power_off",
    ],
    later: &["shares"],
};

/// Longest serial number of a disk (virtio 1.2, section 5.2.6), in characters.
const SERIAL_MAX: usize = 20;
/// Most queues of a disk.
const QUEUES_MAX: u16 = 16;
/// Longest time that a queue is looked at before its thread sleeps, in microseconds, and that of a disk that does not say.
const POLL_MAX: u16 = 1000;
const POLL_DEFAULT: u16 = 50;
/// Most queues of a disk that does not say how many: each has a thread of the monitor's.
const QUEUES_DEFAULT_MAX: u16 = 4;
const IOPS_MAX: u64 = 10_000_000;
/// Least and most bytes a second.
const BANDWIDTH_MIN: u64 = 4 << 10;
const BANDWIDTH_MAX: u64 = 1 << 40;
const BURST_MIN: Duration = Duration::from_millis(1);
const BURST_MAX: Duration = Duration::from_secs(60);

/// Each `[[disk]]`, for a guest with `cpus` vCPUs.
pub fn disks<'t>(reader: &mut Reader<'t>, top: &Section<'t>, base: &Path, cpus: u8) -> Vec<Disk> {
    let mut disks: Vec<Disk> = Vec::new();
    for (index, section) in reader.sections(top, "disk", DISK).into_iter().enumerate() {
        let Some(disk) = disk(reader, &section, base, index, cpus) else { continue };
        if disks.iter().any(|other| other.path == disk.path && !(is_shareable(other) && is_shareable(&disk)))
        {
            reader.refuse(
                &section,
                "path",
                "another disk of this guest is the same file; both would have to be readonly or nonpersistent",
            );
        }
        disks.push(disk);
    }
    disks
}

/// Whether others may read the image while the disk is in use.
fn is_shareable(disk: &Disk) -> bool {
    disk.readonly || disk.mode == Mode::Nonpersistent
}

fn disk<'t>(
    reader: &mut Reader<'t>,
    section: &Section<'t>,
    base: &Path,
    index: usize,
    cpus: u8,
) -> Option<Disk> {
    reader.missing(section, "path", "it names the image file or block device");
    let path = reader.parsed(section, "path", |text| file(base, text));
    let readonly = reader.boolean(section, "readonly").unwrap_or(false);
    let mode = mode(reader, section, readonly);
    let serial = reader.parsed(section, "serial", |text| {
        if text.is_empty() || text.len() > SERIAL_MAX || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(format!("a serial number is 1 to {SERIAL_MAX} ASCII characters without spaces"));
        }
        Ok(text.to_owned())
    });
    let format = reader.parsed(section, "format", str::parse::<Format>);
    let cache = reader.parsed(section, "cache", str::parse::<Cache>);
    let queues = reader.number(section, "queues", 1..=QUEUES_MAX, "of queues");
    let poll_us = reader.number(section, "poll_us", 0..=POLL_MAX, "of microseconds");
    let on_error = reader.parsed(section, "on_error", |text| match text {
        "report" => Ok(OnError::Report),
        "pause" => Ok(OnError::Pause),
        _ => Err("has to be one of \"report\", \"pause\"".to_owned()),
    });
    let limits = limits(reader, section);
    let at_power_off = reader.parsed(section, "at_power_off", str::parse::<AtPowerOff>);
    if at_power_off.is_some() && mode.is_some_and(|mode| mode != Mode::Undoable) {
        reader.refuse(section, "at_power_off", "is for a disk with mode = \"undoable\" only");
    }
    Some(Disk {
        path: path?,
        mode: mode.unwrap_or_default(),
        readonly,
        serial: serial.unwrap_or_else(|| format!("disk{index}")),
        format,
        cache: cache.unwrap_or_default(),
        queues: queues.unwrap_or_else(|| u16::from(cpus).min(QUEUES_DEFAULT_MAX)),
        poll: Duration::from_micros(poll_us.unwrap_or(POLL_DEFAULT).into()),
        on_error: on_error.unwrap_or_default(),
        limits,
        at_power_off: at_power_off.unwrap_or(AtPowerOff::Ask),
    })
}

/// `None` if it is given and wrong.
fn mode<'t>(reader: &mut Reader<'t>, section: &Section<'t>, readonly: bool) -> Option<Mode> {
    if !reader.is_given(section, "mode") {
        return Some(Mode::Persistent);
    }
    let mode = reader.parsed(section, "mode", |text| {
        [Mode::Persistent, Mode::Nonpersistent, Mode::Undoable, Mode::Append]
            .into_iter()
            .find(|mode| mode.as_str() == text)
            .ok_or_else(|| {
                "has to be one of \"persistent\", \"nonpersistent\", \"undoable\", \"append\"".to_owned()
            })
    })?;
    if readonly && mode != Mode::Persistent {
        reader.refuse(
            section,
            "mode",
            "is about what the guest writes, and this disk is readonly; one of the two has to go",
        );
    }
    Some(mode)
}

fn limits<'t>(reader: &mut Reader<'t>, section: &Section<'t>) -> Limits {
    let iops = reader.number(section, "iops", 1..=IOPS_MAX, "of requests a second");
    let bandwidth = reader.parsed(section, "bandwidth", |text| {
        let bytes = size::parse(text)?;
        if !(BANDWIDTH_MIN..=BANDWIDTH_MAX).contains(&bytes) {
            let (min, max) = (size::show(BANDWIDTH_MIN), size::show(BANDWIDTH_MAX));
            return Err(format!("the bandwidth of a disk is from {min} to {max} bytes a second"));
        }
        Ok(bytes)
    });
    let burst = reader.parsed(section, "burst", |text| {
        let time = time::parse(text)?;
        if !(BURST_MIN..=BURST_MAX).contains(&time) {
            return Err("a burst is from 1ms to 60s".to_owned());
        }
        Ok(time)
    });
    if burst.is_some() && !reader.is_given(section, "iops") && !reader.is_given(section, "bandwidth") {
        reader.refuse(section, "burst", "means nothing without iops or bandwidth");
    }
    Limits { iops, bandwidth, burst }
}

/// Whether `limits`, which did not come from a file, could stand in one.
///
/// # Errors
///
/// What is wrong with them, and what would be right.
pub fn check_limits(limits: &Limits) -> Result<(), String> {
    if limits.iops.is_some_and(|iops| !(1..=IOPS_MAX).contains(&iops)) {
        return Err(format!("iops has to be a number of requests a second from 1 to {IOPS_MAX}"));
    }
    if limits.bandwidth.is_some_and(|bytes| !(BANDWIDTH_MIN..=BANDWIDTH_MAX).contains(&bytes)) {
        return Err(format!("bandwidth has to be from {BANDWIDTH_MIN} to {BANDWIDTH_MAX} bytes a second"));
    }
    if limits.burst.is_some_and(|time| !(BURST_MIN..=BURST_MAX).contains(&time)) {
        return Err("burst has to be from 1 to 60000 milliseconds".to_owned());
    }
    if limits.burst.is_some() && limits.iops.is_none() && limits.bandwidth.is_none() {
        return Err("burst means nothing without iops or bandwidth".to_owned());
    }
    Ok(())
}
