//! ELF images (System V gABI, chapters 4 and 5) and the Xen note that names a PVH entry point.

use std::fs::File;
use std::io::BufReader;

use object::elf::{EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_LOAD, PT_NOTE};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, ReadCache, ReadRef};

/// `XEN_ELFNOTE_PHYS32_ENTRY` (xen/include/public/elfnote.h).
const PHYS32_ENTRY: u32 = 18;
/// More notes than this are not looked at; a kernel has a dozen.
const MAX_NOTES: usize = 1024;
/// More program headers than this are refused; a kernel has a handful.
const MAX_HEADERS: usize = 128;
/// Addresses from here on are beyond any guest (256 GiB of memory and the hole below 4 GiB).
const ADDRESS_LIMIT: u64 = 1 << 39;

/// A piece of an image and its place in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes in memory.
    pub len: u64,
    /// Where it begins in the image.
    pub offset: u64,
    /// Bytes in the image; the rest is zero.
    pub file_len: u64,
}

impl Segment {
    /// Address after the last.
    pub fn end(&self) -> u64 {
        self.address.saturating_add(self.len)
    }
}

/// What is to be known of an image.
#[derive(Debug, PartialEq, Eq)]
pub struct Elf {
    /// Pieces to load, ascending, not overlapping.
    pub segments: Vec<Segment>,
    /// The header's entry point.
    pub entry: u64,
    /// The note's entry point.
    pub pvh_entry: Option<u64>,
}

impl Elf {
    /// Reads the headers of `file`, `len` bytes long. The error says what is wrong.
    pub fn parse_file(file: &File, len: u64) -> Result<Self, String> {
        let cache = ReadCache::new(BufReader::new(file));
        parse(&cache, len)
    }

    /// Reads the headers of an image in memory. The error says what is wrong.
    pub fn parse_bytes(bytes: &[u8]) -> Result<Self, String> {
        parse(bytes, bytes.len() as u64)
    }
}

fn parse<'data, R: ReadRef<'data>>(data: R, len: u64) -> Result<Elf, String> {
    let damaged = |error: object::read::Error| format!("it is truncated or damaged: {error}");
    let header = FileHeader64::<LittleEndian>::parse(data)
        .map_err(|error| format!("it is not a little-endian 64-bit ELF file: {error}"))?;
    let endian = header.endian().map_err(damaged)?;
    let machine = header.e_machine(endian);
    if machine != EM_X86_64 {
        return Err(format!("it is for another machine (ELF machine {}), not for x86-64", machine.0));
    }
    let kind = header.e_type(endian);
    if kind != ET_EXEC && kind != ET_DYN {
        return Err("it is not an executable".to_owned());
    }
    let headers = header.program_headers(endian, data).map_err(damaged)?;
    if headers.len() > MAX_HEADERS {
        return Err(format!(
            "it has {} program headers; a kernel has no more than {MAX_HEADERS}",
            headers.len()
        ));
    }
    let mut segments = Vec::new();
    let mut pvh_entry = None;
    for program in headers {
        if program.p_type(endian) == PT_LOAD && program.p_memsz(endian) > 0 {
            segments.push(segment(program, endian, len)?);
        } else if program.p_type(endian) == PT_NOTE && pvh_entry.is_none() {
            pvh_entry = phys32_entry(program, endian, data).map_err(damaged)?;
        }
    }
    segments.sort_by_key(|segment| segment.address);
    if segments.is_empty() {
        return Err("it has nothing to load".to_owned());
    }
    if let Some(pair) = segments.windows(2).find(|pair| pair[0].end() > pair[1].address) {
        return Err(format!("its segments at {:#x} and {:#x} overlap", pair[0].address, pair[1].address));
    }
    let entry = header.e_entry(endian);
    let start = pvh_entry.unwrap_or(entry);
    if !segments.iter().any(|segment| segment.address <= start && start < segment.end()) {
        return Err(format!(
            "its entry point {start:#x} lies in none of its segments (physical addresses count)"
        ));
    }
    Ok(Elf { segments, entry, pvh_entry })
}

fn segment(
    program: &impl ProgramHeader<Endian = LittleEndian, Word = u64>,
    endian: LittleEndian,
    len: u64,
) -> Result<Segment, String> {
    let segment = Segment {
        address: program.p_paddr(endian),
        len: program.p_memsz(endian),
        offset: program.p_offset(endian),
        file_len: program.p_filesz(endian),
    };
    let at = segment.address;
    if segment.file_len > segment.len {
        return Err(format!("its segment at {at:#x} is larger in the file than in memory"));
    }
    if segment.offset.checked_add(segment.file_len).is_none_or(|end| end > len) {
        let needed = segment.offset.saturating_add(segment.file_len);
        return Err(format!(
            "it is truncated: its segment at {at:#x} needs {needed} bytes of file, there are {len}"
        ));
    }
    if at.checked_add(segment.len).is_none_or(|end| end > ADDRESS_LIMIT) {
        return Err(format!(
            "its segment at {at:#x} of {:#x} bytes lies beyond any guest's memory",
            segment.len
        ));
    }
    Ok(segment)
}

fn phys32_entry<'data, R: ReadRef<'data>>(
    program: &impl ProgramHeader<Elf = FileHeader64<LittleEndian>, Endian = LittleEndian>,
    endian: LittleEndian,
    data: R,
) -> object::read::Result<Option<u64>> {
    let Some(mut notes) = program.notes(endian, data)? else { return Ok(None) };
    for _ in 0..MAX_NOTES {
        let Some(note) = notes.next()? else { break };
        if note.name() != b"Xen" || note.n_type(endian).0 != PHYS32_ENTRY {
            continue;
        }
        // The value is as wide as the tool that made it liked: 4 bytes, or 8.
        if let Ok(bytes) = <[u8; 8]>::try_from(note.desc()) {
            return Ok(Some(u64::from_le_bytes(bytes)).filter(|entry| *entry <= u64::from(u32::MAX)));
        }
        if let Ok(bytes) = <[u8; 4]>::try_from(note.desc()) {
            return Ok(Some(u32::from_le_bytes(bytes).into()));
        }
    }
    Ok(None)
}
