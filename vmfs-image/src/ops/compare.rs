//! Comparing the contents of two images.

use vm_memory::VolatileSlice;

use super::copy::all_zero;
use super::{ChainRun, Progress, chain_run, failed, step};
use crate::image::{Error, Image};

/// How much is compared at once, in bytes.
const CHUNK: usize = 1 << 20;

/// What came out of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// Both read the same.
    Identical,
    /// They differ first in the byte at this offset.
    Different {
        /// In bytes.
        offset: u64,
    },
    /// One has more bytes: what makes a difference only in a strict comparison, if the rest is zeroes.
    Sizes {
        /// That of the first, in bytes.
        first: u64,
        /// That of the second, in bytes.
        second: u64,
    },
    /// Both read as zeroes there, and one has bytes for it: what makes a difference only in a strict comparison.
    Allocation {
        /// In bytes.
        offset: u64,
    },
}

/// Compares what two images read as, chains and all. The shorter one counts as followed by zeroes, unless `strict`: then
/// sizes have to be the same, and what has bytes in one has to have them in the other.
///
/// # Errors
///
/// [`Error::Io`], and [`Error::Interrupted`] once `progress` says to stop.
pub fn compare(
    first: &dyn Image,
    second: &dyn Image,
    strict: bool,
    progress: &mut Progress<'_>,
) -> Result<Comparison, Error> {
    let (sizes, total) = ((first.size(), second.size()), first.size().max(second.size()));
    if strict && sizes.0 != sizes.1 {
        return Ok(Comparison::Sizes { first: sizes.0, second: sizes.1 });
    }
    let mut sides = [Side::new(first), Side::new(second)];
    let mut at = 0;
    while at < total {
        step(progress, first, at, total)?;
        let [a, b] = [sides[0].has_data(at, total)?, sides[1].has_data(at, total)?];
        let len = a.1.min(b.1);
        if strict && a.0 != b.0 {
            return Ok(Comparison::Allocation { offset: at });
        }
        let end = at + len;
        while (a.0 || b.0) && at < end {
            let part = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            let [one, other] = &mut sides;
            let difference = match (a.0, b.0) {
                (true, true) => {
                    let (one, other) = (one.read(at, part)?, other.read(at, part)?);
                    (one != other).then(|| one.iter().zip(other).position(|(a, b)| a != b))
                }
                (data, _) => {
                    let bytes = if data { one.read(at, part)? } else { other.read(at, part)? };
                    (!all_zero(bytes)).then(|| bytes.iter().position(|b| *b != 0))
                }
            };
            if let Some(place) = difference {
                return Ok(Comparison::Different { offset: at + place.unwrap_or_default() as u64 });
            }
            at += part as u64;
            step(progress, first, at, total)?;
        }
        at = end;
    }
    step(progress, first, total, total)?;
    Ok(Comparison::Identical)
}

struct Side<'a> {
    image: &'a dyn Image,
    buffer: Vec<u8>,
}

impl<'a> Side<'a> {
    fn new(image: &'a dyn Image) -> Self {
        Self { image, buffer: Vec::new() }
    }

    /// Whether there are bytes at `offset`, and for how long that is so.
    fn has_data(&self, offset: u64, total: u64) -> Result<(bool, u64), Error> {
        let size = self.image.size();
        if offset >= size {
            return Ok((false, total - offset));
        }
        let ChainRun { len, data, .. } =
            chain_run(self.image, offset, size - offset).map_err(failed(self.image, "read"))?;
        Ok((data.is_some(), len))
    }

    fn read(&mut self, offset: u64, len: usize) -> Result<&[u8], Error> {
        self.buffer.resize(len, 0);
        let into = [VolatileSlice::from(self.buffer.as_mut_slice())];
        self.image.read_at(offset, &into).map_err(failed(self.image, "read"))?;
        Ok(&self.buffer)
    }
}
