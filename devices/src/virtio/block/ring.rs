//! Transfers by io_uring: many at a time, by a single thread.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{EnterFlags, IoUring, opcode, types};

/// Most transfers queued for the kernel at once; others wait for these to be submitted, not to be done.
const ENTRIES: u32 = 128;
/// Most that should not be done, so that the kernel has room for what is.
const MOST: usize = 2 * ENTRIES as usize;

/// After so long the kernel is offered again what it has not taken.
pub const MOMENT: Duration = Duration::from_millis(1);

/// What is to be done with a file of those in use, by its index.
#[derive(Debug, Clone, Copy)]
pub enum Operation {
    /// Fill memory from an offset.
    Read {
        /// Which file.
        file: u16,
        /// Byte offset in it.
        offset: u64,
        /// Pieces of memory.
        pieces: *const libc::iovec,
        /// How many.
        count: u32,
    },
    /// Write memory to an offset.
    Write {
        /// Which file.
        file: u16,
        /// Byte offset in it.
        offset: u64,
        /// Pieces of memory.
        pieces: *const libc::iovec,
        /// How many.
        count: u32,
    },
    /// Make its data stable.
    Sync {
        /// Which file.
        file: u16,
    },
}

/// A ring. All calls have to come from the thread that made it.
pub struct Ring {
    ring: IoUring,
    files: Vec<RawFd>,
    /// The kernel has taken the files, so that it need not look them up each time.
    registered: bool,
    unsubmitted: usize,
    in_flight: usize,
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").field("files", &self.files).field("in_flight", &self.in_flight).finish()
    }
}

impl Ring {
    /// Makes one.
    ///
    /// # Errors
    ///
    /// The kernel has none, or this process may not.
    pub fn new() -> io::Result<Self> {
        // What is done is handed over when this thread enters the kernel anyway, not by interrupting it. Kernels before
        // 6.0 know none of that.
        let mut builder = IoUring::builder();
        builder.dontfork().setup_single_issuer().setup_coop_taskrun().setup_taskrun_flag();
        let ring = match builder.build(ENTRIES) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => IoUring::new(ENTRIES)?,
            made => made?,
        };
        if !ring.params().is_feature_nodrop() || !ring.params().is_feature_submit_stable() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's io_uring is too old"));
        }
        Ok(Self { ring, files: Vec::new(), registered: false, unsubmitted: 0, in_flight: 0 })
    }

    /// Readable when something is done.
    pub fn fd(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Transfers are to and from these files from now on. Nothing may be in flight. They must stay open until
    /// [`forget_files`](Self::forget_files).
    pub fn use_files(&mut self, files: &[Arc<File>]) {
        self.forget_files();
        self.files = files.iter().map(|file| file.as_raw_fd()).collect();
        self.registered = !self.files.is_empty() && self.ring.submitter().register_files(&self.files).is_ok();
    }

    /// Lets go of the files.
    pub fn forget_files(&mut self) {
        if std::mem::take(&mut self.registered) {
            // Nothing is in flight, so that there is nothing that could fail.
            self.ring.submitter().unregister_files().unwrap_or_default();
        }
        self.files.clear();
    }

    /// Number of operations that are not done.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// How many more there should be at most.
    pub fn room(&self) -> usize {
        MOST.saturating_sub(self.in_flight)
    }

    /// Queues an operation, which [`reap`](Self::reap) tells of by `token`.
    ///
    /// # Errors
    ///
    /// There is no such file, or the kernel takes nothing.
    ///
    /// # Safety
    ///
    /// The pieces, and the memory that they name, must stay where they are until the operation is done.
    pub unsafe fn push(&mut self, operation: Operation, token: u64) -> io::Result<()> {
        let entry = self.entry(operation)?.user_data(token);
        // SAFETY: what it points to stays, as the caller promises.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.submit()?;
            // SAFETY: as above.
            unsafe { self.ring.submission().push(&entry) }.map_err(|_| io::ErrorKind::WouldBlock)?;
        }
        self.unsubmitted += 1;
        self.in_flight += 1;
        Ok(())
    }

    fn entry(&self, operation: Operation) -> io::Result<Entry> {
        macro_rules! on {
            ($file:expr, $make:expr) => {{
                let fd = *self.files.get(usize::from($file)).ok_or(io::ErrorKind::NotFound)?;
                if self.registered { $make(types::Fixed($file.into())) } else { $make(types::Fd(fd)) }
            }};
        }
        // A single piece needs no list, which the kernel would have to copy.
        let only = |pieces: *const libc::iovec, count: u32| {
            // SAFETY: it is a list of as many pieces, which is there, as the caller of `push` promises.
            let piece = (count == 1).then(|| unsafe { *pieces });
            piece.and_then(|piece| Some((piece.iov_base.cast::<u8>(), u32::try_from(piece.iov_len).ok()?)))
        };
        Ok(match operation {
            Operation::Read { file, offset, pieces, count } => match only(pieces, count) {
                Some((at, len)) => on!(file, |fd| opcode::Read::new(fd, at, len).offset(offset).build()),
                None => on!(file, |fd| opcode::Readv::new(fd, pieces, count).offset(offset).build()),
            },
            Operation::Write { file, offset, pieces, count } => match only(pieces, count) {
                Some((at, len)) => on!(file, |fd| opcode::Write::new(fd, at, len).offset(offset).build()),
                None => on!(file, |fd| opcode::Writev::new(fd, pieces, count).offset(offset).build()),
            },
            Operation::Sync { file } => {
                on!(file, |fd| opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build())
            }
        })
    }

    /// Hands the kernel what was queued. What it does not take now it takes with the next call.
    ///
    /// # Errors
    ///
    /// That of `io_uring_enter`, but for those that pass.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.unsubmitted > 0 {
            match self.ring.submit() {
                Ok(0) => break,
                Ok(count) => self.unsubmitted = self.unsubmitted.saturating_sub(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_passing(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Number of operations that the kernel has not taken yet. If those are all that are in flight, nothing tells when to
    /// [`submit`](Self::submit) them.
    pub fn unsubmitted(&self) -> usize {
        self.unsubmitted
    }

    /// Whether [`reap`](Self::reap) would find something.
    pub fn has_done(&mut self) -> bool {
        self.in_flight > 0 && (self.ring.submission().taskrun() || !self.ring.completion().is_empty())
    }

    /// Appends what is done: its token, and a number of bytes or a negative error number.
    pub fn reap(&mut self, done: &mut Vec<(u64, i32)>) {
        if self.in_flight == 0 {
            return;
        }
        let submission = self.ring.submission();
        let wants_entry = submission.taskrun() || submission.cq_overflow();
        drop(submission);
        if wants_entry {
            // Errors are those that pass.
            self.enter(0).unwrap_or_default();
        }
        let before = done.len();
        done.extend(self.ring.completion().map(|entry| (entry.user_data(), entry.result())));
        self.in_flight = self.in_flight.saturating_sub(done.len() - before);
    }

    /// Waits until something is done, or for a moment if the kernel takes nothing now.
    ///
    /// # Errors
    ///
    /// That of `io_uring_enter`.
    pub fn wait(&mut self) -> io::Result<()> {
        self.submit()?;
        if self.in_flight == self.unsubmitted {
            std::thread::sleep(MOMENT);
            return Ok(());
        }
        match self.enter(1) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted || is_passing(&error) => Ok(()),
            waited => waited,
        }
    }

    fn enter(&self, wanted: u32) -> io::Result<()> {
        // SAFETY: no arguments are given along.
        unsafe {
            self.ring.submitter().enter::<libc::sigset_t>(0, wanted, EnterFlags::GETEVENTS.bits(), None)
        }
        .map(drop)
    }
}

/// The kernel has no room at the moment.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn piece(bytes: &mut [u8]) -> libc::iovec {
        libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
    }

    fn all(ring: &mut Ring) -> Vec<(u64, i32)> {
        let mut done = Vec::new();
        while ring.in_flight() > 0 {
            ring.wait().unwrap();
            ring.reap(&mut done);
        }
        done.sort_unstable();
        done
    }

    #[test]
    fn more_operations_than_there_are_entries_are_all_done() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let mut ring = Ring::new().unwrap();
        ring.use_files(std::slice::from_ref(&file));
        let mut bytes = vec![7_u8; MOST * 512];
        let pieces: Vec<_> = bytes.chunks_mut(512).map(piece).collect();
        for (index, pieces) in pieces.iter().enumerate() {
            assert!(ring.room() > 0);
            let write = Operation::Write {
                file: 0,
                offset: index as u64 * 512,
                pieces: &raw const *pieces,
                count: 1,
            };
            // SAFETY: bytes and pieces outlive the ring's work, which `all` waits for.
            unsafe { ring.push(write, index as u64) }.unwrap();
        }
        assert_eq!(ring.room(), 0);
        let done = all(&mut ring);
        assert_eq!(done.len(), MOST);
        assert!((0..).zip(done).all(|(index, done)| done == (index, 512)));
        let mut seen = vec![0; bytes.len()];
        file.read_exact_at(&mut seen, 0).unwrap();
        assert!(seen == bytes);
    }

    #[test]
    fn pieces_are_filled_in_order_and_errors_are_told() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.write_all_at(b"hello world", 0).unwrap();
        let mut ring = Ring::new().unwrap();
        ring.use_files(&[file]);
        let (mut first, mut second) = ([0; 6], [0; 20]);
        let pieces = [piece(&mut first), piece(&mut second)];
        let read = Operation::Read { file: 0, offset: 0, pieces: pieces.as_ptr(), count: 2 };
        let bad = libc::iovec { iov_base: std::ptr::dangling_mut::<u8>().cast(), iov_len: 8 };
        let fault = Operation::Read { file: 0, offset: 0, pieces: &raw const bad, count: 1 };
        // SAFETY: all of it outlives `all`; the kernel finds by itself that there is no memory behind `bad`.
        unsafe {
            ring.push(read, 1).unwrap();
            ring.push(Operation::Sync { file: 0 }, 2).unwrap();
            ring.push(fault, 3).unwrap();
            assert_eq!(
                ring.push(Operation::Sync { file: 1 }, 4).unwrap_err().kind(),
                io::ErrorKind::NotFound
            );
        }
        assert_eq!(all(&mut ring), [(1, 11), (2, 0), (3, -libc::EFAULT)]);
        assert_eq!((&first[..], &second[..5]), (&b"hello "[..], &b"world"[..]));
    }

    /// Makes the kernel have no room for a single operation, as seen by this thread and those that it starts.
    fn refuse_single_operations() {
        let load = |k| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k };
        let unless =
            |k: libc::c_long, jf| libc::sock_filter { code: 0x15, jt: 0, jf, k: u32::try_from(k).unwrap() };
        let answer = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
        // The number of the call, and the lower half of its second argument.
        let mut program = [
            load(0),
            unless(libc::SYS_io_uring_enter, 3),
            load(24),
            unless(1, 1),
            answer(libc::SECCOMP_RET_ERRNO | libc::EAGAIN.unsigned_abs()),
            answer(libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog { len: 6, filter: program.as_mut_ptr() };
        // SAFETY: the calls take integers, and a program that outlives them.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
        }
    }

    #[test]
    fn what_the_kernel_does_not_take_is_not_waited_for_and_offered_again() {
        let refused = || {
            refuse_single_operations();
            let mut ring = Ring::new().unwrap();
            ring.use_files(&[Arc::new(tempfile::tempfile().unwrap())]);
            // SAFETY: no memory is involved.
            unsafe { ring.push(Operation::Sync { file: 0 }, 1) }.unwrap();
            ring.wait().unwrap();
            assert_eq!((ring.in_flight(), ring.unsubmitted()), (1, 1));
            // SAFETY: as above.
            unsafe { ring.push(Operation::Sync { file: 0 }, 2) }.unwrap();
            assert_eq!(all(&mut ring), [(1, 0), (2, 0)]);
            assert_eq!(ring.unsubmitted(), 0);
        };
        std::thread::spawn(refused).join().unwrap();
    }

    #[test]
    fn files_are_let_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let file = Arc::new(File::create(&path).unwrap());
        let mut ring = Ring::new().unwrap();
        ring.use_files(std::slice::from_ref(&file));
        // A lock belongs to the open file, and lasts as long as anybody has that.
        file.lock().unwrap();
        drop(file);
        ring.forget_files();
        let other = File::open(&path).unwrap();
        let free = || other.try_lock().is_ok();
        assert!((0..1000).any(|_| free() || {
            std::thread::sleep(std::time::Duration::from_millis(1));
            false
        }));
    }
}
