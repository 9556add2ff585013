//! The 64-bit entry of Linux (`Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol").

use devices::GuestRam;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::Error;
use super::layout::{self, put};

const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// A boot loader that has no number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const CAN_USE_HEAP: u8 = 1 << 7;
const KEEP_SEGMENTS: u8 = 1 << 6;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PRESENT_WRITABLE: u64 = 3;
const LARGE: u64 = 1 << 7;
const TABLE: u64 = 0x1000;
/// The identity mapping covers 4 GiB in 2 MiB pages: one page directory a GiB.
const DIRECTORIES: u64 = 4;
const ENTRIES: u64 = 512;

/// `__BOOT_CS` and `__BOOT_DS`, the selectors that the protocol fixes.
const BOOT_CS: u16 = 0x10;
const BOOT_DS: u16 = 0x18;
const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[derive(Clone, Copy)]
#[repr(transparent)]
struct ZeroPage(boot_params);

// SAFETY: a boot_params is integers and arrays of them, laid out without gaps (it is packed), so that any bytes
// are a value of it and it has no uninitialised ones.
unsafe impl ByteValued for ZeroPage {}

/// Writes `boot_params`, the descriptor table and the page tables.
pub fn write_boot_params(
    memory: &GuestRam,
    ram: &[(u64, u64)],
    header: Option<&setup_header>,
    initrd: Option<(u64, u64)>,
    cmdline: &str,
    acpi: bool,
) -> Result<(), Error> {
    // An ELF has no header: what the kernel reads of one is filled in.
    let hdr = header.copied().unwrap_or(setup_header {
        boot_flag: 0xaa55,
        header: HEADER_MAGIC,
        kernel_alignment: 0x100_0000,
        ..Default::default()
    });
    let mut params = boot_params { hdr, ..Default::default() };
    let low = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or_default();
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags = params.hdr.loadflags & !CAN_USE_HEAP | KEEP_SEGMENTS;
    params.hdr.cmd_line_ptr = low(layout::CMDLINE);
    params.hdr.cmdline_size = u32::try_from(cmdline.len()).unwrap_or_default();
    if let Some((address, size)) = initrd {
        params.hdr.ramdisk_image = low(address);
        params.hdr.ramdisk_size = low(size);
    }
    params.acpi_rsdp_addr = if acpi { layout::RSDP } else { 0 };
    let map = layout::memory_map(ram);
    for (slot, (addr, size, usable)) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: *addr, size: *size, r#type: if *usable { 1 } else { 2 } };
    }
    params.e820_entries = u8::try_from(map.len()).unwrap_or_default();
    put(memory, layout::ZERO_PAGE, ZeroPage(params))?;
    for (entry, at) in GDT_ENTRIES.into_iter().zip(0_u64..) {
        put(memory, layout::GDT + 8 * at, entry)?;
    }
    write_page_tables(memory)
}

fn write_page_tables(memory: &GuestRam) -> Result<(), Error> {
    let (top, pointers) = (layout::PAGE_TABLES, layout::PAGE_TABLES + TABLE);
    put(memory, top, pointers | PRESENT_WRITABLE)?;
    for directory in 0..DIRECTORIES {
        let table = pointers + TABLE * (1 + directory);
        put(memory, pointers + 8 * directory, table | PRESENT_WRITABLE)?;
        let page = |index: u64| (directory * ENTRIES + index) << 21 | PRESENT_WRITABLE | LARGE;
        let pages: Vec<u8> = (0..ENTRIES).flat_map(|index| page(index).to_le_bytes()).collect();
        memory.write_slice(&pages, GuestAddress(table)).map_err(|_| Error::Memory { address: table })?;
    }
    Ok(())
}

/// Long mode, identity mapping of the low 4 GiB, flat segments; `rsi` points to `boot_params`.
pub fn configure(rip: u64, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
    let segment = |selector, type_, l| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        s: 1,
        l,
        db: 1 - l,
        g: 1,
        ..Default::default()
    };
    sregs.cs = segment(BOOT_CS, 0xb, 1);
    let data = segment(BOOT_DS, 0x3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x20, type_: 0xb, present: 1, ..Default::default() };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = u16::try_from(size_of_val(&GDT_ENTRIES) - 1).unwrap_or_default();
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    *regs = kvm_regs { rip, rsp: layout::STACK, rsi: layout::ZERO_PAGE, rflags: 2, ..Default::default() };
}
