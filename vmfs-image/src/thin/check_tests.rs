use super::check::{Failure, Report, check_storage};
use super::forge::{self, CLUSTER, CLUSTERS, PAGE, fields, get, l2_entry, place, put, sample, seal};
use super::memory::Memory;

fn check(bytes: &[u8]) -> Report {
    check_storage(&Memory::new(bytes), false).unwrap()
}

fn repair(bytes: &[u8]) -> (Report, Vec<u8>) {
    let memory = Memory::new(bytes);
    let report = check_storage(&memory, true).unwrap();
    (report, memory.to_vec())
}

fn changed(change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut bytes = sample();
    change(&mut bytes);
    seal(&mut bytes);
    bytes
}

#[track_caller]
fn finds(bytes: &[u8], what: &str) {
    let report = check(bytes);
    assert!(report.errors.iter().any(|error| error.contains(what)), "{what:?} is not in {report:#?}");
}

#[test]
fn a_sound_image_has_nothing_wrong_and_is_counted() {
    let report = check(&sample());
    assert_eq!(report.errors, Vec::<String>::new());
    assert_eq!(
        report,
        Report {
            generation: forge::GENERATION,
            size: forge::SIZE,
            cluster_size: CLUSTER as u64,
            end: place::END as u64,
            clusters: 4,
            data: 20 * 4096,
            zeroes: (8 + 8 + 16) * 4096,
            tree: 5 * 4096,
            free: (11 * PAGE + CLUSTER) as u64,
            leaked: 0,
            leaks: 0,
            fragments: 3,
            ..Report::default()
        }
    );
}

#[test]
fn a_sound_image_is_not_changed_by_a_repair() {
    let (report, bytes) = repair(&sample());
    assert_eq!(report.repaired, None);
    assert!(bytes == sample());
}

#[test]
fn clusters_in_the_disks_order_are_one_fragment() {
    let bytes = changed(|bytes| {
        for (index, cluster) in [0, 1, 3, 513].into_iter().enumerate() {
            put(bytes, l2_entry(cluster), 4, (place::DATA / CLUSTER + index) as u64);
        }
    });
    assert_eq!(check(&bytes).fragments, 1);
}

#[test]
fn every_reserved_byte_that_is_not_zero_is_found() {
    for field in
        fields().iter().filter(|field| field.name.contains("reserved") || field.name.contains("padding"))
    {
        for at in [0, field.width - 1] {
            let bytes = changed(|bytes| bytes[field.offset + at] ^= 0x40);
            assert_eq!(check(&bytes).error_count, 1, "{field:?}, byte {at}");
        }
    }
}

#[test]
fn wrong_checksums_are_found() {
    for page in [place::ROOT, place::L1, place::L2_FIRST, place::L2_LAST, place::FREE_LIST] {
        let mut bytes = sample();
        bytes[page + 3000] ^= 1;
        assert!(check(&bytes).errors[0].contains("checksum"), "{page:#x}");
    }
}

#[test]
fn one_torn_superblock_is_no_error_and_two_are() {
    let mut bytes = sample();
    bytes[place::SUPER_A + 700] ^= 1;
    let report = check(&bytes);
    assert_eq!((report.error_count, report.generation), (0, forge::GENERATION - 1));
    bytes[place::SUPER_B + 700] ^= 1;
    let failure = check_storage(&Memory::new(&bytes), false).unwrap_err();
    assert!(matches!(failure, Failure::Corrupt(what) if what.contains("superblock")));
}

#[test]
fn a_superblock_in_the_others_slot_does_not_count() {
    let mut bytes = sample();
    put(&mut bytes, place::SUPER_B + 8, 8, 100);
    seal(&mut bytes);
    assert_eq!(check(&bytes).generation, forge::GENERATION);
}

#[test]
fn overlaps_are_found() {
    let data = place::DATA as u64;
    let free = (place::FREE / CLUSTER) as u64;
    finds(&changed(|bytes| put(bytes, l2_entry(5), 4, 2)), "where something else does");
    finds(&changed(|bytes| put(bytes, l2_entry(5), 4, 1)), "where something else does");
    finds(&changed(|bytes| put(bytes, l2_entry(5), 4, free)), "the free list names");
    finds(&changed(|bytes| put(bytes, place::L1 + 16, 8, place::L2_FIRST as u64)), "named twice");
    finds(&changed(|bytes| put(bytes, place::L1 + 16, 8, place::ROOT as u64)), "named twice");
    finds(&changed(|bytes| put(bytes, place::L1 + 16, 8, data)), "where something else does");
    finds(&changed(|bytes| put(bytes, place::FREE_LIST + 24, 8, (CLUSTER + PAGE) as u64)), "cannot be free");
    finds(&changed(|bytes| put(bytes, place::FREE_LIST + 8, 8, (12 * PAGE) as u64)), "the free list names");
}

#[test]
fn places_outside_or_misaligned_are_found() {
    for cluster in [(place::END / CLUSTER) as u64, 1 << 16, 1 << 31, u64::from(u32::MAX)] {
        finds(&changed(|bytes| put(bytes, l2_entry(1), 4, cluster)), "no place for it");
    }
    for offset in [512, 4096, 8192, CLUSTER as u64 + 512, place::END as u64, u64::MAX - 4095] {
        finds(&changed(|bytes| put(bytes, place::L1, 8, offset)), "no place for it");
        finds(&changed(|bytes| put(bytes, place::ROOT, 8, offset)), "no place for it");
    }
}

#[test]
fn a_file_shorter_than_it_says_is_found() {
    finds(&sample()[..place::END - 1], "in use up to");
}

#[test]
fn bytes_past_the_disks_end_are_found() {
    let last = place::DATA + 3 * CLUSTER + 4608;
    for at in [last, last + 4096 - 513] {
        finds(&changed(|bytes| bytes[at] = 1), "past the disk's end");
    }
    assert_eq!(check(&changed(|bytes| bytes[last + 4096 - 512] = 1)).error_count, 0);
}

#[test]
fn a_tree_that_names_one_page_everywhere_is_gone_through_once() {
    let bytes = changed(|bytes| {
        for slot in 0..256 {
            put(bytes, place::L1 + slot * 16, 8, place::L2_FIRST as u64);
        }
        for place in [place::SUPER_A, place::SUPER_B] {
            put(bytes, place + 16, 8, 1 << 33);
        }
    });
    let report = check(&bytes);
    assert!(report.error_count > 250 && report.errors.len() == 100, "{report:?}");
    assert_eq!(report.tree, 4 * 4096);
}

#[test]
fn leaks_are_counted_and_given_back() {
    // The list forgets the free cluster, and a cluster of the disk is dropped without being noted there.
    let bytes = changed(|bytes| {
        put(bytes, place::FREE_LIST + 16, 8, 0);
        put(bytes, place::FREE_LIST + 24, 8, 0);
        bytes[l2_entry(0)..l2_entry(0) + 8].fill(0);
        for place in [place::SUPER_A, place::SUPER_B] {
            put(bytes, place + 64, 4, 1);
            put(bytes, place + 72, 8, 3);
        }
    });
    let report = check(&bytes);
    assert_eq!((report.error_count, report.leaked, report.leaks), (0, 2 * CLUSTER as u64, 2));

    let (report, bytes) = repair(&bytes);
    assert_eq!(report.repaired.unwrap().given_back, 2 * CLUSTER as u64);
    let report = check(&bytes);
    assert_eq!((report.error_count, report.leaked, report.clusters), (0, 0, 3));
    // The last cluster was given back to the file system, the other is free and holds nothing.
    assert_eq!((report.end, bytes.len()), (place::FREE as u64, place::FREE));
    assert_eq!(report.generation, forge::GENERATION + 1);
    let dropped = place::DATA + CLUSTER;
    assert!(bytes[dropped..dropped + CLUSTER].iter().all(|&byte| byte == 0));
    assert!(report.free >= (CLUSTER + 10 * PAGE) as u64);
}

#[test]
fn what_lies_past_the_end_is_cut_off_by_a_repair() {
    let mut bytes = sample();
    bytes.resize(place::END + 3 * CLUSTER, 0xaa);
    assert_eq!(check(&bytes).beyond, 3 * CLUSTER as u64);
    let (report, bytes) = repair(&bytes);
    assert_eq!(report.repaired.unwrap().given_back, 3 * CLUSTER as u64);
    assert!(bytes == sample());
}

#[test]
fn a_wrong_count_and_a_wrong_free_list_are_made_right() {
    let bytes = changed(|bytes| {
        for place in [place::SUPER_A, place::SUPER_B] {
            put(bytes, place + 72, 8, 7);
        }
        put(bytes, place::FREE_LIST, 8, CLUSTER as u64);
    });
    assert_eq!(check(&bytes).error_count, 2);
    let (report, bytes) = repair(&bytes);
    let repaired = report.repaired.unwrap();
    assert!(repaired.count && repaired.free_list);
    let report = check(&bytes);
    assert_eq!((report.errors, report.leaked), (vec![], 0));
    assert_eq!(get(&bytes, place::SUPER_B + 72, 8), 4);
}

#[test]
fn a_damaged_tree_is_not_repaired() {
    let mut bytes = sample();
    bytes[place::L2_FIRST + 3000] ^= 1;
    let (report, after) = repair(&bytes);
    assert!(report.leaked > 0 && report.repaired.is_none());
    assert!(after == bytes);
}

#[test]
fn leaks_of_an_image_without_a_free_list_get_one() {
    let bytes = changed(|bytes| {
        for place in [place::SUPER_A, place::SUPER_B] {
            put(bytes, place + 32, 8, place::FREE as u64);
            put(bytes, place + 56, 8, 0);
            put(bytes, place + 64, 4, 0);
            put(bytes, place + 68, 4, 0);
        }
        bytes.truncate(place::FREE);
    });
    let (report, bytes) = repair(&bytes);
    assert_eq!(report.errors, Vec::<String>::new());
    assert_eq!(check(&bytes).leaked, 0);
}

#[test]
fn sums_of_a_sealed_image_do_not_change_when_it_is_sealed_again() {
    let mut bytes = sample();
    seal(&mut bytes);
    assert!(bytes == sample());
    assert_eq!(CLUSTERS.len(), 4);
}
