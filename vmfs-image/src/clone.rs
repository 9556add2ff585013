//! Copies of a disk: at once, as an overlay on it, or in full.
//!
//! A **linked** clone holds what was written to it since; all else it reads from its base, which therefore must not change. So the base
//! is marked: nobody has permission to write to its file any more, which this crate respects even where the system does
//! not (for root). A clone knows its base by its identity, and does not open if that has changed all the same.
//!
//! A **full** clone shares nothing, but the space on disk where the file system can (reflink).

use std::path::Path;

use crate::image::{Error, Format};
use crate::open::OpenOptions;
use crate::ops::{self, Progress};
use crate::overlay;
use crate::redo::refuse_pending;
use crate::steps::{self, failed};
use crate::thin;

/// Makes a clone of the image at `base` at `path`, where nothing is yet. It takes no time and no space. The base, which nobody
/// may be writing to, is marked as one.
///
/// # Errors
///
/// [`Error::Locked`] if somebody writes to `base`; [`Error::Invalid`] if it has changes that are neither committed nor
/// discarded; other [`Error`]s.
pub fn linked(base: &Path, path: &Path) -> Result<(), Error> {
    let (base, path) = (&steps::real(base)?, &steps::real_new(path)?);
    refuse_pending(base)?;
    let image = crate::open(base, &OpenOptions::default())?;
    let named = steps::relative(overlay::home(path), base);
    // Marked first: a clone without its base would be worse than a base without clones.
    overlay::mark(base)?;
    let backing = Some((named, image.format(), overlay::exact(&*image)?));
    thin::create(path, &thin::Create { backing, ..thin::Create::new(image.size()) })
}

/// Makes an image of a kind at `path`, where nothing is yet, that reads as the one at `source` does and needs no other.
///
/// # Errors
///
/// [`Error::Locked`] if somebody writes to `source`; [`Error::Invalid`] if it has changes that are neither committed nor
/// discarded; [`Error::Interrupted`] once `progress` says to stop; other [`Error`]s. Nothing is left behind then.
pub fn full(source: &Path, path: &Path, format: Format, progress: &mut Progress<'_>) -> Result<(), Error> {
    refuse_pending(source)?;
    let image = crate::open(source, &OpenOptions::default())?;
    let options =
        ops::ConvertOptions { format, preallocate: crate::flat::Preallocate::Sparse, detect_zeroes: false };
    ops::convert(&*image, path, &options, progress)
}

/// Takes the mark of a base of linked clones away, so that it can be written to again. Clones that are left will not open any
/// more once that happens.
///
/// # Errors
///
/// [`Error::Io`].
pub fn unmark(base: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(base).map_err(failed(base, "examine"))?.permissions().mode();
    let writable = std::fs::Permissions::from_mode(mode | 0o200);
    std::fs::set_permissions(base, writable).map_err(failed(base, "let be written to"))
}

/// Whether an image is marked as the base of linked clones.
#[must_use]
pub fn is_base(path: &Path) -> bool {
    overlay::is_marked(path)
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;

    use super::*;
    use crate::flat::{self, Preallocate};
    use crate::redo::{self, Mode};
    use crate::test_image::{contents, read, write};

    fn writable() -> OpenOptions {
        OpenOptions { writable: true, ..OpenOptions::default() }
    }

    #[test]
    fn linked_clone_reads_as_its_base_and_leaves_it_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("guests")).unwrap();
        let (base, path) = (dir.path().join("base.img"), dir.path().join("guests/web.img"));
        flat::create(&base, 1 << 20, Preallocate::Sparse).unwrap();
        write(&*crate::open(&base, &writable()).unwrap(), 4096, &[1; 4096]).unwrap();
        linked(&base, &path).unwrap();
        assert!(is_base(&base));
        let clone = redo::open(&path, Mode::Persistent, &writable()).unwrap().image;
        assert_eq!(read(&*clone, 4096, 4096), [1; 4096]);
        write(&*clone, 4096, &[2; 4096]).unwrap();
        drop(clone);
        assert_eq!(read(&*crate::open(&base, &OpenOptions::default()).unwrap(), 4096, 512), [1; 512]);
        assert_eq!(read(&*crate::open(&path, &OpenOptions::default()).unwrap(), 4096, 512), [2; 512]);
    }

    #[test]
    fn base_of_clones_is_not_written_to_until_its_mark_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base.img"), dir.path().join("web.img"));
        thin::create(&base, &thin::Create::new(1 << 20)).unwrap();
        linked(&base, &path).unwrap();
        linked(&base, &dir.path().join("db.img")).unwrap();
        let refused = redo::open(&base, Mode::Persistent, &writable()).unwrap_err().to_string();
        assert!(refused.contains("linked clones"), "{refused}");
        let refused = crate::merge::commit(&path, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
        assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
        redo::open(&base, Mode::Nonpersistent, &writable()).unwrap();
        unmark(&base).unwrap();
        let image = redo::open(&base, Mode::Persistent, &writable()).unwrap().image;
        write(&*image, 0, &[1; 512]).unwrap();
        drop(image);
        let refused = crate::open(&path, &OpenOptions::default()).unwrap_err();
        assert!(matches!(refused, Error::Backing { .. }), "{refused}");
    }

    #[test]
    fn image_with_a_writer_and_place_that_is_taken_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base.img"), dir.path().join("web.img"));
        thin::create(&base, &thin::Create::new(1 << 20)).unwrap();
        let writer = crate::open(&base, &writable()).unwrap();
        assert!(matches!(linked(&base, &path), Err(Error::Locked { .. })));
        drop(writer);
        std::fs::write(&path, b"mine").unwrap();
        assert!(linked(&base, &path).is_err());
        let mut go_on = |_: u64, _: u64| ControlFlow::Continue(());
        assert!(full(&base, &path, Format::Flat, &mut go_on).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn full_clone_reads_as_the_chain_does_and_is_gone_if_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let [base, top, copy] = ["base", "top", "copy"].map(|name| dir.path().join(name));
        flat::create(&base, 1 << 20, Preallocate::Sparse).unwrap();
        write(&*crate::open(&base, &writable()).unwrap(), 0, &[1; 8192]).unwrap();
        linked(&base, &top).unwrap();
        write(&*crate::open(&top, &writable()).unwrap(), 4096, &[2; 8192]).unwrap();
        let stopped = full(&top, &copy, Format::Thin, &mut |_, _| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(Error::Interrupted { .. })), "{stopped:?}");
        assert!(!copy.exists());
        for format in [Format::Thin, Format::Flat] {
            full(&top, &copy, format, &mut |_, _| ControlFlow::Continue(())).unwrap();
            let copied = crate::open(&copy, &OpenOptions::default()).unwrap();
            assert!(copied.backing().is_none() && copied.format() == format);
            assert_eq!(contents(&*copied), contents(&*crate::open(&top, &OpenOptions::default()).unwrap()));
            drop(copied);
            std::fs::remove_file(&copy).unwrap();
        }
    }

    #[test]
    fn clone_of_100_gib_takes_no_space() {
        let dir = tempfile::tempdir().unwrap();
        let (base, path) = (dir.path().join("base.img"), dir.path().join("web.img"));
        flat::create(&base, 100 << 30, Preallocate::Sparse).unwrap();
        linked(&base, &path).unwrap();
        let info = crate::open(&path, &OpenOptions::default()).unwrap().info().unwrap();
        assert_eq!(info.size, 100 << 30);
        assert!(info.allocated <= 64 << 10, "{}", info.allocated);
    }
}
