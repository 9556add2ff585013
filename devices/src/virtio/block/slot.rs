//! A request from the time that it was taken from the queue until it is given back.

use std::io;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;
use vmfs_image::{Extent, Place, Ticket};

use super::request::{Request, Status};
use crate::virtio::chain::Chain;

/// A piece of a request that lies in one piece of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Index of the file.
    pub file: u16,
    /// Byte offset in it.
    pub offset: u64,
    /// Its first piece of memory, and how many there are.
    pub first: usize,
    pub count: usize,
    /// Its length in bytes.
    pub len: u64,
}

/// A request under way. The room of its lists is used again for the next one in the same place.
#[derive(Debug, Default)]
pub struct Slot {
    /// What is left of it are the data.
    pub chain: Chain<'static>,
    /// Where the status goes.
    pub status: Option<VolatileSlice<'static>>,
    /// What was asked for.
    pub request: Request,
    /// What its image has to be given back.
    pub ticket: Option<Ticket>,
    pub segments: Vec<Segment>,
    /// Memory of all segments.
    pub pieces: Vec<libc::iovec>,
    /// How many operations of it are in flight.
    pub pending: usize,
    /// The first of those that went wrong.
    pub error: Option<io::Error>,
    /// Has to be done anew, by a call that waits.
    pub anew: bool,
    /// Its data are written, and are being made stable for a driver that knows no flush.
    pub settles: bool,
}

// SAFETY: what makes it otherwise are pointers into guest memory, which is there for every thread; whoever has the slot
// keeps that memory mapped.
unsafe impl Send for Slot {}

impl Slot {
    /// The memory that data come from or go to.
    pub fn data(&self) -> &[VolatileSlice<'static>] {
        match self.request {
            Request::Read(_) => self.chain.writable.pieces(),
            Request::Write(_) => self.chain.readable.pieces(),
            _ => &[],
        }
    }

    /// Number of its bytes.
    pub fn len(&self) -> u64 {
        let len = match self.request {
            Request::Read(_) => self.chain.writable.len(),
            Request::Write(_) => self.chain.readable.len(),
            _ => 0,
        };
        len as u64
    }

    /// Makes segments of `extents`, which cover the data. What reads as zeroes is filled at once.
    pub fn plan(&mut self, extents: &[Extent]) {
        let (mut segments, mut pieces) =
            (std::mem::take(&mut self.segments), std::mem::take(&mut self.pieces));
        segments.clear();
        pieces.clear();
        let mut data = Cursor { pieces: self.data(), skip: 0 };
        for extent in extents {
            match extent.place {
                Place::Zero => data.advance(extent.len, zero),
                Place::File { file, offset } => {
                    let first = pieces.len();
                    data.advance(extent.len, |piece| pieces.push(iovec(piece)));
                    let count = pieces.len() - first;
                    segments.push(Segment { file, offset, first, count, len: extent.len });
                }
            }
        }
        (self.segments, self.pieces) = (segments, pieces);
    }

    /// The memory of a segment.
    pub fn pieces(&self, segment: Segment) -> &[libc::iovec] {
        self.pieces.get(segment.first..segment.first + segment.count).unwrap_or_default()
    }

    /// Writes the status, and says how many bytes of the chain were written in all.
    pub fn answer(&mut self, status: Status) -> u32 {
        let mut written = 1;
        if status == Status::Ok && matches!(self.request, Request::Read(_)) {
            for piece in self.chain.writable.pieces() {
                piece.bitmap().mark_dirty(0, piece.len());
            }
            written += self.len();
        }
        if let Some(place) = self.status.take() {
            place.copy_from(&[status as u8]);
        }
        u32::try_from(written).unwrap_or(u32::MAX)
    }
}

fn iovec(piece: VolatileSlice<'_>) -> libc::iovec {
    libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() }
}

fn zero(piece: VolatileSlice<'_>) {
    const ZEROES: [u8; 4096] = [0; 4096];
    let mut at = 0;
    while let Ok(rest) = piece.offset(at)
        && !rest.is_empty()
    {
        let len = rest.len().min(ZEROES.len());
        rest.copy_from(&ZEROES[..len]);
        at += len;
    }
}

/// A place in a list of pieces.
struct Cursor<'s> {
    pieces: &'s [VolatileSlice<'static>],
    /// How much of the first is behind.
    skip: usize,
}

impl Cursor<'_> {
    /// Goes on by `len` bytes, of which `each` is given the pieces.
    fn advance(&mut self, len: u64, mut each: impl FnMut(VolatileSlice<'static>)) {
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        while left > 0
            && let Some((first, rest)) = self.pieces.split_first()
        {
            let here = (first.len() - self.skip).min(left);
            // It lies within the piece.
            if let Ok(piece) = first.subslice(self.skip, here) {
                each(piece);
            }
            (left, self.skip) = (left - here, self.skip + here);
            if self.skip == first.len() {
                (self.pieces, self.skip) = (rest, 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn segments_cover_the_data_in_order_and_holes_are_zeroes(
            pieces in prop::collection::vec(1..30_usize, 1..20),
            cuts in prop::collection::vec((1..60_usize, any::<bool>()), 1..20),
        ) {
            let total: usize = pieces.iter().sum();
            let bytes: &'static mut [u8] = Box::leak(vec![0xee_u8; total].into_boxed_slice());
            let base = bytes.as_ptr() as usize;
            let whole: VolatileSlice<'static> = VolatileSlice::from(bytes);
            let mut at = 0;
            let mut slot = Slot { request: Request::Write(0), ..Slot::default() };
            for len in pieces {
                slot.chain.readable.add(whole.subslice(at, len).unwrap());
                at += len;
            }
            let (mut extents, mut left) = (Vec::new(), total);
            for (len, hole) in cuts.into_iter().chain([(total, false)]) {
                let len = len.min(left);
                left -= len;
                let place = if hole { Place::Zero } else { Place::File { file: 3, offset: 7 } };
                if len > 0 {
                    extents.push(Extent { len: len as u64, place });
                }
            }
            slot.plan(&extents);
            let mut segments = slot.segments.iter();
            let mut at = 0;
            for extent in extents {
                let len = usize::try_from(extent.len).unwrap();
                if extent.place == Place::Zero {
                    let mut seen = vec![1_u8; len];
                    whole.subslice(at, len).unwrap().copy_to(&mut seen[..]);
                    prop_assert!(seen.iter().all(|byte| *byte == 0));
                } else {
                    let segment = *segments.next().unwrap();
                    prop_assert_eq!((segment.file, segment.offset, segment.len), (3, 7, extent.len));
                    let mut place = base + at;
                    for piece in slot.pieces(segment) {
                        prop_assert_eq!(piece.iov_base as usize, place);
                        place += piece.iov_len;
                    }
                    prop_assert_eq!(place, base + at + len);
                }
                at += len;
            }
            prop_assert_eq!(segments.next(), None);
        }
    }
}
