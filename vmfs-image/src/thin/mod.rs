//! Our copy-on-write format: `docs/image-format.md` describes its bytes.
//!
//! ```text
//!  image.rs   what is asked: locate and finish (never wait), and the calls that wait, which are in io.rs
//!  state.rs   what is known in memory, under one short lock: map.rs (the tree), space.rs (what is free)
//!  commit.rs  how it becomes what is on disk
//!  layout.rs  the bytes            storage.rs  the file            open.rs  making and opening
//! ```
//!
//! # Why it is right
//!
//! **Data before tree.** A sub-cluster's bit in the data mask is set by `finish`, after its bytes were written; a commit writes
//! the bits that are set and syncs, so bytes and bits become stable together. Until then reads find what was there before.
//!
//! **One at a time in a fresh sub-cluster.** Sub-clusters that are getting their first data are *busy*: `locate` refuses
//! them, and all calls that wait do wait. So what fills a sub-cluster from the backing (a small write, or `pull`) never meets another
//! write to it, and a cluster is not given back under a write. Sub-clusters with data are written in place, and who writes and
//! discards the same bytes at the same time gets either.
//!
//! **Space.** What the tree gives up is free only after the commit that says so, and after the last transfer that was
//! located before: see `space.rs`.
//!
//! **The limit.** What changes a page of the tree first makes sure that the next commit has the space to write it, so a commit
//! never fails for `max_size`.

pub mod check;
#[cfg(test)]
mod check_tests;
mod commit;
#[cfg(any(test, feature = "fuzzing"))]
pub mod forge;
mod freeze;
mod image;
mod io;
mod layout;
mod map;
#[cfg(any(test, feature = "fuzzing"))]
pub mod memory;
mod open;
mod space;
mod state;
mod storage;

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::image::Image;
use crate::lock::Lock;

pub use layout::Backing;
pub(crate) use open::create_in;
#[cfg(any(test, feature = "fuzzing"))]
pub use open::open_memory;
pub use open::{Create, create, peek_backing, peek_limits, peek_size, set_backing};

use state::State;
use storage::Storage;

/// An open thin image.
#[derive(Debug)]
pub struct Thin {
    path: PathBuf,
    storage: Arc<dyn Storage>,
    /// Was opened to be changed.
    writable: bool,
    /// May be changed now.
    unfrozen: AtomicBool,
    /// Flushes need not reach the disk.
    no_flush: bool,
    block_size: u32,
    /// Of memory that goes past the page cache, of this file or one below, in bytes.
    memory_alignment: usize,
    bits: u8,
    uuid: [u8; 16],
    backing: Option<Arc<dyn Image>>,
    files: Vec<Arc<File>>,
    /// Size of the disk as it is shown.
    size: AtomicU64,
    state: Mutex<State>,
    /// Something has ended that others may wait for: a fresh sub-cluster, or a transfer.
    changed: Condvar,
    in_flight: space::InFlight,
    committer: commit::Committer,
    /// Held while the file is made longer, and while anything that only the superblock says is changed.
    growing: Mutex<()>,
    settings: Mutex<()>,
    /// Last, so that the file is closed to others until everything is written.
    lock: Option<Arc<dyn Lock>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(on: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    on.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

fn wait_for<'a, T>(on: &Condvar, guard: MutexGuard<'a, T>, most: Duration) -> MutexGuard<'a, T> {
    on.wait_timeout(guard, most).unwrap_or_else(PoisonError::into_inner).0
}

impl Thin {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Drop for Thin {
    fn drop(&mut self) {
        if !self.is_writable() {
            return;
        }
        let closed = self.commit().and_then(|()| {
            let end = self.state().space.end;
            self.storage.set_len(end)
        });
        if let Err(error) = closed {
            tracing::warn!("what was not flushed of {} is lost: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests;
