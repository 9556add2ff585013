//! An image that is changed no more, so that others can be laid on it; and one that takes the place of another while both
//! are open.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Thin;
use crate::image::{Error, Image};
use crate::lock::Mode;

impl Thin {
    /// See [`Image::set_writable`].
    pub(super) fn freeze(&self, frozen: bool) -> Result<(), Error> {
        if !frozen && !self.writable {
            let what = "is open to be read; to be changed it has to be opened anew".to_owned();
            return Err(Error::Invalid { path: self.path.clone(), what });
        }
        let _alone = super::lock(&self.settings);
        if frozen && self.is_writable() {
            self.commit().map_err(self.failed("make stable what was written to"))?;
            self.unfrozen.store(false, Ordering::Release);
            // Others note this generation: what changes after it is another.
            self.state().marked = false;
        }
        let Some(lock) = &self.lock else {
            self.unfrozen.store(!frozen, Ordering::Release);
            return Ok(());
        };
        let set = lock.set(if frozen { Mode::Shared } else { Mode::Exclusive });
        self.unfrozen.store(lock.mode() == Mode::Exclusive, Ordering::Release);
        set
    }

    /// The same image, opened once more with `backing`, as it notes it by now, and under the lock that this one has. This one
    /// is not to be used any more: it can only be read.
    ///
    /// # Errors
    ///
    /// [`Error::Backing`] if that is not what it notes, and others; then this one is what it was.
    pub(crate) fn successor(&self, path: &Path, backing: Option<Arc<dyn Image>>) -> Result<Self, Error> {
        let refused = || io::Error::from(io::ErrorKind::PermissionDenied);
        if !self.is_writable() {
            return Err(self.failed("change")(refused()));
        }
        self.commit().map_err(self.failed("make stable what was written to"))?;
        self.unfrozen.store(false, Ordering::Release);
        let opened = Self::with_backing(Arc::clone(&self.storage), path, true, backing, self.lock.clone());
        match opened {
            Ok(mut thin) => {
                (thin.block_size, thin.no_flush) = (self.block_size, self.no_flush);
                thin.memory_alignment = self.memory_alignment;
                Ok(thin)
            }
            Err(error) => {
                self.unfrozen.store(true, Ordering::Release);
                Err(error)
            }
        }
    }

    /// The image, whose file was given another name.
    pub(crate) fn renamed(mut self, path: &Path) -> Self {
        path.clone_into(&mut self.path);
        self
    }

    /// Its cluster size is 2 to this power.
    pub(crate) fn cluster_bits(&self) -> u8 {
        self.bits
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> Error {
        let path = self.path.clone();
        move |source| Error::Io { path: path.clone(), what, source }
    }
}
