//! Moving bytes between a file and pieces of memory.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

/// Most pieces that the kernel takes at once (`IOV_MAX`).
const MOST_PIECES: usize = 1024;

type Call =
    unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off64_t) -> libc::ssize_t;

/// Length of all pieces together, in bytes.
pub(crate) fn total(pieces: &[VolatileSlice<'_>]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).fold(0, u64::saturating_add)
}

/// Fills `into` from `offset` of `file`; `UnexpectedEof` where it ends before.
pub(crate) fn read(file: &File, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
    transfer(file, offset, into, libc::preadv64)?;
    for piece in into {
        piece.bitmap().mark_dirty(0, piece.len());
    }
    Ok(())
}

/// Writes `from` to `offset` of `file`.
pub(crate) fn write(file: &File, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
    transfer(file, offset, from, libc::pwritev64)
}

/// Writes `len` zeroes to `offset` of `file`.
pub(crate) fn write_zeroes(file: &File, mut offset: u64, len: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    const CHUNK: u64 = 64 << 10;
    let zeroes = vec![0; usize::try_from(CHUNK.min(len)).map_err(io::Error::other)?];
    let end = offset.saturating_add(len);
    while offset < end {
        let part = usize::try_from((end - offset).min(CHUNK)).map_err(io::Error::other)?;
        file.write_all_at(&zeroes[..part], offset)?;
        offset += part as u64;
    }
    Ok(())
}

/// The first `len` bytes of `pieces`, and the others.
pub(crate) fn split<'a>(
    pieces: &[VolatileSlice<'a>],
    len: usize,
) -> io::Result<(Vec<VolatileSlice<'a>>, Vec<VolatileSlice<'a>>)> {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    let mut left = len;
    for piece in pieces {
        let part = left.min(piece.len());
        if part > 0 {
            first.push(piece.subslice(0, part).map_err(io::Error::other)?);
        }
        if part < piece.len() {
            rest.push(piece.offset(part).map_err(io::Error::other)?);
        }
        left -= part;
    }
    Ok((first, rest))
}

/// Copies `bytes` to `pieces` where `out`, else `pieces` to `bytes`: as much as fits both. Gives how much that was.
pub(crate) fn copy(pieces: &[VolatileSlice<'_>], bytes: &mut [u8], out: bool) -> usize {
    let mut done = 0;
    for piece in pieces {
        let bytes = &mut bytes[done..];
        done += if out { copy_out(piece, bytes) } else { piece.copy_to(bytes) };
    }
    done
}

fn copy_out(piece: &VolatileSlice<'_>, bytes: &[u8]) -> usize {
    let len = bytes.len().min(piece.len());
    piece.copy_from(&bytes[..len]);
    len
}

fn transfer(file: &File, offset: u64, pieces: &[VolatileSlice<'_>], call: Call) -> io::Result<()> {
    // Pointers stay valid: the guards only keep what they were made from mapped, and that outlives this call.
    let vectors: Vec<_> = pieces
        .iter()
        .map(|piece| libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() })
        .collect();
    // SAFETY: the pieces lie in memory that the caller's slices borrow; that somebody else (a guest) may change it meanwhile
    // is as with memory that a device of hardware reads or writes.
    let moved = unsafe { vectored(file, offset, vectors, call) }?;
    // The file is shorter than it was: nothing is there.
    if moved < total(pieces) { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Fills pieces of memory from `offset` of `file`, and gives how many bytes there were before its end.
///
/// # Safety
///
/// The pieces are memory that may be written to, for as long as the call takes.
pub(crate) unsafe fn read_vectors(file: &File, offset: u64, into: Vec<libc::iovec>) -> io::Result<u64> {
    // SAFETY: that is what the caller promises.
    unsafe { vectored(file, offset, into, libc::preadv64) }
}

/// Writes pieces of memory to `offset` of `file`.
///
/// # Safety
///
/// The pieces are memory that may be read, for as long as the call takes.
pub(crate) unsafe fn write_vectors(file: &File, offset: u64, from: Vec<libc::iovec>) -> io::Result<()> {
    let len: usize = from.iter().map(|piece| piece.iov_len).sum();
    // SAFETY: that is what the caller promises.
    let written = unsafe { vectored(file, offset, from, libc::pwritev64) }?;
    if written < len as u64 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(()) }
}

/// Moves all pieces, or up to the end of the file, and gives how many bytes that were.
///
/// # Safety
///
/// The pieces are memory that `call` may use, for as long as this takes.
unsafe fn vectored(file: &File, offset: u64, mut pieces: Vec<libc::iovec>, call: Call) -> io::Result<u64> {
    pieces.retain(|piece| piece.iov_len > 0);
    let mut rest = &mut pieces[..];
    let mut moved = 0;
    while !rest.is_empty() {
        let count = libc::c_int::try_from(rest.len().min(MOST_PIECES)).map_err(io::Error::other)?;
        let at = offset.checked_add(moved).and_then(|at| libc::off64_t::try_from(at).ok());
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: that is what the caller promises.
        let done = unsafe { call(file.as_raw_fd(), rest.as_ptr(), count, at) };
        let mut done = match usize::try_from(done) {
            Ok(0) => break,
            Ok(done) => done,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            }
        };
        moved += done as u64;
        while let Some(first) = rest.first_mut() {
            if done < first.iov_len {
                first.iov_base = first.iov_base.wrapping_byte_add(done);
                first.iov_len -= done;
                break;
            }
            done -= first.iov_len;
            rest = &mut rest[1..];
        }
    }
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_pieces_than_the_kernel_takes_at_once_are_all_moved() {
        let file = tempfile::tempfile().unwrap();
        let mut data: Vec<u8> = (0..5000_u32).flat_map(u32::to_le_bytes).collect();
        let slice = VolatileSlice::from(data.as_mut_slice());
        let pieces: Vec<_> = (0..5000).map(|i| slice.subslice(i * 4, 4).unwrap()).collect();
        write(&file, 512, &pieces).unwrap();
        let mut back = vec![0; 20_000];
        let slice = VolatileSlice::from(back.as_mut_slice());
        let pieces: Vec<_> = (0..2500).map(|i| slice.subslice(i * 8, 8).unwrap()).collect();
        read(&file, 512, &pieces).unwrap();
        assert_eq!(back, data);
    }

    #[test]
    fn reading_past_the_end_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let mut data = [0; 200];
        let error = read(&file, 0, &[VolatileSlice::from(&mut data[..])]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn pieces_are_split_and_copied_where_they_end() {
        let mut memory = *b"abcdefgh";
        let slice = VolatileSlice::from(&mut memory[..]);
        let pieces = [slice.subslice(0, 3).unwrap(), slice.subslice(3, 5).unwrap()];
        let (first, rest) = split(&pieces, 4).unwrap();
        assert_eq!((total(&first), total(&rest)), (4, 4));
        let mut bytes = [0; 6];
        assert_eq!(copy(&rest, &mut bytes, false), 4);
        assert_eq!(&bytes, b"efgh\0\0");
        assert_eq!(copy(&first, &mut bytes, true), 4);
        assert_eq!(&memory, b"efghefgh");
    }
}
