//! Thin images against a model: the bytes that the disk ought to have.

mod corrupt;
mod crash;
mod model;
mod open;
mod quota;
mod single;
mod speed;
mod threads;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::{Create, Thin, create};
use crate::image::{Access, Image, Place};
use crate::open::OpenOptions;

const SUB: u64 = 4096;
const CLUSTER: u64 = 65_536;

fn writable() -> OpenOptions {
    OpenOptions { writable: true, ..OpenOptions::default() }
}

fn read(image: &dyn Image, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    image.read_at(offset, &[VolatileSlice::from(&mut bytes[..])]).unwrap();
    bytes
}

fn try_write(image: &dyn Image, offset: u64, bytes: &[u8]) -> std::io::Result<()> {
    let mut bytes = bytes.to_vec();
    let third = bytes.len() / 3;
    let (one, other) = bytes.split_at_mut(third);
    image.write_at(offset, &[VolatileSlice::from(one), VolatileSlice::from(other)])
}

fn write(image: &dyn Image, offset: u64, bytes: &[u8]) {
    try_write(image, offset, bytes).unwrap();
}

/// Reads by the short way, where it can be gone.
fn read_located(image: &dyn Image, offset: u64, len: usize) -> Option<Vec<u8>> {
    let mut extents = Vec::new();
    let ticket = image.locate(offset, len as u64, Access::Read, &mut extents)?;
    let mut bytes = vec![0xee; len];
    let mut at = 0;
    for extent in extents {
        let end = at + usize::try_from(extent.len).unwrap();
        match extent.place {
            Place::Zero => bytes[at..end].fill(0),
            Place::File { file, offset } => {
                image.files()[usize::from(file)].read_exact_at(&mut bytes[at..end], offset).unwrap();
            }
        }
        at = end;
    }
    assert_eq!(at, len);
    image.finish(ticket, true);
    Some(bytes)
}

/// Writes by the short way, where it can be gone.
fn write_located(image: &dyn Image, offset: u64, bytes: &[u8], ok: bool) -> bool {
    let mut extents = Vec::new();
    let Some(ticket) = image.locate(offset, bytes.len() as u64, Access::Write, &mut extents) else {
        assert!(extents.is_empty());
        return false;
    };
    let mut at = 0;
    for extent in extents {
        let Place::File { file: 0, offset } = extent.place else { panic!("written to {:?}", extent.place) };
        let end = at + usize::try_from(extent.len).unwrap();
        if ok {
            image.files()[0].write_all_at(&bytes[at..end], offset).unwrap();
        }
        at = end;
    }
    assert_eq!(at, bytes.len());
    image.finish(ticket, ok);
    true
}

fn make(path: &Path, size: u64) -> Thin {
    create(path, &Create::new(size)).unwrap();
    Thin::open(path, &writable(), None).unwrap()
}

/// An image on another.
fn make_on(path: &Path, size: u64, backing: &Arc<dyn Image>) -> Thin {
    let noted = (backing.path().to_owned(), backing.format(), backing.identity().unwrap());
    create(path, &Create { backing: Some(noted), ..Create::new(size) }).unwrap();
    Thin::open(path, &writable(), Some(Arc::clone(backing))).unwrap()
}
