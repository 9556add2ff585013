//! bzImages (Linux, `Documentation/arch/x86/boot.rst`).

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::elf::Segment;

/// Bytes from the start of the file that hold the setup header.
pub const HEADER_END: u64 = 0x1f1 + size_of::<setup_header>() as u64;
/// Offset of the 64-bit entry in the protected-mode part.
pub const ENTRY_64: u64 = 0x200;

const HEADER_START: usize = 0x1f1;
const MAGIC: [u8; 4] = *b"HdrS";
const MAGIC_AT: usize = 0x202;
/// First protocol with a payload that can be found (2.08).
const PROTOCOL_PAYLOAD: u16 = 0x208;
/// First protocol with a 64-bit entry that says so (2.12).
const PROTOCOL_XLOADFLAGS: u16 = 0x20c;
/// `XLF_KERNEL_64`.
const KERNEL_64: u16 = 1;
/// `LOADED_HIGH`.
const LOADED_HIGH: u8 = 1;
/// A payload larger than this is not a kernel.
const PAYLOAD_MAX: u64 = 256 << 20;

/// A bzImage's setup header.
#[derive(Debug)]
pub struct Bzimage {
    pub header: setup_header,
}

impl Bzimage {
    /// Looks at the start of a file; `None` if it is no bzImage, an error if it is one that cannot be used.
    pub fn recognise(start: &[u8]) -> Option<Result<Self, String>> {
        if start.get(MAGIC_AT..MAGIC_AT + MAGIC.len())? != MAGIC {
            return None;
        }
        let Some(bytes) = start.get(HEADER_START..HEADER_START + size_of::<setup_header>()) else {
            return Some(Err("it is truncated in its header".to_owned()));
        };
        let mut header = setup_header::default();
        header.as_mut_slice().copy_from_slice(bytes);
        if header.version < PROTOCOL_PAYLOAD || header.loadflags & LOADED_HIGH == 0 {
            let version = header.version;
            return Some(Err(format!(
                "it speaks boot protocol {}.{:02}; a bzImage of protocol 2.08 or later is needed",
                version >> 8,
                version & 0xff
            )));
        }
        Some(Ok(Self { header }))
    }

    /// Where the protected-mode part begins in the file.
    fn protected_mode(&self) -> u64 {
        let sectors = match self.header.setup_sects {
            0 => 4,
            sectors => u64::from(sectors),
        };
        (sectors + 1) * 512
    }

    /// Offset and length of the packed kernel in a file of `len` bytes.
    pub fn payload(&self, len: u64) -> Result<(u64, u64), String> {
        let (offset, size) = (self.header.payload_offset, self.header.payload_length);
        let start = self.protected_mode() + u64::from(offset);
        let size = u64::from(size);
        if size == 0 || size > PAYLOAD_MAX || start + size > len {
            return Err(format!(
                "its payload ({size} bytes at {start:#x}) does not lie within its {len} bytes"
            ));
        }
        Ok((start, size))
    }

    /// The piece to load to enter the image's own 64-bit code, which unpacks the kernel itself.
    pub fn own_entry(&self, len: u64) -> Result<Segment, String> {
        let header = &self.header;
        let (version, xloadflags, init_size) = (header.version, header.xloadflags, header.init_size);
        if version < PROTOCOL_XLOADFLAGS || xloadflags & KERNEL_64 == 0 {
            return Err("it has no 64-bit entry of its own".to_owned());
        }
        let offset = self.protected_mode();
        let file_len = len.checked_sub(offset).filter(|len| *len > ENTRY_64);
        let file_len = file_len.ok_or_else(|| format!("it is truncated: {len} bytes hold no code"))?;
        let address = header.pref_address;
        if address > u64::from(u32::MAX) {
            return Err(format!("it wants to be loaded at {address:#x}, above 4 GiB"));
        }
        Ok(Segment { address, len: u64::from(init_size).max(file_len), offset, file_len })
    }
}
