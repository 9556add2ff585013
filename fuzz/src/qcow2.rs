//! A small qcow2 image made by hand (QEMU, `docs/interop/qcow2.rst`), to be changed by the fuzzer.

use crate::input::Input;

const CLUSTER: usize = 512;

fn put(bytes: &mut [u8], at: usize, width: usize, value: u64) {
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

/// A sound image: 64 KiB of disk in clusters of 512 bytes; the first clusters have data, one is zero, one compressed.
#[must_use]
pub fn sample() -> Vec<u8> {
    let mut bytes = vec![0; 12 * CLUSTER];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    for (at, width, value) in [
        (4, 4, 3),
        (20, 4, 9),
        (24, 8, 64 << 10),
        (36, 4, 2),
        (40, 8, 3 * CLUSTER as u64),
        (48, 8, CLUSTER as u64),
        (56, 4, 1),
        (96, 4, 4),
        (100, 4, 112),
    ] {
        put(&mut bytes, at, width, value);
    }
    put(&mut bytes, CLUSTER, 8, 2 * CLUSTER as u64);
    for cluster in 0..12 {
        put(&mut bytes, 2 * CLUSTER + cluster * 2, 2, 1);
    }
    put(&mut bytes, 3 * CLUSTER, 8, 1 << 63 | (4 * CLUSTER as u64));
    for data in 0..4 {
        put(&mut bytes, 4 * CLUSTER + data * 8, 8, 1 << 63 | ((5 + data) * CLUSTER) as u64);
        bytes[(5 + data) * CLUSTER..(6 + data) * CLUSTER].fill(0xd0 + u8::try_from(data).unwrap_or(0));
    }
    put(&mut bytes, 4 * CLUSTER + 32, 8, 1);
    // Raw deflate of 512 zeroes.
    let compressed = [0x63, 0x60, 0x18, 0x05, 0xa3, 0x00, 0x00];
    bytes[9 * CLUSTER..9 * CLUSTER + compressed.len()].copy_from_slice(&compressed);
    put(&mut bytes, 4 * CLUSTER + 40, 8, 1 << 62 | (9 * CLUSTER as u64));
    bytes
}

/// The sample as the input changes it.
#[must_use]
pub fn from_input(input: &mut Input<'_>) -> Vec<u8> {
    let mut bytes = sample();
    // Header fields by offset and width.
    let header = [
        (4, 4),
        (8, 8),
        (16, 4),
        (20, 4),
        (24, 8),
        (32, 4),
        (36, 4),
        (40, 8),
        (48, 8),
        (56, 4),
        (60, 4),
        (64, 8),
        (72, 8),
        (80, 8),
        (88, 8),
        (96, 4),
        (100, 4),
        (104, 1),
        (112, 4),
        (116, 4),
    ];
    let near: Vec<u64> =
        (0..13).map(|cluster| cluster * CLUSTER as u64).chain([64 << 10, 112, 104]).collect();
    for _ in 0..1 + input.below(6) {
        let (at, width) = match input.below(6) {
            0 | 1 => input.one_of(&header),
            2 => (3 * CLUSTER + usize::try_from(input.below(3)).unwrap_or(0) * 8, 8),
            3 => (4 * CLUSTER + usize::try_from(input.below(64)).unwrap_or(0) * 8, 8),
            4 => (CLUSTER + usize::try_from(input.below(2)).unwrap_or(0) * 8, 8),
            _ => (2 * CLUSTER + usize::try_from(input.below(16)).unwrap_or(0) * 2, 2),
        };
        let flags = input.one_of(&[0, 0, 1 << 63, 1 << 62, 1]);
        let value = input.interesting(&near) | flags;
        put(&mut bytes, at, width, value);
        if input.is_empty() {
            break;
        }
    }
    // Text for a backing or a data file's name, or an extension, or compressed data.
    let at = input.one_of(&[112, 120, 9 * CLUSTER, 256]);
    let text = input.bytes(200);
    bytes[at..at + text.len()].copy_from_slice(text);
    if input.one_in(8) {
        let len = usize::try_from(input.number(2)).unwrap_or(0) % bytes.len();
        bytes.truncate(len);
    }
    bytes
}
