//! Images that are wrong in one place: every byte of every structure, with checksums that tell and with ones that do not.

use std::path::Path;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use crate::image::Image;
use crate::thin::check::check_storage;
use crate::thin::forge::{self, CLUSTER, PAGE, fields, l2_entry, place, put, sample, seal};
use crate::thin::memory::{Bytes, Memory};
use crate::thin::storage::Storage;
use crate::thin::{Thin, open_memory};

const PAGES: [usize; 8] = [
    place::HEADER,
    place::SUPER_A,
    place::SUPER_B,
    place::ROOT,
    place::FREE_LIST,
    place::L1,
    place::L2_FIRST,
    place::L2_LAST,
];

/// The clusters that the sample has something of, and one that it has nothing of.
const CLUSTERS: [usize; 6] = [0, 1, 2, 3, 100, 513];

/// What is at stake of the sample's disk.
fn contents() -> Vec<u8> {
    let disk = forge::contents();
    CLUSTERS.map(|at| &disk[at * CLUSTER..disk.len().min((at + 1) * CLUSTER)]).concat()
}

fn read(image: &dyn Image) -> std::io::Result<Vec<u8>> {
    let mut all = Vec::new();
    for cluster in CLUSTERS {
        let offset = (cluster * CLUSTER) as u64;
        let len = image.size().saturating_sub(offset).min(CLUSTER as u64);
        let from = all.len();
        all.resize(from + usize::try_from(len).unwrap(), 0xee);
        image.read_at(offset, &[VolatileSlice::from(&mut all[from..])])?;
    }
    Ok(all)
}

/// A full image is a sound one.
fn fine(result: &std::io::Result<()>) -> bool {
    result.as_ref().err().is_none_or(|error| error.kind() == std::io::ErrorKind::QuotaExceeded)
}

/// Does everything that can be done to an image, and tells whether nothing failed.
fn use_it(image: &dyn Image) -> bool {
    assert!(image.size().is_multiple_of(512) && (512..=1 << 50).contains(&image.size()));
    let mut ok = read(image).is_ok();
    let last = image.size() - 512;
    let within = |at: u64| at.min(last);
    let mut sector = [0xa5; 512];
    for at in [0, 3 * CLUSTER as u64 + 4096, 100 * CLUSTER as u64, last].map(within) {
        ok &= fine(&image.write_at(at, &[VolatileSlice::from(&mut sector[..])]));
    }
    let len = image.size().min(2 * CLUSTER as u64);
    ok &= fine(&image.write_zeroes(within(CLUSTER as u64 + 512), 512, true));
    ok &= fine(&image.discard(0, len));
    ok &= fine(&image.pull(0, len));
    ok &= image.flush().is_ok();
    ok &= fine(&image.write_at(0, &[VolatileSlice::from(&mut sector[..])]));
    ok &= image.run(0, image.size()).is_ok();
    ok &= fine(&image.grow(image.size() + 512)) || image.size() == 1 << 50;
    ok &= image.info().is_ok() && image.flush().is_ok();
    ok
}

/// Opens, uses, checks and repairs what may be anything. What the check finds sound has to be usable, and sound after that.
fn go_through(bytes: &Bytes, what: &dyn Fn() -> String) {
    let before = check_storage(&Memory::from(bytes.clone()), false);
    let sound = matches!(&before, Ok(report) if report.error_count == 0);
    let memory = Memory::from(bytes.clone());
    match open_memory(&memory, true, None) {
        Ok(image) => {
            let ok = use_it(&*image);
            drop(image);
            let after = check_storage(&memory, true);
            if sound {
                assert!(ok, "{}: it is sound and fails", what());
                assert_eq!(after.unwrap().errors, Vec::<String>::new(), "{}: it was sound", what());
            }
        }
        // A backing was not given.
        Err(error) => assert!(!sound, "{}: it is sound and does not open: {error}", what()),
    }
    assert!(memory.bytes().len() <= (1 << 50) + (1 << 49), "{}: {} bytes", what(), memory.bytes().len());
    let _ = check_storage(&Memory::from(bytes.clone()), true);
}

fn bytes(image: &[u8]) -> Bytes {
    let mut bytes = Bytes::default();
    bytes.write(0, image);
    bytes
}

#[test]
fn every_byte_flipped_is_an_error_or_changes_nothing() {
    let (image, wanted) = (sample(), contents());
    let sound = bytes(&image);
    let mut read_well = 0;
    for page in PAGES {
        for (at, byte) in (page..).zip(&image[page..page + PAGE]) {
            let mut damaged = sound.clone();
            damaged.write(at as u64, &[byte ^ 1 << (at % 8)]);
            let Ok(thin) = open_memory(&Memory::from(damaged), false, None) else { continue };
            for _ in 0..2 {
                match read(&*thin) {
                    Ok(found) => {
                        assert!(found == wanted, "byte {at:#x}");
                        read_well += 1;
                    }
                    Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::InvalidData, "byte {at:#x}"),
                }
            }
        }
    }
    // One superblock is enough.
    assert_eq!(read_well, 2 * 2 * PAGE);
}

/// A flipped byte under checksums that were made right.
#[test]
fn every_byte_changed_by_somebody_who_knows_the_checksums_does_no_harm() {
    let mut image = sample();
    let sound = bytes(&image);
    for page in PAGES {
        for at in page..page + PAGE {
            // Of what is something, every bit.
            let flips =
                if image[at] == 0 { vec![1 << (at % 8)] } else { vec![1, 2, 4, 8, 16, 32, 64, 128, 255] };
            let old = image[at];
            for flip in flips {
                image[at] = old ^ flip;
                seal(&mut image);
                let mut damaged = sound.clone();
                PAGES.iter().for_each(|page| damaged.write(*page as u64, &image[*page..page + PAGE]));
                go_through(&damaged, &|| format!("byte {at:#x} is {:#x} and not {old:#x}", old ^ flip));
            }
            image[at] = old;
            // Checksums that lie in pages are made right with the next.
        }
        image = sample();
    }
}

/// Every field with numbers at the bounds of what there is, in both superblocks where it is one of theirs.
#[test]
fn numbers_at_all_bounds_do_no_harm() {
    let bits = [0, 4, 8, 12, 16, 20, 31, 32, 40, 44, 50, 51, 53, 62, 63];
    let numbers = bits
        .map(|bit| 1_u64 << bit)
        .into_iter()
        .flat_map(|power| [power, power - 1, power.wrapping_sub(512), power.wrapping_add(4096)]);
    let numbers: Vec<u64> = numbers.chain([3, CLUSTER as u64 * 3, place::END as u64, u64::MAX]).collect();
    for field in fields() {
        for number in &numbers {
            let mut image = sample();
            put(&mut image, field.offset, field.width, *number);
            if (place::SUPER_A..place::SUPER_B).contains(&field.offset)
                && field.name != "superblock: generation"
            {
                put(&mut image, field.offset + PAGE, field.width, *number);
            }
            seal(&mut image);
            go_through(&bytes(&image), &|| format!("{} is {number:#x}", field.name));
        }
    }
}

#[test]
fn file_that_was_cut_off_is_refused_wherever_it_was_cut() {
    let image = sample();
    for len in (0..image.len()).step_by(512).chain([1, PAGE - 1, 3 * PAGE - 1, image.len() - 1]) {
        let memory = Memory::new(&image[..len]);
        for writable in [false, true] {
            assert!(open_memory(&memory, writable, None).is_err(), "{len} bytes");
        }
        assert!(check_storage(&memory, true).is_err() || len >= 3 * PAGE, "{len} bytes");
        assert_eq!(memory.bytes().len(), len as u64);
    }
}

/// A file that becomes shorter while it is in use.
#[test]
fn file_that_is_cut_off_in_use_gives_errors() {
    let image = sample();
    for len in (0..image.len()).step_by(PAGE) {
        let memory = Memory::new(&image);
        let thin = open_memory(&memory, true, None).unwrap();
        memory.set_len(len as u64).unwrap();
        use_it(&*thin);
    }
}

#[test]
fn clusters_and_pages_that_overlap_do_no_harm() {
    let clusters = place::END / CLUSTER;
    for one in 0..clusters {
        for (other, masks) in [(0, 0x8001), (1, 0xffff), (2, 0xffff), (5, 0xffff), (513, 3)] {
            let mut image = sample();
            put(&mut image, l2_entry(other), 8, one as u64 | masks << 32);
            seal(&mut image);
            go_through(&bytes(&image), &|| format!("cluster {other} lies in {one}"));
        }
    }
    // Tree pages that are one another, and free space that is not free.
    for from in PAGES.into_iter().skip(3) {
        for to in (0..place::END).step_by(PAGE) {
            for entry in [place::ROOT, place::L1, place::L1 + 16, place::FREE_LIST, place::FREE_LIST + 16] {
                if entry & !(PAGE - 1) != from {
                    continue;
                }
                let mut image = sample();
                put(&mut image, entry, 8, to as u64);
                seal(&mut image);
                go_through(&bytes(&image), &|| format!("entry {entry:#x} names {to:#x}"));
            }
        }
    }
}

/// A free list that names everything, pages of the tree and superblocks among it: what is overwritten is lost, and nothing more.
#[test]
fn free_list_that_names_everything_does_no_harm() {
    let mut image = sample();
    put(&mut image, place::FREE_LIST, 8, CLUSTER as u64);
    put(&mut image, place::FREE_LIST + 8, 8, (place::END - CLUSTER) as u64);
    put(&mut image, place::FREE_LIST + 16, 8, 0);
    put(&mut image, place::FREE_LIST + 24, 8, 0);
    for place in [place::SUPER_A, place::SUPER_B] {
        put(&mut image, place + 64, 4, 1);
    }
    seal(&mut image);
    go_through(&bytes(&image), &|| "everything is free".to_owned());
    let memory = Memory::new(&image);
    check_storage(&memory, true).unwrap();
    let image = Thin::open_on(Box::new(memory), Path::new("memory"), false, None).unwrap();
    let image: Arc<dyn Image> = Arc::new(image);
    assert!(read(&*image).unwrap() == contents());
}
