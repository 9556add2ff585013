//! Descriptor chains as byte sequences in guest memory.

use vm_memory::{GuestMemory, GuestMemoryBackend, Permissions, VolatileSlice};

use crate::GuestRam;

/// Most pieces a chain may have: what the kernel takes in one vectored read or write (`IOV_MAX`).
const MAX_PIECES: usize = 1024;

/// Most descriptors a chain may have: as many pieces to read and to write as there may be.
const MAX_DESCRIPTORS: usize = 2 * MAX_PIECES;

/// A chain that a driver must not make (virtio 1.2, section 2.7).
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// Memory that is not there.
    #[error("a descriptor names {len} bytes at guest address {address:#x}, which is not memory")]
    Memory {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u32,
    },
    /// The wrong order.
    #[error("a descriptor that the device may read follows one that it may write")]
    Order,
    /// Too long.
    #[error("a descriptor chain has more than {MAX_PIECES} pieces")]
    Pieces,
    /// No end.
    #[error("a descriptor chain runs in a circle, or on to a descriptor that cannot be")]
    Endless,
    /// Too short.
    #[error("a descriptor chain ends {missing} bytes early")]
    Short {
        /// How many bytes lack.
        missing: usize,
    },
}

/// Bytes of guest memory in pieces.
#[derive(Debug, Default)]
pub struct Buffers<'a> {
    pieces: Vec<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> Buffers<'a> {
    /// Number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn push(
        &mut self,
        memory: &'a GuestRam,
        address: vm_memory::GuestAddress,
        len: u32,
        access: Permissions,
    ) -> Result<(), Error> {
        let outside = || Error::Memory { address: address.0, len };
        let bytes = usize::try_from(len).map_err(|_| outside())?;
        // Nearly always it lies in one region.
        if bytes > 0
            && self.pieces.len() < MAX_PIECES
            && let Ok(piece) = GuestMemoryBackend::get_slice(memory, address, bytes)
        {
            self.pieces.push(piece);
            self.len += bytes;
            return Ok(());
        }
        for piece in GuestMemory::get_slices(memory, address, bytes, access).map_err(|_| outside())? {
            let piece = piece.map_err(|_| outside())?;
            if self.pieces.len() == MAX_PIECES {
                return Err(Error::Pieces);
            }
            if !piece.is_empty() {
                self.pieces.push(piece);
            }
        }
        self.len += bytes;
        Ok(())
    }

    /// Adds a piece.
    #[cfg(test)]
    pub fn add(&mut self, piece: VolatileSlice<'a>) {
        self.len += piece.len();
        self.pieces.push(piece);
    }

    /// Drops all pieces, and keeps their room.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.len = 0;
    }

    /// Cuts off and returns the last `count` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Short`]; nothing is cut then.
    pub fn split_last(&mut self, count: usize) -> Result<Self, Error> {
        let keep = self.len.checked_sub(count).ok_or_else(|| self.short_of(count))?;
        let (at, within) = self.find(keep);
        let mut last = Self { pieces: self.pieces.split_off(at), len: count };
        // The cut lies within the piece, so that neither call fails.
        if within > 0
            && let Some(first) = last.pieces.first_mut()
            && let (Ok(front), Ok(back)) = (first.subslice(0, within), first.offset(within))
        {
            self.pieces.push(front);
            *first = back;
        }
        self.len = keep;
        Ok(last)
    }

    /// Cuts off and returns all but the first `count` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Short`]; nothing is cut then.
    pub fn split_at(&mut self, count: usize) -> Result<Self, Error> {
        let rest = self.len.checked_sub(count).ok_or_else(|| self.short_of(count))?;
        self.split_last(rest)
    }

    fn short_of(&self, count: usize) -> Error {
        Error::Short { missing: count.saturating_sub(self.len) }
    }

    /// The piece that byte `at`, which is at most the end, lies in, and where in it.
    fn find(&self, at: usize) -> (usize, usize) {
        let mut left = at;
        for (index, piece) in self.pieces.iter().enumerate() {
            match left.checked_sub(piece.len()) {
                Some(rest) => left = rest,
                None => return (index, left),
            }
        }
        (self.pieces.len(), 0)
    }

    /// Takes `count` bytes, which there are, off the front.
    fn drop_front(&mut self, count: usize) {
        let (at, within) = self.find(count);
        self.pieces.drain(..at);
        if let Some(first) = self.pieces.first_mut()
            && let Ok(rest) = first.offset(within)
        {
            *first = rest;
        }
        self.len -= count;
    }

    /// Takes bytes off the front into `data`.
    ///
    /// # Errors
    ///
    /// [`Error::Short`]; nothing is taken then.
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), Error> {
        if self.len < data.len() {
            return Err(self.short_of(data.len()));
        }
        let mut at = 0;
        for piece in &self.pieces {
            if at == data.len() {
                break;
            }
            at += piece.copy_to(&mut data[at..]);
        }
        self.drop_front(data.len());
        Ok(())
    }

    /// Puts `data` over the bytes at the front and takes these off.
    ///
    /// # Errors
    ///
    /// [`Error::Short`]; nothing is written then.
    pub fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        if self.len < data.len() {
            return Err(self.short_of(data.len()));
        }
        let mut at = 0;
        for piece in &self.pieces {
            let part = &data[at..data.len().min(at + piece.len())];
            piece.copy_from(part);
            at += part.len();
        }
        self.drop_front(data.len());
        Ok(())
    }

    /// Cuts off the last byte.
    ///
    /// # Errors
    ///
    /// [`Error::Short`] if there is none.
    pub fn take_last(&mut self) -> Result<VolatileSlice<'a>, Error> {
        let short = Error::Short { missing: 1 };
        // Pieces of no bytes are nowhere among them.
        let Some(piece) = self.pieces.pop() else { return Err(short) };
        let rest = piece.len().checked_sub(1).ok_or(short)?;
        let byte = piece.offset(rest).map_err(|_| Error::Short { missing: 1 })?;
        if rest > 0
            && let Ok(front) = piece.subslice(0, rest)
        {
            self.pieces.push(front);
        }
        self.len -= 1;
        Ok(byte)
    }

    /// The pieces as the kernel takes them. They point into guest memory, which outlives the borrow that this
    /// value holds.
    #[must_use]
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |piece: &VolatileSlice<'_>| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        };
        self.pieces.iter().map(iovec).collect()
    }

    /// The pieces.
    #[must_use]
    pub fn pieces(&self) -> &[VolatileSlice<'a>] {
        &self.pieces
    }
}

/// A descriptor chain: first what the device reads, then what it writes.
#[derive(Debug, Default)]
pub struct Chain<'a> {
    /// What names the chain in the used ring.
    pub head: u16,
    /// Bytes for the device.
    pub readable: Buffers<'a>,
    /// Bytes from the device.
    pub writable: Buffers<'a>,
}

impl<'a> Chain<'a> {
    /// Follows the descriptors of `chain` in `memory`.
    ///
    /// # Errors
    ///
    /// [`Error`] if they name what is not there, or are in the wrong order.
    pub fn parse(
        memory: &'a GuestRam,
        chain: virtio_queue::DescriptorChain<&GuestRam>,
    ) -> Result<Self, Error> {
        let mut parsed = Self::default();
        parsed.refill(memory, chain)?;
        Ok(parsed)
    }

    /// As [`parse`](Self::parse), in the place of another chain, whose room is used again.
    ///
    /// # Errors
    ///
    /// As of `parse`.
    pub fn refill(
        &mut self,
        memory: &'a GuestRam,
        chain: virtio_queue::DescriptorChain<&GuestRam>,
    ) -> Result<(), Error> {
        self.head = chain.head_index();
        self.readable.clear();
        self.writable.clear();
        // The iterator simply ends where it cannot go on, with the last descriptor still naming a next one.
        let (mut goes_on, mut has_writable) = (true, false);
        for (count, descriptor) in chain.enumerate() {
            // Descriptors of no bytes make no pieces, and an indirect table has room for 65,535 of them.
            if count == MAX_DESCRIPTORS {
                return Err(Error::Pieces);
            }
            goes_on = descriptor.has_next();
            let (address, len) = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                has_writable = true;
                self.writable.push(memory, address, len, Permissions::Write)?;
            } else if has_writable {
                return Err(Error::Order);
            } else {
                self.readable.push(memory, address, len, Permissions::Read)?;
            }
        }
        if goes_on { Err(Error::Endless) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    fn memory() -> GuestRam {
        let memory =
            GuestRam::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]).unwrap();
        let bytes: Vec<u8> = (0..0x2000_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        memory
    }

    #[test]
    fn buffer_across_two_regions_is_one_sequence() {
        let memory = memory();
        let mut buffers = Buffers::default();
        buffers.push(&memory, GuestAddress(0xffe), 4, Permissions::Read).unwrap();
        assert_eq!((buffers.len(), buffers.pieces().len()), (4, 2));
        let (mut seen, mut wanted) = ([0; 4], [0; 4]);
        buffers.read(&mut seen).unwrap();
        memory.read_slice(&mut wanted, GuestAddress(0xffe)).unwrap();
        assert_eq!(seen, wanted);
        assert!(buffers.is_empty());
    }

    #[test]
    fn buffer_past_the_end_of_memory_is_refused_with_its_address() {
        let memory = memory();
        let pushed = Buffers::default().push(&memory, GuestAddress(0x1fff), 2, Permissions::Read);
        assert_eq!(pushed, Err(Error::Memory { address: 0x1fff, len: 2 }));
    }

    proptest! {
        #[test]
        fn splitting_anywhere_keeps_every_byte_in_order(
            pieces in prop::collection::vec((0_u64..0x1f00, 0_u32..0x100), 0..20),
            cut in any::<prop::sample::Index>(),
        ) {
            let memory = memory();
            let build = || {
                let mut buffers = Buffers::default();
                for (address, len) in &pieces {
                    buffers.push(&memory, GuestAddress(*address), *len, Permissions::Read).unwrap();
                }
                buffers
            };
            let total = build().len();
            let cut = cut.index(total + 1);
            let mut whole = vec![0; total];
            build().read(&mut whole).unwrap();
            let mut front = build();
            let mut back = front.split_at(cut).unwrap();
            prop_assert_eq!((front.len(), back.len()), (cut, total - cut));
            let (mut a, mut b) = (vec![0; cut], vec![0; total - cut]);
            front.read(&mut a).unwrap();
            back.read(&mut b).unwrap();
            prop_assert_eq!([a, b].concat(), whole);
            prop_assert_eq!(build().split_last(total + 1).unwrap_err(), Error::Short { missing: 1 });
        }
    }
}
