use std::io::Write;
use std::path::Path;

use linux_loader::loader::bootparam::{boot_params, setup_header};
use linux_loader::loader::elf::start_info::hvm_start_info;
use proptest::prelude::*;
use tempfile::NamedTempFile;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::elf::{Elf, Segment};
use super::*;
use crate::config::model::Backing;
use crate::memory;

const LOAD: u64 = 0x10_0000;
const CODE: &[u8] = b"code of a kernel";
const MIB: u64 = 1 << 20;

/// An ELF with one segment at [`LOAD`] and, if `pvh`, the note.
fn elf(pvh: Option<&[u8]>) -> Vec<u8> {
    let mut image = vec![0; 0x1000];
    image[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
    image[20..24].copy_from_slice(&1_u32.to_le_bytes());
    image[24..32].copy_from_slice(&LOAD.to_le_bytes());
    image[32..40].copy_from_slice(&64_u64.to_le_bytes());
    image[52..54].copy_from_slice(&64_u16.to_le_bytes());
    image[54..56].copy_from_slice(&56_u16.to_le_bytes());
    image[56..58].copy_from_slice(&(1 + u16::from(pvh.is_some())).to_le_bytes());
    let header = |kind: u32, offset: u64, address: u64, file: u64, memory: u64| {
        let mut bytes = [kind.to_le_bytes(), 5_u32.to_le_bytes()].concat();
        for value in [offset, address, address, file, memory, 4] {
            bytes.extend(value.to_le_bytes());
        }
        bytes
    };
    image[64..120].copy_from_slice(&header(1, 0x800, LOAD, CODE.len() as u64, 0x3000));
    image[0x800..0x800 + CODE.len()].copy_from_slice(CODE);
    if let Some(value) = pvh {
        let mut note = [4_u32, u32::try_from(value.len()).unwrap(), 18].map(u32::to_le_bytes).concat();
        note.extend(b"Xen\0");
        note.extend(value);
        image[120..176].copy_from_slice(&header(4, 0x900, 0, note.len() as u64, note.len() as u64));
        image[0x900..0x900 + note.len()].copy_from_slice(&note);
    }
    image
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut header = setup_header {
        setup_sects: 1,
        boot_flag: 0xaa55,
        header: u32::from_le_bytes(*b"HdrS"),
        version: 0x20f,
        loadflags: 1,
        xloadflags: 1,
        init_size: 0x20_0000,
        cmdline_size: 100,
        initrd_addr_max: 0x7fff_ffff,
        payload_offset: 0x400,
        payload_length: u32::try_from(payload.len()).unwrap(),
        ..Default::default()
    };
    header.pref_address = 16 * MIB;
    let mut image = vec![0; 0x400 + 0x400];
    let bytes = header.as_slice();
    image[0x1f1..0x1f1 + bytes.len()].copy_from_slice(bytes);
    image.extend(payload);
    image
}

fn with_size(mut packed: Vec<u8>, size: usize) -> Vec<u8> {
    packed.extend(u32::try_from(size).unwrap().to_le_bytes());
    packed
}

fn packed() -> Vec<(&'static str, Vec<u8>)> {
    let image = elf(Some(&LOAD.to_le_bytes()));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&image).unwrap();
    let block = lz4_flex::block::compress(&image);
    let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
    lz4.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
    lz4.extend(block);
    let zstd = ruzstd::encoding::compress_to_vec(&image[..], ruzstd::encoding::CompressionLevel::Fastest);
    vec![
        ("gzip", gzip.finish().unwrap()),
        ("lz4", with_size(lz4, image.len())),
        ("zstd", with_size(zstd, image.len())),
        ("xz", with_size(XZ_ELF.to_vec(), image.len())),
    ]
}

/// `elf(Some(&LOAD.to_le_bytes()))` packed by `xz --check=crc32 --x86 --lzma2=`, as the build of Linux does.
const XZ_ELF: &[u8] = include_bytes!("testdata/elf.xz");

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn open(bytes: &[u8]) -> Result<Kernel, Error> {
    Kernel::open(file(bytes).path())
}

fn refusal(bytes: &[u8]) -> String {
    open(bytes).unwrap_err().to_string()
}

#[test]
fn elf_with_a_note_of_4_or_8_bytes_is_entered_by_pvh() {
    for value in [&LOAD.to_le_bytes()[..], &LOAD.to_le_bytes()[..4]] {
        assert_eq!(open(&elf(Some(value))).unwrap().entry(), Entry::Pvh { rip: LOAD });
    }
}

#[test]
fn elf_without_a_note_is_entered_by_the_64_bit_protocol() {
    assert_eq!(open(&elf(None)).unwrap().entry(), Entry::Linux64 { rip: LOAD });
}

#[test]
fn bzimage_of_every_packing_is_booted_as_the_elf_within() {
    for (name, payload) in packed() {
        let kernel = open(&bzimage(&payload)).unwrap();
        assert_eq!(kernel.entry(), Entry::Pvh { rip: LOAD }, "{name}");
        assert_eq!((kernel.end(), kernel.cmdline_max()), (LOAD + 0x3000, 100), "{name}");
    }
}

#[test]
fn bzimage_of_an_unknown_packing_is_entered_by_its_own_64_bit_code() {
    let kernel = open(&bzimage(b"BZh91AY&SY and more of it")).unwrap();
    assert_eq!(kernel.entry(), Entry::Linux64 { rip: 16 * MIB + 0x200 });
    assert_eq!(kernel.end(), 18 * MIB);
}

#[test]
fn files_that_are_no_kernels_are_refused_with_what_they_are() {
    assert!(refusal(&[]).contains("is empty"));
    assert!(refusal(&[0x5a; 64 << 10]).contains("neither an ELF file nor a bzImage"));
    assert!(refusal(&elf(None)[..100]).contains("truncated"));
    assert!(refusal(&elf(None)[..0x805]).contains("truncated: its segment at 0x100000 needs 2064 bytes"));
    let mut other = elf(None);
    other[18] = 0xb7;
    assert!(refusal(&other).contains("for another machine"));
    assert!(Kernel::open(Path::new("/")).unwrap_err().to_string().contains("not a regular file"));
    assert!(Kernel::open(Path::new("/nonexistent")).unwrap_err().to_string().contains("/nonexistent"));
    assert!(refusal(&bzimage(b"")[..0x210]).contains("truncated"));
}

#[test]
fn bomb_is_refused_when_it_passes_what_it_claims() {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&vec![0; 64 << 20]).unwrap();
    let mut payload = gzip.finish().unwrap();
    let at = payload.len() - 4;
    payload[at..].copy_from_slice(&1000_u32.to_le_bytes());
    assert!(super::payload::unpack(&payload).unwrap_err().contains("gzip payload"));
}

#[test]
fn segments_that_wrap_or_lie_beyond_any_guest_are_refused() {
    for (at, value) in [(64 + 24, u64::MAX - 0x1000), (64 + 24, 1 << 40), (64 + 40, u64::MAX)] {
        let mut image = elf(Some(&LOAD.to_le_bytes()));
        image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        assert!(Elf::parse_bytes(&image).is_err());
    }
}

#[test]
fn kernel_outside_ram_or_in_the_first_megabyte_is_refused() {
    let kernel = open(&elf(None)).unwrap();
    assert!(kernel.check_placement(&[(0, 2 * MIB)]).is_ok());
    let refused = kernel.check_placement(&[(0, MIB)]).unwrap_err().to_string();
    assert!(refused.contains("0x100000 to 0x103000"), "{refused}");
    let mut low = elf(None);
    for at in [24, 64 + 24] {
        low[at..at + 8].copy_from_slice(&0x1000_u64.to_le_bytes());
    }
    assert!(open(&low).unwrap().check_placement(&[(0, 2 * MIB)]).is_err());
}

#[test]
fn pvh_kernel_finds_command_line_initrd_and_memory() {
    let ram = memory::create(4 * MIB, &Backing::Anonymous).unwrap();
    let mut kernel = open(&elf(Some(&LOAD.to_le_bytes()))).unwrap();
    let initrd = file(&[7; 5000]);
    let mut initrd = Initrd::open(initrd.path()).unwrap();
    let entry = load(&ram, &mut kernel, Some(&mut initrd), "quiet", true).unwrap();
    assert_eq!(entry, Entry::Pvh { rip: LOAD });
    let mut code = [0; CODE.len()];
    ram.read_slice(&mut code, GuestAddress(LOAD)).unwrap();
    assert_eq!(code, CODE);
    let info: hvm_start_info = ram.read_obj(GuestAddress(layout::START_INFO)).unwrap();
    assert_eq!((info.version, info.nr_modules, info.rsdp_paddr), (1, 1, RSDP));
    let mut line = [0; 6];
    ram.read_slice(&mut line, GuestAddress(info.cmdline_paddr)).unwrap();
    assert_eq!(&line, b"quiet\0");
    let [address, size]: [u64; 2] = ram.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((address, size), (4 * MIB - 8192, 5000));
    assert_eq!(ram.read_obj::<u8>(GuestAddress(address + 4999)).unwrap(), 7);
    assert_eq!(info.memmap_entries, 3);
    let [start, len, kind]: [u64; 3] = ram.read_obj(GuestAddress(info.memmap_paddr + 48)).unwrap();
    assert_eq!((start, len, kind), (MIB, 3 * MIB, 1));
}

#[test]
fn linux_kernel_finds_its_boot_parameters() {
    let ram = memory::create(4 * MIB, &Backing::Anonymous).unwrap();
    let mut kernel = open(&elf(None)).unwrap();
    load(&ram, &mut kernel, None, "quiet", false).unwrap();
    let mut params = boot_params::default();
    let at = layout::ZERO_PAGE + 0x1f1;
    ram.read_slice(params.hdr.as_mut_slice(), GuestAddress(at)).unwrap();
    let (line, magic, loader) = (params.hdr.cmd_line_ptr, params.hdr.header, params.hdr.type_of_loader);
    assert_eq!((u64::from(line), magic, loader), (layout::CMDLINE, 0x5372_6448, 0xff));
    assert_eq!(ram.read_obj::<u8>(GuestAddress(layout::ZERO_PAGE + 0x1e8)).unwrap(), 3);
    let page: u64 = ram.read_obj(GuestAddress(layout::PAGE_TABLES + 0x2000 + 8 * 511)).unwrap();
    assert_eq!(page, 511 << 21 | 0x83);
}

#[test]
fn initrd_that_does_not_fit_beside_the_kernel_is_refused_with_both_sizes() {
    let kernel = open(&elf(None)).unwrap();
    let initrd = file(&vec![1; 3 << 20]);
    let refused = Initrd::open(initrd.path()).unwrap().address(&[(0, 4 * MIB)], &kernel).unwrap_err();
    assert!(refused.to_string().contains("of 3 MiB"), "{refused}");
}

#[test]
fn command_line_longer_than_the_kernel_takes_is_refused() {
    let ram = memory::create(4 * MIB, &Backing::Anonymous).unwrap();
    let (_, payload) = packed().swap_remove(0);
    let mut kernel = open(&bzimage(&payload)).unwrap();
    let refused = load(&ram, &mut kernel, None, &"x".repeat(101), false).unwrap_err();
    assert!(matches!(refused, Error::Cmdline { len: 101, max: 100 }));
}

fn mutations(len: usize) -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..len)
}

proptest! {
    #[test]
    fn mutated_elf_is_refused_or_keeps_its_promises(
        changes in mutations(8), cut in any::<prop::sample::Index>(), truncate in any::<bool>()
    ) {
        let mut image = elf(Some(&LOAD.to_le_bytes()));
        // Headers are where a change matters.
        for (at, value) in changes {
            image[at.index(200)] = value;
        }
        if truncate {
            image.truncate(cut.index(image.len()));
        }
        if let Ok(elf) = Elf::parse_bytes(&image) {
            for Segment { address, len, offset, file_len } in elf.segments {
                prop_assert!(file_len <= len && offset + file_len <= image.len() as u64 && address + len <= 1 << 39);
            }
        }
    }

    #[test]
    fn mutated_payload_is_refused_or_unpacks_to_its_claim(
        which in 0_usize..4, changes in mutations(4), cut in any::<prop::sample::Index>(), truncate in any::<bool>()
    ) {
        let (_, mut payload) = packed().swap_remove(which);
        for (at, value) in changes {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        if truncate {
            payload.truncate(cut.index(payload.len()));
        }
        if let Ok(bytes) = super::payload::unpack(&payload) {
            prop_assert!(bytes.len() <= 1 << 30);
        }
    }

    #[test]
    fn mutated_bzimage_header_is_refused_or_bootable(changes in mutations(6)) {
        let (_, payload) = packed().swap_remove(0);
        let mut image = bzimage(&payload);
        for (at, value) in changes {
            image[0x1f1 + at.index(size_of::<setup_header>())] = value;
        }
        if let Ok(kernel) = open(&image) {
            prop_assert!(kernel.end() > 0);
        }
    }
}
