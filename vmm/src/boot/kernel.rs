//! Recognising a kernel image, and putting it into guest memory.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use devices::GuestRam;
use linux_loader::loader::bootparam::setup_header;
use vm_memory::{Bytes, GuestAddress};

use super::bzimage::{self, Bzimage};
use super::elf::{Elf, Segment};
use super::layout;
use super::{Entry, Error};

/// Longest command line that Linux takes on x86 (`COMMAND_LINE_SIZE`), less its terminator.
const LINUX_CMDLINE_MAX: usize = 2047;

/// Where the bytes of a kernel come from.
#[derive(Debug)]
enum Source {
    File(File),
    /// An unpacked payload.
    Bytes(Vec<u8>),
}

/// A kernel image that has been recognised and checked.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    source: Source,
    segments: Vec<Segment>,
    entry: Entry,
    header: Option<setup_header>,
}

/// Opens `path`, which has to be a regular file that is not empty.
pub(super) fn open_regular(what: &'static str, path: &Path) -> Result<(File, u64), Error> {
    let path = || path.to_owned();
    // O_NONBLOCK: a FIFO without a writer is refused below instead of being waited for.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path())
        .map_err(|source| Error::Open { what, path: path(), source })?;
    let metadata = file.metadata().map_err(|source| Error::Read { what, path: path(), source })?;
    if !metadata.is_file() {
        return Err(Error::Kind { what, path: path() });
    }
    match metadata.len() {
        0 => Err(Error::Empty { what, path: path() }),
        len => Ok((file, len)),
    }
}

impl Kernel {
    /// Opens and recognises `path`.
    ///
    /// # Errors
    ///
    /// [`Error`] if it is not a kernel that can be booted here; the message says what would be.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (file, len) = open_regular("kernel", path)?;
        let read_failed = |source| Error::Read { what: "kernel", path: path.to_owned(), source };
        let mut start = vec![0; usize::try_from(len.min(bzimage::HEADER_END)).unwrap_or_default()];
        file.read_exact_at(&mut start, 0).map_err(read_failed)?;
        if start.starts_with(&object::elf::ELFMAG) {
            let elf =
                Elf::parse_file(&file, len).map_err(|reason| Error::Elf { path: path.to_owned(), reason })?;
            return Ok(Self::from_elf(path, Source::File(file), elf, None));
        }
        let Some(image) = Bzimage::recognise(&start) else {
            return Err(Error::Unknown { path: path.to_owned() });
        };
        Self::from_bzimage(path, file, len, image)
    }

    fn from_elf(path: &Path, source: Source, elf: Elf, header: Option<setup_header>) -> Self {
        let entry = match elf.pvh_entry {
            Some(rip) => Entry::Pvh { rip },
            None => Entry::Linux64 { rip: elf.entry },
        };
        Self { path: path.to_owned(), source, segments: elf.segments, entry, header }
    }

    fn from_bzimage(
        path: &Path,
        mut file: File,
        len: u64,
        image: Result<Bzimage, String>,
    ) -> Result<Self, Error> {
        let refused = |reason| Error::Bzimage { path: path.to_owned(), reason };
        let image = image.map_err(refused)?;
        let unpacked = image.payload(len).and_then(|(offset, len)| {
            let mut packed = vec![0; usize::try_from(len).map_err(|error| error.to_string())?];
            file.read_exact_at(&mut packed, offset).map_err(|error| error.to_string())?;
            let bytes = super::payload::unpack(&packed)?;
            let elf = Elf::parse_bytes(&bytes)?;
            Ok((bytes, elf))
        });
        match unpacked {
            Ok((bytes, elf)) => Ok(Self::from_elf(path, Source::Bytes(bytes), elf, Some(image.header))),
            Err(reason) => {
                let segment =
                    image.own_entry(len).map_err(|second| refused(format!("{reason}; {second}")))?;
                tracing::info!("{}: {reason}; the image unpacks itself in the guest", path.display());
                let entry = Entry::Linux64 { rip: segment.address + bzimage::ENTRY_64 };
                file.seek(SeekFrom::Start(0)).map_err(|error| refused(error.to_string()))?;
                let (path, source) = (path.to_owned(), Source::File(file));
                Ok(Self { path, source, segments: vec![segment], entry, header: Some(image.header) })
            }
        }
    }

    /// Address after the last that the kernel occupies at its start.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.segments.iter().map(Segment::end).max().unwrap_or(0)
    }

    /// Whether the kernel's pieces leave the first MiB, where what the monitor prepares for it lies, alone.
    ///
    /// # Errors
    ///
    /// [`Error::Low`] with the first piece that does not.
    pub fn check_start(&self) -> Result<(), Error> {
        match self.segments.iter().find(|segment| segment.address < layout::HIGH_START) {
            Some(low) => Err(Error::Low { path: self.path.clone(), start: low.address }),
            None => Ok(()),
        }
    }

    /// Whether the kernel's pieces lie in RAM, given as `(start, end)` ranges.
    ///
    /// # Errors
    ///
    /// [`Error::Placement`] with the first piece that does not; [`Error::Low`].
    pub fn check_placement(&self, ram: &[(u64, u64)]) -> Result<(), Error> {
        self.check_start()?;
        for segment in &self.segments {
            let (start, end) = (segment.address, segment.end());
            if !ram.iter().any(|range| range.0 <= start && end <= range.1) {
                return Err(Error::Placement { path: self.path.clone(), start, end });
            }
        }
        Ok(())
    }

    /// How it is entered.
    #[must_use]
    pub fn entry(&self) -> Entry {
        self.entry
    }

    /// Setup header of the bzImage it came from.
    #[must_use]
    pub(super) fn setup_header(&self) -> Option<&setup_header> {
        self.header.as_ref()
    }

    /// Longest command line in bytes, without terminator.
    #[must_use]
    pub fn cmdline_max(&self) -> usize {
        let announced = self.header.as_ref().and_then(|h| usize::try_from(h.cmdline_size).ok());
        announced.filter(|size| *size > 0).unwrap_or(LINUX_CMDLINE_MAX)
    }

    /// Address after the highest that an initial RAM disk may occupy.
    #[must_use]
    pub(super) fn initrd_end(&self) -> u64 {
        // An ELF does not say; Linux maps all of low memory early.
        self.header
            .as_ref()
            .filter(|h| h.initrd_addr_max > 0)
            .map_or(u64::from(u32::MAX), |h| u64::from(h.initrd_addr_max) + 1)
    }

    pub(super) fn place(&mut self, memory: &GuestRam) -> Result<(), Error> {
        self.check_placement(&layout::ram(memory))?;
        for segment in &self.segments {
            // What a segment has in memory beyond the file is zero, as fresh guest memory is.
            let (address, offset, len) = (GuestAddress(segment.address), segment.offset, segment.file_len);
            let read_failed = |source| Error::Read { what: "kernel", path: self.path.clone(), source };
            let len = usize::try_from(len).map_err(|_| read_failed(io::ErrorKind::FileTooLarge.into()))?;
            match &mut self.source {
                Source::File(file) => {
                    file.seek(SeekFrom::Start(offset)).map_err(read_failed)?;
                    memory
                        .read_exact_volatile_from(address, file, len)
                        .map_err(|error| read_failed(io::Error::other(error)))?;
                }
                Source::Bytes(bytes) => {
                    let start = usize::try_from(offset).unwrap_or(usize::MAX);
                    let part = start.checked_add(len).and_then(|end| bytes.get(start..end));
                    let part = part.ok_or_else(|| read_failed(io::ErrorKind::UnexpectedEof.into()))?;
                    memory.write_slice(part, address).map_err(|_| Error::Memory { address: address.0 })?;
                }
            }
        }
        Ok(())
    }
}
