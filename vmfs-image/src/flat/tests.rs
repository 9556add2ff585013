use proptest::prelude::*;

use super::*;
use crate::open::open;

fn file(size: u64) -> tempfile::NamedTempFile {
    // Not in /tmp, which may be a file system without extended attributes or direct I/O.
    let file = tempfile::NamedTempFile::new_in(".").unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

fn writable() -> OpenOptions {
    OpenOptions { writable: true, ..OpenOptions::default() }
}

fn write(image: &dyn Image, offset: u64, bytes: &[u8]) -> io::Result<()> {
    image.write_at(offset, &[VolatileSlice::from(bytes.to_vec().as_mut_slice())])
}

fn read(image: &dyn Image, offset: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0xee; len];
    image.read_at(offset, &[VolatileSlice::from(bytes.as_mut_slice())])?;
    Ok(bytes)
}

#[test]
fn directory_missing_and_empty_files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let missing = open(&dir.path().join("none.img"), &writable()).unwrap_err();
    assert!(matches!(missing, Error::Open { .. }) && missing.to_string().contains("none.img"));
    for options in [writable(), OpenOptions::default()] {
        let directory = open(dir.path(), &options).unwrap_err().to_string();
        assert!(directory.contains("is a directory"), "{directory}");
        let device = open(Path::new("/dev/null"), &options).unwrap_err();
        assert!(matches!(device, Error::Kind { .. }), "{device}");
    }
    let empty = file(511);
    assert!(matches!(open(empty.path(), &writable()), Err(Error::Empty { size: 511, .. })));
}

#[test]
fn second_writer_is_refused_and_told_who_holds_the_disk() {
    let file = file(4096);
    let options = OpenOptions { owner: Some("db".to_owned()), ..writable() };
    let first = open(file.path(), &options).unwrap();
    for options in [writable(), OpenOptions::default()] {
        let refused = open(file.path(), &options).unwrap_err().to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
    }
    drop(first);
    let _readers = [(); 2].map(|()| open(file.path(), &OpenOptions::default()).unwrap());
    assert!(matches!(open(file.path(), &writable()), Err(Error::Locked { .. })));
}

#[test]
fn odd_tail_of_a_file_is_left_out_and_does_not_show_up_when_it_grows() {
    let file = file(0);
    std::fs::write(file.path(), [7; 1025]).unwrap();
    let image = open(file.path(), &writable()).unwrap();
    assert_eq!(image.size(), 1024);
    image.grow(2048).unwrap();
    assert_eq!(image.size(), 2048);
    assert_eq!(read(&*image, 1024, 1024).unwrap(), [0; 1024]);
    for size in [1024, 2049, MAX_SIZE + 512] {
        assert_eq!(image.grow(size).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }
}

#[test]
fn pipe_is_refused_at_once_instead_of_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for options in [writable(), OpenOptions::default()] {
        assert!(matches!(open(&pipe, &options), Err(Error::Kind { .. })));
    }
}

#[test]
fn disk_is_opened_through_a_symbolic_link_and_waits_for_its_storage() {
    let dir = tempfile::tempdir().unwrap();
    let (file, link) = (dir.path().join("a.img"), dir.path().join("link.img"));
    std::fs::write(&file, [0; 4096]).unwrap();
    std::os::unix::fs::symlink(&file, &link).unwrap();
    let image = open(&link, &writable()).unwrap();
    assert_eq!(image.size(), 4096);
    // SAFETY: F_GETFL takes and gives integers.
    let flags = unsafe { libc::fcntl(image.files()[0].as_raw_fd(), libc::F_GETFL) };
    assert_eq!(flags & libc::O_NONBLOCK, 0);
}

#[test]
fn ranges_that_are_none_and_changes_of_what_is_only_read_are_refused() {
    let file = file(4096);
    let reader = open(file.path(), &OpenOptions::default()).unwrap();
    let refused = [
        write(&*reader, 0, &[1; 512]),
        reader.write_zeroes(0, 512, true),
        reader.discard(0, 512),
        reader.grow(8192),
    ];
    for error in refused.map(Result::unwrap_err) {
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
    assert!(reader.locate(0, 512, Access::Write, &mut Vec::new()).is_none());
    drop(reader);
    let image = open(file.path(), &writable()).unwrap();
    for (offset, len) in [(4096, 512), (1, 512), (0, 511), (u64::MAX - 511, 512), (3584, 1024)] {
        let len_usize = usize::try_from(len).unwrap();
        let refused = [
            read(&*image, offset, len_usize).map(drop),
            write(&*image, offset, &vec![1; len_usize]),
            image.write_zeroes(offset, len, false),
            image.discard(offset, len),
            image.run(offset, len).map(drop),
        ];
        for error in refused.map(Result::unwrap_err) {
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{offset} {len}");
        }
        assert!(image.locate(offset, len, Access::Read, &mut Vec::new()).is_none());
    }
}

#[test]
fn guest_cannot_make_its_flat_disk_into_another_kind_of_image() {
    let file = file(4096);
    let magics: [&[u8]; 5] = [b"VMM-THIN", b"QFI\xfb", b"KDMV", b"COWD", b"# Disk DescriptorFile"];
    for magic in magics {
        let mut sector = [0; 512];
        sector[..magic.len()].copy_from_slice(magic);
        let probed = open(file.path(), &writable()).unwrap();
        write(&*probed, 0, &[1; 1024]).unwrap();
        let mut pieces = sector;
        let slice = VolatileSlice::from(&mut pieces[..]);
        let split = [slice.subslice(0, 3).unwrap(), slice.subslice(3, 509).unwrap()];
        assert_eq!(probed.write_at(0, &split).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(read(&*probed, 0, 1024).unwrap(), [1; 1024]);
        assert!(probed.locate(0, 4096, Access::Write, &mut Vec::new()).is_none());
        assert!(probed.locate(512, 512, Access::Write, &mut Vec::new()).is_some());
        write(&*probed, 512, &sector).unwrap();
        drop(probed);
        let flat = OpenOptions { format: Some(Format::Flat), ..writable() };
        let flat = open(file.path(), &flat).unwrap();
        assert!(flat.locate(0, 4096, Access::Write, &mut Vec::new()).is_some());
        write(&*flat, 0, &sector).unwrap();
        assert_eq!(crate::probe(file.path()).unwrap(), crate::open::kind_of(magic));
        write(&*flat, 0, &[0; 512]).unwrap();
    }
}

#[test]
fn frozen_image_is_read_by_others_and_changed_again_once_they_are_gone() {
    let file = file(4096);
    let image = open(file.path(), &writable()).unwrap();
    image.set_writable(false).unwrap();
    assert!(!image.is_writable());
    assert_eq!(write(&*image, 0, &[1; 512]).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    let reader = open(file.path(), &OpenOptions::default()).unwrap();
    assert!(matches!(image.set_writable(true), Err(Error::Locked { .. })));
    assert!(!image.is_writable());
    assert!(matches!(reader.set_writable(true), Err(Error::Invalid { .. })));
    drop(reader);
    image.set_writable(true).unwrap();
    write(&*image, 0, &[1; 512]).unwrap();
    assert!(matches!(open(file.path(), &OpenOptions::default()), Err(Error::Locked { .. })));
}

#[test]
fn runs_and_discards_follow_the_holes_of_the_file() {
    let file = file(1 << 20);
    file.as_file().write_all_at(&[1; 65536], 65536).unwrap();
    let image = open(file.path(), &writable()).unwrap();
    let runs = || {
        let (mut at, mut found) = (0, Vec::new());
        while at < image.size() {
            let run = image.run(at, image.size() - at).unwrap();
            found.push((run.len, run.kind));
            at += run.len;
        }
        found
    };
    let holes = [(65536, RunKind::Zero), (65536, RunKind::Data), ((1 << 20) - 131_072, RunKind::Zero)];
    assert_eq!(runs(), holes);
    assert_eq!(image.run(65536 + 512, 512).unwrap(), Run { len: 512, kind: RunKind::Data });
    image.discard(65536, 65536).unwrap();
    assert_eq!(runs(), [(1 << 20, RunKind::Zero)]);
    assert_eq!(image.info().unwrap().allocated, 0);
}

#[test]
fn new_images_are_sparse_or_have_all_their_space() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let (sparse, full) = (dir.path().join("sparse"), dir.path().join("full"));
    create(&sparse, 1 << 20, Preallocate::Sparse).unwrap();
    create(&full, 1 << 20, Preallocate::Full).unwrap();
    let allocated = |path| open(path, &OpenOptions::default()).unwrap().info().unwrap().allocated;
    assert_eq!(allocated(&sparse), 0);
    assert!(allocated(&full) >= 1 << 20);
    assert!(matches!(create(&full, 512, Preallocate::Sparse), Err(Error::Open { .. })));
    for size in [0, 511, 513, MAX_SIZE + 512] {
        let refused = create(&dir.path().join("x"), size, Preallocate::Sparse);
        assert!(matches!(refused, Err(Error::Invalid { .. })));
        assert!(!dir.path().join("x").exists());
    }
}

#[test]
fn unsafe_cache_never_syncs() {
    let file = file(4096);
    let image = open(file.path(), &OpenOptions { cache: Cache::Unsafe, ..writable() }).unwrap();
    assert_eq!(image.flush_is_sync_of(), None);
    image.flush().unwrap();
    drop(image);
    assert_eq!(open(file.path(), &writable()).unwrap().flush_is_sync_of(), Some(0));
}

#[test]
fn identity_changes_with_what_an_image_holds_at_either_end() {
    let file = file(1 << 20);
    let image = open(file.path(), &writable()).unwrap();
    let before = image.identity().unwrap();
    assert_eq!(before, image.identity().unwrap());
    for offset in [0, (1 << 20) - 512] {
        write(&*image, offset, &[9; 512]).unwrap();
        assert_ne!(image.identity().unwrap().id, before.id);
        write(&*image, offset, &[0; 512]).unwrap();
        let after = image.identity().unwrap();
        assert_eq!((after.id, after.size), (before.id, before.size));
    }
    let time = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::new(3, 5);
    image.files()[0].set_modified(time).unwrap();
    assert_eq!(image.identity().unwrap().state, 3_000_000_005);
}

/// Opens with direct I/O; nothing where the file system has none.
fn open_direct(path: &Path) -> Option<Arc<dyn Image>> {
    match open(path, &OpenOptions { cache: Cache::None, ..writable() }) {
        Ok(image) => Some(image),
        Err(Error::Direct { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn direct_io_on_a_size_that_does_not_suit_is_refused_and_said_so() {
    let file = file(8192 + 512);
    match open(file.path(), &OpenOptions { cache: Cache::None, ..writable() }) {
        Ok(image) => assert_eq!(image.block_size(), 512),
        Err(error) => assert!(error.to_string().contains("writeback"), "{error}"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn direct_io_moves_the_same_bytes_as_the_page_cache_from_any_memory(
        requests in prop::collection::vec((0_u64..512, 1_usize..=300, 0_usize..600, any::<bool>(), any::<u8>()), 1..12)
    ) {
        let file = file(256 << 10);
        let Some(image) = open_direct(file.path()) else { return Ok(()) };
        let mut model = vec![0; 256 << 10];
        for (sector, sectors, skew, writes, fill) in requests {
            let sectors = sectors.min(512 - usize::try_from(sector).unwrap());
            let (offset, len) = (sector * SECTOR, sectors * 512);
            let at = usize::try_from(offset).unwrap();
            let mut memory: Vec<u8> = (0..len + skew).map(|i| fill ^ (i / 64).to_le_bytes()[0]).collect();
            let given = memory.clone();
            let slice = VolatileSlice::from(memory.as_mut_slice()).offset(skew).unwrap();
            let cut = skew.min(len);
            let pieces = [slice.subslice(0, cut).unwrap(), slice.offset(cut).unwrap()];
            if writes {
                image.write_at(offset, &pieces).unwrap();
                model[at..at + len].copy_from_slice(&given[skew..]);
            } else {
                image.read_at(offset, &pieces).unwrap();
                prop_assert_eq!(&memory[skew..], &model[at..at + len]);
            }
        }
        image.write_zeroes(0, 512, false).unwrap();
        model[..512].fill(0);
        drop(image);
        prop_assert!(std::fs::read(file.path()).unwrap() == model);
    }

    #[test]
    fn any_beginning_of_a_file_is_probed_without_panic(start in prop::collection::vec(any::<u8>(), 0..64)) {
        let file = file(0);
        std::fs::write(file.path(), &start).unwrap();
        prop_assert_eq!(crate::probe(file.path()).unwrap(), crate::open::kind_of(&start));
    }
}

/// A loop device on a file of 4 MiB.
struct Loop(PathBuf, tempfile::NamedTempFile);

impl Loop {
    fn new() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0x77; 4 << 20]).unwrap();
        let setup = std::process::Command::new("losetup").args(["-f", "--show"]).arg(file.path()).output();
        let setup = setup.unwrap();
        assert!(setup.status.success(), "{}", String::from_utf8_lossy(&setup.stderr));
        Self(String::from_utf8(setup.stdout).unwrap().trim().into(), file)
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        std::process::Command::new("losetup").arg("-d").arg(&self.0).status().unwrap();
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn block_device_shows_its_size_and_discards_and_zeroes_reach_its_file() {
    let device = Loop::new();
    for cache in [Cache::Writeback, Cache::None] {
        let image = open(&device.0, &OpenOptions { cache, ..writable() }).unwrap();
        assert_eq!((image.size(), image.block_size()), (4 << 20, 512));
        let blocks = || device.1.as_file().metadata().unwrap().blocks();
        let full = blocks();
        image.discard(0, 1 << 20).unwrap();
        assert!(blocks() < full, "the discard gave nothing back");
        for unmap in [false, true] {
            let at = if unmap { 2 << 20 } else { 3 << 20 };
            image.write_zeroes(at, 4096, unmap).unwrap();
            let data = read(&*image, at, 4608).unwrap();
            assert!(data[..4096].iter().all(|b| *b == 0) && data[4096] == 0x77);
        }
        image.flush().unwrap();
        assert_eq!(image.run(0, 4096).unwrap(), Run { len: 4096, kind: RunKind::Data });
        write(&*image, 0, &vec![0x77; 1 << 20]).unwrap();
        assert_eq!(image.grow(8 << 20).unwrap_err().kind(), io::ErrorKind::Unsupported);
        device.1.as_file().set_len(8 << 20).unwrap();
        assert!(std::process::Command::new("losetup").arg("-c").arg(&device.0).status().unwrap().success());
        image.grow(8 << 20).unwrap();
        assert_eq!(read(&*image, (8 << 20) - 512, 512).unwrap(), [0; 512]);
        drop(image);
        device.1.as_file().set_len(4 << 20).unwrap();
        assert!(std::process::Command::new("losetup").arg("-c").arg(&device.0).status().unwrap().success());
    }
}

#[test]
#[ignore = "needs root and loop devices"]
fn block_device_that_is_open_exclusively_is_refused_as_busy() {
    let device = Loop::new();
    let first = open(&device.0, &writable()).unwrap();
    assert!(matches!(open(&device.0, &writable()), Err(Error::Busy { .. })));
    drop(first);
    open(&device.0, &writable()).unwrap();
}
