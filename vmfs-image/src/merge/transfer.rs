//! Moving what one image holds to another, piece by piece.

use std::io;

use vm_memory::VolatileSlice;

use crate::image::{Error, Format, Image, RunKind};
use crate::open::{MAGIC_LEN, kind_of};
use crate::ops::{Progress, chain_run};
use crate::steps::failed;

/// Moved at once, in bytes.
const CHUNK: u64 = 1 << 20;
/// The most that is moved in one piece of work, in bytes.
const MOST: u64 = 1 << 40;
/// Absent stretches looked at in one piece of work, so that it ends soon.
const LOOKS: usize = 4096;

/// What remains to be done of a range of work over a whole disk.
#[derive(Debug)]
pub(crate) struct Merger {
    at: u64,
    buffer: Vec<u8>,
    any_kind: bool,
}

impl Merger {
    /// `any_kind`: a flat image below may be made to begin as another kind of image does.
    pub(crate) fn new(any_kind: bool) -> Self {
        Self { at: 0, buffer: Vec::new(), any_kind }
    }

    /// How far it is, in bytes of the disk.
    pub(crate) fn at(&self) -> u64 {
        self.at
    }

    /// Writes to `below` what `top` has of its own, about `most` bytes of it. Gives whether that was all.
    pub(crate) fn push(&mut self, top: &dyn Image, below: &dyn Image, most: u64) -> Result<bool, Error> {
        let size = top.size();
        if below.size() < size {
            below.grow(size).map_err(failed(below.path(), "make larger"))?;
        }
        let mut left = most.clamp(1, MOST);
        for _ in 0..LOOKS {
            if self.at >= size {
                return Ok(true);
            }
            if left == 0 {
                break;
            }
            let run = top.run(self.at, size - self.at).map_err(failed(top.path(), "read"))?;
            let len = match run.kind {
                RunKind::Absent => run.len,
                RunKind::Zero => {
                    let zeroed = below.write_zeroes(self.at, run.len, true);
                    zeroed.map_err(failed(below.path(), "write to"))?;
                    left = left.saturating_sub(4096);
                    run.len
                }
                RunKind::Data => {
                    let len = run.len.min(CHUNK).min(left.next_multiple_of(4096));
                    self.move_data(top, below, len)?;
                    left = left.saturating_sub(len);
                    len
                }
            };
            self.at += len;
        }
        Ok(self.at >= size)
    }

    fn move_data(&mut self, top: &dyn Image, below: &dyn Image, len: u64) -> Result<(), Error> {
        let len = usize::try_from(len).map_err(io::Error::other).map_err(failed(top.path(), "read"))?;
        self.buffer.resize(len, 0);
        let bytes = &mut self.buffer[..];
        top.read_at(self.at, &[VolatileSlice::from(&mut *bytes)]).map_err(failed(top.path(), "read"))?;
        let kind = kind_of(&bytes[..MAGIC_LEN.min(len)]);
        if self.at == 0 && below.format() == Format::Flat && kind != Format::Flat && !self.any_kind {
            // Whoever opens the flat image next and is not told its format would follow what a guest wrote there.
            return Err(Error::Invalid {
                path: below.path().to_owned(),
                what: format!(
                    "would begin as a {kind} image does, since a guest has written that, and be taken for one; \
                     say that its format is \"flat\" to have it so"
                ),
            });
        }
        let written = below.write_at(self.at, &[VolatileSlice::from(bytes)]);
        written.map_err(failed(below.path(), "write to"))
    }

    /// Copies up to `top` what it lacks and an image between it and `lower` has, about `most` bytes; `lower` and what is
    /// below are left out. Gives whether that was all.
    pub(crate) fn pull(
        &mut self,
        top: &dyn Image,
        lower: Option<&dyn Image>,
        most: u64,
    ) -> Result<bool, Error> {
        let size = top.size();
        let mut left = most.clamp(1, MOST);
        for _ in 0..LOOKS {
            if self.at >= size {
                return Ok(true);
            }
            if left == 0 {
                break;
            }
            let run = chain_run(top, self.at, size - self.at).map_err(failed(top.path(), "read"))?;
            let mut len = run.len;
            let is_wanted =
                run.depth > 0 && !run.absent && depth_of(top, lower).is_none_or(|depth| run.depth < depth);
            // Without anything below, what is zero needs no note of it.
            if is_wanted && (run.data.is_some() || lower.is_some()) {
                len = len.min(CHUNK).min(left.next_multiple_of(4096));
                top.pull(self.at, len).map_err(failed(top.path(), "write to"))?;
                left = left.saturating_sub(len);
            }
            self.at += len;
        }
        Ok(self.at >= size)
    }

    /// Does everything of one of the two, and tells `progress`.
    pub(crate) fn all(
        &mut self,
        image: &dyn Image,
        progress: &mut Progress<'_>,
        mut some: impl FnMut(&mut Self, u64) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        loop {
            if progress(self.at, image.size()).is_break() {
                return Err(Error::Interrupted { path: image.path().to_owned() });
            }
            if some(self, 8 << 20)? {
                break;
            }
        }
        let _ = progress(image.size(), image.size());
        Ok(())
    }
}

/// How far below `top` an image lies.
fn depth_of(top: &dyn Image, lower: Option<&dyn Image>) -> Option<usize> {
    let lower = lower?;
    let mut depth = 0;
    let mut image = top;
    loop {
        if std::ptr::addr_eq(image, lower) {
            return Some(depth);
        }
        image = &**image.backing()?;
        depth += 1;
    }
}
