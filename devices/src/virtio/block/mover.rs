//! Moving the data of requests between guest memory and the files of an image.
//!
//! What is in the page cache is there sooner than a queue of the kernel's can say so: such a read is made at once, if
//! that needs no waiting, and so is a write to the page cache. Everything else goes by io_uring.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmfs_image::{Access, Extent, Image};

use super::request::Request;
use super::ring::{Operation, Ring};
use super::slot::{Segment, Slot};

/// A write to the page cache that takes longer waited for storage, ...
const LONG: Duration = Duration::from_millis(2);
/// ... and for so long others are not waited for.
const PENANCE: Duration = Duration::from_millis(200);

/// Number of an operation that is not one of a segment.
const NO_SEGMENT: u64 = u64::MAX >> 16;

/// How far a request is.
#[derive(Debug)]
pub enum Progress {
    /// It is done, or failed.
    Done(io::Result<()>),
    /// The ring will tell.
    Pending,
    /// It can only be done by a call that waits.
    Call,
}

/// What moves data.
#[derive(Debug)]
pub struct Mover {
    ring: Ring,
    image: Option<Arc<dyn Image>>,
    files: Vec<Arc<File>>,
    /// The page cache is between, which can be read without waiting, ...
    cached_reads: bool,
    /// ... and written to.
    cached_writes: bool,
    /// Until when not.
    slow_until: Option<Instant>,
    extents: Vec<Extent>,
    done: Vec<(u64, i32)>,
}

impl Mover {
    /// Makes one for the calling thread, which alone may use it.
    ///
    /// # Errors
    ///
    /// The kernel has no io_uring, or this process may not use it.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            ring: Ring::new()?,
            image: None,
            files: Vec::new(),
            cached_reads: false,
            cached_writes: false,
            slow_until: None,
            extents: Vec::new(),
            done: Vec::new(),
        })
    }

    /// Readable when [`reap`](Self::reap) has something.
    pub fn fd(&self) -> RawFd {
        self.ring.fd()
    }

    /// Data are those of `image` from now on; `None` lets go of the one before. Nothing may be in flight.
    pub fn set_image(&mut self, image: Option<Arc<dyn Image>>) {
        self.ring.forget_files();
        self.files = image.as_ref().map_or_else(Vec::new, |image| image.files().to_vec());
        self.ring.use_files(&self.files);
        let cached = image.as_ref().is_some_and(|image| image.memory_alignment() == 1);
        (self.cached_reads, self.cached_writes, self.slow_until) = (cached, cached, None);
        self.image = image;
    }

    /// Number of operations in flight.
    pub fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    /// How many more requests can be begun.
    pub fn room(&self) -> usize {
        self.ring.room()
    }

    /// Whether [`reap`](Self::reap) has something.
    pub fn has_done(&mut self) -> bool {
        self.ring.has_done()
    }

    /// Hands the kernel what was begun; false if it has not taken all of that, and it is to be offered again after a
    /// [`MOMENT`](super::ring::MOMENT).
    pub fn submit(&mut self) -> bool {
        if let Err(error) = self.ring.submit() {
            tracing::error!("requests of a disk are not taken by the kernel: {error}");
        }
        self.ring.unsubmitted() == 0
    }

    /// Waits until something is done.
    pub fn wait(&mut self) {
        if let Err(error) = self.ring.wait() {
            tracing::error!("requests of a disk cannot be waited for: {error}");
            // Not at full speed, should that go on.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Begins the transfer of the slot with this number.
    pub fn start(&mut self, index: u16, slot: &mut Slot) -> Progress {
        let (offset, access) = match slot.request {
            Request::Read(offset) => (offset, Access::Read),
            Request::Write(offset) => (offset, Access::Write),
            _ => return Progress::Call,
        };
        if slot.len() == 0 {
            return Progress::Done(Ok(()));
        }
        let Some(image) = &self.image else { return Progress::Call };
        if !is_aligned(slot, image.memory_alignment()) {
            return Progress::Call;
        }
        self.extents.clear();
        let Some(ticket) = image.locate(offset, slot.len(), access, &mut self.extents) else {
            return Progress::Call;
        };
        slot.plan(&self.extents);
        (slot.ticket, slot.error, slot.anew, slot.pending) = (Some(ticket), None, false, 0);
        for number in 0..slot.segments.len() {
            let segment = slot.segments[number];
            match self.at_once(slot, segment, access) {
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    slot.error.get_or_insert(error);
                }
                None => self.queue(index, slot, number),
            }
        }
        self.finished(slot).unwrap_or(Progress::Pending)
    }

    /// Begins to make a file's data stable.
    pub fn sync(&mut self, index: u16, slot: &mut Slot, file: u16) -> Progress {
        (slot.ticket, slot.error, slot.anew, slot.pending) = (None, None, false, 0);
        // SAFETY: no memory is involved.
        match unsafe { self.ring.push(Operation::Sync { file }, token(index, NO_SEGMENT)) } {
            Ok(()) => {
                slot.pending = 1;
                Progress::Pending
            }
            Err(_) => Progress::Call,
        }
    }

    /// Moves a segment if that needs no waiting; `None` if it does.
    fn at_once(&mut self, slot: &Slot, segment: Segment, access: Access) -> Option<io::Result<()>> {
        let file = self.files.get(usize::from(segment.file))?;
        let pieces = slot.pieces(segment);
        match access {
            Access::Read if self.cached_reads => {
                match vectored(file, segment.offset, pieces, libc::SYS_preadv2, libc::RWF_NOWAIT) {
                    Ok(moved) if moved == segment.len => Some(Ok(())),
                    Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                        self.cached_reads = false;
                        None
                    }
                    // Not all of it is in the page cache; or the ring will find the same error.
                    _ => None,
                }
            }
            Access::Write if self.cached_writes => {
                let began = Instant::now();
                if self.slow_until.is_some_and(|until| began < until) {
                    return None;
                }
                // Where file systems do not say beforehand whether a write has to wait, it shows.
                let moved = vectored(file, segment.offset, pieces, libc::SYS_pwritev2, 0);
                let ended = Instant::now();
                self.slow_until = (ended - began > LONG).then(|| ended + PENANCE);
                match moved {
                    Ok(moved) if moved == segment.len => Some(Ok(())),
                    Err(error) if error.kind() != io::ErrorKind::Interrupted => Some(Err(error)),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    fn queue(&mut self, index: u16, slot: &mut Slot, number: usize) {
        let segment = slot.segments[number];
        let pieces = slot.pieces(segment);
        let (file, offset) = (segment.file, segment.offset);
        let (at, count) = (pieces.as_ptr(), u32::try_from(pieces.len()).unwrap_or(u32::MAX));
        let operation = match slot.request {
            Request::Read(_) => Operation::Read { file, offset, pieces: at, count },
            _ => Operation::Write { file, offset, pieces: at, count },
        };
        // SAFETY: the list stays as it is until nothing of the slot is pending, and whoever has the slot keeps the guest's
        // memory, which the pieces lie in, mapped.
        match unsafe { self.ring.push(operation, token(index, number as u64)) } {
            Ok(()) => slot.pending += 1,
            Err(_) => slot.anew = true,
        }
    }

    /// Looks for what is done, and tells `each` number of a slot whose request is, and what it came to.
    pub fn reap(&mut self, slots: &mut [Slot], mut each: impl FnMut(u16, Progress)) {
        let mut done = std::mem::take(&mut self.done);
        self.ring.reap(&mut done);
        for (token, result) in done.drain(..) {
            let index = u16::try_from(token & 0xffff).unwrap_or(u16::MAX);
            let Some(slot) = slots.get_mut(usize::from(index)) else { continue };
            slot.pending = slot.pending.saturating_sub(1);
            came_back(slot, token >> 16, result);
            if let Some(progress) = self.finished(slot) {
                each(index, progress);
            }
        }
        self.done = done;
    }

    /// What became of a slot's request, if nothing of it is in flight.
    fn finished(&self, slot: &mut Slot) -> Option<Progress> {
        if slot.pending > 0 {
            return None;
        }
        let error = slot.error.take();
        if let (Some(ticket), Some(image)) = (slot.ticket.take(), &self.image) {
            image.finish(ticket, error.is_none() && !slot.anew);
        }
        Some(match error {
            Some(error) => Progress::Done(Err(error)),
            None if std::mem::take(&mut slot.anew) => Progress::Call,
            None => Progress::Done(Ok(())),
        })
    }
}

/// Notes what an operation has come to.
fn came_back(slot: &mut Slot, number: u64, result: i32) {
    let segment = usize::try_from(number).ok().and_then(|number| slot.segments.get(number));
    let wanted = if number == NO_SEGMENT { 0 } else { segment.map_or(0, |segment| segment.len) };
    match u64::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)) {
        Ok(moved) if moved == wanted => {}
        // The rest, or what keeps it from being moved, is found by a call.
        Ok(_) => slot.anew = true,
        Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
            slot.anew = true;
        }
        Err(error) => {
            slot.error.get_or_insert(error);
        }
    }
}

/// Whether all memory of a slot is aligned as an image wants it.
fn is_aligned(slot: &Slot, alignment: usize) -> bool {
    let fits = |at: usize, len: usize| at.is_multiple_of(alignment) && len.is_multiple_of(alignment);
    alignment == 1 || slot.data().iter().all(|piece| fits(piece.ptr_guard().as_ptr().addr(), piece.len()))
}

fn token(index: u16, number: u64) -> u64 {
    u64::from(index) | number << 16
}

fn vectored(
    file: &File,
    offset: u64,
    pieces: &[libc::iovec],
    call: libc::c_long,
    flags: libc::c_int,
) -> io::Result<u64> {
    // The offset is one argument, for which two are counted (`pos_from_hilo` in Linux, fs/read_write.c).
    const HIGH: libc::c_ulong = 0;
    // Not by libc's functions, which make each call a point where a thread may be cancelled, at a price.
    // SAFETY: the pieces lie in guest memory, which whoever has the slot keeps mapped; that the guest may change it
    // meanwhile is as with memory that a device of hardware reads or writes.
    let moved =
        unsafe { libc::syscall(call, file.as_raw_fd(), pieces.as_ptr(), pieces.len(), offset, HIGH, flags) };
    u64::try_from(moved).map_err(|_| io::Error::last_os_error())
}
