//! What tests do with images of any kind.

use std::io;

use vm_memory::VolatileSlice;

use crate::image::Image;

/// Writes bytes to an image.
pub(crate) fn write(image: &dyn Image, offset: u64, bytes: &[u8]) -> io::Result<()> {
    image.write_at(offset, &[VolatileSlice::from(bytes.to_vec().as_mut_slice())])
}

/// Reads bytes of an image.
pub(crate) fn read(image: &dyn Image, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    image.read_at(offset, &[VolatileSlice::from(bytes.as_mut_slice())]).unwrap();
    bytes
}

/// Everything that an image reads as.
pub(crate) fn contents(image: &dyn Image) -> Vec<u8> {
    read(image, 0, usize::try_from(image.size()).unwrap())
}

/// A change of a disk, for property tests: whether it zeroes, its first unit of 4 KiB, how many, and what is written.
pub(crate) type Change = (bool, u64, u64, u8);

/// Makes a change, and the same in `model`.
pub(crate) fn change(image: &dyn Image, model: &mut [u8], (zeroes, unit, units, byte): Change) {
    let units = units.min(model.len() as u64 / 4096 - unit);
    let (offset, len) = (unit * 4096, units * 4096);
    let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
    if zeroes {
        image.write_zeroes(offset, len, byte % 2 == 0).unwrap();
        model[range].fill(0);
    } else {
        write(image, offset, &vec![byte; range.len()]).unwrap();
        model[range].fill(byte);
    }
}
