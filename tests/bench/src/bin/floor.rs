//! The least that any monitor must do to run a guest: the floor under the start benchmark.
//!
//! Opens KVM, makes a machine with interrupt controllers, timer, memory and one vCPU, loads an ELF by its PVH entry, runs
//! it, and prints what it writes to COM1. There is nothing else in the machine: any other port or address reads as ones.
//!
//! Usage: `floor ELF COMMAND-LINE MEMORY-IN-MIB`

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

type Error = Box<dyn std::error::Error>;

/// Where the start information and what it points to are put: below the first megabyte, as loaders do.
const START_INFO: usize = 0x6000;
const MEMORY_MAP: usize = 0x7000;
const CMDLINE: usize = 0x8000;
const CMDLINE_MAX: usize = 0x1000;
/// `XEN_HVM_START_MAGIC_VALUE` (Xen, `xen/include/public/arch-x86/hvm/start_info.h`).
const MAGIC: u32 = 0x336e_c578;
/// `XEN_ELFNOTE_PHYS32_ENTRY` (Xen, `xen/include/public/elfnote.h`).
const PHYS32_ENTRY: u32 = 18;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Memory stays below the hole for devices.
const MEMORY_MAX_MIB: usize = 3072;
/// Three pages that KVM needs on Intel, and one more (Linux, `Documentation/virt/kvm/api.rst`, 4.29 and 4.36).
const IDENTITY_MAP: u64 = 0xfffb_c000;
const TSS: usize = 0xfffb_d000;
const COM1: u16 = 0x3f8;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("floor: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [elf, cmdline, mib] = arguments.as_slice() else {
        return Err("usage: floor ELF COMMAND-LINE MEMORY-IN-MIB".into());
    };
    let mib: usize =
        mib.parse().ok().filter(|mib| (1..=MEMORY_MAX_MIB).contains(mib)).ok_or("memory: 1 to 3072 MiB")?;

    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    // Memory comes first: the devices that KVM makes for the interrupt controllers and the timer leave a grace period of
    // the machine's SRCU behind, and a change of memory would wait for it, milliseconds long.
    let memory = map(mib << 20)?;
    let region = kvm_userspace_memory_region {
        memory_size: memory.len() as u64,
        userspace_addr: memory.as_ptr() as usize as u64,
        ..Default::default()
    };
    // SAFETY: the mapping is never unmapped, and only KVM and this thread, while the vCPU does not run, write to it.
    unsafe { vm.set_user_memory_region(region)? };
    vm.set_identity_map_address(IDENTITY_MAP)?;
    vm.set_tss_address(TSS)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config::default())?;
    let entry = load(&File::open(elf)?, memory)?;
    write_start_info(memory, cmdline)?;

    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_by_pvh(&vcpu, entry)?;
    serve(&mut vcpu)
}

/// Anonymous memory for the guest, for the life of the process.
fn map(size: usize) -> Result<&'static mut [u8], Error> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping wherever the kernel likes.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0) };
    if address == libc::MAP_FAILED {
        return Err(io::Error::last_os_error().into());
    }
    // SAFETY: the mapping has this size, is zeroed, and is never unmapped.
    Ok(unsafe { std::slice::from_raw_parts_mut(address.cast(), size) })
}

/// Reads the loadable segments of a 64-bit ELF to their physical addresses; returns the PVH entry.
fn load(file: &File, memory: &mut [u8]) -> Result<u32, Error> {
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    if header[..6] != *b"\x7fELF\x02\x01" {
        return Err("not a 64-bit little-endian ELF".into());
    }
    let table = u64_at(&header, 32)?;
    let mut entry = None;
    for index in 0..u64::from(u16_at(&header, 56)?) {
        let mut segment = [0; 56];
        let place = index.checked_mul(56).and_then(|offset| table.checked_add(offset));
        file.read_exact_at(&mut segment, place.ok_or("program headers past the end")?)?;
        let (offset, address) = (u64_at(&segment, 8)?, u64_at(&segment, 24)?);
        let length = usize::try_from(u64_at(&segment, 32)?)?;
        match u32_at(&segment, 0)? {
            PT_LOAD => {
                let start = usize::try_from(address)?;
                let end = start.checked_add(length).ok_or("a segment wraps around")?;
                let to = memory.get_mut(start..end).ok_or("a segment lies outside of memory")?;
                file.read_exact_at(to, offset)?;
            }
            PT_NOTE if length <= 1 << 16 => {
                let mut notes = vec![0; length];
                file.read_exact_at(&mut notes, offset)?;
                entry = entry.or(pvh_entry(&notes));
            }
            _ => {}
        }
    }
    entry.ok_or_else(|| "the ELF has no PVH note".into())
}

/// Each note: sizes of name and description, type, then both, padded to four bytes.
fn pvh_entry(mut notes: &[u8]) -> Option<u32> {
    loop {
        let size = |at| u32_at(notes, at).ok().and_then(|size| usize::try_from(size).ok());
        let (name, description, kind) = (size(0)?, size(4)?, u32_at(notes, 8).ok()?);
        let start = 12 + name.checked_next_multiple_of(4)?;
        if kind == PHYS32_ENTRY && notes.get(12..16) == Some(b"Xen\0") {
            return u32_at(notes, start).ok();
        }
        notes = notes.get(start.checked_add(description.checked_next_multiple_of(4)?)?..)?;
    }
}

fn write_start_info(memory: &mut [u8], cmdline: &str) -> Result<(), Error> {
    if cmdline.len() >= CMDLINE_MAX {
        return Err("the command line is too long".into());
    }
    let size = memory.len() as u64;
    let mut put = |at: usize, bytes: &[u8]| -> Result<(), Error> {
        memory.get_mut(at..at + bytes.len()).ok_or("memory is too small")?.copy_from_slice(bytes);
        Ok(())
    };
    put(START_INFO, &MAGIC.to_le_bytes())?;
    put(START_INFO + 4, &1_u32.to_le_bytes())?;
    put(START_INFO + 24, &(CMDLINE as u64).to_le_bytes())?;
    put(START_INFO + 40, &(MEMORY_MAP as u64).to_le_bytes())?;
    put(START_INFO + 48, &1_u32.to_le_bytes())?;
    // One entry: address 0, the size, RAM.
    put(MEMORY_MAP + 8, &size.to_le_bytes())?;
    put(MEMORY_MAP + 16, &1_u32.to_le_bytes())?;
    put(CMDLINE, cmdline.as_bytes())
}

/// 32-bit protected mode without paging, flat segments, `ebx` at the start information (Xen, `docs/misc/pvh.pandoc`).
fn enter_by_pvh(vcpu: &VcpuFd, entry: u32) -> Result<(), Error> {
    let flat = |selector, type_| kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu.get_sregs()?;
    sregs.cs = flat(0x08, 0xb);
    let data = flat(0x10, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 0xb, present: 1, ..Default::default() };
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs)?;
    let regs = kvm_regs { rip: entry.into(), rbx: START_INFO as u64, rflags: 2, ..Default::default() };
    Ok(vcpu.set_regs(&regs)?)
}

fn serve(vcpu: &mut VcpuFd) -> Result<(), Error> {
    let mut output = io::stdout().lock();
    let mut divisor_latch = false;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(COM1, data)) if !divisor_latch => {
                output.write_all(data)?;
                output.flush()?;
            }
            // Bit 7 of the line control register turns the data register into half of the divisor.
            Ok(VcpuExit::IoOut(port, [value])) if port == COM1 + 3 => divisor_latch = value & 0x80 != 0,
            // Line status: the transmitter is empty.
            Ok(VcpuExit::IoIn(port, data)) if port == COM1 + 5 => data.fill(0x60),
            Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
            Ok(VcpuExit::Hlt | VcpuExit::Shutdown) => return Ok(()),
            Ok(other) => return Err(format!("the vCPU stopped: {other:?}").into()),
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Result<[u8; N], Error> {
    let end = at.checked_add(N).ok_or("cut off")?;
    Ok(from.get(at..end).ok_or("cut off")?.try_into()?)
}

fn u16_at(from: &[u8], at: usize) -> Result<u16, Error> {
    bytes(from, at).map(u16::from_le_bytes)
}

fn u32_at(from: &[u8], at: usize) -> Result<u32, Error> {
    bytes(from, at).map(u32::from_le_bytes)
}

fn u64_at(from: &[u8], at: usize) -> Result<u64, Error> {
    bytes(from, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
        let size = |of: &[u8]| u32::try_from(of.len()).unwrap().to_le_bytes();
        let padded = |of: &[u8]| {
            let mut padded = of.to_vec();
            padded.resize(of.len().next_multiple_of(4), 0);
            padded
        };
        [size(name).as_slice(), &size(description), &kind.to_le_bytes(), &padded(name), &padded(description)]
            .concat()
    }

    #[test]
    fn pvh_entry_is_found_behind_other_notes() {
        let pvh = note(b"Xen\0", PHYS32_ENTRY, &0x20_0000_u32.to_le_bytes());
        let notes = [note(b"GNU\0", PHYS32_ENTRY, b"12345"), note(b"Xen\0", 5, b"x"), pvh].concat();
        assert_eq!(pvh_entry(&notes), Some(0x20_0000));
        assert_eq!(pvh_entry(&notes[..notes.len() - 1]), None, "cut off");
        assert_eq!(pvh_entry(&[]), None);
        assert_eq!(pvh_entry(&[0xff; 64]), None);
    }

    #[test]
    fn garbage_and_segments_outside_of_memory_are_refused() {
        use std::io::Write as _;
        let file = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            file
        };
        let mut memory = vec![0; 1 << 16];
        assert!(load(&file(&[]), &mut memory).is_err());
        assert!(load(&file(&[7; 4096]), &mut memory).is_err());
        let mut elf = vec![0; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        elf[32] = 64;
        elf[56] = 1;
        elf[64] = 1;
        elf[64 + 32] = 1;
        let without_note = load(&file(&elf), &mut memory).unwrap_err().to_string();
        assert!(without_note.contains("no PVH note"), "{without_note}");
        elf[64 + 24..64 + 32].copy_from_slice(&(1_u64 << 16).to_le_bytes());
        let outside = load(&file(&elf), &mut memory).unwrap_err().to_string();
        assert!(outside.contains("outside of memory"), "{outside}");
        elf[64 + 24..64 + 32].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(load(&file(&elf), &mut memory).is_err());
    }
}
