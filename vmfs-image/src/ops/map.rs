//! Where everything of an image lies.

use std::ops::ControlFlow;
use std::path::Path;

use serde::Serialize;

use super::{chain_run, failed};
use crate::image::{Access, Error, Extent, Image, Place};

/// A piece of an image: what it reads as, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Piece<'a> {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes.
    pub len: u64,
    /// How many images are above the one that has it: 0 for the image itself.
    pub depth: usize,
    /// Whether there are bytes; else it reads as zeroes.
    pub data: bool,
    /// Whether any image of the chain says something of it. What is in none is nobody's.
    pub present: bool,
    /// The image whose bytes they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<&'a Path>,
    /// Where in its file they begin, in bytes; `None` where they do not lie there as they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file_offset: Option<u64>,
}

/// Tells `each` where every piece of `image` lies, from the beginning to the end, chain and all. Pieces are as long as can
/// be.
///
/// # Errors
///
/// [`Error::Io`], and [`Error::Interrupted`] once `each` says to stop.
pub fn map(image: &dyn Image, each: &mut dyn FnMut(&Piece<'_>) -> ControlFlow<()>) -> Result<(), Error> {
    let size = image.size();
    let mut tell = |piece: &Piece<'_>| match each(piece) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Interrupted { path: image.path().to_owned() }),
    };
    let mut last: Option<Piece<'_>> = None;
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let run = chain_run(image, at, size - at).map_err(failed(image, "read"))?;
        let mut piece = Piece {
            offset: at,
            len: run.len,
            depth: run.depth,
            data: run.data.is_some(),
            present: !run.absent,
            image: run.data.map(Image::path),
            file_offset: None,
        };
        if let Some(layer) = run.data {
            extents.clear();
            if let Some(ticket) = layer.locate(at, run.len, Access::Read, &mut extents) {
                layer.finish(ticket, true);
                // Only the first place: the rest comes next.
                if let Some(Extent { len, place: Place::File { file: 0, offset } }) = extents.first() {
                    piece.len = piece.len.min(*len).max(crate::image::SECTOR);
                    piece.file_offset = Some(*offset);
                }
            }
        }
        at += piece.len;
        match &mut last {
            Some(before) if continues(before, &piece) => before.len += piece.len,
            before => {
                if let Some(before) = before.replace(piece) {
                    tell(&before)?;
                }
            }
        }
    }
    last.map_or(Ok(()), |piece| tell(&piece))
}

fn continues(before: &Piece<'_>, piece: &Piece<'_>) -> bool {
    let expected = before.file_offset.map(|offset| offset + before.len);
    before.offset + before.len == piece.offset
        && (before.depth, before.data, before.present, before.image, expected)
            == (piece.depth, piece.data, piece.present, piece.image, piece.file_offset)
}
