//! Directories of images that lie on one another, or seem to: with their snapshots, redo logs and what was said of them.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use vmfs_image::fuzzing::forge;
use vmfs_image::{OpenOptions, redo, snapshot, thin};

use crate::image::{directory, use_it};
use crate::input::Input;

/// What there may be, and what images may name.
const NAMES: [&str; 10] = [
    "a",
    "b",
    "a.redo",
    "a.redo.merging",
    "a.redo.new",
    "a.snapshots/one",
    "a.snapshots/two",
    "a.snapshots/.top",
    "a.snapshots/.del-one",
    "base",
];
const NAMED: [&str; 8] =
    ["../b", "/etc/passwd", ".", "a.snapshots", "a.snapshots/../a", "nowhere", "b/", "a.snapshots/one/x"];

fn image(input: &mut Input<'_>) -> Vec<u8> {
    if input.one_in(6) {
        return vec![0x5a; usize::try_from(input.below(4)).unwrap_or(0) * 4096];
    }
    let mut bytes = if input.one_in(2) {
        forge::sample()
    } else {
        let size = input.one_of(&[512, 40_960, 1 << 20, 1 << 50]);
        forge::empty(size, 16, 0)
    };
    let kind = u16::try_from(input.one_of(&[0, 1, 2, 2, 2, 2, 3, 4, 5, 0xffff])).unwrap_or(0);
    let path: Vec<u8> = match input.below(8) {
        0..6 => input.one_of(&NAMES).as_bytes().to_vec(),
        6 => input.one_of(&NAMED).as_bytes().to_vec(),
        _ => input.bytes(40).to_vec(),
    };
    let path = if kind == 0 { &[][..] } else { &path[..path.len().min(1024)] };
    // What is noted is right mostly: the sample's own size, its UUID and its generation, or any state.
    let size = input.one_of(&[forge::SIZE, 40_960, 1 << 20, 1 << 50, 0, 513, 1 << 63]);
    let state = input.one_of(&[u64::MAX, forge::GENERATION, 0, 1]);
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[40..56]);
    if input.one_in(6) {
        id[0] ^= 1;
    }
    if kind != 0 || input.one_in(8) {
        forge::set_backing(&mut bytes, kind, path, size, id, state);
    }
    if input.one_in(8) {
        let at = usize::try_from(input.number(3)).unwrap_or(0) % bytes.len();
        bytes[at] ^= 1 << input.below(8);
        if input.one_in(2) {
            forge::seal(&mut bytes);
        }
    }
    bytes
}

fn make(root: &Path, input: &mut Input<'_>) -> Option<()> {
    fs::create_dir_all(root.join("a.snapshots")).ok()?;
    fs::write(root.join("base"), vec![0xba; 40_960]).ok()?;
    let mut there: Vec<&str> = Vec::new();
    for _ in 0..1 + input.below(6) {
        let name = if there.is_empty() { "a" } else { input.one_of(&NAMES) };
        let path = root.join(name);
        let _ = fs::remove_file(&path);
        let done = match input.below(16) {
            // The same file under another name.
            0 => fs::hard_link(root.join(there.first().copied().unwrap_or("base")), &path),
            1 => std::os::unix::fs::symlink(root.join(input.one_of(&NAMES)), &path),
            2 => fs::create_dir(&path),
            _ => fs::write(&path, image(input)),
        };
        if done.is_ok() {
            there.push(name);
        }
    }
    for name in ["one", "two"] {
        if input.one_in(3) {
            let about = root.join("a.snapshots").join(format!(".{name}.about"));
            fs::write(about, input.bytes(60)).ok()?;
        }
    }
    Some(())
}

/// Makes a directory as the input says, opens what is in it, and uses it.
pub fn open_all(input: &mut Input<'_>) {
    let root: PathBuf = directory().join("chain");
    let _ = fs::remove_dir_all(&root);
    if make(&root, input).is_none() {
        return;
    }
    let path = root.join("a");
    for name in ["a", "b", "a.snapshots/one", "a.redo"] {
        let path = root.join(name);
        let _ = (thin::peek_size(&path), redo::pending(&path));
        if let Ok(Some(noted)) = thin::peek_backing(&path) {
            assert!((1..=1024).contains(&noted.path.as_os_str().as_bytes().len()));
        }
        if let Ok(image) = vmfs_image::open(&path, &OpenOptions::default()) {
            use_it(image.as_ref(), false);
        }
    }
    if let Ok(tree) = snapshot::list(&path) {
        let unique: std::collections::HashSet<_> = tree.snapshots.iter().map(|s| &s.name).collect();
        assert_eq!(unique.len(), tree.snapshots.len(), "{tree:?}");
    }
    let mode = input.one_of(&[
        redo::Mode::Persistent,
        redo::Mode::Nonpersistent,
        redo::Mode::Undoable,
        redo::Mode::Append,
    ]);
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    if let Ok(opened) = redo::open(&path, mode, &options) {
        use_it(opened.image.as_ref(), true);
    }
    let quiet = &mut |_, _| std::ops::ControlFlow::Continue(());
    for _ in 0..3 {
        match input.below(8) {
            0 => drop(redo::discard(&path)),
            1 => drop(redo::commit(&path, quiet)),
            2 => drop(snapshot::list(&path)),
            3 => drop(thin::check::check(&path, true)),
            4 => drop(thin::set_backing(&path, None)),
            5 => {
                if let Ok(image) = vmfs_image::open(&path, &options) {
                    use_it(image.as_ref(), true);
                }
            }
            6 => drop(vmfs_image::clone::linked(&path, &root.join("c"))),
            _ => drop(vmfs_image::clone::is_base(&path)),
        }
    }
}
