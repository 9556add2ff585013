//! Redo logs, clones and thin images on images of others' formats.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::image::{Error, Format};
use crate::merge::{ActiveCommit, Job, Next};
use crate::open::OpenOptions;
use crate::redo::{self, Mode};
use crate::test_image::{contents, write};
use crate::{clone, foreign, snapshot};

fn writable() -> OpenOptions {
    OpenOptions { writable: true, ..OpenOptions::default() }
}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A qcow2 image of 4 MiB with something in it.
fn qcow2(dir: &Path) -> PathBuf {
    let path = dir.join("disk.qcow2");
    foreign::create(&path, 4 << 20, 64 << 10).unwrap();
    let image = crate::open(&path, &writable()).unwrap();
    write(&*image, 4096, &[1; 100 << 10]).unwrap();
    path
}

fn vmdk(dir: &Path) -> PathBuf {
    let path = dir.join("disk.vmdk");
    fs::write(dir.join("disk-flat.vmdk"), vec![1; 1 << 20]).unwrap();
    let text = "# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\nRW 2048 FLAT \"disk-flat.vmdk\" 0\n";
    fs::write(&path, text).unwrap();
    path
}

fn bytes_of(path: &Path) -> Vec<u8> {
    contents(&*crate::open(path, &OpenOptions::default()).unwrap())
}

#[test]
fn redo_log_on_qcow2_is_committed_discarded_or_gone() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path());
    let mut model = bytes_of(&path);
    for (mode, commits) in
        [(Mode::Nonpersistent, false), (Mode::Undoable, false), (Mode::Append, true), (Mode::Undoable, true)]
    {
        let opened = redo::open(&path, mode, &writable()).unwrap();
        write(&*opened.image, 512, &[9; 1024]).unwrap();
        write(&*opened.image, 3 << 20, &[8; 65536]).unwrap();
        opened.image.write_zeroes(64 << 10, 32 << 10, true).unwrap();
        let new = contents(&*opened.image);
        let kept = opened.redo.is_some();
        drop(opened);
        assert!(bytes_of(&path) == model, "{mode}");
        // As after a pause of any length.
        if kept {
            let again = redo::open(&path, mode, &writable()).unwrap();
            assert!(contents(&*again.image) == new, "{mode}");
        }
        if commits {
            redo::commit(&path, &mut go_on).unwrap();
            model = new;
        } else if kept {
            redo::discard(&path).unwrap();
        }
        assert!(bytes_of(&path) == model, "{mode}");
        assert!(redo::pending(&path).is_none());
    }
}

#[test]
fn redo_log_on_qcow2_is_committed_while_it_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path());
    let opened = redo::open(&path, Mode::Append, &writable()).unwrap();
    write(&*opened.image, 0, &[5; 300 << 10]).unwrap();
    let mut model = contents(&*opened.image);
    let mut job = ActiveCommit::start(&path, &opened.image, &writable()).unwrap();
    let mut image = opened.image;
    for round in 0.. {
        match job.step(64 << 10).unwrap() {
            Next::Step => {}
            Next::Switch => image = job.switch().unwrap(),
            Next::Done => break,
        }
        let offset = round * 8192;
        write(&*image, offset, &[u8::try_from(round + 10).unwrap(); 4096]).unwrap();
        let at = usize::try_from(offset).unwrap();
        model[at..at + 4096].fill(u8::try_from(round + 10).unwrap());
    }
    assert!(contents(&*image) == model);
    drop((job, image, opened.base));
    redo::commit(&path, &mut go_on).unwrap();
    assert!(bytes_of(&path) == model);
}

#[test]
fn vmdk_takes_a_redo_log_that_is_discarded_and_not_committed() {
    let dir = tempfile::tempdir().unwrap();
    let path = vmdk(dir.path());
    let refused = redo::open(&path, Mode::Persistent, &writable()).unwrap_err();
    assert!(matches!(refused, Error::Unsupported { .. }), "{refused}");
    for mode in [Mode::Nonpersistent, Mode::Undoable] {
        let opened = redo::open(&path, mode, &writable()).unwrap();
        write(&*opened.image, 4096, &[2; 4096]).unwrap();
        let mut wanted = vec![1; 1 << 20];
        wanted[4096..8192].fill(2);
        assert!(contents(&*opened.image) == wanted, "{mode}");
    }
    let refused = redo::commit(&path, &mut go_on).unwrap_err();
    assert!(refused.to_string().contains("writing to VMDK images"), "{refused}");
    redo::discard(&path).unwrap();
    assert!(bytes_of(&path) == vec![1; 1 << 20]);
}

#[test]
fn clones_of_both_read_as_they_do_and_notice_a_change() {
    let dir = tempfile::tempdir().unwrap();
    for base in [qcow2(dir.path()), vmdk(dir.path())] {
        let wanted = bytes_of(&base);
        let [linked, full] = ["linked", "full"].map(|name| dir.path().join(name));
        clone::linked(&base, &linked).unwrap();
        clone::full(&base, &full, Format::Qcow2, &mut go_on).unwrap();
        for clone in [&linked, &full] {
            let image = crate::open(clone, &writable()).unwrap();
            assert!(contents(&*image) == wanted);
            write(&*image, 8192, &[3; 512]).unwrap();
        }
        assert!(bytes_of(&base) == wanted);
        assert_eq!(
            crate::open(&linked, &OpenOptions::default()).unwrap().backing().unwrap().format(),
            crate::probe(&base).unwrap()
        );
        clone::unmark(&base).unwrap();
        // What lies in an extent counts too.
        let file = if crate::probe(&base).unwrap() == Format::Vmdk {
            dir.path().join("disk-flat.vmdk")
        } else {
            base
        };
        fs::File::options()
            .write(true)
            .open(&file)
            .unwrap()
            .set_modified(std::time::SystemTime::now())
            .unwrap();
        let refused = crate::open(&linked, &OpenOptions::default()).unwrap_err();
        assert!(matches!(refused, Error::Backing { .. }), "{refused}");
        fs::remove_file(linked).unwrap();
        fs::remove_file(full).unwrap();
    }
}

#[test]
fn snapshots_are_refused_and_one_of_a_thin_image_on_it_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = qcow2(dir.path());
    let refused = snapshot::create(&path, "one", &snapshot::About::default()).unwrap_err().to_string();
    assert!(refused.contains("make a thin image with it as backing"), "{refused}");
    let top = dir.path().join("top");
    clone::linked(&path, &top).unwrap();
    let before = bytes_of(&top);
    snapshot::create(&top, "one", &snapshot::About::default()).unwrap();
    write(&*crate::open(&top, &writable()).unwrap(), 0, &[7; 4096]).unwrap();
    snapshot::revert(&top, "one", None).unwrap();
    assert!(bytes_of(&top) == before);
    // Up into the thin image comes what the other holds.
    snapshot::delete(&top, "one", &mut go_on).unwrap();
    crate::merge::stream(&top, None, &mut go_on).unwrap();
    let image = crate::open(&top, &OpenOptions::default()).unwrap();
    assert!(image.backing().is_none() && contents(&*image) == before);
}

#[test]
fn thin_image_is_written_down_to_the_qcow2_one_that_it_lies_on() {
    let dir = tempfile::tempdir().unwrap();
    let (path, top) = (qcow2(dir.path()), dir.path().join("top"));
    clone::linked(&path, &top).unwrap();
    let image = crate::open(&top, &writable()).unwrap();
    image.grow(5 << 20).unwrap();
    write(&*image, (4 << 20) - 4096, &[6; 8192]).unwrap();
    let wanted = contents(&*image);
    drop(image);
    clone::unmark(&path).unwrap();
    crate::merge::commit(&top, &mut go_on).unwrap();
    assert!(bytes_of(&path) == wanted && bytes_of(&top) == wanted);
}
