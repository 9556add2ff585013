//! What the card is connected to.

use std::fmt;
use std::io;
use std::iter;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileSlice};

use super::header::HEADER_LEN;
use crate::GuestRam;
use crate::virtio::chain::Error;

/// Most pieces in a list: with one for the header and one for what does not fit, as many as the kernel takes in one
/// vectored read or write (`IOV_MAX`).
pub const MAX_PIECES: usize = 1024 - 2;

/// What one side is ready to finish for the other, so that frames need not be complete when they are handed over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Fill in the checksum of a TCP or UDP packet.
    pub csum: bool,
    /// Cut TCP over IPv4 into segments.
    pub tso4: bool,
    /// Cut TCP over IPv6 into segments.
    pub tso6: bool,
    /// The same for TCP with explicit congestion notification.
    pub ecn: bool,
    /// Cut UDP into IP fragments.
    pub ufo: bool,
    /// Cut UDP into datagrams, over IPv4 and IPv6.
    pub uso: bool,
}

impl Offloads {
    /// Leaves out what does not work without something else that is missing (virtio 1.2, section 5.1.3.1).
    #[must_use]
    pub fn consistent(self) -> Self {
        let Self { csum, tso4, tso6, ecn, ufo, uso } = self;
        Self {
            csum,
            tso4: tso4 && csum,
            tso6: tso6 && csum,
            ecn: ecn && csum && (tso4 || tso6),
            ufo: ufo && csum,
            uso: uso && csum,
        }
    }

    /// Whether frames may be longer than the MTU allows.
    #[must_use]
    pub fn large_frames(self) -> bool {
        self.tso4 || self.tso6 || self.ufo || self.uso
    }
}

/// The other end of the card's cable. The device's thread alone calls it, one call at a time.
pub trait Backend: Send + fmt::Debug {
    /// What it is called, for messages.
    fn name(&self) -> &str;

    /// Largest packet in bytes that goes through it whole, without the Ethernet header; `None` if it does not matter.
    fn mtu(&self) -> Option<u16>;

    /// What it can finish for its sender, and makes use of if its receiver can.
    fn offloads(&self) -> Offloads;

    /// From now on, hand over only frames that a receiver able to do `accepted` can take. Called with each driver that
    /// starts, before frames are asked for.
    ///
    /// # Errors
    ///
    /// That of the system. The device goes on, and drops what its driver has not agreed to.
    fn set_offloads(&mut self, accepted: Offloads) -> io::Result<()>;

    /// A descriptor to be watched edge-triggered (epoll(7), `EPOLLET`), the same one for all the life of the back end. It
    /// becomes readable with each frame that arrives after [`receive`](Self::receive) has found none; and writable when
    /// [`send`](Self::send) is worth another try.
    fn fd(&self) -> RawFd;

    /// Takes one frame: its header as section 5.1.6 has it (`num_buffers` does not matter), its contents into `into`, and
    /// what does not fit there into `overflow`. What does not fit there either is lost. Returns the length of the
    /// contents, of which no more than the room counts.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] if there is none; others if none can be had.
    fn receive(
        &mut self,
        header: &mut [u8; HEADER_LEN],
        into: Pieces<'_>,
        overflow: &mut [u8],
    ) -> io::Result<usize>;

    /// Sends one frame. Its header asks only for what [`offloads`](Self::offloads) promises.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::WouldBlock`] if there is no room for it now, so that it may be sent again later; others if it
    /// is lost.
    fn send(&mut self, header: &[u8; HEADER_LEN], frame: Pieces<'_>) -> io::Result<()>;
}

/// Bytes of guest memory in pieces, each of which the guest may change at any time.
#[derive(Clone, Copy)]
pub struct Pieces<'a> {
    /// What is left of a piece that was cut.
    first: Option<libc::iovec>,
    rest: &'a [libc::iovec],
}

impl fmt::Debug for Pieces<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iovecs().map(|piece| piece.iov_len)).finish()
    }
}

impl<'a> Pieces<'a> {
    /// The pieces as the kernel takes them, at most [`MAX_PIECES`].
    pub fn iovecs(self) -> impl Iterator<Item = libc::iovec> + 'a {
        self.first.into_iter().chain(self.rest.iter().copied())
    }

    /// Number of bytes.
    #[must_use]
    pub fn len(self) -> usize {
        self.iovecs().map(|piece| piece.iov_len).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// All but the first `count` bytes; none if there are fewer.
    #[must_use]
    pub fn skip(self, mut count: usize) -> Self {
        let mut left = self;
        while count > 0 {
            let (piece, rest) = match (left.first, left.rest) {
                (Some(piece), rest) => (piece, rest),
                (None, [piece, rest @ ..]) => (*piece, rest),
                (None, []) => break,
            };
            let cut = count.min(piece.iov_len);
            count -= cut;
            let remainder =
                libc::iovec { iov_base: piece.iov_base.wrapping_byte_add(cut), iov_len: piece.iov_len - cut };
            left = Self { first: Some(remainder).filter(|piece| piece.iov_len > 0), rest };
        }
        left
    }

    /// The pieces in a form that can be copied from and to.
    fn slices(self) -> impl Iterator<Item = VolatileSlice<'a>> {
        // SAFETY: every piece that is not empty was taken from guest memory by `PieceList::push`, or is the end of such a
        // piece; the list, which `self` borrows, keeps that memory mapped.
        self.iovecs().map(|piece| unsafe { VolatileSlice::new(piece.iov_base.cast(), piece.iov_len) })
    }

    /// Copies from the front into `data` and returns how many bytes there were.
    pub fn copy_to(self, data: &mut [u8]) -> usize {
        let mut at = 0;
        for slice in self.slices() {
            if at == data.len() {
                break;
            }
            at += slice.copy_to(&mut data[at..]);
        }
        at
    }

    /// Copies `data` to the front and returns how many bytes there was room for.
    pub fn copy_from(self, data: &[u8]) -> usize {
        let mut at = 0;
        for slice in self.slices() {
            if at == data.len() {
                break;
            }
            let part = &data[at..data.len().min(at + slice.len())];
            slice.copy_from(part);
            at += part.len();
        }
        at
    }
}

/// A list of pieces that is used again and again, so that frames cost no allocation.
pub struct PieceList {
    pieces: Vec<libc::iovec>,
    /// What the pieces point into; held so that they are good as long as the list is.
    memory: Arc<GuestRam>,
}

// SAFETY: the pointers are to guest memory, which belongs to no thread and lives as long as `memory`.
unsafe impl Send for PieceList {}

impl fmt::Debug for PieceList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PieceList").field(&self.pieces(0..self.pieces.len())).finish()
    }
}

impl PieceList {
    /// An empty list of pieces in `memory`.
    pub fn new(memory: Arc<GuestRam>) -> Self {
        Self { pieces: Vec::with_capacity(MAX_PIECES), memory }
    }

    /// Number of pieces.
    pub fn count(&self) -> usize {
        self.pieces.len()
    }

    /// Appends the `len` bytes at `address` and returns how many that is.
    ///
    /// # Errors
    ///
    /// They are not all memory, or the list is full. Some may have been appended.
    pub fn push(&mut self, address: GuestAddress, len: u32, access: Permissions) -> Result<usize, Error> {
        let outside = || Error::Memory { address: address.0, len };
        let bytes = usize::try_from(len).map_err(|_| outside())?;
        let Self { pieces, memory } = self;
        let mut append = |iov_base, iov_len| {
            if pieces.len() == MAX_PIECES {
                return Err(Error::Pieces);
            }
            pieces.push(libc::iovec { iov_base, iov_len });
            Ok(())
        };
        if bytes == 0 {
            // Counts like any other, so that a list of nothing does not take for ever to be gone through.
            append(ptr::dangling_mut(), 0)?;
        }
        for slice in memory.get_slices(address, bytes, access).map_err(|_| outside())? {
            let slice = slice.map_err(|_| outside())?;
            append(slice.ptr_guard_mut().as_ptr().cast(), slice.len())?;
        }
        Ok(bytes)
    }

    /// Forgets all pieces but the first `count`.
    pub fn truncate(&mut self, count: usize) {
        self.pieces.truncate(count);
    }

    /// Forgets the first `count` pieces.
    pub fn drop_front(&mut self, count: usize) {
        self.pieces.drain(..count.min(self.pieces.len()));
    }

    /// The pieces of a range, as far as there are any.
    pub fn pieces(&self, range: std::ops::Range<usize>) -> Pieces<'_> {
        Pieces { first: None, rest: self.pieces.get(range).unwrap_or_default() }
    }
}

/// The iovecs of a call: `header`, then `pieces`, then `last`.
pub fn gather(
    list: &mut Vec<libc::iovec>,
    header: libc::iovec,
    pieces: Pieces<'_>,
    last: Option<libc::iovec>,
) {
    list.clear();
    list.extend(iter::once(header).chain(pieces.iovecs()).chain(last));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::Bytes;

    fn memory() -> Arc<GuestRam> {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        let memory = GuestRam::from_ranges(&ranges).unwrap();
        let bytes: Vec<u8> = (0..0x2000_u32).map(|i| i.to_le_bytes()[0] ^ i.to_le_bytes()[1]).collect();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        Arc::new(memory)
    }

    #[test]
    fn bytes_outside_of_memory_are_refused() {
        let mut list = PieceList::new(memory());
        let pushed = list.push(GuestAddress(0x1fff), 2, Permissions::Read);
        assert_eq!(pushed, Err(Error::Memory { address: 0x1fff, len: 2 }));
        assert!(list.push(GuestAddress(u64::MAX), u32::MAX, Permissions::Read).is_err());
    }

    #[test]
    fn piece_after_the_last_that_the_kernel_takes_is_refused() {
        let mut list = PieceList::new(memory());
        for index in 0..MAX_PIECES {
            let len = u32::from(index % 2 == 0);
            list.push(GuestAddress(0), len, Permissions::Read).unwrap();
        }
        for len in [0, 1] {
            assert_eq!(list.push(GuestAddress(0), len, Permissions::Read), Err(Error::Pieces));
        }
    }

    #[test]
    fn offload_without_what_it_needs_is_left_out() {
        let all = Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true };
        assert_eq!(all.consistent(), all);
        assert_eq!(Offloads { csum: false, ..all }.consistent(), Offloads::default());
        let no_tso = Offloads { tso4: false, tso6: false, ..all };
        assert_eq!(no_tso.consistent(), Offloads { ecn: false, ..no_tso });
    }

    proptest! {
        #[test]
        fn any_part_of_any_pieces_is_read_and_written_in_order(
            parts in prop::collection::vec((0_u64..0x1f00, 0_u32..0x100), 0..20),
            skip in 0_usize..0x1000,
            len in 0_usize..0x1000,
        ) {
            let memory = memory();
            let mut list = PieceList::new(memory.clone());
            let mut whole = Vec::new();
            for (address, len) in parts {
                list.push(GuestAddress(address), len, Permissions::Write).unwrap();
                let mut part = vec![0; usize::try_from(len).unwrap()];
                memory.read_slice(&mut part, GuestAddress(address)).unwrap();
                whole.extend(part);
            }
            let pieces = list.pieces(0..list.count());
            prop_assert_eq!(pieces.len(), whole.len());
            let wanted = whole.get(skip..).unwrap_or_default();
            let mut seen = vec![0; len];
            let copied = pieces.skip(skip).copy_to(&mut seen);
            prop_assert_eq!(&seen[..copied], &wanted[..len.min(wanted.len())]);
            // The same bytes again, so that pieces that lie upon each other do no harm.
            prop_assert_eq!(pieces.skip(skip).copy_from(wanted), wanted.len());
            let mut again = vec![0; whole.len()];
            pieces.copy_to(&mut again);
            prop_assert_eq!(again, whole);
        }
    }
}
