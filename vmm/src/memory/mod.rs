//! Guest memory: where it lies in the guest's physical address space and what holds it on the host.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;

use devices::GuestRam;
use vm_memory::mmap::{MmapRegion, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionCollectionError,
    GuestRegionMmap,
};

use crate::config::model::Backing;

/// Start of the hole that is left below 4 GiB for devices and interrupt controllers.
pub const HOLE_START: u64 = 0xc000_0000;
/// End of the hole; memory that does not fit below it goes on from here.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// Guest memory that cannot be had from the host.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No memfd.
    #[error("cannot create a memory file of {} MiB for the guest", size >> 20)]
    Memfd {
        /// Bytes asked for.
        size: u64,
        /// What the kernel answered.
        source: io::Error,
    },
    /// No mapping.
    #[error("cannot map {} MiB of guest memory ({hint})", size >> 20)]
    Map {
        /// Bytes asked for.
        size: u64,
        /// What is to be looked at for this kind of backing.
        hint: &'static str,
        /// What the kernel answered.
        source: MmapRegionError,
    },
    /// The size is not one a machine can have on this host.
    #[error("{size} bytes of guest memory are more than this host can address")]
    Size {
        /// Bytes asked for.
        size: u64,
    },
    /// The pieces do not form an address space.
    #[error("guest memory cannot be laid out")]
    Layout(#[source] GuestRegionCollectionError),
}

/// The ranges of guest-physical addresses that hold `size` bytes of RAM: `(start, length)`, ascending.
#[must_use]
pub fn ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(HOLE_START);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((HOLE_END, size - low));
    }
    ranges
}

/// Makes `size` bytes of guest memory, none of it touched yet.
///
/// # Errors
///
/// [`Error`] if the host has not got it.
pub fn create(size: u64, backing: &Backing) -> Result<GuestRam, Error> {
    let file = match backing {
        Backing::Anonymous => None,
        Backing::Memfd => Some(memfd(size, 0)?),
        Backing::Hugetlbfs => Some(memfd(size, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)?),
    };
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, len) in ranges(size) {
        let bytes = usize::try_from(len).map_err(|_| Error::Size { size })?;
        let region = map(file.as_ref(), offset, bytes, backing).map_err(|source| Error::Map {
            size: len,
            hint: hint(backing),
            source,
        })?;
        regions.push(GuestRegionMmap::new(region, GuestAddress(start)).ok_or(Error::Size { size })?);
        offset += len;
    }
    GuestRam::from_regions(regions).map_err(Error::Layout)
}

fn hint(backing: &Backing) -> &'static str {
    match backing {
        Backing::Anonymous => "see vm.overcommit_memory and the limits of this process",
        Backing::Memfd => "see the free memory of the host and the limits of this process",
        Backing::Hugetlbfs => {
            "see HugePages_Free and Hugepagesize in /proc/meminfo: 2 MiB pages are reserved with vm.nr_hugepages"
        }
    }
}

fn map(
    file: Option<&File>,
    offset: u64,
    bytes: usize,
    backing: &Backing,
) -> Result<MmapRegion, MmapRegionError> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    match file {
        Some(file) => {
            let file = file.try_clone().map_err(MmapRegionError::Mmap)?;
            // Huge pages are reserved when they are mapped, so that a lack of them shows here and not as
            // a SIGBUS in the guest.
            let flags =
                libc::MAP_SHARED | if *backing == Backing::Hugetlbfs { 0 } else { libc::MAP_NORESERVE };
            MmapRegion::build(Some(FileOffset::new(file, offset)), bytes, prot, flags)
        }
        None => MmapRegion::build(
            None,
            bytes,
            prot,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        ),
    }
}

fn memfd(size: u64, flags: libc::c_uint) -> Result<File, Error> {
    const NAME: &CStr = c"guest-memory";
    let failed = |source| Error::Memfd { size, source };
    // SAFETY: NAME is a C string; the kernel checks the flags.
    let fd =
        unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | flags) };
    if fd < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    // SAFETY: fd was just opened and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(failed)?;
    // Whoever is handed this file later can neither cut the guest's memory off under a mapping nor grow it.
    // SAFETY: F_ADD_SEALS takes an integer.
    let sealed = unsafe {
        libc::fcntl(fd, libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL)
    };
    if sealed < 0 {
        return Err(failed(io::Error::last_os_error()));
    }
    Ok(file)
}

/// Asks for huge pages under anonymous guest memory, from now on.
///
/// What is there already stays as it is until the kernel collapses it: the little that is written before the guest runs
/// (its kernel, tables) is not worth the time that it takes to clear 2 MiB around each of its parts.
pub fn advise_huge_pages(memory: &GuestRam, backing: &Backing) {
    if *backing != Backing::Anonymous {
        return;
    }
    for region in memory.iter() {
        let map = region.get_mmap();
        // SAFETY: the range is exactly this mapping; the advice changes no contents.
        let advised = unsafe { libc::madvise(map.as_ptr().cast(), map.size(), libc::MADV_HUGEPAGE) };
        if advised < 0 {
            tracing::debug!("huge pages are not to be had for guest memory: {}", io::Error::last_os_error());
        }
    }
}

/// Host address of each region, for the hypervisor: `(guest address, length, host address)`.
pub fn host_regions(memory: &GuestRam) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
    memory.iter().map(|region| {
        let host = region.get_mmap().as_ptr() as usize as u64;
        (region.start_addr().0, region.len(), host)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn memory_up_to_the_hole_is_one_range() {
        assert_eq!(ranges(128 << 20), [(0, 128 << 20)]);
        assert_eq!(ranges(HOLE_START), [(0, HOLE_START)]);
    }

    #[test]
    fn memory_past_the_hole_goes_on_above_four_gib() {
        assert_eq!(ranges(HOLE_START + (2 << 20)), [(0, HOLE_START), (HOLE_END, 2 << 20)]);
        assert_eq!(ranges(256 << 30).iter().map(|r| r.1).sum::<u64>(), 256 << 30);
    }

    #[test]
    fn anonymous_and_memfd_memory_of_256_gib_is_mapped_on_both_sides_of_the_hole() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let memory = create(256 << 30, &backing).unwrap();
            memory.write_obj(7_u64, GuestAddress(HOLE_START - 8)).unwrap();
            memory.write_obj(9_u64, GuestAddress(HOLE_END)).unwrap();
            assert!(memory.write_obj(1_u8, GuestAddress(HOLE_START)).is_err(), "the hole holds no memory");
            assert_eq!(memory.read_obj::<u64>(GuestAddress(HOLE_START - 8)).unwrap(), 7);
            assert_eq!(memory.read_obj::<u64>(GuestAddress(HOLE_END)).unwrap(), 9);
            assert_eq!(memory.last_addr().0, HOLE_END + (256 << 30) - HOLE_START - 1);
        }
    }

    #[test]
    fn memfd_cannot_be_resized() {
        let file = memfd(2 << 20, 0).unwrap();
        assert!(file.set_len(0).is_err());
        assert!(file.set_len(4 << 20).is_err());
    }

    #[test]
    fn hugetlbfs_beyond_the_reserve_is_refused_with_a_hint() {
        let error = create(256 << 30, &Backing::Hugetlbfs).unwrap_err();
        assert!(matches!(error, Error::Map { .. } | Error::Memfd { .. }), "{error}");
    }
}
