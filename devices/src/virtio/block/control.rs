//! A disk as it is controlled from outside.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use vmfs_image::Image;

use super::options::Limits;
use super::shared::{Counters, Shared};

/// The handle of a disk, which outlives it. Calls that wait for what is in flight wait for storage.
#[derive(Debug, Clone)]
pub struct BlockControl(pub(super) Arc<Shared>);

impl BlockControl {
    /// Returns when nothing is in flight; nothing new starts until [`resume`](Self::resume) was called as often as this.
    /// Requests that wait because of an error or a limit are not in flight and go on waiting.
    pub fn drain(&self) {
        let mut threads = self.0.threads();
        threads.drains += 1;
        threads.follow();
    }

    /// Takes a [`drain`](Self::drain) back.
    pub fn resume(&self) {
        let mut threads = self.0.threads();
        threads.drains = threads.drains.saturating_sub(1);
        threads.follow();
    }

    /// Shows the guest another image, between two requests, and gives back the one before, which nobody uses any more.
    /// The guest is told by an interrupt that the configuration has changed. Requests that wait because of an error are
    /// tried again, on the new image.
    ///
    /// # Errors
    ///
    /// The guest may write, and `image` cannot be written to.
    pub fn swap(&self, image: Arc<dyn Image>) -> io::Result<Arc<dyn Image>> {
        if !self.0.options.readonly && !image.is_writable() {
            let what =
                format!("{} is open to be read, and the guest writes to its disk", image.path().display());
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, what));
        }
        let mut threads = self.0.threads();
        threads.drains += 1;
        threads.follow();
        let old = {
            let mut current = self.0.image.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *current, image)
        };
        threads.drains -= 1;
        threads.follow();
        if let Some(interrupt) = &threads.interrupt {
            interrupt.config_changed();
        }
        drop(threads);
        self.retry();
        Ok(old)
    }

    /// The image that the guest is shown.
    #[must_use]
    pub fn image(&self) -> Arc<dyn Image> {
        self.0.image()
    }

    /// Tells the guest that the size of the image has changed.
    pub fn size_changed(&self) {
        if let Some(interrupt) = &self.0.threads().interrupt {
            interrupt.config_changed();
        }
    }

    /// Tries requests again that wait since an error.
    pub fn retry(&self) {
        self.0.retries.fetch_add(1, Ordering::AcqRel);
        self.0.threads().follow();
    }

    /// Why requests wait, if some do because of an error.
    #[must_use]
    pub fn waiting(&self) -> Option<String> {
        self.0.why_waiting()
    }

    /// Limits the guest from now on; what waits because of the limits before is looked at anew.
    pub fn set_limits(&self, limits: Limits) {
        self.0.limiter.set(limits);
        self.0.threads().follow();
    }

    /// The limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.0.limiter.limits()
    }

    /// What moves data: `io_uring`, or `plain` system calls. Whether the host has the former is known once the guest has
    /// used the disk.
    #[must_use]
    pub fn engine(&self) -> &'static str {
        if self.0.is_plain() { "plain" } else { "io_uring" }
    }

    /// What the disk has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.0.counters()
    }
}
