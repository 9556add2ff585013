use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;

use super::*;
use crate::flat::{self, Preallocate};
use crate::image::{Access, Place};
use crate::redo::{self, Mode};
use crate::snapshot::{self, About};
use crate::test_image::{Change, change, contents, write};

const SIZE: u64 = 256 << 10;
const FORMATS: [Format; 2] = [Format::Flat, Format::Thin];

fn writable() -> OpenOptions {
    OpenOptions { writable: true, ..OpenOptions::default() }
}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn disk(format: Format) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.img");
    make(&path, format);
    (dir, path)
}

fn make(path: &Path, format: Format) {
    match format {
        Format::Flat => flat::create(path, SIZE, Preallocate::Sparse).unwrap(),
        _ => thin::create(path, &thin::Create::new(SIZE)).unwrap(),
    }
    put(&*crate::open(path, &writable()).unwrap(), 0, 1);
}

fn put(image: &dyn Image, unit: u64, byte: u8) {
    write(image, unit * 4096, &[byte; 4096]).unwrap();
}

fn bytes_of(path: &Path) -> Vec<u8> {
    contents(&*crate::open(path, &OpenOptions::default()).unwrap())
}

/// An overlay at `top` on the image at `base`, which is not marked.
fn lay(top: &Path, base: &Path) {
    let image = crate::open(base, &OpenOptions::default()).unwrap();
    overlay::create(top, &*image, Path::new(base.file_name().unwrap())).unwrap();
}

fn files(dir: &Path) -> Vec<String> {
    let names =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| !name.ends_with(".about")).collect();
    names.sort();
    names
}

/// Three images, each on the one before, of which all have something of their own.
fn chain(format: Format) -> (tempfile::TempDir, [PathBuf; 3]) {
    let (dir, base) = disk(format);
    let paths = [base, dir.path().join("middle"), dir.path().join("top")];
    for index in [1, 2] {
        lay(&paths[index], &paths[index - 1]);
        let image = crate::open(&paths[index], &writable()).unwrap();
        put(&*image, index as u64, 5);
        image.write_zeroes(index as u64 * 16384, 8192, true).unwrap();
    }
    (dir, paths)
}

#[test]
fn streamed_image_needs_nothing_below_or_only_what_was_said() {
    for format in FORMATS {
        for lower in [None, Some(0)] {
            let (_dir, paths) = chain(format);
            let before = bytes_of(&paths[2]);
            stream(&paths[2], lower.map(|lower: usize| &*paths[lower]), &mut go_on).unwrap();
            let image = crate::open(&paths[2], &OpenOptions::default()).unwrap();
            assert_eq!(image.backing().is_some(), lower.is_some());
            drop(image);
            std::fs::remove_file(&paths[1]).unwrap();
            if lower.is_none() {
                std::fs::remove_file(&paths[0]).unwrap();
            }
            assert_eq!(bytes_of(&paths[2]), before);
        }
    }
}

#[test]
fn stream_of_what_lies_on_nothing_or_on_another_is_refused() {
    let (dir, paths) = chain(Format::Flat);
    for path in &paths[..1] {
        assert!(matches!(stream(path, None, &mut go_on), Err(Error::Invalid { .. })));
    }
    make(&dir.path().join("other"), Format::Thin);
    let refused = stream(&paths[2], Some(&dir.path().join("other")), &mut go_on).unwrap_err().to_string();
    assert!(refused.contains("does not lie on"), "{refused}");
    let stopped = stream(&paths[2], None, &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Interrupted { .. })));
}

#[test]
fn committed_overlay_is_empty_and_its_backing_has_everything() {
    for format in FORMATS {
        let (_dir, paths) = chain(format);
        let before = bytes_of(&paths[2]);
        commit(&paths[2], &mut go_on).unwrap();
        assert_eq!(bytes_of(&paths[2]), before);
        assert_eq!(bytes_of(&paths[1]), before);
        let top = crate::open(&paths[2], &OpenOptions::default()).unwrap();
        assert_eq!(top.run(0, SIZE).unwrap().kind, crate::RunKind::Absent);
        drop(top);
        commit(&paths[1], &mut go_on).unwrap();
        assert_eq!(bytes_of(&paths[0]), before);
        assert!(matches!(commit(&paths[0], &mut go_on), Err(Error::Invalid { .. })));
    }
}

#[test]
fn what_an_overlay_does_not_see_of_a_larger_backing_is_zeroes_also_when_it_is_brought_together() {
    for up in [false, true] {
        let (dir, base) = disk(Format::Thin);
        let image = crate::open(&base, &writable()).unwrap();
        put(&*image, 40, 4);
        drop(image);
        let top = dir.path().join("top");
        let identity = crate::open(&base, &OpenOptions::default()).unwrap().identity().unwrap();
        let backing = Some((PathBuf::from("web.img"), Format::Thin, identity));
        thin::create(&top, &thin::Create { backing, ..thin::Create::new(SIZE / 2) }).unwrap();
        let image = crate::open(&top, &writable()).unwrap();
        image.grow(SIZE).unwrap();
        put(&*image, 3, 3);
        drop(image);
        let before = bytes_of(&top);
        assert_eq!(before[40 * 4096], 0);
        if up {
            stream(&top, None, &mut go_on).unwrap()
        } else {
            commit(&top, &mut go_on).unwrap()
        }
        assert!(bytes_of(&top) == before);
        assert_eq!(bytes_of(&base) == before, !up);
    }
}

#[test]
fn commit_is_refused_where_others_may_lie_on_the_backing() {
    let (dir, path) = disk(Format::Thin);
    snapshot::create(&path, "a", &About::default()).unwrap();
    assert!(commit(&path, &mut go_on).unwrap_err().to_string().contains("lies on its snapshot"));
    let clone = dir.path().join("clone");
    crate::clone::linked(&path, &clone).unwrap();
    assert!(commit(&clone, &mut go_on).unwrap_err().to_string().contains("linked clones"));
}

#[test]
fn crash_at_any_step_of_a_commit_leaves_an_overlay_that_reads_the_same() {
    for format in FORMATS {
        for steps_done in 0.. {
            let (_dir, paths) = chain(format);
            let before = bytes_of(&paths[2]);
            let done = steps::cut::after(steps_done, || commit(&paths[1], &mut go_on));
            if done.is_ok() {
                assert!(steps_done > 1);
                break;
            }
            let cut = bytes_of(&paths[1]);
            commit(&paths[1], &mut go_on).unwrap();
            assert_eq!(bytes_of(&paths[0]), cut);
            assert_eq!(bytes_of(&paths[1]), cut);
            // What lay on the committed one noted another state of it.
            thin::set_backing(
                &paths[2],
                Some((
                    Path::new("middle"),
                    Format::Thin,
                    crate::open(&paths[1], &OpenOptions::default()).unwrap().identity().unwrap(),
                )),
            )
            .unwrap();
            assert_eq!(bytes_of(&paths[2]), before);
        }
    }
}

/// A guest that runs, with what its disk has to read as.
struct Guest {
    image: Arc<dyn Image>,
    model: Vec<u8>,
    writes: u64,
}

impl Guest {
    fn new(path: &Path, mode: Mode) -> Self {
        let image = redo::open(path, mode, &writable()).unwrap().image;
        let model = contents(&*image);
        Self { image, model, writes: 0 }
    }

    /// Writes something, somewhere else each time.
    fn work(&mut self) {
        self.writes += 1;
        let unit = self.writes * 7 % (SIZE / 4096);
        let byte = self.writes.to_le_bytes()[0];
        change(
            &*self.image,
            &mut self.model,
            (self.writes.is_multiple_of(5), unit, 1 + self.writes % 3, byte),
        );
    }

    fn check(&self) {
        assert!(contents(&*self.image) == self.model, "the guest sees something else");
    }

    /// Drives a job to its end, the guest writing between any two of its steps.
    fn drive(&mut self, job: &mut dyn Job) -> Result<(), Error> {
        loop {
            self.work();
            let next = job.step(4096)?;
            self.check();
            let (done, total) = job.progress();
            assert!(done <= total);
            match next {
                Next::Step => {}
                Next::Switch => {
                    self.work();
                    self.image = job.switch()?;
                    assert!(self.image.is_writable());
                    self.check();
                }
                Next::Done => return Ok(()),
            }
        }
    }
}

#[test]
fn stream_under_a_guest_ends_with_an_image_of_its_own() {
    for format in FORMATS {
        for lower in [None, Some(0)] {
            let (_dir, paths) = chain(format);
            let mut guest = Guest::new(&paths[2], Mode::Persistent);
            let lower = lower.map(|lower: usize| &*paths[lower]);
            let mut job = Stream::start(&guest.image, lower).unwrap();
            guest.drive(&mut job).unwrap();
            drop(job);
            // What is no longer needed is no longer held.
            drop(crate::open(&paths[1], &writable()).unwrap());
            assert_eq!(guest.image.backing().is_some(), lower.is_some());
            guest.work();
            guest.check();
            let Guest { image, model, .. } = guest;
            drop(image);
            assert!(bytes_of(&paths[2]) == model);
        }
    }
}

#[test]
fn commit_of_a_log_under_a_guest_takes_what_was_there_and_goes_on_with_a_new_log() {
    for format in FORMATS {
        let (dir, path) = disk(format);
        let mut guest = Guest::new(&path, Mode::Undoable);
        for _ in 0..3 {
            guest.work();
            let committed = guest.model.clone();
            let mut job = ActiveCommit::start(&path, &guest.image, &writable()).unwrap();
            assert!(matches!(redo::open(&path, Mode::Nonpersistent, &writable()), Err(Error::Locked { .. })));
            guest.drive(&mut job).unwrap();
            drop(job);
            assert_eq!(files(dir.path()), ["web.img", "web.img.redo"]);
            // The first write of all comes between the start and the switch.
            let base = bytes_of(&path);
            let differ = base.chunks(4096).zip(committed.chunks(4096)).filter(|(a, b)| a != b).count();
            assert!(differ <= 6, "{differ}");
            assert!(matches!(crate::open(&path, &writable()), Err(Error::Locked { .. })));
        }
        let Guest { image, model, .. } = guest;
        drop(image);
        assert!(contents(&*redo::open(&path, Mode::Undoable, &writable()).unwrap().image) == model);
        let base = bytes_of(&path);
        redo::discard(&path).unwrap();
        assert!(bytes_of(&path) == base);
    }
}

#[test]
fn snapshot_is_deleted_under_a_guest_which_goes_on_with_it() {
    for format in FORMATS {
        for deeper in [false, true] {
            let (_dir, path) = disk(format);
            if deeper {
                snapshot::create(&path, "first", &About::default()).unwrap();
                put(&*crate::open(&path, &writable()).unwrap(), 9, 9);
            }
            snapshot::create(&path, "a", &About::default()).unwrap();
            let mut guest = Guest::new(&path, Mode::Persistent);
            guest.work();
            let mut job = ActiveCommit::start(&path, &guest.image, &writable()).unwrap();
            guest.drive(&mut job).unwrap();
            drop(job);
            let kept: &[&str] = if deeper { &["first"] } else { &[] };
            assert_eq!(files(&snapshot::directory(&path)), kept);
            assert_eq!(guest.image.path(), path);
            guest.work();
            guest.check();
            assert!(matches!(crate::open(&path, &OpenOptions::default()), Err(Error::Locked { .. })));
            // And again from there.
            let prepared =
                snapshot::prepare(&path, &guest.image, "b", &About::default(), &writable()).unwrap();
            guest.image = prepared.switch().unwrap();
            guest.work();
            guest.check();
            let mut job = ActiveCommit::start(&path, &guest.image, &writable()).unwrap();
            guest.drive(&mut job).unwrap();
            drop(job);
            assert_eq!(files(&snapshot::directory(&path)), kept);
            for name in ["c", "d"] {
                let prepared =
                    snapshot::prepare(&path, &guest.image, name, &About::default(), &writable()).unwrap();
                guest.image = prepared.switch().unwrap();
                guest.work();
            }
            let mut job = Stream::start(&guest.image, Some(&snapshot::file(&path, "c"))).unwrap();
            guest.drive(&mut job).unwrap();
            drop(job);
            drop(crate::open(&snapshot::file(&path, "d"), &writable()).unwrap());
            let Guest { image, model, .. } = guest;
            drop(image);
            assert!(bytes_of(&path) == model);
        }
    }
}

#[test]
fn commit_under_a_guest_is_refused_where_it_would_cost_others() {
    let (dir, path) = disk(Format::Thin);
    snapshot::create(&path, "a", &About::default()).unwrap();
    snapshot::create(&path, "b", &About::default()).unwrap();
    snapshot::revert(&path, "a", None).unwrap();
    let guest = Guest::new(&path, Mode::Persistent);
    let refused = ActiveCommit::start(&path, &guest.image, &writable()).unwrap_err().to_string();
    assert!(refused.contains("several"), "{refused}");
    drop(guest);
    let clone = dir.path().join("clone");
    crate::clone::linked(&snapshot::file(&path, "b"), &clone).unwrap();
    let guest = Guest::new(&clone, Mode::Persistent);
    let refused = ActiveCommit::start(&clone, &guest.image, &writable()).unwrap_err().to_string();
    assert!(refused.contains("no snapshot of it"), "{refused}");
    drop(guest);
    snapshot::delete(&path, "b", &mut go_on).unwrap_err();
    snapshot::revert(&path, "b", None).unwrap();
    let guest = Guest::new(&path, Mode::Undoable);
    let reader = redo::open(&path, Mode::Nonpersistent, &writable()).unwrap();
    assert!(matches!(ActiveCommit::start(&path, &guest.image, &writable()), Err(Error::Locked { .. })));
    drop(reader);
    drop(ActiveCommit::start(&path, &guest.image, &writable()).unwrap());
    drop(guest);
    redo::discard(&path).unwrap();
}

/// Runs a commit under a guest that is killed after so many steps, and checks that nothing is lost; it is finished under the
/// guest that comes back, or without it. Gives whether it ended first.
fn killed_after(steps_done: usize, format: Format, mode: Mode, comes_back: bool) -> bool {
    let (dir, path) = disk(format);
    if mode == Mode::Persistent {
        snapshot::create(&path, "a", &About::default()).unwrap();
    }
    let mut guest = Guest::new(&path, mode);
    guest.work();
    let ended = steps::cut::after(steps_done, || {
        let mut job = ActiveCommit::start(&path, &guest.image, &writable())?;
        guest.drive(&mut job)
    });
    // What the guest has is right even so, and what it flushes survives.
    guest.check();
    guest.work();
    guest.image.flush().unwrap();
    let Guest { image, model, .. } = guest;
    drop(image);
    let mut guest = Guest::new(&path, mode);
    assert!(guest.model == model, "cut at {steps_done}: something is lost");
    if comes_back {
        guest.work();
        let mut job = ActiveCommit::start(&path, &guest.image, &writable());
        if let Ok(job) = &mut job {
            guest.drive(job).unwrap();
        } else {
            assert!(
                ended.is_ok(),
                "cut at {steps_done}: {:?}, {:?} {mode}",
                job.as_ref().err(),
                files(dir.path())
            );
        }
        drop(job);
        guest.work();
        guest.check();
    }
    let Guest { image, model, .. } = guest;
    drop(image);
    match mode {
        Mode::Persistent => match snapshot::delete(&path, "a", &mut go_on) {
            Err(Error::Invalid { what, .. }) if what.contains("has no snapshot") => {}
            deleted => deleted.unwrap(),
        },
        _ => redo::commit(&path, &mut go_on).unwrap(),
    }
    assert!(bytes_of(&path) == model, "cut at {steps_done}");
    assert!(files(dir.path()).into_iter().all(|name| name == "web.img" || name == "web.img.snapshots"));
    ended.is_ok()
}

#[test]
fn guest_killed_at_any_step_of_a_commit_under_it_loses_nothing() {
    for format in FORMATS {
        for mode in [Mode::Undoable, Mode::Persistent] {
            for comes_back in [false, true] {
                let ended = (0..200).find(|steps_done| killed_after(*steps_done, format, mode, comes_back));
                assert!(ended.is_some_and(|steps| steps > 5), "{ended:?}");
            }
        }
    }
}

/// Runs a commit under a guest which fails after so many steps, and once more under the same guest, which has not been started
/// anew. Gives whether it ended first.
fn failed_after(steps_done: usize, format: Format, mode: Mode) -> bool {
    let (_dir, path) = disk(format);
    if mode == Mode::Persistent {
        snapshot::create(&path, "a", &About::default()).unwrap();
    }
    let mut guest = Guest::new(&path, mode);
    guest.work();
    let ended = steps::cut::after(steps_done, || {
        let mut job = ActiveCommit::start(&path, &guest.image, &writable())?;
        guest.drive(&mut job)
    });
    guest.work();
    guest.check();
    match ActiveCommit::start(&path, &guest.image, &writable()) {
        Ok(mut job) => guest.drive(&mut job).unwrap(),
        Err(error) => assert!(ended.is_ok(), "cut at {steps_done}: {error} {mode} {format}"),
    }
    guest.work();
    guest.check();
    let Guest { image, model, .. } = guest;
    image.flush().unwrap();
    drop(image);
    assert!(Guest::new(&path, mode).model == model, "cut at {steps_done}: something is lost");
    ended.is_ok()
}

#[test]
fn commit_that_failed_at_any_step_under_a_guest_is_made_again_under_it() {
    for format in FORMATS {
        for mode in [Mode::Undoable, Mode::Persistent] {
            let ended = (0..200).find(|steps_done| failed_after(*steps_done, format, mode));
            assert!(ended.is_some_and(|steps| steps > 5), "{ended:?}");
        }
    }
}

#[test]
fn log_whose_commit_was_given_up_before_anything_was_written_can_be_discarded() {
    let (_dir, path) = disk(Format::Thin);
    let before = bytes_of(&path);
    let mut guest = Guest::new(&path, Mode::Undoable);
    guest.work();
    drop(ActiveCommit::start(&path, &guest.image, &writable()).unwrap());
    guest.work();
    drop(guest);
    redo::discard(&path).unwrap();
    assert!(bytes_of(&path) == before);
}

/// Writes to its part of a disk and looks whether it reads what it wrote, in both ways, until `stop`. The lock is what drains.
fn load(image: &RwLock<Arc<dyn Image>>, part: u64, stop: &AtomicBool) -> Vec<u8> {
    const PART: u64 = SIZE / 2;
    let mut model = contents(&**image.read().unwrap());
    model.drain(..usize::try_from(part * PART).unwrap());
    model.truncate(usize::try_from(PART).unwrap());
    let mut round = part + 1;
    while !stop.load(Ordering::Relaxed) || round < 200 {
        round += 2;
        let unit = round * 7 % (PART / 4096);
        let (offset, at) = (part * PART + unit * 4096, usize::try_from(unit * 4096).unwrap());
        let byte = round.to_le_bytes()[0];
        let image = image.read().unwrap();
        let mut extents = Vec::new();
        let mut found = vec![0; 4096];
        match image.locate(offset, 4096, Access::Read, &mut extents) {
            Some(ticket) => {
                let mut done = 0;
                for extent in &extents {
                    let len = usize::try_from(extent.len).unwrap();
                    if let Place::File { file, offset } = extent.place {
                        image.files()[usize::from(file)]
                            .read_exact_at(&mut found[done..done + len], offset)
                            .unwrap();
                    }
                    done += len;
                }
                image.finish(ticket, true);
            }
            None => found = crate::test_image::read(&**image, offset, 4096),
        }
        assert!(found == model[at..at + 4096], "round {round}");
        extents.clear();
        match image.locate(offset, 4096, Access::Write, &mut extents) {
            Some(ticket) if !round.is_multiple_of(3) => {
                for extent in &extents {
                    let Place::File { file, offset } = extent.place else { panic!("a write to nowhere") };
                    let bytes = vec![byte; usize::try_from(extent.len).unwrap()];
                    image.files()[usize::from(file)].write_all_at(&bytes, offset).unwrap();
                }
                image.finish(ticket, true);
            }
            ticket => {
                if let Some(ticket) = ticket {
                    image.finish(ticket, false);
                }
                write(&**image, offset, &[byte; 4096]).unwrap();
            }
        }
        model[at..at + 4096].fill(byte);
        if round % 16 < 2 {
            image.write_zeroes(offset, 4096, true).unwrap();
            model[at..at + 4096].fill(0);
            image.flush().unwrap();
        }
    }
    model
}

#[test]
fn guest_with_several_threads_never_sees_anything_else_while_its_chain_is_brought_together() {
    for (format, kind) in FORMATS.into_iter().flat_map(|format| [0, 1, 2].map(|kind| (format, kind))) {
        let (_dir, path) = disk(format);
        let mode = if kind == 0 { Mode::Undoable } else { Mode::Persistent };
        if kind != 0 {
            snapshot::create(&path, "a", &About::default()).unwrap();
        }
        let image = RwLock::new(redo::open(&path, mode, &writable()).unwrap().image);
        let stop = AtomicBool::new(false);
        let model = std::thread::scope(|scope| {
            let threads = [0, 1].map(|part| {
                let (image, stop) = (&image, &stop);
                scope.spawn(move || load(image, part, stop))
            });
            for round in 0..8 {
                let current = Arc::clone(&image.read().unwrap());
                if kind != 0 && current.backing().is_none() {
                    let name = format!("s{round}");
                    let prepared =
                        snapshot::prepare(&path, &current, &name, &About::default(), &writable()).unwrap();
                    let mut drained = image.write().unwrap();
                    *drained = prepared.switch().unwrap();
                    continue;
                }
                let mut job: Box<dyn Job> = match kind {
                    2 => Box::new(Stream::start(&current, None).unwrap()),
                    _ => Box::new(ActiveCommit::start(&path, &current, &writable()).unwrap()),
                };
                drop(current);
                loop {
                    match job.step(16384).unwrap() {
                        Next::Step => {}
                        Next::Switch => {
                            let mut drained = image.write().unwrap();
                            *drained = job.switch().unwrap();
                        }
                        Next::Done => break,
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
            threads.map(|thread| thread.join().unwrap()).concat()
        });
        drop(image);
        assert!(contents(&*redo::open(&path, mode, &writable()).unwrap().image) == model);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn chain_reads_the_same_however_it_is_brought_together(
        layers in prop::collection::vec(
            prop::collection::vec((any::<bool>(), 0_u64..64, 1_u64..20, any::<u8>()), 0..6), 1..5),
        is_flat in any::<bool>(), up in any::<bool>(), to in any::<usize>(),
    ) {
        let (dir, base) = disk(if is_flat { Format::Flat } else { Format::Thin });
        let mut model = bytes_of(&base);
        let mut paths = vec![base];
        for changes in layers {
            let path = dir.path().join(format!("layer{}", paths.len()));
            lay(&path, paths.last().unwrap());
            let image = crate::open(&path, &writable()).unwrap();
            changes.into_iter().for_each(|to: Change| change(&*image, &mut model, to));
            paths.push(path);
        }
        let top = paths.last().unwrap();
        if up {
            let lower = to % paths.len();
            let lower = if lower == paths.len() - 1 { None } else { Some(&*paths[lower]) };
            stream(top, lower, &mut go_on).unwrap();
            prop_assert!(bytes_of(top) == model);
        } else {
            // From the top down, so that nothing lies on what is written to.
            while paths.len() > 1 {
                let top = paths.pop().unwrap();
                commit(&top, &mut go_on).unwrap();
                prop_assert!(bytes_of(&top) == model);
                std::fs::remove_file(top).unwrap();
            }
            prop_assert!(bytes_of(&paths[0]) == model);
        }
    }

    #[test]
    fn guest_sees_the_same_while_its_chain_is_brought_together(
        before in prop::collection::vec((any::<bool>(), 0_u64..64, 1_u64..20, any::<u8>()), 0..6),
        is_flat in any::<bool>(), kind in 0..3,
    ) {
        let format = if is_flat { Format::Flat } else { Format::Thin };
        let (_dir, path) = disk(format);
        let mode = if kind == 0 { Mode::Undoable } else { Mode::Persistent };
        if kind != 0 {
            snapshot::create(&path, "a", &About::default()).unwrap();
        }
        let mut guest = Guest::new(&path, mode);
        before.into_iter().for_each(|to: Change| change(&*guest.image, &mut guest.model, to));
        let mut job: Box<dyn Job> = match kind {
            2 => Box::new(Stream::start(&guest.image, None).unwrap()),
            _ => Box::new(ActiveCommit::start(&path, &guest.image, &writable()).unwrap()),
        };
        guest.drive(&mut *job).unwrap();
        drop(job);
        let Guest { image, model, .. } = guest;
        drop(image);
        prop_assert!(contents(&*redo::open(&path, mode, &writable()).unwrap().image) == model);
    }
}
