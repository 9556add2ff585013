use std::ops::ControlFlow;
use std::process::Command;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::image::Image;
use crate::open::OpenOptions;
use crate::test_image::{Change, change, contents, write};
use crate::thin;

const SIZE: u64 = 4 << 20;

fn writable() -> OpenOptions {
    OpenOptions { writable: true, ..OpenOptions::default() }
}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn bytes_of(path: &Path) -> Vec<u8> {
    contents(&*crate::open(path, &OpenOptions::default()).unwrap())
}

/// 64 KiB that are like no other with another seed.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    (0..65536).map(step).collect()
}

/// Thin images of which each holds the first `common` clusters of all, and one of its own.
fn copies(dir: &Path, count: u64, common: u64) -> Vec<PathBuf> {
    let make = |number| {
        let path = dir.join(format!("guest{number}.img"));
        thin::create(&path, &thin::Create::new(SIZE)).unwrap();
        let image = crate::open(&path, &writable()).unwrap();
        for cluster in 0..common {
            write(&*image, cluster * CLUSTER, &noise(cluster + 1)).unwrap();
        }
        write(&*image, (common + 1) * CLUSTER, &noise(1000 + number)).unwrap();
        path
    };
    (0..count).map(make).collect()
}

fn by_base() -> Options {
    Options { method: Method::Base, ..Options::default() }
}

#[test]
fn copies_of_one_template_come_to_lie_on_a_base_and_read_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let paths = copies(dir.path(), 3, 32);
    let before: Vec<_> = paths.iter().map(|path| bytes_of(path)).collect();
    let told = dedupe(dir.path(), &Options { dry_run: true, ..by_base() }, &mut go_on).unwrap();
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 3);
    assert_eq!(told.saved, 2 * 32 * CLUSTER);
    let report = dedupe(dir.path(), &by_base(), &mut go_on).unwrap();
    assert_eq!(report.bases.len(), 1);
    assert!(report.saved > told.saved * 9 / 10, "{report:?}");
    for (path, before) in paths.iter().zip(before) {
        assert!(bytes_of(path) == before);
        let saved = report.images.iter().find(|image| image.path == *path).unwrap().saved;
        assert!(saved >= 31 * CLUSTER, "{saved}");
        let image = crate::open(path, &writable()).unwrap();
        assert!(image.backing().is_some());
        write(&*image, 0, &[1; 512]).unwrap();
    }
    let again = dedupe(dir.path(), &by_base(), &mut go_on).unwrap();
    assert_eq!((again.saved, again.bases.len()), (0, 0));
}

#[test]
fn images_in_use_flat_ones_and_bases_are_left_and_said_why() {
    let dir = tempfile::tempdir().unwrap();
    let paths = copies(dir.path(), 4, 32);
    std::fs::write(dir.path().join("kernel"), noise(5)).unwrap();
    crate::clone::linked(&paths[3], &dir.path().join("clone")).unwrap();
    let owner = OpenOptions { owner: Some("web".to_owned()), ..writable() };
    let _guest = crate::open(&paths[0], &owner).unwrap();
    let report = dedupe(dir.path(), &by_base(), &mut go_on).unwrap();
    let why = |path: &Path| report.images.iter().find(|image| image.path == path).unwrap().skipped.clone();
    assert!(why(&paths[0]).unwrap().contains("in use by"));
    assert!(why(&paths[3]).unwrap().contains("others lie on it"));
    assert!(why(&dir.path().join("kernel")).unwrap().contains("no thin image"));
    assert_eq!((why(&paths[1]), why(&paths[2])), (None, None));
    assert!(report.saved > 0);
}

#[test]
fn crash_or_stop_at_any_step_leaves_all_images_readable() {
    for steps_done in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let paths = copies(dir.path(), 2, 20);
        let before: Vec<_> = paths.iter().map(|path| bytes_of(path)).collect();
        let cut = steps::cut::after(steps_done, || dedupe(dir.path(), &by_base(), &mut go_on));
        for (path, before) in paths.iter().zip(&before) {
            assert!(bytes_of(path) == *before);
        }
        if cut.is_ok() {
            assert!(steps_done >= 3);
            break;
        }
        dedupe(dir.path(), &by_base(), &mut go_on).unwrap();
        for (path, before) in paths.iter().zip(&before) {
            assert!(bytes_of(path) == *before);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    copies(dir.path(), 2, 20);
    let stopped = dedupe(dir.path(), &by_base(), &mut |_, _| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(Error::Interrupted { .. })));
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2);
}

#[test]
fn extents_are_refused_where_the_file_system_has_none_to_share() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    copies(dir.path(), 2, 2);
    let refused = dedupe(dir.path(), &Options { method: Method::Extents, ..Options::default() }, &mut go_on);
    assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn images_read_the_same_whatever_they_have_in_common(
        shared in prop::collection::vec((any::<bool>(), 0_u64..1024, 1_u64..400, any::<u8>()), 1..12),
        own in prop::collection::vec((0..3_usize, (any::<bool>(), 0_u64..1024, 1_u64..100, any::<u8>())), 0..12),
        on_a_base in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("template");
        thin::create(&base, &thin::Create::new(SIZE)).unwrap();
        write(&*crate::open(&base, &writable()).unwrap(), 0, &noise(7)).unwrap();
        let mut guests: Vec<(PathBuf, Arc<dyn Image>, Vec<u8>)> = (0..3)
            .map(|number| {
                let path = dir.path().join(format!("guest{number}"));
                if on_a_base {
                    crate::clone::linked(&base, &path).unwrap();
                } else {
                    thin::create(&path, &thin::Create::new(SIZE)).unwrap();
                }
                let image = crate::open(&path, &writable()).unwrap();
                let model = contents(&*image);
                (path, image, model)
            })
            .collect();
        for to in shared {
            let to: Change = to;
            guests.iter_mut().for_each(|(_, image, model)| change(&**image, model, to));
        }
        for (index, to) in own {
            let (_, image, model) = &mut guests[index];
            change(&**image, model, to);
        }
        let guests: Vec<_> = guests.into_iter().map(|(path, image, model)| { drop(image); (path, model) }).collect();
        dedupe(dir.path(), &by_base(), &mut go_on).unwrap();
        for (path, model) in guests {
            prop_assert!(bytes_of(&path) == model);
        }
    }
}

/// An XFS that is there as long as this is.
struct Xfs(tempfile::TempDir, PathBuf);

impl Xfs {
    fn new() -> Self {
        let dir = tempfile::tempdir_in(".").unwrap();
        let (disk, mount) = (dir.path().join("disk"), dir.path().join("mnt"));
        std::fs::File::create(&disk).unwrap().set_len(400 << 20).unwrap();
        std::fs::create_dir(&mount).unwrap();
        let run = |command: &mut Command| {
            let done = command.output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        };
        run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&disk));
        run(Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(&mount));
        Self(dir, mount)
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.1).status();
        let _ = &self.0;
    }
}

fn free(path: &Path) -> u64 {
    let name = std::ffi::CString::new(path.as_os_str().as_encoded_bytes()).unwrap();
    // SAFETY: a structure of integers, for which zeroes are valid.
    let mut about: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: the name ends in zero, and the call fills the structure.
    assert_eq!(unsafe { libc::statvfs(name.as_ptr(), &raw mut about) }, 0);
    about.f_bfree * about.f_frsize
}

#[test]
#[ignore = "needs root, loop devices and XFS"]
fn extents_of_running_guests_are_shared_and_what_was_saved_is_free() {
    let xfs = Xfs::new();
    let paths = copies(&xfs.1, 3, 40);
    // The same at another place, in a flat file, and behind it something that is no whole cluster.
    let mut flat = noise(999);
    (0..40).for_each(|cluster| flat.extend(noise(cluster + 1)));
    flat.extend([3; 512]);
    std::fs::write(xfs.1.join("flat.img"), &flat).unwrap();
    let guest = crate::open(&paths[0], &writable()).unwrap();
    let before: Vec<_> = paths[1..].iter().map(|path| bytes_of(path)).collect();
    let expected = 3 * 40 * CLUSTER;
    let dry = Options { dry_run: true, ..Options::default() };
    // What the images note of their clusters is the same too.
    let told = dedupe(&xfs.1, &dry, &mut go_on).unwrap().saved;
    assert!((expected..expected + 9 * CLUSTER).contains(&told), "{told}");
    let was_free = free(&xfs.1);
    // Hardly any room for the table: many passes.
    let report = dedupe(&xfs.1, &Options { memory: 24 * 50, ..Options::default() }, &mut go_on).unwrap();
    assert_eq!(report.method, Method::Extents);
    assert_eq!(report.saved, told, "{report:?}");
    assert!(free(&xfs.1) >= was_free + expected * 9 / 10, "{} {was_free}", free(&xfs.1));
    assert_eq!(dedupe(&xfs.1, &Options::default(), &mut go_on).unwrap().saved, 0);
    write(&*guest, 0, &[9; 4096]).unwrap();
    drop(guest);
    assert!(bytes_of(&paths[0])[..4096] == [9; 4096]);
    for (path, before) in paths[1..].iter().zip(before) {
        assert!(bytes_of(path) == before);
    }
    assert!(std::fs::read(xfs.1.join("flat.img")).unwrap() == flat);
}
