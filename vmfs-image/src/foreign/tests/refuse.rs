//! What is not opened, and what is said then.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::hostile::{open, put, sound};
use crate::image::{Error, Format, MAX_DEPTH};
use crate::open::OpenOptions;
use crate::test_image::{contents, read, write};

struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("disks")).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("disks").join(name)
    }

    fn refused(&self, name: &str) -> String {
        let error = crate::open(&self.path(name), &OpenOptions::default()).unwrap_err();
        let mut said = error.to_string();
        let mut source = std::error::Error::source(&error);
        while let Some(next) = source {
            said = format!("{said}: {next}");
            source = next.source();
        }
        said
    }
}

/// A qcow2 image that names its backing, and its format where there is one.
fn with_backing(path: &Path, name: &str, format: Option<&str>) {
    let mut bytes = sound();
    // Everything is below.
    let l1 = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    bytes[l1..l1 + 16].fill(0);
    bytes[104..512].fill(0);
    put(&mut bytes, 100, 4, 104);
    let mut at = 104;
    if let Some(format) = format {
        put(&mut bytes, at, 4, 0xe279_2aca);
        put(&mut bytes, at + 4, 4, format.len() as u64);
        bytes[at + 8..at + 8 + format.len()].copy_from_slice(format.as_bytes());
        at += 8 + format.len().next_multiple_of(8);
    }
    at += 8;
    put(&mut bytes, 8, 8, at as u64);
    put(&mut bytes, 16, 4, name.len() as u64);
    bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn backing_elsewhere_than_beside_the_image_or_below_is_refused() {
    let place = Place::new();
    let secret = place.0.path().join("secret");
    fs::write(&secret, [0x5e; 64 << 10]).unwrap();
    fs::create_dir(place.path("dir")).unwrap();
    for name in [secret.to_str().unwrap(), "../secret", "./dir/../../secret", "/etc/passwd"] {
        with_backing(&place.path("image"), name, Some("raw"));
        let said = place.refused("image");
        assert!(said.contains("only opened in its own directory or below"), "{name}: {said}");
    }
    for name in ["nbd://host/export", "json:{\"driver\":\"null-co\"}", "file:secret"] {
        with_backing(&place.path("image"), name, Some("raw"));
        assert!(place.refused("image").contains("which is no file"), "{name}");
    }
    with_backing(&place.path("image"), "dir", Some("raw"));
    assert!(place.refused("image").contains("is not a regular file"));
    with_backing(&place.path("image"), "nothing", Some("raw"));
    assert!(place.refused("image").contains("cannot open the backing"));
}

#[test]
fn backing_is_what_its_image_says_and_never_guessed() {
    let place = Place::new();
    // A guest has written a header into its disk.
    fs::write(place.path("base"), sound()).unwrap();
    with_backing(&place.path("image"), "base", None);
    assert!(place.refused("image").contains("its format is not noted"));
    with_backing(&place.path("image"), "base", Some("raw"));
    let image = crate::open(&place.path("image"), &OpenOptions::default()).unwrap();
    assert_eq!(&read(&*image, 0, 512)[..4], b"QFI\xfb");
    drop(image);
    with_backing(&place.path("image"), "base", Some("qcow2"));
    let image = crate::open(&place.path("image"), &OpenOptions::default()).unwrap();
    assert_eq!(read(&*image, 0, 512), [1; 512]);
    assert_eq!(image.backing().unwrap().format(), Format::Qcow2);
    drop(image);
    with_backing(&place.path("image"), "base", Some("qed"));
    assert!(place.refused("image").contains("of format qed"));
}

#[test]
fn backing_is_locked_and_never_written_to() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    fs::write(place.path("dir/base"), vec![7; 64 << 10]).unwrap();
    with_backing(&place.path("image"), "dir/base", Some("raw"));
    let options = OpenOptions { writable: true, ..OpenOptions::default() };
    let image = crate::open(&place.path("image"), &options).unwrap();
    write(&*image, 512, &[9; 1024]).unwrap();
    let flat = OpenOptions { format: Some(Format::Flat), ..options.clone() };
    assert!(matches!(crate::open(&place.path("dir/base"), &flat), Err(Error::Locked { .. })));
    let mut wanted = vec![7; 64 << 10];
    wanted[512..1536].fill(9);
    assert!(contents(&*image) == wanted);
    drop(image);
    assert!(fs::read(place.path("dir/base")).unwrap() == vec![7; 64 << 10]);
    crate::open(&place.path("dir/base"), &flat).unwrap();
}

#[test]
fn chain_in_a_circle_and_one_that_is_too_long_are_refused() {
    let place = Place::new();
    with_backing(&place.path("one"), "two", Some("qcow2"));
    with_backing(&place.path("two"), "one", Some("qcow2"));
    assert!(place.refused("one").contains("lies on itself"));
    with_backing(&place.path("self"), "self", Some("qcow2"));
    assert!(place.refused("self").contains("lies on itself"));
    fs::write(place.path("0"), [1; 1024]).unwrap();
    with_backing(&place.path("1"), "0", Some("raw"));
    for depth in 2..=MAX_DEPTH {
        with_backing(&place.path(&depth.to_string()), &(depth - 1).to_string(), Some("qcow2"));
    }
    crate::open(&place.path(&(MAX_DEPTH - 1).to_string()), &OpenOptions::default()).unwrap();
    with_backing(&place.path("top"), &MAX_DEPTH.to_string(), Some("qcow2"));
    assert!(place.refused("top").contains("longer than 64"));
}

#[test]
fn features_that_are_not_there_are_named() {
    let place = Place::new();
    for (bit, says) in [
        (0, "marked dirty"),
        (1, "marked corrupt"),
        (2, "an external data file"),
        (3, "a compression other than deflate"),
        (4, "extended L2 entries"),
        (5, "\"quantum clusters\" (incompatible feature 5)"),
        (63, "the incompatible feature 63"),
    ] {
        let mut bytes = sound();
        put(&mut bytes, 72, 8, 1 << bit);
        put(&mut bytes, 100, 4, 104);
        bytes[104..512].fill(0);
        put(&mut bytes, 104, 4, 0x6803_f857);
        put(&mut bytes, 108, 4, 48);
        bytes[113] = 5;
        bytes[114..130].copy_from_slice(b"quantum clusters");
        fs::write(place.path("image"), &bytes).unwrap();
        for writable in [false, true] {
            let refused = open(&place.path("image"), writable).unwrap_err();
            assert!(matches!(refused, Error::Unsupported { .. }), "{refused:?}");
            assert!(refused.to_string().contains(says), "{refused}");
        }
        assert!(fs::read(place.path("image")).unwrap() == bytes);
    }
    for (method, says) in [(1, "AES encryption"), (2, "LUKS encryption"), (9, "unknown kind (9)")] {
        let mut bytes = sound();
        put(&mut bytes, 32, 4, method);
        fs::write(place.path("image"), &bytes).unwrap();
        assert!(place.refused("image").contains(says));
    }
}

#[test]
fn compatible_features_are_no_reason_to_refuse_and_the_time_of_change_stays() {
    let place = Place::new();
    let mut bytes = sound();
    put(&mut bytes, 80, 8, u64::MAX);
    put(&mut bytes, 88, 8, 0b101);
    fs::write(place.path("image"), &bytes).unwrap();
    let before = fs::metadata(place.path("image")).unwrap().modified().unwrap();
    open(&place.path("image"), false).unwrap();
    assert!(fs::read(place.path("image")).unwrap() == bytes);
    drop(open(&place.path("image"), true).unwrap());
    let after = fs::read(place.path("image")).unwrap();
    assert_eq!((&after[88..96], &after[80..88]), (&[0; 8][..], &[0xff; 8][..]));
    assert_eq!(fs::metadata(place.path("image")).unwrap().modified().unwrap(), before);
}

fn vmdk(place: &Place, lines: &str) {
    let text = format!("# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\n{lines}\n");
    fs::write(place.path("image"), text).unwrap();
}

#[test]
fn vmdk_as_vmware_writes_it_is_read() {
    let place = Place::new();
    fs::write(place.path("a b-flat.vmdk"), vec![3; 8192]).unwrap();
    symlink("a b-flat.vmdk", place.path("link")).unwrap();
    vmdk(
        &place,
        "encoding=\"windows-1252\"\r\nisNativeSnapshot=\"no\"\r\ncreateType=\"vmfs\"\r\n\r\n# Extent description\r\n\
         RW 8 VMFS \"a b-flat.vmdk\"\r\nRW 4 ZERO\r\nRDONLY 2 FLAT \"link\" 14\r\n\r\nddb.virtualHWVersion = \"8\"\r\n",
    );
    let image = crate::open(&place.path("image"), &OpenOptions::default()).unwrap();
    assert_eq!((image.format(), image.size()), (Format::Vmdk, 14 * 512));
    let mut wanted = vec![3; 14 * 512];
    wanted[4096..6144].fill(0);
    assert!(contents(&*image) == wanted);
    let flat = OpenOptions { writable: true, format: Some(Format::Flat), ..OpenOptions::default() };
    assert!(matches!(crate::open(&place.path("a b-flat.vmdk"), &flat), Err(Error::Locked { .. })));
}

#[test]
fn vmdk_that_names_what_it_may_not_or_is_no_descriptor_is_refused() {
    let place = Place::new();
    fs::write(place.path("file"), vec![3; 8192]).unwrap();
    let many = "RW 1 ZERO\n".repeat(1025);
    for (lines, says) in [
        ("RW 8 FLAT \"/etc/passwd\" 0", "only opened in its own directory or below"),
        ("RW 8 FLAT \"../secret\" 0", "only opened in its own directory or below"),
        ("RW 8 FLAT \"\" 0", "only opened in its own directory or below"),
        ("RW 8 FLAT \".\" 0", "not a regular file"),
        ("RW 8 FLAT \"nothing\" 0", "cannot open disk"),
        ("RW 17 FLAT \"file\" 0", "ends at byte 8704, and has 8192 bytes"),
        ("RW 1 FLAT \"file\" 16", "ends at byte 8704"),
        ("RW 8 FLAT \"file\" 36028797018963967", "its offset is no number of sectors"),
        ("RW 8 FLAT file 0", "names no file"),
        ("RW 0 FLAT \"file\" 0", "its length is no number of sectors"),
        ("RW 36028797018963968 ZERO", "its length is no number of sectors"),
        ("RW 9007199254740992 ZERO", "1 PiB"),
        ("RW -1 ZERO", "its length is no number of sectors"),
        ("RW 8", "it has no type"),
        ("RW 8 SPARSE \"file\"", "VMDK extents of type SPARSE"),
        ("NOACCESS 8 FLAT \"file\" 0", "to which there is no access"),
        ("parentFileNameHint=\"/etc/passwd\"\nRW 8 ZERO", "that lie on others"),
        ("parentCID=12345678\nRW 8 ZERO", "that lie on others"),
        ("version=9\nRW 8 ZERO", "version 9 of VMDK"),
        (&many, "more than 1024 extents"),
        ("", "it has no extents"),
    ] {
        vmdk(&place, lines);
        let said = place.refused("image");
        assert!(said.contains(says), "{lines}: {said}");
    }
    fs::write(place.path("image"), b"vhdxfile").unwrap();
    assert!(place.refused("image").contains("needs images of format vhdx"));
}
