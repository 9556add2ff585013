use std::ops::ControlFlow;

use proptest::prelude::*;

use super::*;
use crate::flat::{self, Preallocate};
use crate::redo::{self, Mode};
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
    match format {
        Format::Flat => flat::create(&path, SIZE, Preallocate::Sparse).unwrap(),
        _ => thin::create(&path, &thin::Create::new(SIZE)).unwrap(),
    }
    put(&path, 0, 1);
    (dir, path)
}

/// Writes 4 KiB of a byte, as a guest does.
fn put(path: &Path, unit: u64, byte: u8) {
    let opened = redo::open(path, Mode::Persistent, &writable()).unwrap();
    write(&*opened.image, unit * 4096, &[byte; 4096]).unwrap();
}

fn bytes_of(path: &Path) -> Vec<u8> {
    contents(&*crate::open(path, &OpenOptions::default()).unwrap())
}

fn snap(path: &Path, name: &str) {
    create(path, name, &About::default()).unwrap();
}

fn names(path: &Path) -> Vec<(String, Option<String>)> {
    list(path).unwrap().snapshots.into_iter().map(|found| (found.name, found.parent)).collect()
}

/// Files of the directory of snapshots, those of descriptions left out.
fn files(path: &Path) -> Vec<String> {
    let Ok(listing) = std::fs::read_dir(directory(path)) else { return Vec::new() };
    let names = listing.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| !name.ends_with(".about")).collect();
    names.sort();
    names
}

#[test]
fn snapshots_form_a_tree_and_keep_what_the_disk_was() {
    for format in FORMATS {
        let (_dir, path) = disk(format);
        let states = ["fresh", "fixed"].map(|name| {
            let state = bytes_of(&path);
            let about = About {
                description: format!("is {name}"),
                running: name == "fixed",
                created: None,
                ..About::default()
            };
            create(&path, name, &about).unwrap();
            put(&path, 1, name.len().try_into().unwrap());
            (name, state)
        });
        revert(&path, "fresh", Some("lost")).unwrap();
        snap(&path, "other");
        for (name, state) in states {
            assert_eq!(bytes_of(&file(&path, name)), state);
        }
        let tree = list(&path).unwrap();
        assert_eq!(tree.head.as_deref(), Some("other"));
        let parents = ["fresh", "fixed", "lost", "other"].map(|name| {
            let found = tree.snapshots.iter().find(|found| found.name == name).unwrap();
            assert_eq!(found.size, Some(SIZE));
            (found.parent.as_deref(), found.running)
        });
        assert_eq!(
            parents,
            [(None, false), (Some("fresh"), true), (Some("fixed"), false), (Some("fresh"), false)]
        );
        assert_eq!(tree.snapshots[0].description, "is fresh");
        assert_eq!(tree.snapshots[0].format, format);
    }
}

#[test]
fn disk_reverts_to_any_snapshot() {
    for format in FORMATS {
        let (_dir, path) = disk(format);
        let first = bytes_of(&path);
        snap(&path, "a");
        put(&path, 0, 2);
        put(&path, 9, 2);
        let second = bytes_of(&path);
        snap(&path, "b");
        put(&path, 0, 3);
        let third = bytes_of(&path);
        revert(&path, "a", Some("c")).unwrap();
        assert_eq!(bytes_of(&path), first);
        for (name, state) in [("b", &second), ("c", &third), ("a", &first), ("a", &first)] {
            revert(&path, name, None).unwrap();
            assert_eq!(bytes_of(&path), *state);
            put(&path, 3, 3);
        }
    }
}

#[test]
fn names_that_are_paths_or_taken_are_refused() {
    let (dir, path) = disk(Format::Thin);
    for name in ["", ".", "..", "a/b", "/etc", ".new", "-x", "a b", "a\n", "ä", &"a".repeat(65)] {
        assert!(matches!(create(&path, name, &About::default()), Err(Error::Invalid { .. })), "{name}");
    }
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
    snap(&path, "a");
    let taken = create(&path, "a", &About::default()).unwrap_err().to_string();
    assert!(taken.contains("already"), "{taken}");
    let missing = revert(&path, "b", None).unwrap_err().to_string();
    assert!(missing.contains("has no snapshot b; it has: a"), "{missing}");
    assert!(delete(&path, "b", &mut go_on).is_err());
    assert!(revert(&path, "a", Some("a")).is_err());
}

#[test]
fn what_has_no_snapshots_is_refused_and_says_so() {
    let (_dir, path) = disk(Format::Thin);
    let guest = redo::open(&path, Mode::Persistent, &writable()).unwrap();
    assert!(matches!(create(&path, "a", &About::default()), Err(Error::Locked { .. })));
    drop(guest);
    drop(redo::open(&path, Mode::Undoable, &writable()).unwrap());
    assert!(create(&path, "a", &About::default()).unwrap_err().to_string().contains("commit or discard"));
    redo::discard(&path).unwrap();
    snap(&path, "a");
    let snapshot = file(&path, "a");
    for mode in [Mode::Persistent, Mode::Undoable] {
        let refused = redo::open(&snapshot, mode, &writable()).unwrap_err().to_string();
        assert!(refused.contains("is a snapshot"), "{refused}");
    }
    redo::open(&snapshot, Mode::Nonpersistent, &writable()).unwrap();
    crate::clone::linked(&path, &path.with_file_name("clone")).unwrap();
    assert!(create(&path, "b", &About::default()).unwrap_err().to_string().contains("linked clones"));
}

#[test]
fn flat_given_as_format_does_not_show_the_bytes_of_a_thin_head() {
    let (_dir, path) = disk(Format::Flat);
    let flat = OpenOptions { format: Some(Format::Flat), ..writable() };
    drop(redo::open(&path, Mode::Persistent, &flat).unwrap());
    snap(&path, "a");
    for mode in [Mode::Persistent, Mode::Nonpersistent, Mode::Undoable, Mode::Append] {
        let refused = redo::open(&path, mode, &flat).unwrap_err().to_string();
        assert!(refused.contains("leave the format out"), "{refused}");
    }
}

#[test]
fn disk_of_a_clone_elsewhere_finds_its_base_through_snapshots() {
    let (dir, base) = disk(Format::Thin);
    std::fs::create_dir(dir.path().join("guests")).unwrap();
    let path = dir.path().join("guests/db.img");
    crate::clone::linked(&base, &path).unwrap();
    snap(&path, "a");
    put(&path, 5, 5);
    snap(&path, "b");
    let state = bytes_of(&path);
    let moved = dir.path().join("moved");
    std::fs::create_dir(&moved).unwrap();
    std::fs::rename(&base, moved.join("web.img")).unwrap();
    assert!(matches!(crate::open(&path, &OpenOptions::default()), Err(Error::BackingOpen { .. })));
    std::fs::rename(moved.join("web.img"), &base).unwrap();
    std::fs::rename(dir.path().join("guests"), dir.path().join("others")).unwrap();
    let path = dir.path().join("others/db.img");
    assert_eq!(bytes_of(&path), state);
    delete(&path, "a", &mut go_on).unwrap();
    delete(&path, "b", &mut go_on).unwrap();
    assert_eq!(bytes_of(&path), state);
    assert!(list(&path).unwrap().snapshots.is_empty());
}

#[test]
fn snapshot_with_one_image_on_it_is_deleted_and_nothing_else_changes() {
    for format in FORMATS {
        for name in ["a", "b", "c"] {
            let (_dir, path) = disk(format);
            for (index, name) in (0..).zip(["a", "b", "c"]) {
                put(&path, index, 7);
                snap(&path, name);
                put(&path, index + 1, index.to_le_bytes()[0]);
            }
            let others: Vec<_> = ["a", "b", "c"].into_iter().filter(|other| *other != name).collect();
            let states: Vec<_> = others.iter().map(|other| bytes_of(&file(&path, other))).collect();
            let disk = bytes_of(&path);
            delete(&path, name, &mut go_on).unwrap();
            assert_eq!(bytes_of(&path), disk);
            assert_eq!(files(&path), others);
            for (other, state) in others.iter().zip(states) {
                assert_eq!(bytes_of(&file(&path, other)), state);
            }
            assert_eq!(names(&path).len(), 2);
            put(&path, 1, 1);
        }
    }
}

#[test]
fn flat_disk_is_flat_again_when_its_last_snapshot_is_deleted() {
    let (_dir, path) = disk(Format::Flat);
    snap(&path, "a");
    put(&path, 4, 4);
    let state = bytes_of(&path);
    delete(&path, "a", &mut go_on).unwrap();
    assert_eq!(crate::probe(&path).unwrap(), Format::Flat);
    assert_eq!(std::fs::read(&path).unwrap(), state);
}

#[test]
fn snapshot_on_which_several_or_clones_lie_is_not_deleted_but_one_without_is_while_a_guest_runs() {
    let (dir, path) = disk(Format::Thin);
    snap(&path, "a");
    snap(&path, "b");
    revert(&path, "a", None).unwrap();
    let refused = delete(&path, "a", &mut go_on).unwrap_err().to_string();
    assert!(refused.contains("several") && refused.contains("b, the disk itself"), "{refused}");
    let _guest = redo::open(&path, Mode::Persistent, &writable()).unwrap();
    delete(&path, "b", &mut go_on).unwrap();
    assert!(matches!(delete(&path, "a", &mut go_on), Err(Error::Locked { .. })));
    crate::clone::linked(&file(&path, "a"), &dir.path().join("clone")).unwrap();
    let refused = delete(&path, "a", &mut go_on).unwrap_err().to_string();
    assert!(refused.contains("linked clones"), "{refused}");
}

#[test]
fn guest_goes_on_with_a_new_head_and_nobody_gets_at_either() {
    for format in FORMATS {
        let (_dir, path) = disk(format);
        let options = OpenOptions { owner: Some("web".to_owned()), ..writable() };
        let guest = redo::open(&path, Mode::Persistent, &options).unwrap().image;
        let before = contents(&*guest);
        let prepared = prepare(&path, &guest, "a", &About::default(), &options).unwrap();
        write(&*guest, 8192, &[8; 4096]).unwrap();
        let between = contents(&*guest);
        drop(prepared);
        assert!(guest.is_writable() && files(&path).is_empty());
        let prepared = prepare(&path, &guest, "a", &About::default(), &options).unwrap();
        assert!(names(&path).is_empty());
        let head = prepared.switch().unwrap();
        assert_eq!(head.path(), path);
        assert!(!guest.is_writable() && head.is_writable());
        drop(guest);
        write(&*head, 8192, &[9; 4096]).unwrap();
        head.flush().unwrap();
        for locked in [&path, &file(&path, "a")] {
            assert!(
                matches!(crate::open(locked, &writable()), Err(Error::Locked { .. })),
                "{}",
                locked.display()
            );
        }
        assert!(matches!(crate::open(&path, &OpenOptions::default()), Err(Error::Locked { .. })));
        assert_ne!(before, between);
        assert_eq!(bytes_of(&file(&path, "a")), between);
        drop(head);
        assert_eq!(bytes_of(&path)[8192..12288], [9; 4096]);
    }
}

/// Cuts `action` at every step, and has `check` look at what is left, and at what is there once it was done again.
fn cut_everywhere(
    format: Format,
    prepare: impl Fn(&Path),
    action: impl Fn(&Path) -> Result<(), Error>,
    check: impl Fn(&Path, bool),
) {
    for steps_done in 0..200 {
        let (_dir, path) = disk(format);
        prepare(&path);
        let done = steps::cut::after(steps_done, || action(&path)).is_ok();
        check(&path, done);
        if done {
            assert!(steps_done > 1, "nothing was cut");
            return;
        }
        // What is left is in nobody's way.
        let again = action(&path);
        assert!(again.is_ok(), "cut at {steps_done}: {}", again.unwrap_err());
        check(&path, true);
    }
    panic!("there is no end of steps");
}

#[test]
fn crash_at_any_step_of_a_snapshot_leaves_the_disk_with_or_without_it() {
    for format in FORMATS {
        cut_everywhere(
            format,
            |path| {
                snap(path, "a");
                put(path, 3, 3);
            },
            |path| match create(path, "b", &About::default()) {
                Err(Error::Invalid { what, .. }) if what.contains("already") => Ok(()),
                created => created,
            },
            |path, done| {
                let bytes = bytes_of(path);
                assert_eq!((bytes[0], bytes[3 * 4096]), (1, 3));
                let expected: &[&str] = if done { &["a", "b"] } else { &["a"] };
                let found = names(path);
                assert!(found.len() == 2 || found.len() == expected.len(), "{found:?}");
                if done {
                    assert_eq!(files(path), expected);
                    assert_eq!(bytes_of(&file(path, "b")), bytes);
                }
            },
        );
    }
}

#[test]
fn crash_at_any_step_of_going_back_leaves_the_disk_before_or_after() {
    for keep in [None, Some("kept")] {
        cut_everywhere(
            Format::Thin,
            |path| {
                snap(path, "a");
                put(path, 0, 2);
            },
            |path| match revert(path, "a", keep) {
                Err(Error::Invalid { what, .. }) if what.contains("already") => Ok(()),
                reverted => reverted,
            },
            |path, done| {
                let byte = bytes_of(path)[0];
                assert!(byte == 1 || byte == 2 && !done);
                if byte == 1 && keep.is_some() {
                    assert_eq!(bytes_of(&file(path, "kept"))[0], 2);
                }
            },
        );
    }
}

#[test]
fn crash_at_any_step_of_deleting_leaves_all_states_readable() {
    for format in FORMATS {
        for name in ["a", "b", "c"] {
            cut_everywhere(
                format,
                |path| {
                    for (index, name) in (2..).zip(["a", "b", "c"]) {
                        snap(path, name);
                        put(path, u64::from(index), index);
                        put(path, 1, index);
                    }
                },
                |path| match delete(path, name, &mut go_on) {
                    Err(Error::Invalid { what, .. }) if what.contains("has no snapshot") => Ok(()),
                    deleted => deleted,
                },
                |path, done| {
                    // What the disk holds at 1 tells how often it was written to, and so what the others hold.
                    let states = [("a", 0), ("b", 2), ("c", 3)];
                    for (other, byte) in states.into_iter().filter(|(other, _)| *other != name) {
                        assert_eq!(bytes_of(&file(path, other))[4096], byte, "{other}");
                    }
                    let bytes = bytes_of(path);
                    assert_eq!((bytes[0], bytes[4096]), (1, 4));
                    for unit in 2..5 {
                        assert_eq!(bytes[usize::from(unit) * 4096], unit);
                    }
                    if done {
                        assert_eq!(files(path).len(), 2, "{:?}", files(path));
                        // Everybody knows again exactly what they lie on.
                        let mut below = path.to_owned();
                        while crate::probe(&below).unwrap() == Format::Thin
                            && let Some(noted) = thin::peek_backing(&below).unwrap()
                        {
                            assert_ne!(
                                noted.identity.state,
                                crate::Identity::ANY_STATE,
                                "{}",
                                below.display()
                            );
                            below = resolve(&below, &noted.path);
                        }
                    }
                },
            );
        }
    }
}

/// What a run of random work does.
#[derive(Debug, Clone)]
enum Work {
    Write(Change),
    Snapshot,
    Revert(usize, bool),
    Delete(usize),
}

fn work() -> impl Strategy<Value = Work> {
    prop_oneof![
        4 => (any::<bool>(), 0_u64..64, 1_u64..20, any::<u8>()).prop_map(Work::Write),
        2 => Just(Work::Snapshot),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(which, keep)| Work::Revert(which, keep)),
        1 => any::<usize>().prop_map(Work::Delete),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn disk_and_all_snapshots_read_as_a_model_does(
        works in prop::collection::vec(work(), 1..24), is_flat in any::<bool>(),
    ) {
        let (_dir, path) = disk(if is_flat { Format::Flat } else { Format::Thin });
        let mut model = bytes_of(&path);
        let mut states: std::collections::BTreeMap<String, Vec<u8>> = std::collections::BTreeMap::new();
        for (count, work) in works.into_iter().enumerate() {
            let pick = |which: usize| states.keys().nth(which % states.len().max(1)).cloned();
            let name = format!("s{count}");
            match work {
                Work::Write(to) => {
                    let image = redo::open(&path, Mode::Persistent, &writable()).unwrap().image;
                    change(&*image, &mut model, to);
                }
                Work::Snapshot => {
                    snap(&path, &name);
                    states.insert(name, model.clone());
                }
                Work::Revert(which, keep) => {
                    let Some(to) = pick(which) else { continue };
                    revert(&path, &to, keep.then_some(&name)).unwrap();
                    let old = std::mem::replace(&mut model, states[&to].clone());
                    if keep {
                        states.insert(name, old);
                    }
                }
                Work::Delete(which) => {
                    let Some(which) = pick(which) else { continue };
                    match delete(&path, &which, &mut go_on) {
                        Ok(()) => drop(states.remove(&which)),
                        Err(Error::Invalid { what, .. }) => prop_assert!(what.contains("several"), "{}", what),
                        Err(error) => panic!("{error}"),
                    }
                }
            }
            prop_assert!(bytes_of(&path) == model);
            for (name, state) in &states {
                prop_assert!(bytes_of(&file(&path, name)) == *state, "{}", name);
            }
            let listed: Vec<_> = list(&path).unwrap().snapshots.into_iter().map(|found| found.name).collect();
            prop_assert_eq!(listed.len(), states.len());
        }
    }
}
