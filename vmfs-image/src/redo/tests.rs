use std::ops::ControlFlow;

use proptest::prelude::*;

use super::*;
use crate::flat::{self, Preallocate};
use crate::test_image::{Change, change, contents, read, write};

const SIZE: u64 = 256 << 10;

fn writable() -> OpenOptions {
    OpenOptions { writable: true, ..OpenOptions::default() }
}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A disk of `SIZE` bytes with a sector of ones at its beginning.
fn disk(format: Format) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.img");
    match format {
        Format::Flat => flat::create(&path, SIZE, Preallocate::Sparse).unwrap(),
        _ => thin::create(&path, &thin::Create::new(SIZE)).unwrap(),
    }
    write(&*crate::open(&path, &writable()).unwrap(), 0, &[1; 512]).unwrap();
    (dir, path)
}

fn files(dir: &tempfile::TempDir) -> Vec<String> {
    let names =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    names
}

fn bytes_of(path: &Path) -> Vec<u8> {
    contents(&*crate::open(path, &OpenOptions::default()).unwrap())
}

#[test]
fn nonpersistent_guests_share_a_base_and_leave_nothing() {
    for format in [Format::Flat, Format::Thin] {
        let (dir, path) = disk(format);
        let before = bytes_of(&path);
        let guests = [7, 8].map(|byte| {
            let opened = open(&path, Mode::Nonpersistent, &writable()).unwrap();
            write(&*opened.image, 0, &[byte; 4096]).unwrap();
            opened.image.flush().unwrap();
            opened
        });
        for (guest, byte) in guests.iter().zip([7, 8]) {
            assert_eq!(read(&*guest.image, 0, 4096), [byte; 4096]);
            assert!(guest.redo.is_none());
        }
        assert_eq!(files(&dir), ["web.img"]);
        assert!(matches!(open(&path, Mode::Persistent, &writable()), Err(Error::Locked { .. })));
        drop(guests);
        assert_eq!(bytes_of(&path), before);
    }
}

#[test]
fn image_that_only_lies_on_the_disk_is_not_taken_for_it() {
    let (_dir, path) = disk(Format::Thin);
    let guest = open(&path, Mode::Nonpersistent, &writable()).unwrap();
    let about = snapshot::About::default();
    let refused = snapshot::prepare(&path, &guest.image, "a", &about, &writable()).unwrap_err().to_string();
    assert!(refused.contains("persistent"), "{refused}");
    let refused =
        crate::merge::ActiveCommit::start(&path, &guest.image, &writable()).unwrap_err().to_string();
    assert!(refused.contains("persistent"), "{refused}");
}

#[test]
fn limit_on_growth_is_that_of_the_log_and_of_the_head_of_a_snapshot_too() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.img");
    let max_size = Some(1 << 20);
    thin::create(&path, &thin::Create { max_size, ..thin::Create::new(64 << 20) }).unwrap();
    let guest = open(&path, Mode::Undoable, &writable()).unwrap();
    assert_eq!(guest.image.info().unwrap().max_size, max_size);
    drop(guest);
    discard(&path).unwrap();
    snapshot::create(&path, "a", &snapshot::About::default()).unwrap();
    let guest = open(&path, Mode::Persistent, &writable()).unwrap();
    assert_eq!(guest.image.info().unwrap().max_size, max_size);
}

#[test]
fn undoable_run_is_continued_and_then_discarded_or_committed() {
    for format in [Format::Flat, Format::Thin] {
        let (dir, path) = disk(format);
        let before = bytes_of(&path);
        for commits in [false, true] {
            for (mode, unit) in [(Mode::Undoable, 1), (Mode::Append, 2)] {
                let opened = open(&path, mode, &writable()).unwrap();
                assert_eq!(opened.redo, Some(redo_path(&path)));
                write(&*opened.image, unit * 4096, &[9; 4096]).unwrap();
                assert_eq!(read(&*opened.image, 4096, 512), [9; 512]);
            }
            assert_eq!(bytes_of(&path), before);
            if commits {
                commit(&path, &mut go_on).unwrap()
            } else {
                discard(&path).unwrap()
            }
            assert_eq!(files(&dir), ["web.img"]);
            let after = bytes_of(&path);
            assert_eq!(after[..4096], before[..4096]);
            let byte = if commits { 9 } else { 0 };
            assert!(after[4096..3 * 4096].iter().all(|found| *found == byte));
        }
    }
}

#[test]
fn image_with_a_log_is_not_opened_persistently_and_told_what_to_do() {
    let (_dir, path) = disk(Format::Flat);
    drop(open(&path, Mode::Undoable, &writable()).unwrap());
    let refused = open(&path, Mode::Persistent, &writable()).unwrap_err().to_string();
    assert!(refused.contains("commit or discard"), "{refused}");
    open(&path, Mode::Nonpersistent, &writable()).unwrap();
    discard(&path).unwrap();
    open(&path, Mode::Persistent, &writable()).unwrap();
    assert!(matches!(discard(&path), Err(Error::Invalid { .. })));
    assert!(matches!(commit(&path, &mut go_on), Err(Error::Invalid { .. })));
}

#[test]
fn log_of_a_guest_that_runs_is_neither_used_twice_nor_committed_nor_discarded() {
    let (_dir, path) = disk(Format::Thin);
    let owner = OpenOptions { owner: Some("web".to_owned()), ..writable() };
    let guest = open(&path, Mode::Undoable, &owner).unwrap();
    assert!(matches!(open(&path, Mode::Append, &writable()), Err(Error::Locked { .. })));
    assert!(matches!(commit(&path, &mut go_on), Err(Error::Locked { .. })));
    assert!(matches!(discard(&path), Err(Error::Locked { .. })));
    let reader = open(&path, Mode::Nonpersistent, &writable()).unwrap();
    drop(guest);
    assert!(matches!(commit(&path, &mut go_on), Err(Error::Locked { .. })));
    drop(reader);
    commit(&path, &mut go_on).unwrap();
}

#[test]
fn log_of_an_image_that_was_changed_since_is_refused_and_can_be_discarded() {
    let (_dir, path) = disk(Format::Thin);
    let opened = open(&path, Mode::Undoable, &writable()).unwrap();
    write(&*opened.image, 0, &[2; 512]).unwrap();
    drop(opened);
    let image = crate::open(&path, &writable()).unwrap();
    write(&*image, 8192, &[3; 4096]).unwrap();
    drop(image);
    let refused = open(&path, Mode::Undoable, &writable()).unwrap_err().to_string();
    assert!(refused.contains("discard"), "{refused}");
    assert!(commit(&path, &mut go_on).is_err());
    discard(&path).unwrap();
}

#[test]
fn larger_log_makes_the_image_larger() {
    for format in [Format::Flat, Format::Thin] {
        let (_dir, path) = disk(format);
        let opened = open(&path, Mode::Undoable, &writable()).unwrap();
        opened.image.grow(2 * SIZE).unwrap();
        write(&*opened.image, 2 * SIZE - 4096, &[5; 4096]).unwrap();
        let expected = contents(&*opened.image);
        drop(opened);
        commit(&path, &mut go_on).unwrap();
        assert_eq!(bytes_of(&path), expected);
    }
}

#[test]
fn guest_cannot_make_its_flat_disk_into_another_kind_by_way_of_its_log() {
    let (_dir, path) = disk(Format::Flat);
    let opened = open(&path, Mode::Undoable, &writable()).unwrap();
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(b"VMM-THIN");
    write(&*opened.image, 0, &sector).unwrap();
    drop(opened);
    let refused = commit(&path, &mut go_on).unwrap_err();
    assert!(
        refused.to_string().contains("VMM") || matches!(refused, Error::Invalid { .. } | Error::Io { .. }),
        "{refused}"
    );
    assert_eq!(crate::probe(&path).unwrap(), Format::Flat);
    let flat = OpenOptions { format: Some(Format::Flat), ..OpenOptions::default() };
    commit_as(&path, &flat, &mut go_on).unwrap();
    assert_eq!(crate::probe(&path).unwrap(), Format::Thin);
}

#[test]
fn commit_that_is_stopped_is_finished_later_and_not_discarded() {
    for format in [Format::Flat, Format::Thin] {
        let (dir, path) = disk(format);
        let opened = open(&path, Mode::Undoable, &writable()).unwrap();
        write(&*opened.image, 4096, &[2; 65536]).unwrap();
        let expected = contents(&*opened.image);
        drop(opened);
        let mut calls = 0;
        let stopped = commit(&path, &mut |_, _| {
            calls += 1;
            if calls > 1 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        // The second call says that all is done.
        if stopped.is_err() {
            assert!(discard(&path).unwrap_err().to_string().contains("Commit again"));
            assert_eq!(contents(&*open(&path, Mode::Undoable, &writable()).unwrap().image), expected);
            commit(&path, &mut go_on).unwrap();
        }
        assert_eq!(files(&dir), ["web.img"]);
        assert_eq!(bytes_of(&path), expected);
    }
}

#[test]
fn crash_at_any_step_of_an_undoable_run_leaves_the_disk_before_or_behind_it() {
    for format in [Format::Flat, Format::Thin] {
        for steps_done in 0.. {
            let (_dir, path) = disk(format);
            let before = bytes_of(&path);
            let opened = steps::cut::after(steps_done, || open(&path, Mode::Undoable, &writable()));
            let Ok(opened) = opened else {
                drop(open(&path, Mode::Undoable, &writable()).unwrap());
                assert_eq!(bytes_of(&path), before);
                continue;
            };
            write(&*opened.image, 8192, &[4; 4096]).unwrap();
            let expected = contents(&*opened.image);
            drop(opened);
            // From here on, the commit is cut.
            for steps_done in 0.. {
                let committed = steps::cut::after(steps_done, || commit(&path, &mut go_on));
                if committed.is_ok() {
                    break;
                }
                if pending(&path).is_some() {
                    assert_eq!(contents(&*open(&path, Mode::Undoable, &writable()).unwrap().image), expected);
                }
                assert!(steps_done < 100);
            }
            assert_eq!(bytes_of(&path), expected);
            break;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn committed_disk_reads_as_its_log_did(
        runs in prop::collection::vec(
            (prop::collection::vec((any::<bool>(), 0_u64..64, 1_u64..20, any::<u8>()), 0..8), any::<bool>()), 1..6),
        is_flat in any::<bool>(),
    ) {
        let (_dir, path) = disk(if is_flat { Format::Flat } else { Format::Thin });
        let mut model = bytes_of(&path);
        for (changes, commits) in runs {
            let opened = open(&path, Mode::Undoable, &writable()).unwrap();
            let mut now = model.clone();
            changes.into_iter().for_each(|to: Change| change(&*opened.image, &mut now, to));
            prop_assert!(contents(&*opened.image) == now);
            drop(opened);
            if commits {
                commit(&path, &mut go_on).unwrap();
                model = now;
            } else {
                discard(&path).unwrap();
            }
            prop_assert!(bytes_of(&path) == model);
        }
    }
}
