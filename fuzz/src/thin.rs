//! A sound thin image as the fuzzer's input changes it.

use vmfs_image::fuzzing::forge::{self, PAGE, fields, place, put, sample, seal};

use crate::input::Input;

/// An image that is wrong in a few places, its checksums mostly right.
#[must_use]
pub fn image(input: &mut Input<'_>) -> Vec<u8> {
    let mut image = sample();
    let fields = fields();
    let near: Vec<u64> = (0..=place::END / PAGE)
        .map(|page| (page * PAGE) as u64)
        .chain([forge::SIZE, forge::GENERATION, 1 << 50, 1 << 51, 1 << 62, 1 << 63])
        .collect();
    for _ in 0..1 + input.below(8) {
        match input.below(8) {
            0..4 => {
                let field = input.one_of(&fields);
                let both = input.one_in(2);
                let value = input.interesting(&near);
                put(&mut image, field.offset, field.width, value);
                let other = field.offset + PAGE;
                if both
                    && (place::SUPER_A..place::SUPER_B).contains(&field.offset)
                    && field.offset % PAGE != 8
                {
                    put(&mut image, other, field.width, value);
                }
            }
            4 | 5 => {
                // An entry that was absent.
                let index = usize::try_from(input.below(256)).unwrap_or(0);
                match input.below(3) {
                    0 => {
                        put(&mut image, place::L1 + 16 * index, 8, input.interesting(&near));
                        put(&mut image, place::L1 + 16 * index + 12, 2, input.below(2));
                    }
                    1 => {
                        put(&mut image, place::FREE_LIST + 16 * index, 8, input.interesting(&near));
                        put(&mut image, place::FREE_LIST + 16 * index + 8, 8, input.interesting(&near));
                    }
                    _ => {
                        let entry = forge::l2_entry(input.below(516));
                        let cluster = if input.one_in(4) { input.number(4) } else { input.below(8) };
                        put(&mut image, entry, 4, cluster);
                        put(&mut image, entry + 4, 4, input.number(4));
                    }
                }
            }
            6 => {
                let at = usize::try_from(input.number(3)).unwrap_or(0) % image.len();
                image[at] ^= 1 << input.below(8);
            }
            _ => {
                // A whole page somewhere else.
                let pages = (place::END / PAGE) as u64;
                let from = usize::try_from(input.below(pages)).unwrap_or(0) * PAGE;
                let to = usize::try_from(input.below(pages)).unwrap_or(0) * PAGE;
                image.copy_within(from..from + PAGE, to);
            }
        }
        if input.is_empty() {
            break;
        }
    }
    if input.below(16) != 15 {
        seal(&mut image);
    }
    if input.one_in(16) {
        let len = usize::try_from(input.number(3)).unwrap_or(0) % image.len();
        image.truncate(len);
    }
    image
}
