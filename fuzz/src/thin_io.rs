//! A thin image in memory that is used as the fuzzer's input says.

use std::sync::Arc;

use vm_memory::VolatileSlice;
use vmfs_image::fuzzing::{Memory, check_memory, forge};
use vmfs_image::thin::open_memory;
use vmfs_image::{Access, Image, Place};

use crate::input::Input;
use crate::thin;

/// Sectors that are used, by their first: the beginning, over the bounds of L2 and of L1 pages, and up to the end.
const AREAS: [u64; 4] = [0, (32 << 20) / 512 - 64, (8 << 30) / 512 - 64, u64::MAX];
const SECTORS: u64 = 256;

/// What is known of the sectors that are used: those that are not here are as they were found first.
type Model = std::collections::HashMap<u64, u8>;

fn read(image: &dyn Image, sector: u64, count: u64) -> std::io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; usize::try_from(count * 512).unwrap_or(0)];
    image.read_at(sector * 512, &[VolatileSlice::from(&mut bytes[..])])?;
    Ok(bytes)
}

/// Reads a range, and compares it with what is known of it, where the image is sound.
fn look(image: &dyn Image, model: &mut Model, sector: u64, count: u64, sound: bool) {
    let found = match read(image, sector, count) {
        Ok(found) => found,
        Err(error) => return assert!(!sound, "a sound image does not read: {error}"),
    };
    for (sector, found) in (sector..).zip(found.chunks(512)) {
        if !sound {
            continue;
        }
        match model.get(&sector) {
            Some(byte) => {
                assert!(found.iter().all(|b| b == byte), "sector {sector} is not {byte}: {found:?}")
            }
            // Whatever the image held at first has to stay.
            None if found.iter().all(|b| *b == found[0]) => drop(model.insert(sector, found[0])),
            None => {}
        }
    }
}

/// Writes by the short way where that can be gone: memory has no files, so it only locates, and the data go by the other.
fn locate(image: &dyn Image, sector: u64, count: u64, access: Access) {
    let mut extents = Vec::new();
    if let Some(ticket) = image.locate(sector * 512, count * 512, access, &mut extents) {
        let len: u64 = extents.iter().map(|extent| extent.len).sum();
        assert_eq!(len, count * 512, "{extents:?}");
        assert!(access == Access::Read || extents.iter().all(|extent| extent.place != Place::Zero));
        image.finish(ticket, false);
    } else {
        assert!(extents.is_empty());
    }
}

/// Makes an image, sound or not, and uses it.
pub fn use_image(input: &mut Input<'_>) {
    // Half of them are sound, of all sizes of clusters, some with a limit.
    let sound = input.one_in(2);
    let bytes = if sound {
        let bits = 16 + u32::try_from(input.below(6)).unwrap_or(0);
        let size = input.one_of(&[512, 65_024, 1 << 25, (8 << 30) + 66_048, 1 << 50]);
        let max = input.one_of(&[0, 0, 8, 11, 40]);
        if input.one_in(2) { forge::sample() } else { forge::empty(size, bits, max << bits) }
    } else {
        let len = usize::try_from(input.below(48)).unwrap_or(0);
        thin::image(&mut Input(input.bytes(8 + len)))
    };
    let memory = Memory::new(&bytes);
    let open = |memory: &Memory| open_memory(memory, true, None);
    let mut image: Arc<dyn Image> = match open(&memory) {
        Ok(image) => image,
        Err(error) => return assert!(!sound, "a sound image does not open: {error}"),
    };
    let mut model = Model::new();
    let mut value = 0_u8;
    while !input.is_empty() {
        let action = input.below(16);
        let size = image.size() / 512;
        assert!(size > 0 && size <= (1 << 50) / 512);
        let area = input.one_of(&AREAS).min(size.saturating_sub(SECTORS));
        let sector = (area + input.below(SECTORS)).min(size - 1);
        let count = (1 + input.below(SECTORS)).min(size - sector);
        let failed = |error: std::io::Error| {
            let full = error.kind() == std::io::ErrorKind::QuotaExceeded;
            assert!(!sound || full, "a sound image fails: {error}");
        };
        match action {
            0..5 => {
                value = value.wrapping_add(1);
                let mut data = vec![value; usize::try_from(count * 512).unwrap_or(0)];
                match image.write_at(sector * 512, &[VolatileSlice::from(&mut data[..])]) {
                    Ok(()) => model.extend((sector..sector + count).map(|at| (at, value))),
                    // Nothing was changed if it is full.
                    Err(error) => failed(error),
                }
            }
            5 | 6 => look(&*image, &mut model, sector, count, sound),
            7 => {
                let done = image.discard(sector * 512, count * 512);
                if let Err(error) = done {
                    failed(error);
                }
                for at in sector..sector + count {
                    // Zeroes, or what it was; the next read tells.
                    if sound && let Some(old) = model.remove(&at) {
                        let found = read(&*image, at, 1).expect("a sound image reads");
                        assert!(found.iter().all(|b| *b == 0) || found.iter().all(|b| *b == old));
                        model.insert(at, found[0]);
                    }
                }
            }
            8 => match image.write_zeroes(sector * 512, count * 512, input.one_in(2)) {
                Ok(()) => model.extend((sector..sector + count).map(|at| (at, 0))),
                Err(error) => {
                    failed(error);
                    model.retain(|at, _| !(sector..sector + count).contains(at));
                }
            },
            9 => locate(&*image, sector, count, Access::Write),
            10 => locate(&*image, sector, count, Access::Read),
            11 => image.flush().unwrap_or_else(failed),
            12 => {
                let by = input.one_of(&[512, 4096, 66_048, 9 << 30, 1 << 45]);
                let new = image.size().saturating_add(by).min(1 << 50);
                image.grow(new).unwrap_or_else(failed);
            }
            13 => {
                let mut at = sector * 512;
                for _ in 0..64 {
                    match image.run(at, size * 512 - at) {
                        Ok(run) => {
                            assert!(run.len >= 512 && run.len <= size * 512 - at, "{run:?} at {at:#x}");
                            at += run.len;
                        }
                        Err(error) => {
                            failed(error);
                            break;
                        }
                    }
                    if at == size * 512 {
                        break;
                    }
                }
            }
            14 => {
                drop(image);
                if input.one_in(2) {
                    let report = check_memory(&memory, true);
                    assert!(!sound || report.is_ok_and(|report| report.errors.is_empty()));
                }
                image = match open(&memory) {
                    Ok(image) => image,
                    Err(error) => return assert!(!sound, "a sound image does not open again: {error}"),
                };
            }
            _ => {
                let refused = image.read_at(size * 512, &[VolatileSlice::from(&mut [0; 512][..])]);
                assert!(refused.is_err());
                assert!(image.write_zeroes(sector * 512 + 1, 512, false).is_err());
            }
        }
        let taken = memory.bytes().len();
        assert!(taken < 1 << 53, "{taken} bytes of file");
    }
    if !sound {
        return;
    }
    drop(image);
    let report = check_memory(&memory, false).expect("a sound image is checked");
    assert_eq!(report.errors, Vec::<String>::new());
    let image = open_memory(&memory, false, None).expect("a sound image opens");
    for (sector, byte) in &model {
        let found = read(&*image, *sector, 1).expect("a sound image reads");
        assert!(
            found.iter().all(|b| b == byte),
            "sector {sector} is not {byte} after opening again: {found:?}"
        );
    }
}
