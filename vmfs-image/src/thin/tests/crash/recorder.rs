//! Storage that notes in which order it is changed and when that becomes stable, and what it can hold after a crash.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use vm_memory::VolatileSlice;

use crate::thin::memory::{Bytes, Memory};
use crate::thin::storage::Storage;

/// A change, or a wait for all changes before it to be stable.
#[derive(Clone)]
pub(super) enum Op {
    Write { at: u64, bytes: Vec<u8> },
    Punch { at: u64, len: u64 },
    Length(u64),
    Sync,
}

impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Write { at, bytes } => write!(f, "write {:#x} at {at:#x}", bytes.len()),
            Self::Punch { at, len } => write!(f, "punch {len:#x} at {at:#x}"),
            Self::Length(len) => write!(f, "length {len:#x}"),
            Self::Sync => f.write_str("sync"),
        }
    }
}

impl Op {
    /// Does it to `to`.
    pub(super) fn apply(&self, to: &mut Bytes) {
        match self {
            Self::Write { at, bytes } => to.write(*at, bytes),
            Self::Punch { at, len } => to.clear(*at, *len),
            Self::Length(len) => to.set_len(*len),
            Self::Sync => {}
        }
    }

    /// Does those of its pieces of `unit` bytes that `has` names by their number. A change of the length is one piece.
    pub(super) fn apply_torn(&self, to: &mut Bytes, unit: u64, mut has: impl FnMut(usize) -> bool) {
        let (at, len) = match self {
            Self::Write { at, bytes } => (*at, bytes.len() as u64),
            Self::Punch { at, len } => (*at, *len),
            Self::Length(_) | Self::Sync => {
                if has(0) {
                    self.apply(to);
                }
                return;
            }
        };
        let (mut from, mut number) = (at, 0);
        while from < at + len {
            let until = (from + 1).next_multiple_of(unit).min(at + len);
            if has(number) {
                match self {
                    Self::Write { bytes, .. } => {
                        let part = usize::try_from(from - at).unwrap()..usize::try_from(until - at).unwrap();
                        to.write(from, &bytes[part]);
                    }
                    _ => to.clear(from, until - from),
                }
            }
            (from, number) = (until, number + 1);
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Log {
    pub(super) ops: Vec<Op>,
    /// After so many more, a sync fails: what was to be made stable may be so or not.
    pub(super) sync_fails: Option<usize>,
    /// The next write fails, and writes this many bytes.
    pub(super) write_fails: Option<usize>,
}

fn endless() -> Arc<AtomicUsize> {
    Arc::new(AtomicUsize::new(usize::MAX))
}

/// Storage in memory that keeps a log.
#[derive(Debug, Clone)]
pub(super) struct Recorder {
    memory: Memory,
    log: Arc<Mutex<Log>>,
    /// As a file of cache mode `unsafe`: nothing is ever waited for.
    never_sync: bool,
    /// Changes and syncs before the process that uses it is killed.
    left: Arc<AtomicUsize>,
}

impl Recorder {
    pub(super) fn new(bytes: Bytes, never_sync: bool) -> Self {
        Self { memory: Memory::from(bytes), log: Arc::default(), never_sync, left: endless() }
    }

    /// The same storage for another process.
    pub(super) fn for_next(&self) -> Self {
        Self { left: endless(), ..self.clone() }
    }

    /// Lets the process come so far, and then nothing of it reaches the storage any more.
    pub(super) fn kill_after(&self, changes: usize) {
        self.left.store(changes, Ordering::Relaxed);
    }

    fn is_alive(&self) -> io::Result<()> {
        let one_less = |left: usize| left.checked_sub(1);
        match self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::Error::other("the process was killed")),
        }
    }

    pub(super) fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap()
    }

    /// Writes as an engine that is not asked to fail.
    pub(super) fn write(&self, from: &[u8], offset: u64) {
        self.log().ops.push(Op::Write { at: offset, bytes: from.to_vec() });
        self.memory.write_at(from, offset).unwrap();
    }

    /// Changes so far.
    pub(super) fn position(&self) -> usize {
        self.log().ops.len()
    }
}

impl Storage for Recorder {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_at(into, offset)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.is_alive()?;
        let fails = self.log().write_fails.take();
        let from = &from[..fails.map_or(from.len(), |most| most.min(from.len()))];
        if !from.is_empty() {
            self.write(from, offset);
        }
        if fails.is_some() { Err(io::Error::other("the write was to fail")) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        self.is_alive()?;
        if self.never_sync {
            return Ok(());
        }
        let mut log = self.log();
        let was_armed = log.sync_fails.is_some();
        log.sync_fails = log.sync_fails.and_then(|more| more.checked_sub(1));
        if was_armed && log.sync_fails.is_none() {
            return Err(io::Error::other("the sync was to fail"));
        }
        log.ops.push(Op::Sync);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.is_alive()?;
        self.log().ops.push(Op::Punch { at: offset, len });
        self.memory.punch(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.is_alive()?;
        self.log().ops.push(Op::Length(len));
        self.memory.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.memory.len()
    }

    fn file(&self) -> Option<&Arc<File>> {
        None
    }

    fn write_slices(&self, from: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let mut all = Vec::new();
        for slice in from {
            let at = all.len();
            all.resize(at + slice.len(), 0);
            slice.copy_to(&mut all[at..]);
        }
        self.write_at(&all, offset)
    }
}
