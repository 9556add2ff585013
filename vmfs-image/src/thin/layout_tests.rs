//! Every structure comes back from its bytes as it went in, and no bytes make anything panic.

use proptest::prelude::*;

use super::*;

const BITS: u8 = 16;

fn header() -> impl Strategy<Value = Header> {
    (CLUSTER_BITS, any::<u64>(), any::<[u8; 16]>()).prop_map(|(cluster_bits, compatible, uuid)| Header {
        cluster_bits,
        compatible,
        uuid,
    })
}

fn backing() -> impl Strategy<Value = Backing> {
    let path = proptest::collection::vec(1_u8..=255, 1..=MAX_PATH);
    let format = prop_oneof![Just(Format::Flat), Just(Format::Thin), Just(Format::Qcow2), Just(Format::Vmdk)];
    (path, format, 0..=MAX_SIZE / SECTOR, any::<[u8; 16]>(), any::<u64>(), any::<u64>()).prop_map(
        |(path, format, sectors, id, state, visible)| Backing {
            path: Path::new(OsStr::from_bytes(&path)).to_owned(),
            format,
            identity: Identity { size: sectors * SECTOR, id, state },
            visible: visible % (sectors + 1) * SECTOR,
        },
    )
}

fn superblock(header: Header) -> impl Strategy<Value = Superblock> {
    let cluster = 1_u64 << header.cluster_bits;
    let numbers = (0..u64::MAX, 1..=MAX_SIZE / SECTOR, 2..=MAX_CLUSTERS, any::<[u64; 4]>());
    (numbers, any::<bool>(), 0..=256_u32, any::<[u32; 2]>(), proptest::option::of(backing())).prop_map(
        move |((generation, sectors, clusters, random), rooted, entries, crc, backing)| {
            let size = sectors * SECTOR;
            let end = clusters * cluster;
            let roots = u32::try_from(root_entries(size, header.cluster_bits)).unwrap();
            let place = |entries: u32, random: u64| {
                let room = (end - cluster).saturating_sub(list_bytes(entries.into())) / PAGE_U64 + 1;
                cluster + random % room * PAGE_U64
            };
            let fits = list_bytes(roots.into()) <= end - cluster;
            let root = ListRef { offset: place(roots, random[0]), entries: roots, crc: crc[0] };
            let free = ListRef { offset: place(entries, random[1]), entries, crc: crc[1] };
            Superblock {
                generation,
                size,
                max_size: if random[2] % 2 == 0 { 0 } else { end.saturating_add(random[2]) },
                end,
                root: if rooted && fits { root } else { ListRef::default() },
                free: if entries > 0 { free } else { ListRef::default() },
                mapped: random[3] % (clusters - 1),
                backing,
            }
        },
    )
}

/// Entries of a sound L2 page.
fn entry() -> impl Strategy<Value = Entry> {
    (any::<u32>(), any::<u16>(), any::<u16>()).prop_map(|(cluster, data, zero)| {
        let data = if cluster == 0 { 0 } else { data };
        Entry::new(cluster, data, zero & !data)
    })
}

fn page(bytes: &[u8]) -> &[u8; PAGE] {
    bytes.try_into().unwrap()
}

fn decode_any(bytes: &[u8; PAGE]) {
    let header = Header { cluster_bits: BITS, compatible: 0, uuid: [0; 16] };
    let _ = Header::decode(bytes);
    let _ = Superblock::decode(bytes, &header, 0);
    for count in [0, 1, 255, 256, 1000] {
        let _ = decode_refs("root", bytes, count, BITS, u64::MAX);
        let _ = decode_free(bytes, count, BITS, u64::MAX);
    }
    let _ = decode_l2(bytes, L2_ENTRIES, u64::MAX, &mut [Entry::default(); L2_ENTRIES]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn header_and_superblock_come_back(
        (header, block) in header().prop_flat_map(|header| (Just(header), superblock(header)))
    ) {
        prop_assert_eq!(Header::decode(&header.encode()), Ok(header));
        let bytes = block.encode();
        prop_assert_eq!(Superblock::decode(&bytes, &header, block.generation % 2), Ok(block.clone()));
        let other = Superblock::decode(&bytes, &header, 1 - block.generation % 2);
        prop_assert_eq!(other, Err(Bad::Slot(block.generation)));
    }

    #[test]
    fn every_flipped_byte_of_header_and_superblock_is_noticed(
        (header, block) in header().prop_flat_map(|header| (Just(header), superblock(header))), flip in 1_u8..
    ) {
        let (mut one, mut other) = (header.encode(), block.encode());
        for at in 0..PAGE {
            one[at] ^= flip;
            other[at] ^= flip;
            prop_assert!(Header::decode(&one).is_err());
            prop_assert!(Superblock::decode(&other, &header, block.generation % 2).is_err());
            one[at] ^= flip;
            other[at] ^= flip;
        }
    }

    /// As above, with a checksum that is right: what then decodes is sound and goes back to the same bytes.
    #[test]
    fn a_flipped_byte_under_a_right_checksum_is_refused_or_means_something(
        (header, block) in header().prop_flat_map(|header| (Just(header), superblock(header))), flip in 1_u8..
    ) {
        let (one, other) = (header.encode(), block.encode());
        for at in 0..PAGE - 4 {
            let mut bytes = one;
            bytes[at] ^= flip;
            seal(&mut bytes);
            if let Ok(header) = Header::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
            let mut bytes = other;
            bytes[at] ^= flip;
            seal(&mut bytes);
            for slot in [0, 1] {
                if let Ok(block) = Superblock::decode(&bytes, &header, slot) {
                    prop_assert_eq!(block.encode(), bytes);
                }
            }
        }
    }

    #[test]
    fn lists_of_pages_come_back(
        refs in proptest::collection::vec(proptest::option::of((16_u64..1 << 40, any::<u32>())), 0..700)
    ) {
        let refs: Vec<_> = refs
            .into_iter()
            .map(|entry| entry.map_or(PageRef::default(), |(page, crc)| PageRef { offset: page * PAGE_U64, crc }))
            .collect();
        let bytes = encode_refs(refs.iter().copied());
        prop_assert_eq!(bytes.len() as u64, list_bytes(refs.len() as u64));
        prop_assert_eq!(decode_refs("root", &bytes, refs.len(), BITS, 1 << 52), Ok(refs.clone()));
        if let Some(last) = refs.iter().rposition(|entry| entry.offset != 0) {
            let end = refs.iter().map(|entry| entry.offset).max().unwrap();
            prop_assert!(decode_refs("root", &bytes, refs.len(), BITS, end).is_err());
            prop_assert_eq!(decode_refs("root", &bytes, last, BITS, 1 << 52), Err(Bad::Reserved("root")));
        }
    }

    #[test]
    fn l2_pages_come_back(entries in proptest::collection::vec(entry(), L2_ENTRIES)) {
        let entries: [Entry; L2_ENTRIES] = entries.try_into().unwrap();
        let mut bytes = [0; PAGE];
        encode_l2(&entries, &mut bytes);
        let mut found = [Entry::default(); L2_ENTRIES];
        prop_assert_eq!(decode_l2(&bytes, L2_ENTRIES, MAX_CLUSTERS, &mut found), Ok(()));
        prop_assert_eq!(found, entries);
        let most = entries.iter().map(|entry| entry.cluster()).max().unwrap();
        prop_assert!(decode_l2(&bytes, L2_ENTRIES, most.into(), &mut found).is_err());
    }

    #[test]
    fn free_lists_come_back(gaps in proptest::collection::vec((1_u64..1000, 1_u64..1000), 0..=FREE_ENTRIES)) {
        let mut at = 1 << BITS;
        let mut extents = Vec::new();
        for (gap, len) in gaps {
            extents.push(FreeExtent { offset: at + gap * PAGE_U64, len: len * PAGE_U64 });
            at += (gap + len) * PAGE_U64;
        }
        let bytes = encode_free(&extents);
        prop_assert_eq!(decode_free(&bytes, extents.len(), BITS, at), Ok(extents.clone()));
        if !extents.is_empty() {
            prop_assert!(decode_free(&bytes, extents.len(), BITS, at - PAGE_U64).is_err());
            prop_assert!(decode_free(&bytes, extents.len() - 1, BITS, at).is_err());
        }
    }

    #[test]
    fn no_bytes_make_anything_panic(
        bytes in proptest::collection::vec(prop_oneof![3 => Just(0_u8), 1 => any::<u8>()], PAGE), sealed: bool
    ) {
        let mut bytes = *page(&bytes);
        decode_any(&bytes);
        put(&mut bytes, 0, SUPER_MAGIC);
        if sealed {
            seal(&mut bytes);
        }
        decode_any(&bytes);
    }
}

#[test]
fn every_byte_flipped_of_an_l2_page_and_a_free_list_is_refused_or_means_something() {
    let mut l2 = [0; PAGE];
    encode_l2(&[Entry::new(5, 0x00ff, 0xf000); L2_ENTRIES], &mut l2);
    let extents: Vec<_> = (1..=200).map(|at| FreeExtent { offset: at << 17, len: PAGE_U64 }).collect();
    let free = encode_free(&extents);
    for at in 0..PAGE {
        for bit in 0..8 {
            let mut bytes = l2;
            bytes[at] ^= 1 << bit;
            let mut entries = [Entry::default(); L2_ENTRIES];
            if decode_l2(&bytes, L2_ENTRIES, 8, &mut entries).is_ok() {
                assert!(entries.iter().all(|entry| entry.cluster() < 8 && entry.data() & entry.zero() == 0));
            }
            let mut bytes = free;
            bytes[at] ^= 1 << bit;
            if let Ok(extents) = decode_free(&bytes, 200, BITS, 1 << 30) {
                assert!(extents.windows(2).all(|pair| pair[0].offset + pair[0].len < pair[1].offset));
            }
        }
    }
}

#[test]
fn later_versions_and_unknown_features_are_told_from_damage() {
    let header = Header { cluster_bits: BITS, compatible: 0, uuid: [7; 16] };
    for at in [8, 16, 23] {
        let mut bytes = header.encode();
        bytes[at] ^= 2;
        seal(&mut bytes);
        assert!(matches!(Header::decode(&bytes), Err(Bad::Newer(_))), "byte {at}");
    }
    let mut bytes = header.encode();
    bytes[24] ^= 2;
    seal(&mut bytes);
    assert_eq!(Header::decode(&bytes), Ok(Header { compatible: 2, ..header }));
}

#[test]
fn entries_past_the_end_of_the_disk_are_refused() {
    let mut entries = [Entry::default(); L2_ENTRIES];
    entries[7] = Entry::new(0, 0, 1);
    let mut bytes = [0; PAGE];
    encode_l2(&entries, &mut bytes);
    assert_eq!(decode_l2(&bytes, 8, 2, &mut entries), Ok(()));
    assert_eq!(decode_l2(&bytes, 7, 2, &mut entries), Err(Bad::Reserved("L2 page")));
}
