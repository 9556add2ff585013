//! What a VMDK descriptor says. It is read here, since the files that it names are those of somebody else's choice, and the
//! library then gets another one in which only they are named.

use std::fmt::Write;

use super::qcow2::Bad;
use crate::image::{MAX_SIZE, SECTOR};

/// Longest descriptor, in bytes.
pub(super) const MAX_LEN: u64 = 1 << 20;
/// Most extents: 2 TiB in files of 2 GiB.
const MAX_EXTENTS: usize = 1024;

/// A descriptor.
#[derive(Debug, Default)]
pub(super) struct Descriptor {
    /// What it says to be, such as `monolithicFlat`.
    pub(super) kind: String,
    pub(super) extents: Vec<Extent>,
}

/// A piece of the disk.
#[derive(Debug)]
pub(super) struct Extent {
    /// Its length in bytes.
    pub(super) len: u64,
    /// The file that it is in, and the offset there in bytes; zeroes where there is none.
    pub(super) file: Option<(String, u64)>,
}

fn corrupt<T>(what: impl Into<String>) -> Result<T, Bad> {
    Err(Bad::Corrupt(what.into()))
}

fn unsupported<T>(what: impl Into<String>) -> Result<T, Bad> {
    Err(Bad::Unsupported(what.into()))
}

impl Descriptor {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, Bad> {
        if bytes.starts_with(b"KDMV") || bytes.starts_with(b"COWD") {
            return unsupported(
                "VMDK extents that are sparse, or images that are one such extent (only flat ones are read; \"qemu-img \
                 convert\" makes another format of it)",
            );
        }
        if !bytes.starts_with(b"# Disk DescriptorFile") {
            return corrupt("it does not begin as a descriptor does");
        }
        let mut found = Self::default();
        let mut size = 0_u64;
        for (line, number) in bytes.split(|byte| *byte == b'\n').zip(1..) {
            // Names of files may be in an encoding of its own; in comments and values that are not used it does not matter.
            let line = String::from_utf8_lossy(line);
            let line = line.trim().trim_end_matches('\0');
            let access = line.split_whitespace().next().unwrap_or_default();
            if matches!(access, "RW" | "RDONLY" | "NOACCESS") {
                let extent = Extent::parse(line, number)?;
                size = match size.checked_add(extent.len).filter(|size| *size <= MAX_SIZE) {
                    Some(size) => size,
                    None => return corrupt(format!("its extents are more than {MAX_SIZE} bytes (1 PiB)")),
                };
                if found.extents.len() == MAX_EXTENTS {
                    return corrupt(format!("it has more than {MAX_EXTENTS} extents"));
                }
                found.extents.push(extent);
            } else if let Some((key, value)) = line.split_once('=').filter(|_| !line.starts_with('#')) {
                found.take(key.trim(), value.trim().trim_matches('"'))?;
            }
        }
        if found.extents.is_empty() {
            return corrupt("it has no extents");
        }
        Ok(found)
    }

    fn take(&mut self, key: &str, value: &str) -> Result<(), Bad> {
        match key {
            "version" if !matches!(value, "1" | "2" | "3") => {
                unsupported(format!("version {} of VMDK (1 to 3 there are)", value.escape_debug()))
            }
            "createType" => {
                self.kind = value.escape_debug().to_string();
                Ok(())
            }
            "parentFileNameHint" => unsupported("VMDK images that lie on others"),
            "parentCID" if !value.eq_ignore_ascii_case("ffffffff") => {
                unsupported("VMDK images that lie on others")
            }
            _ => Ok(()),
        }
    }

    /// One for the library, in which the files are named by their number.
    pub(super) fn text(&self) -> String {
        let mut text = "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\n".to_owned();
        for (extent, index) in self.extents.iter().zip(0..) {
            let sectors = extent.len / SECTOR;
            // Writing to a string does not fail.
            let _ = match &extent.file {
                Some((_, offset)) => writeln!(text, "RW {sectors} FLAT \"{index}\" {}", offset / SECTOR),
                None => writeln!(text, "RW {sectors} ZERO"),
            };
        }
        text
    }
}

impl Extent {
    /// Such as `RW 4192256 FLAT "disk-f001.vmdk" 0`.
    fn parse(line: &str, number: usize) -> Result<Self, Bad> {
        let wrong = |what: &str| corrupt(format!("its line {number} is no extent: {what}"));
        let mut words = line.split_whitespace();
        if words.next() == Some("NOACCESS") {
            return unsupported("VMDK extents to which there is no access");
        }
        let len = words.next().and_then(|word| word.parse::<u64>().ok());
        let Some(len) = len.and_then(|sectors| sectors.checked_mul(SECTOR)).filter(|len| *len > 0) else {
            return wrong("its length is no number of sectors");
        };
        match words.next() {
            Some("ZERO") => return Ok(Self { len, file: None }),
            Some("FLAT" | "VMFS") => {}
            Some(kind) => {
                return unsupported(format!(
                    "VMDK extents of type {} (only flat ones are read; \"qemu-img convert\" makes another format of it)",
                    kind.escape_debug()
                ));
            }
            None => return wrong("it has no type"),
        }
        let mut parts = line.splitn(3, '"');
        let (Some(_), Some(name), Some(rest)) = (parts.next(), parts.next(), parts.next()) else {
            return wrong("it names no file");
        };
        let offset = match rest.split_whitespace().next() {
            None => Some(0),
            Some(sectors) => sectors.parse::<u64>().ok().and_then(|sectors| sectors.checked_mul(SECTOR)),
        };
        match offset.filter(|offset| offset.checked_add(len).is_some()) {
            Some(offset) => Ok(Self { len, file: Some((name.to_owned(), offset)) }),
            None => wrong("its offset is no number of sectors"),
        }
    }
}
