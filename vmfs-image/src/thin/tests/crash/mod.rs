//! Crashes: what `docs/image-format.md` promises for each moment of a power loss or a `kill -9`.
//!
//! A disk is used at random, and every change of its storage is recorded. Then each crash that could have happened meanwhile is
//! made: everything is there that was waited for, and of the changes since then
//!
//! * after a power loss any: all subsets where there are few, many by chance where there are not, and torn ones, of which
//!   some pages or some sectors are there,
//! * after a kill the first so many, the last one perhaps in part.
//!
//! A subset is looked at as what a crash right behind its last change left: at no later moment is less allowed. Of what
//! each crash leaves it has to hold:
//!
//! * the image opens to be changed, and every sector holds what was stable last or what was written to it since;
//! * a generation that an image on top could have noted holds what it held then;
//! * the check finds nothing wrong, and the repair gives back what has leaked;
//! * after the repair the disk holds the same.
//!
//! One of the crashes is then gone on from, and so on; repairs and openings are recorded like everything else, so
//! that crashes in these are among the crashes.

mod disk;
mod recorder;

use crate::image::Image;
use crate::thin::check::check_storage;
use crate::thin::memory::{Bytes, Memory};

use disk::{Disk, Kind, Random};
use recorder::{Op, Recorder};

/// Changes between two syncs of which every subset is looked at.
const EVERY: usize = 7;
/// Subsets and torn ones by chance, of those between two syncs.
const SOME: usize = 40;

const PLAIN: Kind = Kind { cluster_bits: 16, backing: false, most: None, fails: false, never_sync: false };

/// A crash: what is left, and when it was.
struct Crash {
    bytes: Bytes,
    /// The first change that had not been waited for.
    interval: usize,
    /// Changes that had been made.
    changes: usize,
}

/// What opens after a crash.
struct Found {
    values: Vec<u32>,
    size: u64,
    generation: u64,
}

/// Looks at what a crash has left.
fn look(disk: &Disk, crash: &Crash) -> Result<Found, String> {
    let thin = disk.open(crash.bytes.clone())?;
    let values = disk.areas.read(&thin)?;
    disk.allows(&thin, &values, crash.interval, crash.changes)?;
    let found = Found { values, size: thin.size(), generation: thin.identity().unwrap().state };
    drop(thin);

    let memory = Memory::from(crash.bytes.clone());
    let before = check_storage(&memory, true).map_err(|failure| format!("is not checked: {failure:?}"))?;
    if before.error_count > 0 {
        return Err(format!("is wrong: {before:#?}"));
    }
    if before.repaired.is_some() {
        let after = check_storage(&memory, false).map_err(|failure| format!("after repair: {failure:?}"))?;
        // One page may have to stay if there is no other for the list.
        if after.error_count > 0 || after.leaked > 4096 || after.beyond > 0 {
            return Err(format!("is wrong after its repair: {after:#?}, before {before:#?}"));
        }
    }
    let repaired = memory.bytes().clone();
    let thin = disk.open(repaired)?;
    if (thin.size(), disk.areas.read(&thin)?) != (found.size, found.values.clone()) {
        return Err("holds something else after its repair".to_owned());
    }
    Ok(found)
}

/// All crashes of what a disk went through.
struct Crashes<'a> {
    disk: &'a Disk,
    ops: Vec<Op>,
    random: Random,
    seed: u64,
    count: usize,
    /// One of them, by chance, and what it left.
    kept: Option<(Bytes, Found)>,
}

impl Crashes<'_> {
    fn try_one(&mut self, bytes: Bytes, interval: usize, changes: usize, what: impl FnOnce() -> String) {
        let crash = Crash { bytes, interval, changes };
        match look(self.disk, &crash) {
            Ok(found) => {
                self.count += 1;
                if self.random.one_in(self.count) {
                    self.kept = Some((crash.bytes, found));
                }
            }
            Err(error) => {
                let from = interval.saturating_sub(12);
                let ops: Vec<_> = (from..).zip(&self.ops[from..(changes + 2).min(self.ops.len())]).collect();
                panic!(
                    "seed {}: crash after {changes} changes, the first {interval} of them stable, {}: the image \
                     {error}\n{:#?}\n{ops:#?}",
                    self.seed,
                    what(),
                    self.disk.trace
                );
            }
        }
    }

    /// Kills: the first so many changes are there, the last one perhaps in part.
    fn kills(&mut self) {
        let mut bytes = self.disk.base.clone();
        for position in 0..=self.ops.len() {
            if position > 0 {
                let op = self.ops[position - 1].clone();
                let pages = self.random.below(6);
                if !matches!(op, Op::Sync | Op::Length(_)) {
                    let mut torn = bytes.clone();
                    op.apply_torn(&mut torn, 4096, |page| page < pages);
                    self.try_one(torn, position - 1, position, || format!("the last to {pages} pages"));
                }
                op.apply(&mut bytes);
            }
            self.try_one(bytes.clone(), position, position, || "killed".to_owned());
        }
    }

    /// Power losses: of the changes since the last sync any are there.
    fn power_losses(&mut self) {
        let mut bytes = self.disk.base.clone();
        let mut from = 0;
        while from < self.ops.len() {
            let len = self.ops[from..].iter().take_while(|op| !matches!(op, Op::Sync)).count();
            let ops = self.ops[from..from + len].to_vec();
            self.between_syncs(&bytes, from, &ops);
            ops.iter().for_each(|op| op.apply(&mut bytes));
            from += len + 1;
        }
    }

    fn between_syncs(&mut self, stable: &Bytes, from: usize, ops: &[Op]) {
        let subset = |has: &dyn Fn(usize) -> bool| {
            let mut bytes = stable.clone();
            let chosen: Vec<_> = (0..ops.len()).filter(|at| has(*at)).collect();
            chosen.iter().for_each(|at| ops[*at].apply(&mut bytes));
            let changes = chosen.last().map_or(from, |last| from + last + 1);
            (bytes, changes, chosen)
        };
        if ops.len() <= EVERY {
            for mask in 0..1_u32 << ops.len() {
                let (bytes, changes, chosen) = subset(&|at| mask >> at & 1 == 1);
                self.try_one(bytes, from, changes, || format!("with {chosen:?} of those since"));
            }
        } else {
            for round in 0..SOME {
                let most = 1 + self.random.below(ops.len());
                let mut random = Random(self.random.next());
                let few = 1 + self.random.below(8);
                let has: Vec<_> = (0..most).map(|_| random.one_in(few) ^ (round % 2 == 0)).collect();
                let (bytes, changes, chosen) = subset(&|at| has.get(at) == Some(&true));
                self.try_one(bytes, from, changes, || format!("with {chosen:?} of those since"));
            }
        }
        if let [only @ Op::Write { bytes: written, .. }] = ops
            && written.len() == 4096
        {
            // A superblock, mostly: every way in which it can be torn.
            for mask in 0..1_u32 << 8 {
                let mut bytes = stable.clone();
                only.apply_torn(&mut bytes, 512, |sector| mask >> sector & 1 == 1);
                self.try_one(bytes, from, from + 1, || format!("with sectors {mask:#b} of the next"));
            }
            return;
        }
        for _ in 0..if ops.is_empty() { 0 } else { SOME / 2 } {
            let mut bytes = stable.clone();
            let most = 1 + self.random.below(ops.len());
            let mut random = Random(self.random.next());
            for op in &ops[..most] {
                let (unit, few) = ([512, 4096][random.below(2)], 1 + random.below(4));
                match random.below(3) {
                    0 => op.apply(&mut bytes),
                    1 => op.apply_torn(&mut bytes, unit, |_| random.one_in(few)),
                    _ => {}
                }
            }
            self.try_one(bytes, from, from + most, || "torn".to_owned());
        }
    }
}

/// Uses disks of a kind, each over several crashes, and looks at every crash.
fn go_through(kind: Kind, seeds: std::ops::Range<u64>, power_losses: bool) {
    for seed in seeds {
        let mut disk = Disk::new(kind, seed);
        for _ in 0..3 {
            disk.use_it(14);
            let ops = disk.recorder.log().ops.clone();
            let random = Random(disk.random.next());
            let mut crashes = Crashes { disk: &disk, ops, random, seed, count: 0, kept: None };
            crashes.kills();
            if power_losses {
                crashes.power_losses();
            }
            let (bytes, found) = crashes.kept.unwrap();
            disk.restart(bytes, found.values, found.size, found.generation);
        }
    }
}

/// Bytes after a crash in which everything before the last superblock was there, and of that the sectors that `has` names.
fn torn(base: &Bytes, recorder: &Recorder, has: impl FnMut(usize) -> bool) -> Bytes {
    let ops = recorder.log().ops.clone();
    let is_superblock =
        |op: &Op| matches!(op, Op::Write { at, bytes } if *at < 12_288 && bytes.len() == 4096);
    let last = ops.iter().rposition(is_superblock).unwrap();
    let mut bytes = base.clone();
    ops[..last].iter().for_each(|op| op.apply(&mut bytes));
    ops[last].apply_torn(&mut bytes, 512, has);
    bytes
}

/// The first power loss leaves all of a superblock but the path of the backing, the second only that of the next one in its
/// place: together they would be one whose tree is no more.
#[test]
fn superblock_that_two_power_losses_tore_is_not_put_together() {
    for repair in [false, true] {
        let disk = Disk::new(Kind { backing: true, ..PLAIN }, 0);
        let recorder = Recorder::new(disk.base.clone(), false);
        let thin = disk.open_on(recorder.clone()).unwrap();
        super::write(&thin, 0, &[1; 4096]);
        thin.flush().unwrap();
        let first = torn(&disk.base, &recorder, |sector| sector != 2);
        let recorder = Recorder::new(first.clone(), false);
        if repair {
            check_storage(&recorder, true).unwrap();
        }
        let next = disk.open_on(recorder.clone()).unwrap();
        super::write(&next, 0, &[2; 8192]);
        next.flush().unwrap();
        let second = torn(&first, &recorder, |sector| sector == 2);
        let values = disk.areas.read(&disk.open(second).unwrap()).unwrap();
        assert_eq!(values, disk.areas.read(&disk.open(disk.base.clone()).unwrap()).unwrap());
    }
}

#[test]
fn every_crash_of_an_image_leaves_what_was_flushed() {
    go_through(PLAIN, 0..4, true);
}

#[test]
fn every_crash_of_an_image_on_another_leaves_what_was_flushed() {
    go_through(Kind { backing: true, ..PLAIN }, 115..118, true);
}

#[test]
fn every_crash_of_an_image_with_large_clusters_leaves_what_was_flushed() {
    go_through(Kind { cluster_bits: 18, backing: true, ..PLAIN }, 200..201, true);
}

#[test]
fn every_crash_of_an_image_that_may_not_grow_leaves_what_was_flushed() {
    go_through(Kind { most: Some(11), ..PLAIN }, 300..304, true);
}

#[test]
fn every_crash_after_writes_and_syncs_that_failed_leaves_what_was_flushed() {
    go_through(Kind { backing: true, fails: true, ..PLAIN }, 416..420, true);
}

#[test]
fn every_kill_of_an_image_that_is_never_synced_leaves_what_was_flushed() {
    for (backing, most) in [(false, None), (true, None), (false, Some(11))] {
        go_through(Kind { backing, most, never_sync: true, ..PLAIN }, 500..504, false);
    }
}
