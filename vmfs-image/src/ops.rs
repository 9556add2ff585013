//! What is done with whole images: copying, converting, comparing, and saying where everything lies.

mod compare;
mod convert;
mod copy;
mod map;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::ControlFlow;

use crate::image::{Error, Image, RunKind};

pub use compare::{Comparison, compare};
pub use convert::{ConvertOptions, convert};
pub use copy::{CopyOptions, copy, copy_with};
pub use map::{Piece, map};

/// Is told how many bytes of how many are done, and says whether to go on.
pub type Progress<'a> = dyn FnMut(u64, u64) -> ControlFlow<()> + 'a;

/// What a range reads as through the whole chain.
#[derive(Debug, Clone, Copy)]
pub struct ChainRun<'a> {
    /// How long it is, in bytes: at least one sector.
    pub len: u64,
    /// The image that has its bytes; `None` if it reads as zeroes.
    pub data: Option<&'a dyn Image>,
    /// How many images are above the one that decided: 0 for the image itself.
    pub depth: usize,
    /// Nothing in the chain has anything there.
    pub absent: bool,
}

/// What a range that begins at `offset` and is as long as possible, but at most `len`, reads as: through `image` and
/// everything below it.
///
/// # Errors
///
/// That of the storage.
pub fn chain_run(image: &dyn Image, offset: u64, len: u64) -> io::Result<ChainRun<'_>> {
    let (mut image, mut len, mut depth) = (image, len, 0);
    loop {
        let run = image.run(offset, len)?;
        len = run.len.min(len);
        if len == 0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "an image says that nothing is nowhere"));
        }
        let found = ChainRun { len, data: None, depth, absent: false };
        match run.kind {
            RunKind::Data => return Ok(ChainRun { data: Some(image), ..found }),
            RunKind::Zero => return Ok(found),
            RunKind::Absent => {}
        }
        let Some(below) = image.backing().filter(|below| offset < below.size()) else {
            return Ok(ChainRun { absent: true, ..found });
        };
        len = len.min(below.size() - offset);
        image = &**below;
        depth += 1;
    }
}

fn step(progress: &mut Progress<'_>, image: &dyn Image, done: u64, total: u64) -> Result<(), Error> {
    match progress(done, total) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Interrupted { path: image.path().to_owned() }),
    }
}

fn failed<'a>(image: &'a dyn Image, what: &'static str) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io { path: image.path().to_owned(), what, source }
}
