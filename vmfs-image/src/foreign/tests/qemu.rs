//! To and from what `qemu-img` makes.

use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::flat::Preallocate;
use crate::image::{Error, Format, Image, RunKind};
use crate::open::OpenOptions;
use crate::ops::{self, Comparison, ConvertOptions};
use crate::test_image::{contents, read, write};

pub(super) fn try_qemu_img(dir: &Path, line: &str) -> Output {
    Command::new("qemu-img").current_dir(dir).args(line.split(' ')).output().unwrap()
}

pub(super) fn qemu_img(dir: &Path, line: &str) -> String {
    let output = try_qemu_img(dir, line);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{line}: {said}{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).unwrap()
}

/// Bytes with data, zeroes and holes between them, the same for the same seed.
pub(super) fn sample(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = vec![0; size];
    let mut at = 0;
    while at < size {
        let end = size.min(at + 512 * (1 + usize::try_from(next() % 600).unwrap()));
        match next() % 4 {
            0 | 1 => {}
            2 => bytes[at..end].fill(u8::try_from(next() % 255 + 1).unwrap()),
            _ => bytes[at..end].fill_with(|| next().to_le_bytes()[3]),
        }
        at = end;
    }
    bytes
}

fn open(path: &Path, writable: bool) -> Result<std::sync::Arc<dyn Image>, Error> {
    crate::open(path, &OpenOptions { writable, ..OpenOptions::default() })
}

fn convert(src: &dyn Image, path: &Path, format: Format) {
    let options = ConvertOptions { format, preallocate: Preallocate::Sparse, detect_zeroes: true };
    ops::convert(src, path, &options, &mut |_, _| ControlFlow::Continue(())).unwrap();
}

fn compare(one: &Path, other: &Path) -> Comparison {
    let (one, other) = (open(one, false).unwrap(), open(other, false).unwrap());
    ops::compare(&*one, &*other, false, &mut |_, _| ControlFlow::Continue(())).unwrap()
}

struct Place(tempfile::TempDir);

impl Place {
    /// With a raw image `raw` of some 5 MiB.
    fn new(seed: u64) -> (Self, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let bytes = sample((5 << 20) + 512 * 3, seed);
        fs::write(dir.path().join("raw"), &bytes).unwrap();
        (Self(dir), bytes)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn qemu(&self, line: &str) -> String {
        qemu_img(self.0.path(), line)
    }

    /// The image reads as `bytes`, and both programs find no difference to `raw`, and one to `other`.
    fn reads_as(&self, name: &str, bytes: &[u8]) {
        let image = open(&self.path(name), false).unwrap();
        assert_eq!(image.size(), bytes.len() as u64, "{name}");
        assert!(contents(&*image) == bytes, "{name}");
        drop(image);
        assert_eq!(compare(&self.path(name), &self.path("raw")), Comparison::Identical, "{name}");
        let mut other = bytes.to_vec();
        let at = other.len() / 2 + 7;
        other[at] ^= 1;
        fs::write(self.path("other"), other).unwrap();
        let difference = compare(&self.path(name), &self.path("other"));
        assert_eq!(difference, Comparison::Different { offset: at as u64 }, "{name}");
    }
}

#[test]
#[ignore = "needs qemu-img"]
fn qcow2_of_every_cluster_size_and_feature_reads_as_qemu_wrote_it() {
    let (place, bytes) = Place::new(1);
    let mut options = vec!["compat=0.10".to_owned(), "lazy_refcounts=on".to_owned()];
    options.extend((9..=21).map(|bits| format!("cluster_size={}", 1 << bits)));
    options.extend([1, 2, 4, 8, 32, 64].map(|bits| format!("refcount_bits={bits}")));
    for option in options {
        place.qemu(&format!("convert -f raw -O qcow2 -o {option} raw image"));
        place.reads_as("image", &bytes);
        place.qemu(&format!("convert -c -f raw -O qcow2 -o {option} raw image"));
        place.reads_as("image", &bytes);
    }
}

#[test]
#[ignore = "needs qemu-img"]
fn chain_of_qcow2_on_qcow2_on_raw_reads_as_qemu_reads_it() {
    let (place, mut bytes) = Place::new(2);
    fs::copy(place.path("raw"), place.path("base")).unwrap();
    fs::create_dir(place.path("below")).unwrap();
    fs::rename(place.path("base"), place.path("below/base")).unwrap();
    place.qemu("create -f qcow2 -F raw -b below/base middle 6M");
    place.qemu("create -f qcow2 -o compat=0.10,cluster_size=4K -F qcow2 -b middle top");
    let top = open(&place.path("top"), true).unwrap();
    bytes.resize(6 << 20, 0);
    for (offset, len, byte) in [(512, 512, 1), (70_144, 9216, 2), ((5 << 20) - 512, 4096, 3)] {
        write(&*top, offset, &vec![byte; len]).unwrap();
        let at = usize::try_from(offset).unwrap();
        bytes[at..at + len].fill(byte);
    }
    let depths = [&*top, &**top.backing().unwrap(), &**top.backing().unwrap().backing().unwrap()];
    assert_eq!(depths.map(Image::format), [Format::Qcow2, Format::Qcow2, Format::Flat]);
    assert_eq!(top.run(0, 1 << 20).unwrap().kind, RunKind::Data);
    assert_eq!(top.run(4096, 1 << 20).unwrap().kind, RunKind::Absent);
    drop(top);
    place.qemu("check -f qcow2 top");
    fs::write(place.path("raw"), &bytes).unwrap();
    assert!(place.qemu("compare -f qcow2 -F raw top raw").contains("identical"));
    place.reads_as("top", &bytes);
    convert(&*open(&place.path("top"), false).unwrap(), &place.path("alone"), Format::Thin);
    place.reads_as("alone", &bytes);
}

#[test]
#[ignore = "needs qemu-img"]
fn qcow2_that_we_make_is_sound_and_the_same_to_qemu() {
    let (place, bytes) = Place::new(3);
    let raw = open(&place.path("raw"), false).unwrap();
    convert(&*raw, &place.path("ours"), Format::Qcow2);
    place.qemu("check -f qcow2 ours");
    assert!(place.qemu("compare -f qcow2 -F raw ours raw").contains("identical"));
    place.reads_as("ours", &bytes);
    place.qemu("convert -f qcow2 -O raw ours back");
    assert!(fs::read(place.path("back")).unwrap() == bytes);
    // And of what it makes, something of ours.
    place.qemu("convert -c -f qcow2 -O qcow2 ours theirs");
    let theirs = open(&place.path("theirs"), false).unwrap();
    for format in [Format::Thin, Format::Flat, Format::Qcow2] {
        let name = format!("again-{format}");
        convert(&*theirs, &place.path(&name), format);
        place.reads_as(&name, &bytes);
    }
    assert!(matches!(
        ops::convert(
            &*raw,
            &place.path("no"),
            &ConvertOptions { format: Format::Vmdk, preallocate: Preallocate::Sparse, detect_zeroes: true },
            &mut |_, _| ControlFlow::Continue(())
        ),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
#[ignore = "needs qemu-img"]
fn vmdk_with_flat_extents_is_read_and_others_are_refused_by_name() {
    let (place, bytes) = Place::new(4);
    for kind in ["monolithicFlat", "twoGbMaxExtentFlat"] {
        place.qemu(&format!("convert -f raw -O vmdk -o subformat={kind} raw image.vmdk"));
        place.reads_as("image.vmdk", &bytes);
        let image = open(&place.path("image.vmdk"), false).unwrap();
        let info = image.info().unwrap();
        assert!(info.details.contains(&("type".to_owned(), kind.to_owned())), "{info:?}");
        drop(image);
        let refused = open(&place.path("image.vmdk"), true).unwrap_err().to_string();
        assert!(refused.contains("writing to VMDK images"), "{refused}");
        for name in ["image.vmdk", "image-flat.vmdk", "image-f001.vmdk"] {
            let _ = fs::remove_file(place.path(name));
        }
    }
    for kind in ["monolithicSparse", "streamOptimized", "twoGbMaxExtentSparse"] {
        place.qemu(&format!("convert -f raw -O vmdk -o subformat={kind} raw {kind}.vmdk"));
        let refused = open(&place.path(&format!("{kind}.vmdk")), false).unwrap_err();
        assert!(matches!(refused, Error::Unsupported { .. }), "{refused:?}");
        assert!(refused.to_string().contains("qemu-img convert"), "{refused}");
    }
}

#[test]
#[ignore = "needs qemu-img"]
fn internal_snapshot_keeps_what_it_was_when_the_image_is_written_to() {
    let (place, mut bytes) = Place::new(5);
    place.qemu("convert -f raw -O qcow2 raw image");
    place.qemu("snapshot -c before image");
    let image = open(&place.path("image"), true).unwrap();
    for (offset, len) in [(0, 512), (200_704, 300_032), (4 << 20, 65536)] {
        write(&*image, offset, &vec![7; len]).unwrap();
        let at = usize::try_from(offset).unwrap();
        bytes[at..at + len].fill(7);
    }
    image.write_zeroes(1 << 20, 1 << 20, true).unwrap();
    bytes[1 << 20..2 << 20].fill(0);
    image.discard(3 << 20, 1 << 19).unwrap();
    bytes[3 << 20..(3 << 20) + (1 << 19)].fill(0);
    assert!(contents(&*image) == bytes);
    drop(image);
    place.qemu("check -f qcow2 image");
    place.qemu("convert -f qcow2 -O raw image now");
    assert!(fs::read(place.path("now")).unwrap() == bytes);
    place.qemu("convert -l before -f qcow2 -O raw image then");
    assert!(fs::read(place.path("then")).unwrap() == fs::read(place.path("raw")).unwrap());
}

#[test]
#[ignore = "needs qemu-img"]
fn image_that_grows_reads_as_zeroes_there_and_stays_sound() {
    let (place, _) = Place::new(6);
    for cluster in ["512", "64K", "2M"] {
        place.qemu(&format!("create -f qcow2 -o cluster_size={cluster} image 3146240"));
        let image = open(&place.path("image"), true).unwrap();
        write(&*image, 3_145_728, &[9; 512]).unwrap();
        image.grow(64 << 20).unwrap();
        assert!(image.grow(32 << 20).is_err());
        assert_eq!(image.size(), 64 << 20);
        let mut bytes = vec![0; 64 << 20];
        bytes[3_145_728..3_146_240].fill(9);
        assert!(contents(&*image) == bytes, "{cluster}");
        write(&*image, (64 << 20) - 512, &[8; 512]).unwrap();
        bytes[(64 << 20) - 512..].fill(8);
        drop(image);
        place.qemu("check -f qcow2 image");
        let image = open(&place.path("image"), false).unwrap();
        assert!(contents(&*image) == bytes, "{cluster}");
        assert_eq!(read(&*image, 0, 512), [0; 512]);
        drop(image);
        fs::remove_file(place.path("image")).unwrap();
    }
}
