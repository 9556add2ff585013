//! Unpacking the kernel within a bzImage.
//!
//! The host does this faster than the guest would, and the packed image never takes up guest memory. The build of
//! Linux (`scripts/Makefile.lib`, `size_append`) puts the unpacked size behind every payload but gzip's, which
//! ends with it by itself (RFC 1952); so it is known beforehand how much there may be.

use std::io::{self, Read};

/// More than this is not a kernel.
const UNPACKED_MAX: usize = 1 << 30;
/// Memory that the xz decoder may take, in KiB: its dictionary, which is at most as large as the kernel.
const XZ_MEMORY_KIB: u32 = 256 << 10;
/// Largest block of an LZ4 legacy frame (lz4 frame format, "Legacy frame").
const LZ4_BLOCK: usize = 8 << 20;

const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const UNSUPPORTED: &[(&[u8], &str)] =
    &[(b"BZh", "bzip2"), (&[0x5d, 0, 0], "lzma"), (&[0x89, b'L', b'Z', b'O'], "lzo")];

/// Unpacks `packed`. The error says why not.
pub fn unpack(packed: &[u8]) -> Result<Vec<u8>, String> {
    if packed.starts_with(b"\x7fELF") {
        return Ok(packed.to_vec());
    }
    let Some((body, size)) = packed.split_last_chunk::<4>() else {
        return Err("its payload is truncated".to_owned());
    };
    let size = usize::try_from(u32::from_le_bytes(*size)).unwrap_or(usize::MAX);
    if size > UNPACKED_MAX {
        return Err(format!("its payload claims {size} bytes, more than any kernel has"));
    }
    let (name, unpacked) = if packed.starts_with(GZIP) {
        ("gzip", read(flate2::bufread::GzDecoder::new(packed), size))
    } else if packed.starts_with(XZ) {
        ("xz", read(lzma_rust2::XzReader::new_mem_limit(body, false, XZ_MEMORY_KIB), size))
    } else if let Some(blocks) = body.strip_prefix(LZ4_LEGACY) {
        ("lz4", lz4_legacy(blocks, size))
    } else if packed.starts_with(ZSTD) {
        let decoder = ruzstd::decoding::StreamingDecoder::new(body).map_err(io::Error::other);
        ("zstd", decoder.and_then(|decoder| read(decoder, size)))
    } else {
        let name = UNSUPPORTED.iter().find(|(magic, _)| packed.starts_with(magic)).map(|(_, name)| *name);
        return Err(format!(
            "its payload is packed with {}; gzip, xz, lz4 and zstd can be unpacked",
            name.unwrap_or("something unknown")
        ));
    };
    let unpacked = unpacked.map_err(|error| format!("its {name} payload is damaged: {error}"))?;
    if unpacked.len() != size {
        return Err(format!("its {name} payload unpacks to {} bytes and claims {size}", unpacked.len()));
    }
    Ok(unpacked)
}

/// Reads all there is, but not more than `size` bytes and one, which tells that there is too much. The claim is
/// not believed before the bytes are there: memory grows with them.
fn read(from: impl Read, size: usize) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    from.take(size as u64 + 1).read_to_end(&mut unpacked)?;
    Ok(unpacked)
}

fn lz4_legacy(mut rest: &[u8], size: usize) -> io::Result<Vec<u8>> {
    let mut unpacked = Vec::new();
    while let Some((len, tail)) = rest.split_first_chunk::<4>() {
        let len = usize::try_from(u32::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let block = tail.get(..len).ok_or(io::ErrorKind::UnexpectedEof)?;
        let start = unpacked.len();
        // One byte more than is wanted tells that there is too much.
        let room = LZ4_BLOCK.min(size.saturating_sub(start).saturating_add(1));
        unpacked.resize(start + room, 0);
        let got =
            lz4_flex::block::decompress_into(block, &mut unpacked[start..]).map_err(io::Error::other)?;
        unpacked.truncate(start + got);
        rest = &tail[len..];
        if unpacked.len() > size {
            break;
        }
    }
    Ok(unpacked)
}
