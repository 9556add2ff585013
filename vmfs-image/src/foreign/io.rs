//! Reading and writing.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLockReadGuard, RwLockWriteGuard};
use std::time::UNIX_EPOCH;

use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{ShallowMapping, StorageExt};
use vm_memory::VolatileSlice;

use super::disk::Disk;
use super::open::load;
use super::{Foreign, Inner};
use crate::flat;
use crate::image::{Error, Format, Identity, Image, Info, MAX_SIZE, Run, RunKind, SECTOR};
use crate::lock::Mode;
use crate::transfer;

/// Pieces of one run, or of one write, that are looked at before it is taken for ended.
const MOST_PIECES: usize = 4096;

impl Foreign {
    fn shared(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`alone`](Self::alone), for what has to be flushed.
    fn changing(&self) -> RwLockWriteGuard<'_, Inner> {
        let inner = self.alone();
        self.dirty.store(true, Ordering::Release);
        inner
    }

    fn check(&self, offset: u64, len: u64, to_write: bool) -> io::Result<()> {
        let end = offset.checked_add(len).filter(|end| *end <= self.size());
        if end.is_none() || !offset.is_multiple_of(SECTOR) || !len.is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if to_write && !self.is_writable() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) {
        if self.no_holes.load(Ordering::Relaxed) {
            return;
        }
        #[cfg(test)]
        super::tests::record(|| super::tests::Step::Zero(offset, len));
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let punched = flat::allocate(&self.plain.file, mode, offset, len);
        if punched.is_err_and(|error| error.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            tracing::info!(
                "the file system of disk {} does not give discarded space back",
                self.path.display()
            );
            self.no_holes.store(true, Ordering::Relaxed);
        }
    }

    /// Gives up whole clusters, which read as zeroes then, and their space. Of version 2 only where nothing is below.
    fn free(&self, inner: &Inner, offset: u64, len: u64) -> io::Result<()> {
        let mut holes = Vec::new();
        let mut at = offset;
        while at < offset + len {
            let (mapping, len) = inner.mapping(at, offset + len - at)?;
            if let ShallowMapping::Raw { storage, offset, writable: true, .. } = mapping
                && storage.plain().is_some()
            {
                holes.push((offset, len));
            }
            at += len;
        }
        let mut at = offset;
        while at < offset + len {
            let rest = offset + len - at;
            // SAFETY: whoever has looked up where data lies, or does so, has the lock that this thread has alone.
            let freed = unsafe {
                if self.about.has_zeroes {
                    inner.image.inner().discard_to_zero_unsafe(at, rest)
                } else {
                    inner.image.inner().discard_to_backing_unsafe(at, rest)
                }
            };
            let (from, len) = freed?;
            if from != at || len == 0 {
                return Err(io::Error::other("clusters were not given up"));
            }
            at += len;
        }
        // Now that they belong to nobody, and before anybody can get them again.
        for (offset, len) in holes {
            self.punch(offset, len);
        }
        Ok(())
    }

    /// Does something with each piece of a range that is not known to read as zeroes, and whether it is below.
    fn for_each_used(
        &self,
        inner: &Inner,
        offset: u64,
        len: u64,
        mut todo: impl FnMut(u64, u64, bool) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let run = inner.run(at, end - at)?;
            let is_below = match run.kind {
                RunKind::Data => Some(false),
                RunKind::Absent if self.backing.is_some() => Some(true),
                RunKind::Zero | RunKind::Absent => None,
            };
            if let Some(is_below) = is_below {
                self.by_tables(inner, at, run.len, |at, len| todo(at, len, is_below))?;
            }
            at += run.len;
        }
        Ok(())
    }

    /// Does something with each piece of a range that one L2 table is for. Whatever it frees, no new table is put there before
    /// that is in the file.
    fn by_tables(
        &self,
        inner: &Inner,
        offset: u64,
        len: u64,
        mut todo: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(order) = &inner.order else { return Err(io::ErrorKind::PermissionDenied.into()) };
        let covered = order.covered();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let next = end.min(at - at % covered + covered);
            if order.needs_table(&self.plain, at)? {
                inner.image.flush()?;
            }
            todo(at, next - at)?;
            at = next;
        }
        Ok(())
    }

    /// The clusters that lie in a range as a whole; the last one of the disk may be a part.
    fn whole(&self, offset: u64, len: u64) -> (u64, u64) {
        let cluster = self.about.cluster.unwrap_or(SECTOR);
        let end = offset + len;
        let to = if end == self.size() { end } else { end - end % cluster };
        let from = offset.next_multiple_of(cluster);
        (from.min(to), to)
    }

    fn zero(&self, inner: &Inner, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let end = offset + len;
        let (from, to) = self.whole(offset, len);
        if from == to || !self.about.has_zeroes && (self.backing.is_some() || !unmap) {
            return self.zero_partly(inner, offset, len);
        }
        self.zero_partly(inner, offset, from - offset)?;
        if unmap {
            self.free(inner, from, to - from)?;
        } else {
            inner.image.write_zeroes(from, to - from)?;
        }
        self.zero_partly(inner, to, end - to)
    }

    /// Writes zeroes.
    fn zero_partly(&self, inner: &Inner, offset: u64, len: u64) -> io::Result<()> {
        const CHUNK: u64 = 64 << 10;
        let zeroes = vec![0; usize::try_from(CHUNK.min(len)).map_err(io::Error::other)?];
        let mut at = offset;
        while at < offset + len {
            let part = usize::try_from((offset + len - at).min(CHUNK)).map_err(io::Error::other)?;
            inner.image.write(&zeroes[..part], at)?;
            at += part as u64;
        }
        Ok(())
    }
}

impl Inner {
    fn mapping(&self, offset: u64, len: u64) -> io::Result<(ShallowMapping<'_, Disk>, u64)> {
        let (mapping, found) = self.image.get_shallow_mapping(offset, len)?;
        match found {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            found => Ok((mapping, found)),
        }
    }

    fn run(&self, offset: u64, len: u64) -> io::Result<Run> {
        let mut kind = None;
        let mut done = 0;
        for _ in 0..MOST_PIECES {
            let (mapping, found) = self.mapping(offset + done, len - done)?;
            let next = match mapping {
                ShallowMapping::Zero { explicit: true, .. } => RunKind::Zero,
                ShallowMapping::Zero { .. } | ShallowMapping::Indirect { .. } => RunKind::Absent,
                _ => RunKind::Data,
            };
            if *kind.get_or_insert(next) != next {
                break;
            }
            done += found;
            if done >= len {
                break;
            }
        }
        Ok(Run { len: done, kind: kind.unwrap_or(RunKind::Data) })
    }

    /// Writes where there is space already. Gives `None`, and has done nothing, where there is not.
    fn overwrite(&self, offset: u64, mut from: IoVector<'_>) -> io::Result<Option<()>> {
        let end = offset + from.len();
        let mut places = Vec::new();
        let mut at = offset;
        while at < end {
            let (ShallowMapping::Raw { storage, offset, writable: true, .. }, len) =
                self.mapping(at, end - at)?
            else {
                return Ok(None);
            };
            if places.len() == MOST_PIECES {
                return Ok(None);
            }
            places.push((storage, offset, len));
            at += len;
        }
        for (storage, offset, len) in places {
            let (now, later) = from.split_at(len);
            storage.writev(now, offset)?;
            from = later;
        }
        Ok(Some(()))
    }
}

impl Image for Foreign {
    fn path(&self) -> &Path {
        &self.path
    }

    fn format(&self) -> Format {
        self.format
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn block_size(&self) -> u32 {
        let direct = self.plain.direct.map(|direct| direct.file);
        direct.filter(|block| self.size().is_multiple_of(u64::from(*block))).unwrap_or(512)
    }

    fn memory_alignment(&self) -> usize {
        self.plain.direct.map_or(1, |direct| direct.memory)
    }

    fn is_writable(&self) -> bool {
        self.unfrozen.load(Ordering::Acquire)
    }

    fn set_writable(&self, writable: bool) -> Result<(), Error> {
        if writable && !self.writable {
            let what = "is open to be read; to be changed it has to be opened anew".to_owned();
            return Err(Error::Invalid { path: self.path.clone(), what });
        }
        let Some(lock) = self.locks.first() else { return Ok(()) };
        if !writable {
            if self.is_writable() {
                self.flush().map_err(|source| Error::Io {
                    path: self.path.clone(),
                    what: "make stable what was written to",
                    source,
                })?;
                self.unfrozen.store(false, Ordering::Release);
            }
            let set = lock.set(Mode::Shared);
            self.unfrozen.store(lock.mode() == Mode::Exclusive, Ordering::Release);
            return set;
        }
        lock.set(Mode::Exclusive)?;
        let mut inner = self.alone();
        if !inner.writable {
            match load(&self.plain, self.backing.as_ref(), true) {
                Ok(loaded) => *inner = loaded,
                Err(error) => {
                    let _ = lock.set(Mode::Shared);
                    return Err(error);
                }
            }
        }
        self.unfrozen.store(true, Ordering::Release);
        Ok(())
    }

    fn backing(&self) -> Option<&Arc<dyn Image>> {
        self.backing.as_ref()
    }

    fn read_at(&self, offset: u64, into: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.check(offset, transfer::total(into), false)?;
        let (vector, _mapped) = IoVectorMut::from_volatile_slice(into);
        self.shared().image.readv(vector, offset)
    }

    fn write_at(&self, offset: u64, from: &[VolatileSlice<'_>]) -> io::Result<()> {
        self.check(offset, transfer::total(from), true)?;
        let (vector, _mapped) = IoVector::from_volatile_slice(from);
        if self.shared().overwrite(offset, vector)?.is_some() {
            return Ok(());
        }
        let (vector, _mapped) = IoVector::from_volatile_slice(from);
        let inner = self.changing();
        let mut rest = Some(vector);
        self.by_tables(&inner, offset, transfer::total(from), |at, len| {
            let (now, later) = rest.take().unwrap_or_default().split_at(len);
            rest = Some(later);
            inner.image.writev(now, at)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check(offset, len, true)?;
        let inner = self.changing();
        self.for_each_used(&inner, offset, len, |at, len, _| self.zero(&inner, at, len, unmap))
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len, true)?;
        if !self.about.has_zeroes && self.backing.is_some() {
            return Ok(());
        }
        let inner = self.changing();
        self.for_each_used(&inner, offset, len, |at, len, is_below| {
            let (from, to) = self.whole(at, len);
            if is_below || from == to { Ok(()) } else { self.free(&inner, from, to - from) }
        })
    }

    fn flush(&self) -> io::Result<()> {
        let order = {
            let mut order = None;
            if self.dirty.load(Ordering::Acquire) {
                let inner = self.alone();
                inner.image.flush()?;
                self.dirty.store(false, Ordering::Release);
                order.clone_from(&inner.order);
            } else {
                order.clone_from(&self.shared().order);
            }
            order
        };
        match order {
            Some(order) => order.synced(|| self.plain.sync()),
            None => Ok(()),
        }
    }

    fn files(&self) -> &[Arc<File>] {
        &self.files
    }

    fn run(&self, offset: u64, len: u64) -> io::Result<Run> {
        self.check(offset, len, false)?;
        if len == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.shared().run(offset, len)
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        if !self.is_writable() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let inner = self.changing();
        let old = self.size();
        if size < old || size > MAX_SIZE || !size.is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if self.backing.as_ref().is_some_and(|below| below.size() > old) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the image that it lies on is larger, and what that has there would appear",
            ));
        }
        // What follows the end in its last cluster belongs to nobody, and need not be zero.
        let tail = old.next_multiple_of(self.about.cluster.unwrap_or(SECTOR)).min(size);
        // As in `by_tables`: the L1 table may have to become larger.
        inner.image.flush()?;
        inner.image.resize_grow(size, PreallocateMode::None)?;
        self.for_each_used(&inner, old, tail - old, |at, len, _| self.zero_partly(&inner, at, len))?;
        inner.image.flush()?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn info(&self) -> io::Result<Info> {
        let mut allocated = 0_u64;
        for file in &self.files[..self.own] {
            allocated = allocated.saturating_add(file.metadata()?.blocks().saturating_mul(512));
        }
        Ok(Info {
            path: self.path.clone(),
            format: self.format,
            size: self.size(),
            allocated,
            cluster_size: self.about.cluster,
            max_size: None,
            backing: self.about.backing.clone(),
            details: self.about.details.clone(),
        })
    }

    fn identity(&self) -> io::Result<Identity> {
        let mut identity = flat::identity(self, &self.plain.file)?;
        for file in &self.files {
            let changed = file.metadata()?.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default();
            identity.state = identity.state.max(u64::try_from(changed.as_nanos()).unwrap_or(u64::MAX));
        }
        Ok(identity)
    }
}
