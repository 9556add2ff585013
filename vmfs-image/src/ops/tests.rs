use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use vm_memory::VolatileSlice;

use super::*;
use crate::flat::{self, Preallocate};
use crate::image::{Access, Extent, Format, Identity, Info, Run, SECTOR, Ticket};
use crate::open::{OpenOptions, open};

const SIZE: u64 = 1 << 20;

fn on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn flat(dir: &Path, name: &str, size: u64) -> Arc<dyn Image> {
    let path = dir.join(name);
    flat::create(&path, size, Preallocate::Sparse).unwrap();
    let options = OpenOptions { writable: true, format: Some(Format::Flat), ..OpenOptions::default() };
    open(&path, &options).unwrap()
}

fn write(image: &dyn Image, offset: u64, bytes: &[u8]) {
    image.write_at(offset, &[VolatileSlice::from(bytes.to_vec().as_mut_slice())]).unwrap();
}

fn read(image: &dyn Image) -> Vec<u8> {
    let mut bytes = vec![0xee; usize::try_from(image.size()).unwrap()];
    image.read_at(0, &[VolatileSlice::from(bytes.as_mut_slice())]).unwrap();
    bytes
}

fn dir() -> tempfile::TempDir {
    // Not in /tmp, which may be a file system without holes.
    tempfile::tempdir_in(".").unwrap()
}

/// A layer of a chain: sectors of one letter each, over a backing.
#[derive(Debug)]
struct Layer {
    below: Option<Arc<dyn Image>>,
    /// For each sector what it holds: a letter, `0` for zeroes, or a space for nothing.
    sectors: Vec<u8>,
}

impl Layer {
    fn over(sectors: &str, below: Option<Arc<dyn Image>>) -> Arc<dyn Image> {
        Arc::new(Self { below, sectors: sectors.bytes().collect() })
    }
}

impl Image for Layer {
    fn path(&self) -> &Path {
        Path::new("layer")
    }
    fn format(&self) -> Format {
        Format::Thin
    }
    fn size(&self) -> u64 {
        self.sectors.len() as u64 * SECTOR
    }
    fn block_size(&self) -> u32 {
        512
    }
    fn is_writable(&self) -> bool {
        false
    }
    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.below.as_ref()
    }
    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        let mut sector = usize::try_from(offset / SECTOR).unwrap();
        for piece in into {
            for at in (0..piece.len()).step_by(512) {
                let piece = piece.subslice(at, 512).unwrap();
                match (self.sectors[sector], &self.below) {
                    (b' ', Some(below)) if sector as u64 * SECTOR < below.size() => {
                        below.read_at(sector as u64 * SECTOR, &[piece])?;
                    }
                    (b'0' | b' ', _) => piece.copy_from(&[0_u8; 512]),
                    (letter, _) => piece.copy_from(&[letter; 512]),
                }
                sector += 1;
            }
        }
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[VolatileSlice<'_>]) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn locate(&self, offset: u64, len: u64, access: Access, extents: &mut Vec<Extent>) -> Option<Ticket> {
        let place = crate::image::Place::File { file: 0, offset: offset + 4096 };
        extents.push(Extent { len, place });
        (access == Access::Read).then_some(Ticket(1))
    }
    fn run(&self, offset: u64, len: u64) -> io::Result<Run> {
        let kind = |sector: &u8| match sector {
            b'0' => RunKind::Zero,
            b' ' => RunKind::Absent,
            _ => RunKind::Data,
        };
        let from = usize::try_from(offset / SECTOR).unwrap();
        let rest = &self.sectors[from..from + usize::try_from(len / SECTOR).unwrap()];
        let same = rest.iter().take_while(|sector| kind(sector) == kind(&rest[0])).count();
        Ok(Run { len: same as u64 * SECTOR, kind: kind(&rest[0]) })
    }
    fn grow(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn info(&self) -> io::Result<Info> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn identity(&self) -> io::Result<Identity> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn chain() -> Arc<dyn Image> {
    let base = Layer::over("aabb0  c", None);
    let middle = Layer::over("  d0    e ", Some(base));
    Layer::over("f   0     g ", Some(middle))
}

#[test]
fn chain_is_mapped_with_depths_and_places() {
    let image = chain();
    let mut pieces = Vec::new();
    map(&*image, &mut |piece| {
        let text = format!(
            "{}+{} {} {}{}{:?}",
            piece.offset / SECTOR,
            piece.len / SECTOR,
            piece.depth,
            if piece.data { "data " } else { "" },
            if piece.present { "present " } else { "" },
            piece.file_offset.map(|offset| offset / SECTOR),
        );
        pieces.push(text);
        ControlFlow::Continue(())
    })
    .unwrap();
    let expected = [
        "0+1 0 data present Some(8)",
        "1+1 2 data present Some(9)",
        "2+1 1 data present Some(10)",
        "3+1 1 present None",
        "4+1 0 present None",
        "5+2 2 None",
        "7+1 2 data present Some(15)",
        "8+1 1 data present Some(16)",
        "9+1 1 None",
        "10+1 0 data present Some(18)",
        "11+1 0 None",
    ];
    assert_eq!(pieces, expected);
}

#[test]
fn copy_of_a_chain_reads_as_the_chain() {
    let dir = dir();
    let (image, copied) = (chain(), flat(dir.path(), "copy", 8192));
    write(&*copied, 0, &[b'x'; 8192]);
    copy(&*image, &*copied, &mut on).unwrap();
    let mut expected: Vec<u8> =
        "fad00\0\0ce\0g".bytes().flat_map(|b| [if b == b'0' { 0 } else { b }; 512]).collect();
    expected.resize(8192, 0);
    assert_eq!(read(&*copied), expected);
}

#[test]
fn target_that_is_too_small_is_refused() {
    let dir = dir();
    let (large, small) = (flat(dir.path(), "l", 4096), flat(dir.path(), "s", 2048));
    assert!(matches!(copy(&*large, &*small, &mut on), Err(Error::Invalid { .. })));
}

#[test]
fn interrupted_conversion_leaves_nothing_and_a_finished_one_only_the_image() {
    let dir = dir();
    let src = flat(dir.path(), "src", 16 << 20);
    write(&*src, 8 << 20, &[1; 4096]);
    let path = dir.path().join("dst");
    let options =
        ConvertOptions { format: Format::Flat, preallocate: Preallocate::Sparse, detect_zeroes: true };
    let stop = &mut |done, _| if done > 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    assert!(matches!(convert(&*src, &path, &options, stop), Err(Error::Interrupted { .. })));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    // What a process that was killed left.
    std::fs::write(dir.path().join(".dst.unfinished"), "half").unwrap();
    let mut last = (0, 1);
    let told = &mut |done, total| {
        assert!(done >= last.0 && done <= total);
        last = (done, total);
        ControlFlow::Continue(())
    };
    convert(&*src, &path, &options, told).unwrap();
    assert_eq!(last, (16 << 20, 16 << 20));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    let dst = open(&path, &OpenOptions::default()).unwrap();
    assert_eq!(compare(&*src, &*dst, true, &mut on).unwrap(), Comparison::Identical);
    let again = convert(&*src, &path, &options, &mut on).unwrap_err().to_string();
    assert!(again.contains("already"), "{again}");
}

#[test]
fn conversion_to_a_place_where_another_is_at_work_leaves_that_alone() {
    let dir = dir();
    let src = flat(dir.path(), "src", 1 << 20);
    let path = dir.path().join("dst");
    let options =
        ConvertOptions { format: Format::Thin, preallocate: Preallocate::Sparse, detect_zeroes: true };
    let mut others = Vec::new();
    let meanwhile = &mut |_, _| {
        others.push(convert(&*src, &path, &options, &mut on).unwrap_err());
        ControlFlow::Continue(())
    };
    convert(&*src, &path, &options, meanwhile).unwrap();
    assert!(matches!(&others[..], [Error::Locked { path: named, .. }, ..] if *named == path), "{others:?}");
    assert_eq!(open(&path, &OpenOptions::default()).unwrap().format(), Format::Thin);
}

#[test]
fn preallocated_copy_keeps_its_space() {
    let dir = dir();
    let src = flat(dir.path(), "src", SIZE);
    let options =
        ConvertOptions { format: Format::Flat, preallocate: Preallocate::Full, detect_zeroes: true };
    let path = dir.path().join("dst");
    convert(&*src, &path, &options, &mut on).unwrap();
    let dst = open(&path, &OpenOptions::default()).unwrap();
    assert!(dst.info().unwrap().allocated >= SIZE);
}

#[test]
fn sizes_and_allocation_count_only_in_a_strict_comparison() {
    let dir = dir();
    let (a, b) = (flat(dir.path(), "a", SIZE), flat(dir.path(), "b", 2 * SIZE));
    assert_eq!(compare(&*a, &*b, false, &mut on).unwrap(), Comparison::Identical);
    let sizes = Comparison::Sizes { first: SIZE, second: 2 * SIZE };
    assert_eq!(compare(&*a, &*b, true, &mut on).unwrap(), sizes);
    write(&*b, SIZE + 512, &[0; 1024]);
    assert_eq!(compare(&*a, &*b, false, &mut on).unwrap(), Comparison::Identical);
    let mut sector = [0; 512];
    sector[5] = 1;
    write(&*b, SIZE + 1024, &sector);
    for (first, second) in [(&a, &b), (&b, &a)] {
        let different = Comparison::Different { offset: SIZE + 1024 + 5 };
        assert_eq!(compare(&**first, &**second, false, &mut on).unwrap(), different);
    }
    a.grow(2 * SIZE).unwrap();
    write(&*b, SIZE + 1024, &[0; 512]);
    assert_eq!(compare(&*a, &*b, false, &mut on).unwrap(), Comparison::Identical);
    let allocation = compare(&*a, &*b, true, &mut on).unwrap();
    assert!(
        matches!(allocation, Comparison::Allocation { offset } if offset <= SIZE + 1024),
        "{allocation:?}"
    );
}

/// Where pieces of 4 KiB begin, and what they are filled with.
fn pattern() -> impl Strategy<Value = Vec<(u64, u8)>> {
    prop::collection::vec((0..SIZE / 4096, prop_oneof![2 => Just(0_u8), 3 => any::<u8>()]), 0..40)
}

fn fill(image: &dyn Image, pattern: &[(u64, u8)]) {
    for (block, fill) in pattern {
        write(image, block * 4096, &[*fill; 4096]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn copies_of_sparse_files_are_equal_and_as_sparse(
        from in pattern(), before in pattern(), detect_zeroes in any::<bool>(), larger in any::<bool>()
    ) {
        let dir = dir();
        let (src, dst) = (flat(dir.path(), "src", SIZE), flat(dir.path(), "dst", SIZE << u8::from(larger)));
        fill(&*src, &from);
        fill(&*dst, &before);
        copy_with(&*src, &*dst, CopyOptions { detect_zeroes, ..CopyOptions::default() }, &mut on).unwrap();
        let mut expected = read(&*src);
        expected.resize(usize::try_from(dst.size()).unwrap(), 0);
        prop_assert!(read(&*dst) == expected);
        prop_assert_eq!(compare(&*src, &*dst, false, &mut on).unwrap(), Comparison::Identical);
        // A file in many pieces takes a block more, in which they are listed.
        let list = 4096;
        prop_assert!(dst.info().unwrap().allocated <= src.info().unwrap().allocated + list);
        if detect_zeroes {
            let blocks = expected.chunks(4096).filter(|block| block.iter().any(|b| *b != 0)).count();
            prop_assert!(dst.info().unwrap().allocated <= blocks as u64 * 4096 + list);
        }
    }

    #[test]
    fn any_one_byte_that_differs_is_found(
        pattern in pattern(), place in 0..SIZE, change in 1..=255_u8, swapped in any::<bool>()
    ) {
        let dir = dir();
        let (a, b) = (flat(dir.path(), "a", SIZE), flat(dir.path(), "b", SIZE));
        fill(&*a, &pattern);
        copy(&*a, &*b, &mut on).unwrap();
        let mut byte = [0];
        b.files()[0].read_exact_at(&mut byte, place).unwrap();
        b.files()[0].write_all_at(&[byte[0] ^ change], place).unwrap();
        let (first, second) = if swapped { (&b, &a) } else { (&a, &b) };
        let found = compare(&**first, &**second, false, &mut on).unwrap();
        prop_assert_eq!(found, Comparison::Different { offset: place });
    }

    #[test]
    fn blocks_of_zeroes_are_told_from_others(len in 0_usize..300, place in 0_usize..300, byte in any::<u8>()) {
        let mut bytes = vec![0; len];
        if let Some(at) = bytes.get_mut(place) {
            *at = byte;
        }
        prop_assert_eq!(super::copy::all_zero(&bytes), bytes.iter().all(|b| *b == 0));
    }
}
