//! The initial RAM disk. Its contents are the guest's business.

use std::fs::File;
use std::path::{Path, PathBuf};

use devices::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::kernel::open_regular;
use super::{Error, Kernel};

const PAGE: u64 = 4096;

/// An initial RAM disk that is open and not empty.
#[derive(Debug)]
pub struct Initrd {
    path: PathBuf,
    file: File,
    size: u64,
}

impl Initrd {
    /// Opens `path`.
    ///
    /// # Errors
    ///
    /// [`Error`] if it is not a readable, regular file with something in it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (file, size) = open_regular("initrd", path)?;
        Ok(Self { path: path.to_owned(), file, size })
    }

    /// Where it comes to lie in a guest whose RAM is `ram`: as high as the kernel allows.
    ///
    /// # Errors
    ///
    /// [`Error::InitrdSize`].
    pub fn address(&self, ram: &[(u64, u64)], kernel: &Kernel) -> Result<u64, Error> {
        let does_not_fit =
            || Error::InitrdSize { path: self.path.clone(), size: self.size, kernel_end: kernel.end() };
        let low_end = ram.first().map_or(0, |range| range.1);
        let top = low_end.min(kernel.initrd_end());
        let start = top.checked_sub(self.size).ok_or_else(does_not_fit)? / PAGE * PAGE;
        (start >= kernel.end()).then_some(start).ok_or_else(does_not_fit)
    }

    /// Reads it into `memory`; says where it lies and how long it is.
    pub(super) fn place(
        &mut self,
        memory: &GuestRam,
        ram: &[(u64, u64)],
        kernel: &Kernel,
    ) -> Result<(u64, u64), Error> {
        let address = self.address(ram, kernel)?;
        let size = usize::try_from(self.size).map_err(|_| Error::Memory { address })?;
        memory.read_exact_volatile_from(GuestAddress(address), &mut self.file, size).map_err(|error| {
            Error::Read { what: "initrd", path: self.path.clone(), source: std::io::Error::other(error) }
        })?;
        Ok((address, self.size))
    }
}
