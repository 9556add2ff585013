//! Images in which anything may be wrong: errors, and nothing else.

use std::path::Path;

use crate::image::{Error, Format, Image};
use crate::open::{Cache, OpenOptions};
use crate::test_image::write;
use vm_memory::VolatileSlice;

const CLUSTER: usize = 512;

fn number(bytes: &[u8], at: usize, width: usize) -> usize {
    bytes[at..at + width].iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

pub(super) fn put(bytes: &mut [u8], at: usize, width: usize, value: u64) {
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

/// A sound image of 64 KiB in small clusters, with some data.
pub(super) fn sound() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    crate::foreign::create(&path, 64 << 10, 512).unwrap();
    let image = open(&path, true).unwrap();
    write(&*image, 0, &[1; 4096]).unwrap();
    write(&*image, 40 << 10, &[2; 1024]).unwrap();
    drop(image);
    std::fs::read(path).unwrap()
}

pub(super) fn open(path: &Path, writable: bool) -> Result<std::sync::Arc<dyn Image>, Error> {
    let options =
        OpenOptions { writable, format: Some(Format::Qcow2), cache: Cache::Unsafe, ..OpenOptions::default() };
    crate::open(path, &options)
}

/// Opens bytes as an image, and uses it if that goes well.
fn use_bytes(path: &Path, bytes: &[u8]) {
    for writable in [false, true] {
        std::fs::write(path, bytes).unwrap();
        let Ok(image) = open(path, writable) else { continue };
        let size = image.size();
        assert!(size > 0 && size.is_multiple_of(512) && size <= 1 << 50);
        let _ = (image.info().unwrap(), image.identity());
        let mut buffer = vec![0; 8192];
        for offset in [0, 32 << 10, size / 2 / 512 * 512, size - 512] {
            let len = usize::try_from((size - offset).min(8192)).unwrap();
            let _ = image.read_at(offset, &[VolatileSlice::from(&mut buffer[..len])]);
            if let Ok(run) = image.run(offset, size - offset) {
                assert!(run.len >= 512 && run.len <= size - offset);
            }
            if writable {
                let _ = write(&*image, offset, &buffer[..512]);
                let _ = image.write_zeroes(offset, (size - offset).min(4096), true);
                let _ = image.discard(offset, size - offset);
                let _ = image.flush();
            }
        }
        if writable {
            let _ = image.grow(size.min(1 << 40) + (64 << 10));
        }
    }
}

#[test]
fn every_byte_of_header_and_tables_changed_is_an_error_or_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let sound = sound();
    let (l1, table) = (number(&sound, 40, 8), number(&sound, 48, 8));
    let block = number(&sound, table, 8);
    let l2 = number(&sound, l1, 8) & 0xffff_ffff;
    let extensions = number(&sound, 100, 4);
    let places = (0..extensions + 16)
        .chain(l1..l1 + 32)
        .chain(table..table + 16)
        .chain(block..block + 64)
        .chain(l2..l2 + 80);
    for place in places {
        for change in [0x01, 0x80, 0xff] {
            let mut bytes = sound.clone();
            bytes[place] ^= change;
            use_bytes(&path, &bytes);
        }
    }
}

#[test]
fn cut_off_anywhere_is_an_error_or_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let sound = sound();
    for len in (0..sound.len()).step_by(61).chain([71, 72, 103, 104, 111, 112, CLUSTER]) {
        use_bytes(&dir.path().join("image"), &sound[..len]);
    }
}

#[test]
fn field_that_would_take_memory_or_time_without_bounds_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let sound = sound();
    let table = number(&sound, 48, 8);
    let l1 = number(&sound, 40, 8);
    // Where, how wide, what, and what the refusal says.
    let cases = [
        (4, 4, 4, "version 4 of qcow2"),
        (20, 4, 8, "2 to the power of 8"),
        (20, 4, 31, "2 to the power of 31"),
        (24, 8, 0, "less than one sector"),
        (24, 8, u64::MAX, "1 PiB"),
        (24, 8, 1 << 63, "1 PiB"),
        (24, 8, 1 << 40, "L1 table is for"),
        (36, 4, 0, "L1 table is for 0 bytes"),
        (36, 4, u64::from(u32::MAX), "is the most"),
        (40, 8, 1 << 62, "is not in its file"),
        (40, 8, u64::MAX - 511, "is not in its file"),
        (40, 8, 513, "no place for one"),
        (40, 8, 0, "no place for one"),
        (48, 8, 1 << 62, "is not in its file"),
        (56, 4, 0, "no refcount table"),
        (56, 4, u64::from(u32::MAX), "is the most"),
        (96, 4, 7, "2 to the power of 7"),
        (100, 4, 96, "from 104 to 512"),
        (100, 4, 106, "a multiple of 8"),
        (100, 4, u64::from(u32::MAX), "from 104 to 512"),
        (100, 4, 512, "has no end"),
        (108, 4, u64::from(u32::MAX), "longer than its first cluster"),
        (8, 8, 600, "not in its first cluster"),
    ];
    for (at, width, value, says) in cases {
        let mut bytes = sound.clone();
        put(&mut bytes, at, width, value);
        if at == 8 {
            put(&mut bytes, 16, 4, 10);
        }
        if (at, width) == (108, 4) {
            put(&mut bytes, 104, 4, 0x1234_5678);
        }
        std::fs::write(&path, &bytes).unwrap();
        let refused = open(&path, false).unwrap_err().to_string();
        assert!(refused.contains(says), "{at} = {value}: {refused}");
    }
    // Of tables, where they are to be written to.
    let block = number(&sound, table, 8) as u64;
    let l2 = number(&sound, l1, 8) as u64 & 0xffff_ffff;
    for (at, value, says) in [
        (table + 8, block, "what is not in its file"),
        (table + 8, block + 1, "no place for one"),
        (l1 + 8, 1 << 63 | block, "two of its tables"),
        (table + 8, 1 << 40, "no place for one"),
        (table + 8 * 63, l2, "what is not in its file"),
        (table, 0, "counts as free"),
        (l1 + 8, 1 << 63 | l2, "two of its tables"),
        (l1 + 8, 1 << 63 | 1 << 40, "no place for an L2 table"),
        (l1 + 8, 1 << 63 | 1 << 60, "no place for an L2 table"),
        (l1 + 8, 1 << 63 | table as u64, "two of its tables"),
    ] {
        let mut bytes = sound.clone();
        put(&mut bytes, at, 8, value);
        std::fs::write(&path, &bytes).unwrap();
        let refused = open(&path, true).unwrap_err().to_string();
        assert!(refused.contains(says), "{at} = {value:#x}: {refused}");
    }
    // The refcounts of the header and of an L2 table.
    for cluster in [0, usize::try_from(l2).unwrap() / CLUSTER] {
        let mut bytes = sound.clone();
        put(&mut bytes, usize::try_from(block).unwrap() + 2 * cluster, 2, 0);
        std::fs::write(&path, &bytes).unwrap();
        let refused = open(&path, true).unwrap_err().to_string();
        assert!(refused.contains("counts as free"), "{refused}");
        open(&path, false).unwrap();
    }
}

#[test]
fn table_of_feature_names_that_is_cut_off_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    for len in [1, 47, 49, 97] {
        let mut bytes = sound();
        bytes[104..512].fill(0);
        put(&mut bytes, 100, 4, 104);
        put(&mut bytes, 104, 4, 0x6803_f857);
        put(&mut bytes, 108, 4, len);
        std::fs::write(&path, &bytes).unwrap();
        let refused = open(&path, false).unwrap_err().to_string();
        assert!(refused.contains("is cut off"), "{refused}");
    }
}

#[test]
fn guest_that_an_image_lets_write_over_the_header_gets_errors_at_most() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let sound = sound();
    let l1 = number(&sound, 40, 8);
    let l2 = number(&sound, l1, 8) & 0xffff_ffff;
    // Where the tables are, as the guest says; how large; and what stands in the cluster otherwise.
    let (all, one) = (u64::from(u32::MAX), 1);
    for (place, entries, clusters, rest) in [
        (u64::MAX - 511, all, all, 0xff),
        (1 << 61, all, one, 0xff),
        (0, 4 << 20, one, 0),
        (512, all, all, 0xee),
        (1 << 40, 64, 64, 1),
        (777, 64, 64, 0x80),
    ] {
        let mut bytes = sound.clone();
        // Compressed data that lies where the header is: once it is written over, the header's cluster is free.
        put(&mut bytes, l2 + 8 * 20, 8, 1 << 62);
        std::fs::write(&path, &bytes).unwrap();
        let image = open(&path, true).unwrap();
        let mut header = vec![rest; CLUSTER];
        put(&mut header, 40, 8, place);
        put(&mut header, 36, 4, entries);
        put(&mut header, 48, 8, place);
        put(&mut header, 56, 4, clusters);
        let mut refused = false;
        for cluster in (20..60).chain(120..128) {
            refused |= write(&*image, cluster * 512, &header).is_err();
            if cluster % 7 == 0 {
                let _ = image.flush();
            }
        }
        assert!(refused || std::fs::read(&path).unwrap()[..CLUSTER] == header, "the guest has not got there");
        let _ = image.grow(1 << 20);
        let _ = image.write_zeroes(0, 64 << 10, true);
        drop(image);
        let _ = open(&path, true);
    }
}
