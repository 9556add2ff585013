//! Thin images made by hand, byte by byte as `docs/image-format.md` has them and by no code of the image's own: sound ones,
//! and ones that are wrong wherever wanted but in their checksums, so that the checks behind these are reached.

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of a cluster of the images made here.
pub const CLUSTER: usize = 64 << 10;
/// Clusters that an L2 page names.
const ENTRIES: usize = 512;

/// Where the structures of [`sample`] lie.
pub mod place {
    use super::{CLUSTER, PAGE};

    /// The header.
    pub const HEADER: usize = 0;
    /// Superblock of the even generations: the one that counts.
    pub const SUPER_A: usize = PAGE;
    /// Superblock of the odd generations.
    pub const SUPER_B: usize = 2 * PAGE;
    /// The root.
    pub const ROOT: usize = CLUSTER;
    /// The free list's page.
    pub const FREE_LIST: usize = CLUSTER + PAGE;
    /// The only L1 page.
    pub const L1: usize = CLUSTER + 2 * PAGE;
    /// Names clusters 0 to 3 of the disk.
    pub const L2_FIRST: usize = CLUSTER + 3 * PAGE;
    /// Names the last cluster of the disk.
    pub const L2_LAST: usize = CLUSTER + 4 * PAGE;
    /// Data clusters, of which the image has four.
    pub const DATA: usize = 2 * CLUSTER;
    /// A free cluster follows them.
    pub const FREE: usize = DATA + 4 * CLUSTER;
    /// Everything is before this.
    pub const END: usize = FREE + CLUSTER;
}

/// Size of the disk that [`sample`] is: two L2 pages, the last cluster partly outside.
pub const SIZE: u64 = (32 << 20) + (64 << 10) + 4608;
/// Generation of [`sample`].
pub const GENERATION: u64 = 42;

/// A field of an image that [`sample`] made.
#[derive(Debug, Clone, Copy)]
pub struct Field {
    /// Structure and field.
    pub name: &'static str,
    /// In the file, in bytes.
    pub offset: usize,
    /// In bytes: 1, 2, 4 or 8; other lengths are reserved space.
    pub width: usize,
}

/// Puts a number of `width` bytes.
pub fn put(bytes: &mut [u8], offset: usize, width: usize, value: u64) {
    bytes[offset..offset + width].copy_from_slice(&value.to_le_bytes()[..width]);
}

/// Gets a number of `width` bytes, up to 8.
#[must_use]
pub fn get(bytes: &[u8], offset: usize, width: usize) -> u64 {
    let mut number = [0; 8];
    number[..width].copy_from_slice(&bytes[offset..offset + width]);
    u64::from_le_bytes(number)
}

fn get_usize(bytes: &[u8], offset: usize, width: usize) -> usize {
    usize::try_from(get(bytes, offset, width)).unwrap_or(usize::MAX)
}

/// Puts the checksum of `from` at `at`.
fn checksum(bytes: &mut [u8], from: std::ops::Range<usize>, at: usize) {
    let sum = crc32c::crc32c(&bytes[from]);
    put(bytes, at, 4, u64::from(sum));
}

/// Makes the checksums of an image right, from the leaves up, as far as what they are of lies within the file and is not
/// of absurd size.
pub fn seal(bytes: &mut [u8]) {
    if bytes.len() < 3 * PAGE {
        return;
    }
    checksum(bytes, 0..PAGE - 4, PAGE - 4);
    // The superblock that does not count first: what both name has the sums that the other wants.
    let generation = |bytes: &[u8], place| get(bytes, place + 8, 8);
    let mut order = [place::SUPER_A, place::SUPER_B];
    if generation(bytes, order[0]) > generation(bytes, order[1]) {
        order.reverse();
    }
    for place in order {
        seal_tree(bytes, place);
        checksum(bytes, place..place + PAGE - 4, place + PAGE - 4);
    }
}

fn seal_tree(bytes: &mut [u8], superblock: usize) {
    let fits = |bytes: &[u8], at: usize, len: usize| {
        at.is_multiple_of(PAGE) && at >= 3 * PAGE && at.checked_add(len).is_some_and(|end| end <= bytes.len())
    };
    let root = get_usize(bytes, superblock + 40, 8);
    let entries = get_usize(bytes, superblock + 48, 4);
    let len = entries.saturating_mul(16).div_ceil(PAGE).saturating_mul(PAGE);
    if entries > 0 && fits(bytes, root, len) {
        let mut budget = 4096;
        for entry in (root..root + entries * 16).step_by(16) {
            let l1 = get_usize(bytes, entry, 8);
            if l1 == 0 || !fits(bytes, l1, PAGE) {
                continue;
            }
            for entry in (l1..l1 + PAGE).step_by(16) {
                let l2 = get_usize(bytes, entry, 8);
                if l2 != 0 && fits(bytes, l2, PAGE) && budget > 0 {
                    budget -= 1;
                    checksum(bytes, l2..l2 + PAGE, entry + 8);
                }
            }
            checksum(bytes, l1..l1 + PAGE, entry + 8);
        }
        checksum(bytes, root..root + len, superblock + 52);
    }
    let list = get_usize(bytes, superblock + 56, 8);
    if list != 0 && fits(bytes, list, PAGE) {
        checksum(bytes, list..list + PAGE, superblock + 68);
    }
}

/// Bytes of sub-cluster `sub` of cluster `cluster` of the sample, where it has data.
#[must_use]
pub fn data(cluster: u64, sub: usize) -> Vec<u8> {
    let seed = cluster.wrapping_mul(31) + sub as u64 + 1;
    (0..PAGE as u64)
        .map(|at| (seed.wrapping_mul(0x9e37_79b9).wrapping_add(at / 8) >> (at % 8)).to_le_bytes()[0] | 1)
        .collect()
}

/// What clusters of the sample hold: which of the disk, data mask, zero mask; in the order of their places.
pub const CLUSTERS: [(u64, u16, u16); 4] =
    [(1, 0xffff, 0), (0, 0x8001, 0x0ff0), (3, 0x0000, 0x00ff), (513, 0x0003, 0)];
/// A cluster of zeroes without a place.
pub const ZERO_CLUSTER: (u64, u16) = (2, 0xffff);

/// What the sample's disk reads as, without a backing.
#[must_use]
pub fn contents() -> Vec<u8> {
    let mut disk = vec![0; usize::try_from(SIZE).unwrap_or(0) / CLUSTER * CLUSTER + CLUSTER];
    for (cluster, mask, _) in CLUSTERS {
        for sub in (0..16).filter(|sub| mask >> sub & 1 == 1) {
            let at = usize::try_from(cluster).unwrap_or(0) * CLUSTER + sub * PAGE;
            disk[at..at + PAGE].copy_from_slice(&data(cluster, sub));
        }
    }
    disk.truncate(usize::try_from(SIZE).unwrap_or(0));
    disk
}

/// A sound image, of which both superblocks are valid and name the same tree.
#[must_use]
pub fn sample() -> Vec<u8> {
    use place::{DATA, END, FREE, FREE_LIST, HEADER, L1, L2_FIRST, L2_LAST, ROOT, SUPER_A, SUPER_B};

    let mut bytes = vec![0; END];
    bytes[HEADER..HEADER + 8].copy_from_slice(b"VMM-THIN");
    put(&mut bytes, HEADER + 8, 4, 1);
    put(&mut bytes, HEADER + 32, 1, 16);
    bytes[HEADER + 40..HEADER + 56]
        .copy_from_slice(&0x1234_5678_9abc_4def_8123_4567_89ab_cdef_u128.to_le_bytes());

    for (place, generation) in [(SUPER_A, GENERATION), (SUPER_B, GENERATION - 1)] {
        bytes[place..place + 8].copy_from_slice(b"VMMTSUPR");
        put(&mut bytes, place + 8, 8, generation);
        put(&mut bytes, place + 16, 8, SIZE);
        put(&mut bytes, place + 32, 8, END as u64);
        put(&mut bytes, place + 40, 8, ROOT as u64);
        put(&mut bytes, place + 48, 4, 1);
        put(&mut bytes, place + 56, 8, FREE_LIST as u64);
        put(&mut bytes, place + 64, 4, 2);
        put(&mut bytes, place + 72, 8, CLUSTERS.len() as u64);
    }

    put(&mut bytes, ROOT, 8, L1 as u64);
    put(&mut bytes, L1, 8, L2_FIRST as u64);
    put(&mut bytes, L1 + 16, 8, L2_LAST as u64);

    // What is left of the tree's cluster, and one whole cluster.
    put(&mut bytes, FREE_LIST, 8, (L2_LAST + PAGE) as u64);
    put(&mut bytes, FREE_LIST + 8, 8, (DATA - L2_LAST - PAGE) as u64);
    put(&mut bytes, FREE_LIST + 16, 8, FREE as u64);
    put(&mut bytes, FREE_LIST + 24, 8, CLUSTER as u64);

    for (index, (cluster, mask, zeroes)) in CLUSTERS.into_iter().enumerate() {
        let place = DATA + index * CLUSTER;
        let entry = l2_entry(cluster);
        put(&mut bytes, entry, 4, (place / CLUSTER) as u64);
        put(&mut bytes, entry + 4, 2, u64::from(mask));
        put(&mut bytes, entry + 6, 2, u64::from(zeroes));
        for sub in 0..16 {
            let at = place + sub * PAGE;
            if mask >> sub & 1 == 1 {
                bytes[at..at + PAGE].copy_from_slice(&data(cluster, sub));
            } else {
                // Nobody may read this.
                bytes[at..at + PAGE].fill(0xdb);
            }
        }
    }
    // What of the last sub-cluster is past the disk's end is zero.
    let last = DATA + 3 * CLUSTER + usize::try_from(SIZE).unwrap_or(0) % CLUSTER;
    bytes[last..last.next_multiple_of(PAGE)].fill(0);
    bytes[FREE..].fill(0xdb);
    put(&mut bytes, l2_entry(ZERO_CLUSTER.0) + 6, 2, u64::from(ZERO_CLUSTER.1));
    seal(&mut bytes);
    bytes
}

/// Gives an image a backing, by its second superblock's fields; the generation stays.
pub fn set_backing(bytes: &mut [u8], kind: u16, path: &[u8], size: u64, id: [u8; 16], state: u64) {
    for place in [place::SUPER_A, place::SUPER_B] {
        put(bytes, place + 80, 2, u64::from(kind));
        put(bytes, place + 82, 2, path.len() as u64);
        put(bytes, place + 88, 8, size);
        bytes[place + 96..place + 112].copy_from_slice(&id);
        put(bytes, place + 112, 8, state);
        put(bytes, place + 120, 8, size);
        bytes[place + 1024..place + 2048].fill(0);
        bytes[place + 1024..place + 1024 + path.len()].copy_from_slice(path);
    }
    seal(bytes);
}

/// Where the sample's L2 entry of a cluster of the disk lies.
#[must_use]
pub fn l2_entry(cluster: u64) -> usize {
    let cluster = usize::try_from(cluster).unwrap_or(0);
    let page = [place::L2_FIRST, place::L2_LAST][cluster / ENTRIES];
    page + cluster % ENTRIES * 8
}

/// Every field of the sample that has a meaning or is reserved, those of the superblock that counts, one entry of each page,
/// one that names nothing, and the padding behind.
#[must_use]
pub fn fields() -> Vec<Field> {
    use place::{FREE_LIST, HEADER, L1, ROOT, SUPER_A};

    let mut fields = Vec::new();
    let mut add = |base: usize, list: &[(&'static str, usize, usize)]| {
        fields.extend(list.iter().map(|&(name, offset, width)| Field { name, offset: base + offset, width }));
    };
    add(
        HEADER,
        &[
            ("header: magic", 0, 8),
            ("header: version", 8, 4),
            ("header: reserved at 12", 12, 4),
            ("header: incompatible features", 16, 8),
            ("header: compatible features", 24, 8),
            ("header: cluster bits", 32, 1),
            ("header: reserved at 33", 33, 1),
            ("header: reserved at 39", 39, 1),
            ("header: uuid", 40, 8),
            ("header: reserved at 56", 56, 8),
            ("header: reserved at 4088", 4088, 4),
        ],
    );
    add(
        SUPER_A,
        &[
            ("superblock: magic", 0, 8),
            ("superblock: generation", 8, 8),
            ("superblock: size", 16, 8),
            ("superblock: max_size", 24, 8),
            ("superblock: end", 32, 8),
            ("superblock: root", 40, 8),
            ("superblock: root entries", 48, 4),
            ("superblock: free list", 56, 8),
            ("superblock: free entries", 64, 4),
            ("superblock: clusters", 72, 8),
            ("superblock: backing kind", 80, 2),
            ("superblock: backing path length", 82, 2),
            ("superblock: reserved at 84", 84, 4),
            ("superblock: backing size", 88, 8),
            ("superblock: backing id", 96, 8),
            ("superblock: backing state", 112, 8),
            ("superblock: backing visible", 120, 8),
            ("superblock: reserved at 128", 128, 8),
            ("superblock: reserved at 1016", 1016, 8),
            ("superblock: backing path", 1024, 8),
            ("superblock: end of backing path", 2040, 8),
            ("superblock: reserved at 2048", 2048, 8),
            ("superblock: reserved at 4084", 4084, 8),
        ],
    );
    for (page, names) in [
        (
            ROOT,
            [
                "root: offset",
                "root: reserved",
                "root: padding offset",
                "root: padding reserved",
                "root: end of padding",
            ],
        ),
        (L1, ["l1: offset", "l1: reserved", "l1: absent offset", "l1: absent reserved", "l1: last entry"]),
    ] {
        add(
            page,
            &[(names[0], 0, 8), (names[1], 12, 4), (names[2], 32, 8), (names[3], 44, 4), (names[4], 4080, 8)],
        );
    }
    for (entry, names) in [
        (l2_entry(0), ["l2: cluster", "l2: data mask", "l2: zero mask"]),
        (l2_entry(2), ["l2 zero: cluster", "l2 zero: data mask", "l2 zero: zero mask"]),
        (l2_entry(4), ["l2 absent: cluster", "l2 absent: data mask", "l2 absent: zero mask"]),
        (l2_entry(513), ["l2 last: cluster", "l2 last: data mask", "l2 last: zero mask"]),
        (l2_entry(514), ["l2 past: cluster", "l2 past: data mask", "l2 past: zero mask"]),
    ] {
        add(entry, &[(names[0], 0, 4), (names[1], 4, 2), (names[2], 6, 2)]);
    }
    add(
        FREE_LIST,
        &[
            ("free list: first offset", 0, 8),
            ("free list: first length", 8, 8),
            ("free list: second offset", 16, 8),
            ("free list: second length", 24, 8),
            ("free list: padding", 32, 8),
            ("free list: end of padding", 4088, 8),
        ],
    );
    fields
}

/// A sound image of a disk that holds nothing yet, with clusters of 2 to the power of `bits` bytes.
#[must_use]
pub fn empty(size: u64, bits: u32, max_size: u64) -> Vec<u8> {
    let mut bytes = sample();
    bytes.truncate(3 * PAGE);
    bytes.resize(1 << bits, 0);
    put(&mut bytes, place::HEADER + 32, 1, u64::from(bits));
    bytes[place::SUPER_B..place::SUPER_B + PAGE].fill(0);
    let fields = place::SUPER_A;
    for (offset, width, value) in [
        (8, 8, 0),
        (16, 8, size),
        (24, 8, max_size),
        (32, 8, 1 << bits),
        (40, 8, 0),
        (48, 8, 0),
        (56, 8, 0),
        (64, 8, 0),
        (72, 8, 0),
    ] {
        put(&mut bytes, fields + offset, width, value);
    }
    seal(&mut bytes);
    // A new image has one superblock.
    bytes[place::SUPER_B..place::SUPER_B + PAGE].fill(0);
    bytes
}
