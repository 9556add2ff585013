//! The ELF kernel within a bzImage, as `scripts/extract-vmlinux` of Linux gets it. Written without the monitor's own
//! code, which is what is tested with it.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use crate::{Error, Result};

/// Where the setup header has the number of sectors before the protected-mode code, and offset and length of the
/// payload in that code (Linux, `Documentation/arch/x86/boot.rst`).
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// Largest block of an LZ4 legacy frame.
const LZ4_BLOCK: usize = 8 << 20;

/// Unpacks the kernel `bzimage`.
///
/// # Errors
///
/// [`Error::File`], or [`Error::Format`] where the file is no bzImage or packed in an unknown way.
pub fn vmlinux(bzimage: &Path) -> Result<Vec<u8>> {
    let image = fs::read(bzimage).map_err(Error::file("read", bzimage))?;
    let format = |reason: String| Error::Format { path: bzimage.to_owned(), reason };
    let payload = payload(&image).ok_or_else(|| format("not a bzImage with a payload".to_owned()))?;
    let kernel = unpack(payload).map_err(|error| format(error.to_string()))?;
    if !kernel.starts_with(b"\x7fELF") {
        return Err(format("the payload is no ELF file".to_owned()));
    }
    Ok(kernel)
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let start = (usize::from(*image.get(SETUP_SECTORS)?) + 1) * 512 + word(PAYLOAD_OFFSET)?;
    image.get(start..start.checked_add(word(PAYLOAD_LENGTH)?)?)
}

fn unpack(packed: &[u8]) -> io::Result<Vec<u8>> {
    let mut kernel = Vec::new();
    match packed {
        [0x1f, 0x8b, ..] => flate2::read::GzDecoder::new(packed).read_to_end(&mut kernel)?,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            lzma_rust2::XzReader::new(packed, false).read_to_end(&mut kernel)?
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ruzstd::decoding::StreamingDecoder::new(packed)
            .map_err(io::Error::other)?
            .read_to_end(&mut kernel)?,
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => lz4(blocks, &mut kernel)?,
        _ => return Err(io::Error::other("the payload is packed in an unknown way")),
    };
    Ok(kernel)
}

/// Blocks, each behind its length; the last word is the unpacked size.
fn lz4(mut blocks: &[u8], kernel: &mut Vec<u8>) -> io::Result<usize> {
    while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        if rest.is_empty() {
            break;
        }
        let block = rest.get(..length).ok_or(io::ErrorKind::UnexpectedEof)?;
        kernel.extend(lz4_flex::block::decompress(block, LZ4_BLOCK).map_err(io::Error::other)?);
        blocks = &rest[length..];
    }
    Ok(kernel.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn bzimage(payload: &[u8]) -> tempfile::NamedTempFile {
        let mut image = vec![0; 2048];
        image[SETUP_SECTORS] = 1;
        image[PAYLOAD_OFFSET..][..4].copy_from_slice(&1024_u32.to_le_bytes());
        image[PAYLOAD_LENGTH..][..4].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend(payload);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&image).unwrap();
        file
    }

    #[test]
    fn gzip_payload_is_unpacked() {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(b"\x7fELF and so on").unwrap();
        let mut payload = packed.finish().unwrap();
        payload.extend(13_u32.to_le_bytes());
        assert_eq!(vmlinux(bzimage(&payload).path()).unwrap(), b"\x7fELF and so on");
    }

    #[test]
    fn lz4_payload_is_unpacked() {
        let block = lz4_flex::block::compress(b"\x7fELF and so on");
        let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
        payload.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        payload.extend(&block);
        payload.extend(13_u32.to_le_bytes());
        assert_eq!(vmlinux(bzimage(&payload).path()).unwrap(), b"\x7fELF and so on");
    }

    #[test]
    fn payload_that_is_no_elf_or_unknown_is_refused() {
        let error = vmlinux(bzimage(b"what is this").path()).unwrap_err().to_string();
        assert!(error.contains("unknown way"), "{error}");
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"short").unwrap();
        let error = vmlinux(file.path()).unwrap_err().to_string();
        assert!(error.contains("not a bzImage"), "{error}");
    }
}
