//! Descriptor chains as byte sequences in guest memory.

use vm_memory::{GuestMemory, Permissions, VolatileSlice};

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
        for piece in memory.get_slices(address, bytes, access).map_err(|_| outside())? {
            if self.pieces.len() == MAX_PIECES {
                return Err(Error::Pieces);
            }
            self.pieces.push(piece.map_err(|_| outside())?);
        }
        self.len += bytes;
        Ok(())
    }

    /// Cuts off and returns the last `count` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Short`]; nothing is cut then.
    pub fn split_last(&mut self, count: usize) -> Result<Self, Error> {
        let keep =
            self.len.checked_sub(count).ok_or(Error::Short { missing: count.saturating_sub(self.len) })?;
        let mut last = Self::default();
        let mut at = 0;
        let mut pieces = Vec::with_capacity(self.pieces.len());
        for piece in self.pieces.drain(..) {
            let cut = keep.saturating_sub(at).min(piece.len());
            at += piece.len();
            // Both halves lie within the piece, so that neither call fails.
            if cut > 0
                && let Ok(front) = piece.subslice(0, cut)
            {
                pieces.push(front);
            }
            if cut < piece.len()
                && let Ok(back) = piece.offset(cut)
            {
                last.pieces.push(back);
            }
        }
        self.pieces = pieces;
        (self.len, last.len) = (keep, count);
        Ok(last)
    }

    /// Cuts off and returns all but the first `count` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::Short`]; nothing is cut then.
    pub fn split_at(&mut self, count: usize) -> Result<Self, Error> {
        let rest =
            self.len.checked_sub(count).ok_or(Error::Short { missing: count.saturating_sub(self.len) })?;
        self.split_last(rest)
    }

    /// Takes bytes off the front into `data`.
    ///
    /// # Errors
    ///
    /// [`Error::Short`]; nothing is taken then.
    pub fn read(&mut self, data: &mut [u8]) -> Result<(), Error> {
        let rest = self.split_at(data.len())?;
        let front = std::mem::replace(self, rest);
        let mut at = 0;
        for piece in &front.pieces {
            at += piece.copy_to(&mut data[at..]);
        }
        Ok(())
    }

    /// Puts `data` over the bytes at the front and takes these off.
    ///
    /// # Errors
    ///
    /// [`Error::Short`]; nothing is written then.
    pub fn write(&mut self, data: &[u8]) -> Result<(), Error> {
        let rest = self.split_at(data.len())?;
        let front = std::mem::replace(self, rest);
        let mut at = 0;
        for piece in &front.pieces {
            let part = &data[at..at + piece.len()];
            piece.copy_from(part);
            at += part.len();
        }
        Ok(())
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
#[derive(Debug)]
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
        let mut parsed =
            Self { head: chain.head_index(), readable: Buffers::default(), writable: Buffers::default() };
        // The iterator simply ends where it cannot go on, with the last descriptor still naming a next one.
        let mut goes_on = true;
        for (count, descriptor) in chain.enumerate() {
            // Descriptors of no bytes make no pieces, and an indirect table has room for 65,535 of them.
            if count == MAX_DESCRIPTORS {
                return Err(Error::Pieces);
            }
            goes_on = descriptor.has_next();
            let (address, len) = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                parsed.writable.push(memory, address, len, Permissions::Write)?;
            } else if parsed.writable.pieces.is_empty() {
                parsed.readable.push(memory, address, len, Permissions::Read)?;
            } else {
                return Err(Error::Order);
            }
        }
        if goes_on { Err(Error::Endless) } else { Ok(parsed) }
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
