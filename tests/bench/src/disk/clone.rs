//! How long it takes to make a clone of a large disk: from the start of the program to its end.
//!
//! The disks that are cloned have the same contents in every format, thinly spread, so that the maps of images have entries
//! all over. Clones are made as users make them, by `vmm image clone` and `qemu-img create -b`; those of the former are
//! on the storage when it ends, the latter does not wait for that. What is yet to be written was so before each.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use super::images::{self, run, sync_all};
use super::{Error, is_chosen, is_ours, summary};
use crate::report::Line;
use crate::stats::Summary;
use crate::systems;

/// Name of the case.
pub const CASE: &str = "clone-100g";
/// Unit of its figures.
pub const UNIT: &str = "ms";
/// Size of the disk.
const SIZE: u64 = 100 << 30;
/// Distance of the pieces of data on it, and their length.
const STRIDE: u64 = 100 << 20;
const PIECE: usize = 64 << 10;

/// One way to make a clone.
#[derive(Debug)]
pub struct Way {
    /// Its name in reports.
    pub name: &'static str,
    /// Milliseconds of each run.
    pub times: Vec<f64>,
    /// Why there are none, or no more.
    pub failed: Option<String>,
}

/// Name and format of what is cloned, in the order of reports.
const WAYS: [(&str, Kind); 4] = [
    ("vmm-flat", Kind::OursOfRaw),
    ("vmm-thin", Kind::OursOfThin),
    ("qemu-raw", Kind::QemuOfRaw),
    ("qemu-qcow2", Kind::QemuOfQcow2),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    OursOfRaw,
    OursOfThin,
    QemuOfRaw,
    QemuOfQcow2,
}

impl Way {
    /// Median and extremes, or why there are none.
    ///
    /// # Errors
    ///
    /// Why.
    pub fn summary(&self) -> Result<Summary, String> {
        self.failed.clone().map_or_else(|| summary(&self.times), Err)
    }
}

/// Makes `runs` clones in each way whose name `names` choose, in turns.
///
/// # Errors
///
/// The disks that are to be cloned cannot be made.
pub fn measure(dir: &Path, runs: u32, names: &[String]) -> Result<Vec<Way>, Error> {
    let dir = dir.join("clone");
    let failed = |what| {
        let path = dir.clone();
        move |source| images::Error::Io { what, path, source }
    };
    fs::create_dir(&dir).map_err(failed("make"))?;
    let mut ways: Vec<(Kind, Way)> = WAYS
        .into_iter()
        .filter(|(name, _)| is_chosen(name, names))
        .map(|(name, kind)| (kind, Way { name, times: Vec::new(), failed: None }))
        .collect();
    // The raw disk of each is its own: who is cloned by ours must not be written any more.
    for (kind, way) in &mut ways {
        way.failed = make_base(*kind, &dir).err().map(|error| reason(way.name, &error.to_string()));
    }
    for _ in 0..runs {
        for (kind, way) in ways.iter_mut().filter(|(_, way)| way.failed.is_none()) {
            sync_all(&dir).map_err(failed("write to the disk"))?;
            match make_clone(*kind, &dir) {
                Ok(ms) => way.times.push(ms),
                Err(error) => way.failed = Some(reason(way.name, &error.to_string())),
            }
        }
    }
    Ok(ways.into_iter().map(|(_, way)| way).collect())
}

/// What is reported of a failure; that of ours is a fault.
fn reason(name: &str, why: &str) -> String {
    if is_ours(name) && systems::ours().is_ok() { format!("failed: {why}") } else { why.to_owned() }
}

fn base(kind: Kind, dir: &Path) -> PathBuf {
    dir.join(match kind {
        Kind::OursOfRaw => "ours.raw",
        Kind::OursOfThin => "ours.thin",
        Kind::QemuOfRaw => "qemu.raw",
        Kind::QemuOfQcow2 => "qemu.qcow2",
    })
}

fn program(kind: Kind) -> Result<Command, images::Error> {
    let program = match kind {
        Kind::OursOfRaw | Kind::OursOfThin => systems::ours(),
        Kind::QemuOfRaw | Kind::QemuOfQcow2 => systems::tool("qemu-img", "QEMU_IMG"),
    };
    program.map(Command::new).map_err(images::Error::Tool)
}

fn make_base(kind: Kind, dir: &Path) -> Result<(), images::Error> {
    let base = base(kind, dir);
    let mut command = program(kind)?;
    let raw = match kind {
        Kind::OursOfRaw | Kind::QemuOfRaw => base.clone(),
        Kind::OursOfThin | Kind::QemuOfQcow2 => dir.join("source.raw"),
    };
    if !raw.exists() {
        let failed = |source| images::Error::Io { what: "write", path: raw.clone(), source };
        spread(&raw).map_err(failed)?;
    }
    match kind {
        Kind::OursOfRaw | Kind::QemuOfRaw => return Ok(()),
        Kind::OursOfThin => command.args(["image", "convert", "--format", "thin", "--from", "flat"]),
        Kind::QemuOfQcow2 => command.args(["convert", "-f", "raw", "-O", "qcow2"]),
    };
    command.args([&raw, &base]);
    run(command)
}

/// Makes a raw disk with some data in it everywhere.
fn spread(path: &Path) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(SIZE)?;
    let mut piece = vec![0x5a; PIECE];
    for at in (0..SIZE).step_by(usize::try_from(STRIDE).unwrap_or(usize::MAX)) {
        piece[..8].copy_from_slice(&at.to_le_bytes());
        file.write_all_at(&piece, at)?;
    }
    Ok(())
}

/// Makes a clone, which does not stay, and says how many milliseconds that took.
fn make_clone(kind: Kind, dir: &Path) -> Result<f64, images::Error> {
    let (base, clone) = (base(kind, dir), dir.join("clone"));
    let mut command = program(kind)?;
    match kind {
        Kind::OursOfRaw | Kind::OursOfThin => command.args(["image", "clone"]),
        Kind::QemuOfRaw => command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]),
        Kind::QemuOfQcow2 => command.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]),
    };
    command.args([&base, &clone]);
    let started = Instant::now();
    run(command)?;
    let took = started.elapsed().as_secs_f64() * 1e3;
    fs::remove_file(&clone).map_err(|source| images::Error::Io { what: "remove", path: clone, source })?;
    Ok(took)
}

/// What is reported.
pub fn lines(ways: &[Way]) -> Vec<Line> {
    let line = |way: &Way| Line { case: CASE, system: way.name, unit: UNIT, result: way.summary() };
    ways.iter().map(line).collect()
}

/// The first failure of ours.
pub fn failure(ways: &[Way]) -> Option<Error> {
    ways.iter().find_map(|way| {
        let why = way.failed.clone().filter(|why| why.starts_with("failed"))?;
        Some(Error::Failed { system: way.name, case: CASE, why })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn disk_to_be_cloned_is_large_and_takes_little() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        spread(&path).unwrap();
        let found = fs::metadata(&path).unwrap();
        assert_eq!(found.len(), SIZE);
        let data = SIZE / STRIDE * PIECE as u64;
        assert!((data..2 * data).contains(&(found.blocks() * 512)), "{} blocks", found.blocks());
    }

    #[test]
    fn failure_of_ours_is_an_error_and_of_a_peer_a_reason() {
        let way = |name, why: &str| Way { name, times: vec![1.0], failed: Some(why.to_owned()) };
        assert!(failure(&[way("qemu-raw", "no qemu-img")]).is_none());
        let error = failure(&[way("vmm-thin", "failed: x")]).unwrap().to_string();
        assert_eq!(error, "vmm-thin failed in clone-100g: failed: x");
        let lines = lines(&[Way { name: "vmm-thin", times: vec![3.0, 1.0, 2.0], failed: None }]);
        assert!((lines[0].result.as_ref().unwrap().median - 2.0).abs() < 1e-9);
        assert_eq!((lines[0].case, lines[0].unit), ("clone-100g", "ms"));
    }
}
