//! Storage in memory, for tests and fuzzing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::storage::Storage;

const PAGE: u64 = 4096;

type Page = [u8; 4096];

/// Bytes of a sparse file, cheap to copy: what does not differ is shared.
#[derive(Debug, Clone, Default)]
pub struct Bytes {
    pages: BTreeMap<u64, Arc<Page>>,
    len: u64,
}

impl Bytes {
    /// Length of the file.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a file")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fills `into` from `offset`.
    ///
    /// # Errors
    ///
    /// `UnexpectedEof` where the file ends before.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        if offset.checked_add(into.len() as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (page, within, range) in pieces(offset, into.len()) {
            match self.pages.get(&page) {
                Some(bytes) => into[range].copy_from_slice(&bytes[within]),
                None => into[range].fill(0),
            }
        }
        Ok(())
    }

    /// Writes `from` to `offset`.
    pub fn write(&mut self, offset: u64, from: &[u8]) {
        self.len = self.len.max(offset + from.len() as u64);
        for (page, within, range) in pieces(offset, from.len()) {
            self.page(page)[within].copy_from_slice(&from[range]);
        }
    }

    /// Fills what there is of a range with `byte`.
    pub fn fill(&mut self, offset: u64, len: u64, byte: u8) {
        let len = len.min(self.len.saturating_sub(offset));
        for (page, within, _) in pieces(offset, usize::try_from(len).unwrap_or(usize::MAX)) {
            self.page(page)[within].fill(byte);
        }
    }

    /// Makes what there is of a range a hole.
    pub fn clear(&mut self, offset: u64, len: u64) {
        let end = offset.saturating_add(len).min(self.len);
        let inner = offset.div_ceil(PAGE)..end / PAGE;
        let inside: Vec<u64> = if inner.is_empty() {
            Vec::new()
        } else {
            self.pages.range(inner.clone()).map(|page| *page.0).collect()
        };
        for page in inside {
            self.pages.remove(&page);
        }
        if offset < end {
            self.fill(offset, (offset.next_multiple_of(PAGE).min(end)) - offset, 0);
            let tail = (end / PAGE * PAGE).max(offset);
            self.fill(tail, end - tail, 0);
        }
    }

    /// Makes the file shorter, or longer by a hole.
    pub fn set_len(&mut self, len: u64) {
        self.clear(len, u64::MAX);
        self.len = len;
    }

    fn page(&mut self, page: u64) -> &mut Page {
        Arc::make_mut(self.pages.entry(page).or_insert_with(|| Arc::new([0; 4096])))
    }
}

/// A range as pages, ranges within them, and ranges of what is moved.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, Range<usize>, Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let within = usize::try_from(at % PAGE).unwrap_or(0);
        let some = (4096 - within).min(len - done);
        let piece = (at / PAGE, within..within + some, done..done + some);
        done += some;
        (some > 0).then_some(piece)
    })
}

/// Storage that is [`Bytes`].
#[derive(Debug, Clone, Default)]
pub struct Memory(Arc<Mutex<Bytes>>);

impl Memory {
    /// Storage that holds a copy of `bytes`.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Self {
        let memory = Self::default();
        memory.bytes().write(0, bytes);
        memory
    }

    /// What it holds.
    pub fn bytes(&self) -> MutexGuard<'_, Bytes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that it holds, of which there is not much.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let bytes = self.bytes();
        let mut all = vec![0; usize::try_from(bytes.len()).unwrap_or(0)];
        let _ = bytes.read(0, &mut all);
        all
    }
}

impl From<Bytes> for Memory {
    fn from(bytes: Bytes) -> Self {
        Self(Arc::new(Mutex::new(bytes)))
    }
}

impl Storage for Memory {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes().read(offset, into)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        // As a file system does.
        if offset.checked_add(from.len() as u64).is_none_or(|end| end > 1 << 62) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes().write(offset, from);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.bytes().clear(offset, len);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.bytes().set_len(len);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.bytes().len())
    }

    fn file(&self) -> Option<&Arc<File>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bytes_are_as_a_plain_file_has_them(
            steps in prop::collection::vec((0..4u8, 0..20_000u64, 0..9000u64), 1..30),
        ) {
            let (mut bytes, mut plain) = (Bytes::default(), Vec::new());
            for (kind, offset, len) in steps {
                let (start, count) = (usize::try_from(offset).unwrap(), usize::try_from(len).unwrap());
                let end = (start + count).min(plain.len());
                match kind {
                    0 => {
                        bytes.write(offset, &vec![kind + 7; count]);
                        plain.resize(plain.len().max(start + count), 0);
                        plain[start..start + count].fill(kind + 7);
                    }
                    1 => {
                        bytes.clear(offset, len);
                        plain[start.min(end)..end].fill(0);
                    }
                    2 => {
                        bytes.fill(offset, len, 9);
                        plain[start.min(end)..end].fill(9);
                    }
                    _ => {
                        bytes.set_len(offset);
                        plain.resize(start, 0);
                    }
                }
                prop_assert_eq!(Memory::from(bytes.clone()).to_vec(), plain.clone());
            }
        }
    }
}
