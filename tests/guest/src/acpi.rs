//! The firmware's tables (ACPI 6.5, chapter 5).

use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::phys;

const SEARCHED: core::ops::Range<u64> = 0xe_0000..0x10_0000;
const ROOT_SIGNATURE: [u8; 8] = *b"RSD PTR ";
const HEADER_LEN: u64 = 36;
/// Tables longer than this are not believed.
const LEN_MAX: u64 = 1 << 20;
const SYSTEM_IO: u8 = 1;

/// Where the loader says that the root pointer is; 0 if it does not say.
static ROOT: AtomicU64 = AtomicU64::new(0);

/// A table in memory, header and all.
#[derive(Debug, Clone, Copy)]
pub struct Table {
    /// Where it lies.
    pub address: u64,
    bytes: &'static [u8],
}

impl Table {
    fn at(address: u64) -> Option<Self> {
        let len = u64::from(phys::read::<u32>(address + 4));
        let plausible = (HEADER_LEN..=LEN_MAX).contains(&len);
        plausible.then(|| Self { address, bytes: phys::bytes(address, len) })
    }

    /// Its name of four letters.
    pub fn signature(&self) -> &'static str {
        core::str::from_utf8(&self.bytes[..4]).unwrap_or("????")
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether its bytes add up to 0.
    pub fn sums_up(&self) -> bool {
        sum(self.bytes) == 0
    }

    fn field(&self, offset: u64) -> u64 {
        let bytes = self.bytes.get(phys::index(offset)..phys::index(offset + 8));
        bytes.and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

/// Remembers where the loader says that the root pointer is.
pub fn set_root(address: Option<u64>) {
    ROOT.store(address.unwrap_or(0), Ordering::Relaxed);
}

/// Finds the root pointer: where the loader said, else in the firmware's range.
pub fn root() -> Option<u64> {
    let is_root = |address: &u64| phys::read::<[u8; 8]>(*address) == ROOT_SIGNATURE;
    let told = ROOT.load(Ordering::Relaxed);
    Some(told).filter(|told| *told != 0 && is_root(told)).or_else(|| SEARCHED.step_by(16).find(is_root))
}

/// Whether both checksums of the root pointer are right.
pub fn root_sums_up(root: u64) -> bool {
    sum(phys::bytes(root, 20)) == 0 && sum(phys::bytes(root, 36)) == 0
}

/// All tables that can be reached from the root pointer at `root`, the XSDT first.
pub fn tables(root: u64) -> Vec<Table> {
    let mut tables = Vec::new();
    let Some(xsdt) = Table::at(phys::read(root + 24)) else { return tables };
    tables.push(xsdt);
    for offset in (HEADER_LEN..xsdt.len()).step_by(8) {
        let Some(table) = Table::at(xsdt.field(offset)) else { continue };
        tables.push(table);
        if table.signature() == "FACP" {
            let (long, short) = (table.field(140), table.field(40) & 0xffff_ffff);
            let dsdt = if long != 0 { long } else { short };
            tables.extend(Some(dsdt).filter(|address| *address != 0).and_then(Table::at));
        }
    }
    tables
}

fn find(signature: &str) -> Option<Table> {
    tables(root()?).into_iter().find(|table| table.signature() == signature)
}

/// Port of the sleep control register, where the tables name one.
pub fn sleep_control() -> Option<u16> {
    let register = 244;
    let fadt = find("FACP")?;
    let port = u16::try_from(fadt.field(register + 4)).ok()?;
    (fadt.field(register).to_le_bytes()[0] == SYSTEM_IO && port != 0).then_some(port)
}

/// Identifications of the local APICs of all processors that can be used.
pub fn processors() -> Vec<u8> {
    const LOCAL_APIC: u8 = 0;
    const LOCAL_X2APIC: u8 = 9;
    const ENABLED: u8 = 1;
    let Some(madt) = find("APIC") else { return Vec::new() };
    let mut found = Vec::new();
    let mut rest = &madt.bytes[44.min(madt.bytes.len())..];
    while let [kind, len, ..] = *rest
        && usize::from(len) >= 2
        && let Some((entry, others)) = rest.split_at_checked(len.into())
    {
        match (kind, entry) {
            (LOCAL_APIC, [_, _, _, id, flags, ..]) if flags & ENABLED != 0 => found.push(*id),
            // Those with longer identifications cannot be addressed through the registers in memory.
            (LOCAL_X2APIC, [_, _, _, _, id, 0, 0, 0, flags, ..]) if flags & ENABLED != 0 => found.push(*id),
            _ => {}
        }
        rest = others;
    }
    found
}
