//! What is left after the end of the process at any moment, and after that of the host.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::qemu::{qemu_img, sample, try_qemu_img};
use super::{Step, recording};
use crate::image::Image;
use crate::open::OpenOptions;
use crate::test_image::{contents, write};

const SIZE: u64 = 256 << 10;

fn open(path: &Path, writable: bool) -> std::sync::Arc<dyn Image> {
    crate::open(path, &OpenOptions { writable, ..OpenOptions::default() }).unwrap()
}

fn apply(file: &File, step: &Step) {
    match step {
        Step::Write(offset, bytes) => file.write_all_at(bytes, *offset).unwrap(),
        Step::Zero(offset, len) => {
            file.write_all_at(&vec![0; usize::try_from(*len).unwrap()], *offset).unwrap();
        }
        Step::Sync => {}
    }
}

/// Random numbers, the same for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// What an image read as at a flush, and how many steps there were until then.
struct Flushed {
    steps: usize,
    bytes: Vec<u8>,
    /// What may have become of each sector since.
    changed: Vec<Vec<[u8; 512]>>,
}

/// Changes the image at `path` at random, and records the steps from the file at `before` on.
fn run(path: &Path, random: &mut Random, changes: usize) -> (Vec<Step>, Vec<Flushed>) {
    recording(true);
    let image = open(path, true);
    let mut model = contents(&*image);
    let mut steps = Vec::new();
    let sectors = model.len() / 512;
    let mut flushed = vec![Flushed { steps: 0, bytes: model.clone(), changed: vec![Vec::new(); sectors] }];
    for change in 0..changes {
        let offset = random.below(SIZE / 512) * 512;
        let len = (1 + random.below(24)) * 512;
        let len = len.min(SIZE - offset);
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
        let byte = u8::try_from(1 + change % 255).unwrap();
        match random.below(8) {
            0..5 => {
                write(&*image, offset, &vec![byte; range.len()]).unwrap();
                model[range.clone()].fill(byte);
            }
            5 => {
                image.write_zeroes(offset, len, byte % 2 == 0).unwrap();
                model[range.clone()].fill(0);
            }
            6 => {
                image.discard(offset, len).unwrap();
                // Zeroes or what was there.
                model.copy_from_slice(&contents(&*image));
            }
            _ => {
                image.flush().unwrap();
                steps.append(&mut recording(true));
                let bytes = model.clone();
                flushed.push(Flushed { steps: steps.len(), bytes, changed: vec![Vec::new(); sectors] });
                continue;
            }
        }
        let changed = &mut flushed.last_mut().unwrap().changed;
        for sector in range.start / 512..range.end / 512 {
            // A discard may be done in part.
            changed[sector].push([0; 512]);
            changed[sector].push(model[sector * 512..][..512].try_into().unwrap());
        }
    }
    // As after the end of the process: nothing of what it has in memory is written.
    steps.append(&mut recording(false));
    drop(image);
    (steps, flushed)
}

/// `qemu-img` finds it sound, but for leaked clusters.
fn qemu_check(path: &Path, what: &str) {
    let name = path.file_name().unwrap().to_str().unwrap();
    let check = try_qemu_img(path.parent().unwrap(), &format!("check -f qcow2 {name}"));
    let said = String::from_utf8_lossy(&check.stdout).into_owned() + &String::from_utf8_lossy(&check.stderr);
    assert!(matches!(check.status.code(), Some(0 | 3)), "{what}: {said}");
}

/// The image opens, `qemu-img` finds it sound but for leaked clusters, and it holds what was flushed where nothing was done
/// since; it can be written to, and is sound then too.
fn examine(path: &Path, flushed: &Flushed, what: &str) {
    qemu_check(path, what);
    let image = open(path, true);
    let found = contents(&*image);
    for (sector, (found, old)) in found.chunks(512).zip(flushed.bytes.chunks(512)).enumerate() {
        let is_new = || flushed.changed[sector].iter().any(|new| found == new);
        assert!(
            found == old || is_new(),
            "{what}: sector {sector} is {:?}, and was {:?}",
            &found[..4],
            &old[..4]
        );
    }
    let fresh = sample(32 << 10, 99);
    write(&*image, 64 << 10, &fresh).unwrap();
    let mut wanted = found;
    wanted[64 << 10..96 << 10].copy_from_slice(&fresh);
    assert!(contents(&*image) == wanted, "{what}");
    drop(image);
    qemu_check(path, what);
}

fn crash(options: &str, seed: u64, power: bool) {
    let dir = tempfile::tempdir().unwrap();
    let mut random = Random(seed * 0x9e37_79b9 + 1);
    std::fs::write(dir.path().join("raw"), sample(usize::try_from(SIZE).unwrap() / 2, seed)).unwrap();
    // Some of it compressed, and some shared with a snapshot inside.
    let compressed = if seed.is_multiple_of(2) { "-c " } else { "" };
    qemu_img(dir.path(), &format!("convert {compressed}-f raw -O qcow2 -o {options} raw image"));
    qemu_img(dir.path(), &format!("resize -q -f qcow2 image {SIZE}"));
    if seed.is_multiple_of(3) && !options.contains("refcount_bits=1") {
        qemu_img(dir.path(), "snapshot -c inside image");
    }
    let (path, at) = (dir.path().join("image"), dir.path().join("at"));
    std::fs::copy(&path, dir.path().join("before")).unwrap();
    let (steps, flushed) = run(&path, &mut random, 120);
    for cut in 0..=steps.len() {
        // All of them would take minutes.
        if random.below(if power { 6 } else { 4 }) != 0 && cut != steps.len() {
            continue;
        }
        std::fs::copy(dir.path().join("before"), &at).unwrap();
        let file = File::options().write(true).open(&at).unwrap();
        let stable = steps[..cut].iter().rposition(|step| matches!(step, Step::Sync)).unwrap_or(0);
        let mut done: Vec<&Step> = steps[..cut].iter().collect();
        if power {
            // Of what came after the last sync anything may be there, in any order.
            let mut late = done.split_off(stable);
            late.retain(|_| random.below(2) == 0);
            for index in (1..late.len()).rev() {
                late.swap(index, usize::try_from(random.below(index as u64 + 1)).unwrap());
            }
            done.extend(late);
        }
        done.into_iter().for_each(|step| apply(&file, step));
        let last = flushed.iter().rposition(|flushed| flushed.steps <= cut).unwrap();
        examine(&at, &flushed[last], &format!("{options}, seed {seed}, {cut} of {} steps", steps.len()));
    }
}

#[test]
#[ignore = "needs qemu-img"]
fn end_of_the_process_between_any_two_writes_leaves_a_sound_image_with_all_that_was_flushed() {
    for (options, seed) in
        [("cluster_size=512", 1), ("cluster_size=512,compat=0.10", 2), ("cluster_size=4K", 3)]
    {
        crash(options, seed, false);
    }
}

#[test]
#[ignore = "needs qemu-img"]
fn end_of_the_host_leaves_a_sound_image_with_all_that_was_flushed_whatever_else_was_written() {
    for (options, seed) in [
        ("cluster_size=512", 4),
        ("cluster_size=512,refcount_bits=1", 5),
        ("cluster_size=4K,refcount_bits=64", 6),
    ] {
        crash(options, seed, true);
    }
}

#[test]
#[ignore = "needs qemu-img"]
fn freed_cluster_becomes_no_table_while_the_file_still_has_it_as_data() {
    let dir = tempfile::tempdir().unwrap();
    let (path, at) = (dir.path().join("image"), dir.path().join("at"));
    crate::foreign::create(&path, SIZE, 512).unwrap();
    let image = open(&path, true);
    write(&*image, 0, &[1; 4096]).unwrap();
    drop(image);
    std::fs::copy(&path, dir.path().join("before")).unwrap();
    recording(true);
    let image = open(&path, true);
    image.discard(512, 512).unwrap();
    // The first of what another L2 table is for.
    write(&*image, 64 << 10, &[2; 512]).unwrap();
    image.flush().unwrap();
    let steps = recording(false);
    drop(image);
    assert!(steps.len() > 4, "{steps:?}");
    for cut in 0..=steps.len() {
        std::fs::copy(dir.path().join("before"), &at).unwrap();
        let file = File::options().write(true).open(&at).unwrap();
        steps[..cut].iter().for_each(|step| apply(&file, step));
        qemu_check(&at, &format!("{cut} of {steps:?}"));
    }
}
