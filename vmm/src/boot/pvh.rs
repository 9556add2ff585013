//! The PVH entry (Xen, `docs/misc/pvh.pandoc` and `xen/include/public/arch-x86/hvm/start_info.h`).

use devices::GuestRam;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};

use super::Error;
use super::layout::{self, put};

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;

/// Writes the start information and its tables.
pub fn write_start_info(
    memory: &GuestRam,
    ram: &[(u64, u64)],
    initrd: Option<(u64, u64)>,
    acpi: bool,
) -> Result<(), Error> {
    let map = layout::memory_map(ram);
    for ((addr, size, usable), at) in map.iter().zip(0_u64..) {
        let entry = hvm_memmap_table_entry {
            addr: *addr,
            size: *size,
            type_: if *usable { 1 } else { 2 },
            reserved: 0,
        };
        put(memory, layout::MEMMAP + at * size_of::<hvm_memmap_table_entry>() as u64, entry)?;
    }
    if let Some((paddr, size)) = initrd {
        put(memory, layout::MODULES, hvm_modlist_entry { paddr, size, ..Default::default() })?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { layout::MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: if acpi { layout::RSDP } else { 0 },
        memmap_paddr: layout::MEMMAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or_default(),
        ..Default::default()
    };
    put(memory, layout::START_INFO, info)
}

/// 32-bit protected mode, paging off, flat segments; `ebx` points to the start information.
pub fn configure(rip: u64, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x08, 0xb);
    let data = flat(0x10, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 = CR0_PE | CR0_ET;
    (sregs.cr4, sregs.efer) = (0, 0);
    *regs = kvm_regs { rip, rbx: layout::START_INFO, rflags: 2, ..Default::default() };
}
