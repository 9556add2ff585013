//! Calls that wait for storage, made where the queue's own thread does not wait for them, or does.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use vm_memory::VolatileSlice;
use vmfs_image::Image;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::request::Request;
use crate::GuestRam;

/// A call.
#[derive(Debug)]
pub struct Call {
    /// What is to be done.
    pub request: Request,
    /// The memory of its data.
    pub data: Vec<VolatileSlice<'static>>,
    /// What was changed has to be stable as well.
    pub then_flush: bool,
}

// SAFETY: what makes it otherwise are pointers into guest memory, which is there for every thread; whoever has the call
// keeps that memory mapped.
unsafe impl Send for Call {}

impl Call {
    /// Makes the call.
    pub fn carry_out(&self, image: &dyn Image) -> io::Result<()> {
        match &self.request {
            Request::Read(offset) => return image.read_at(*offset, &self.data),
            Request::Write(offset) => image.write_at(*offset, &self.data)?,
            Request::Flush => return image.flush(),
            Request::Discard(ranges) => {
                return ranges.iter().try_for_each(|range| image.discard(range.offset, range.len));
            }
            Request::Zero(ranges) => {
                ranges
                    .iter()
                    .try_for_each(|range| image.write_zeroes(range.offset, range.len, range.unmap))?;
            }
            Request::Identify | Request::Refused(_) => return Ok(()),
        }
        if self.then_flush { image.flush() } else { Ok(()) }
    }
}

/// Number of a slot, and what its call came to.
type Result = (u16, io::Result<()>);

/// Where calls of a queue come back to.
#[derive(Debug)]
pub struct Returns {
    list: Mutex<Vec<Result>>,
    /// There is something.
    some: AtomicBool,
    changed: Condvar,
    event: EventFd,
}

impl Returns {
    /// Nothing has come back.
    ///
    /// # Errors
    ///
    /// No event descriptor is to be had.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { list: Mutex::default(), some: AtomicBool::new(false), changed: Condvar::new(), event })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Result>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Readable when something has come back.
    pub fn fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Whether [`take`](Self::take) would find something.
    pub fn has_some(&self) -> bool {
        self.some.load(Ordering::Acquire)
    }

    /// What has come back since.
    pub fn take(&self) -> Vec<Result> {
        if !self.has_some() {
            return Vec::new();
        }
        let mut list = self.lock();
        self.event.read().unwrap_or_default();
        self.some.store(false, Ordering::Release);
        std::mem::take(&mut list)
    }

    /// Waits until something has come back.
    pub fn wait(&self) {
        let mut list = self.lock();
        while list.is_empty() {
            list = self.changed.wait(list).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Makes `call`, and gives it back as that of `slot`. By then this thread has neither image nor memory any more.
    pub fn carry_out(&self, slot: u16, call: Call, image: Arc<dyn Image>, memory: Arc<GuestRam>) {
        let result = call.carry_out(&*image);
        drop((call, memory, image));
        // With the lock: an event signalled after what it tells of was taken would stay signalled.
        let mut list = self.lock();
        list.push((slot, result));
        self.some.store(true, Ordering::Release);
        self.changed.notify_all();
        // Only an overflow of the counter can fail, and then the event is signalled already.
        self.event.write(1).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::GuestAddress;
    use vmfs_image::{OpenOptions, flat};

    #[test]
    fn event_is_no_longer_signalled_once_all_was_taken() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        flat::create(&path, 4096, flat::Preallocate::Sparse).unwrap();
        let image = vmfs_image::open(&path, &OpenOptions::default()).unwrap();
        let memory = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 4096)]).unwrap());
        let returns = Returns::new().unwrap();
        for slot in 0..1000 {
            std::thread::scope(|scope| {
                let call = Call { request: Request::Identify, data: Vec::new(), then_flush: false };
                scope.spawn(|| returns.carry_out(slot, call, image.clone(), memory.clone()));
                let mut taken = Vec::new();
                while taken.is_empty() {
                    if slot % 2 == 0 {
                        returns.wait();
                    }
                    taken = returns.take();
                }
                assert!(matches!(&taken[..], [(back, Ok(()))] if *back == slot));
            });
            // Who sleeps until it is signalled would not sleep.
            assert!(returns.event.read().is_err() && !returns.has_some());
        }
    }
}
