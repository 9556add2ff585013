//! What the loader says of the machine, by whichever entry it came: PVH start information (Xen,
//! `xen/include/public/arch-x86/hvm/start_info.h`) or Linux's `boot_params` (Linux,
//! `Documentation/arch/x86/zero-page.rst`).

use alloc::string::String;
use alloc::vec::Vec;

use crate::phys;

/// The entry by which the loader came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit, named by the ELF note.
    Pvh,
    /// 64-bit, the ELF header's.
    Linux64,
}

impl Entry {
    /// As reports name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pvh => "pvh",
            Self::Linux64 => "linux64",
        }
    }
}

/// A range of physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Type in the sense of E820: 1 is RAM.
    pub kind: u32,
}

/// `Range::kind` of RAM.
pub const RAM: u32 = 1;
/// Longest command line that is read, in bytes.
const CMDLINE_MAX: u64 = 65536;

/// What the loader has left in memory, where it lies.
#[derive(Debug, Clone, Copy)]
pub struct Loader {
    entry: Entry,
    cmdline: u64,
    rsdp: u64,
    initrd: (u64, u64),
    map: u64,
    map_len: u64,
    map_stride: u64,
}

impl Loader {
    /// `entry` is the number that ring0.s gives, `info` the structure that the loader passed.
    pub fn new(entry: u32, info: u64) -> Self {
        let at = |offset| phys::read::<u64>(info + offset);
        let at32 = |offset| u64::from(phys::read::<u32>(info + offset));
        if entry == 1 {
            let version = at32(4);
            let modules = at32(12);
            let module = |offset| if modules > 0 { phys::read(at(16) + offset) } else { 0 };
            Self {
                entry: Entry::Pvh,
                cmdline: at(24),
                rsdp: at(32),
                initrd: (module(0), module(8)),
                map: if version > 0 { at(40) } else { 0 },
                map_len: if version > 0 { at32(48) } else { 0 },
                map_stride: 24,
            }
        } else {
            Self {
                entry: Entry::Linux64,
                cmdline: at32(0xc8) << 32 | at32(0x228),
                rsdp: at(0x70),
                initrd: (at32(0xc0) << 32 | at32(0x218), at32(0xc4) << 32 | at32(0x21c)),
                map: info + 0x2d0,
                map_len: phys::read::<u8>(info + 0x1e8).into(),
                map_stride: 20,
            }
        }
    }

    /// The memory map.
    pub fn ranges(self) -> impl Iterator<Item = Range> {
        (0..self.map_len).map(move |index| {
            let entry = self.map + index * self.map_stride;
            let start = phys::read(entry);
            let len = phys::read::<u64>(entry + 8);
            Range { start, end: start.saturating_add(len), kind: phys::read(entry + 16) }
        })
    }

    /// Address and length of the initial RAM disk; length 0 if there is none.
    pub fn initrd(self) -> (u64, u64) {
        self.initrd
    }
}

/// A copy of what the loader said.
#[derive(Debug)]
pub struct BootInfo {
    /// By which entry the loader came.
    pub entry: Entry,
    /// The command line.
    pub cmdline: String,
    /// The ACPI root pointer, if the loader names it.
    pub rsdp: Option<u64>,
    /// Address and length of the initial RAM disk.
    pub initrd: Option<(u64, u64)>,
    /// The memory map.
    pub map: Vec<Range>,
}

impl BootInfo {
    /// Copies what the loader left.
    pub fn new(loader: Loader) -> Self {
        Self {
            entry: loader.entry,
            cmdline: if loader.cmdline == 0 { String::new() } else { read_text(loader.cmdline) },
            rsdp: (loader.rsdp != 0).then_some(loader.rsdp),
            initrd: (loader.initrd.1 != 0).then_some(loader.initrd),
            map: loader.ranges().collect(),
        }
    }
}

/// The text at `address` up to its terminator.
fn read_text(address: u64) -> String {
    let is_end = |offset: &u64| phys::read::<u8>(address + offset) == 0;
    let len = (0..CMDLINE_MAX).find(is_end).unwrap_or(CMDLINE_MAX);
    String::from_utf8_lossy(phys::bytes(address, len)).into_owned()
}
