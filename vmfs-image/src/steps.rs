//! Steps that change directories: each happens as a whole, and is stable when it returns, so that a crash falls between two
//! of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::flat::sync_directory;
use crate::image::Error;

/// Gives the error of a step.
pub(crate) fn failed<'a>(path: &'a Path, what: &'static str) -> impl Fn(io::Error) -> Error + 'a {
    move |source| Error::Io { path: path.to_owned(), what, source }
}

/// Where a test may end the process. Called before each step that leaves something behind.
#[cfg_attr(not(test), expect(clippy::unnecessary_wraps, reason = "only tests make steps fail"))]
pub(crate) fn before(path: &Path) -> Result<(), Error> {
    #[cfg(test)]
    if cut::now() {
        return Err(failed(path, "go on with")(io::Error::other("cut")));
    }
    #[cfg(not(test))]
    let _ = path;
    Ok(())
}

/// Gives the file at `from` a second name, which nothing has yet.
pub(crate) fn link(from: &Path, to: &Path) -> Result<(), Error> {
    before(to)?;
    std::fs::hard_link(from, to).and_then(|()| sync_directory(to)).map_err(failed(to, "make"))
}

/// Gives the file at `from` another name instead of its own; what had it loses it in the same moment.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    before(to)?;
    std::fs::rename(from, to)
        .and_then(|()| sync_directory(to))
        .and_then(|()| if from.parent() == to.parent() { Ok(()) } else { sync_directory(from) })
        .map_err(failed(to, "put a new file in the place of"))
}

/// Removes a file, if it is there.
pub(crate) fn remove(path: &Path) -> Result<(), Error> {
    if identity(path).map_err(failed(path, "examine"))?.is_none() {
        return Ok(());
    }
    before(path)?;
    std::fs::remove_file(path).and_then(|()| sync_directory(path)).map_err(failed(path, "remove"))
}

/// Makes a directory, if it is not there.
pub(crate) fn make_directory(path: &Path) -> Result<(), Error> {
    before(path)?;
    match std::fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| sync_directory(path)).map_err(failed(path, "make")),
    }
}

/// Writes a small file as a whole.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    use std::io::Write;
    before(path)?;
    let new = beside(path, ".tmp");
    File::create(&new)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(failed(&new, "write"))?;
    rename(&new, path)
}

/// Device and inode of what is at `path`, which is not followed if it is a symbolic link; `None` if nothing is.
pub(crate) fn identity(path: &Path) -> io::Result<Option<(u64, u64)>> {
    match std::fs::symlink_metadata(path) {
        Ok(found) => Ok(Some((found.dev(), found.ino()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether two names are those of one file. What cannot be examined is no file.
pub(crate) fn is_same(one: &Path, other: &Path) -> bool {
    matches!((identity(one), identity(other)), (Ok(Some(one)), Ok(Some(other))) if one == other)
}

/// The path with something appended to its last component.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Where a file really is, symbolic links followed: what is put in its place is put there.
pub(crate) fn real(path: &Path) -> Result<PathBuf, Error> {
    std::fs::canonicalize(path).map_err(|source| Error::Open {
        path: path.to_owned(),
        writable: false,
        source,
    })
}

/// Where a file that is not there yet will really be.
pub(crate) fn real_new(path: &Path) -> Result<PathBuf, Error> {
    let Some(name) = path.file_name() else {
        return Err(Error::Invalid { path: path.to_owned(), what: "is not the name of a file".to_owned() });
    };
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(real(parent)?.join(name))
}

/// The way from a directory to a file; both real.
pub(crate) fn relative(directory: &Path, file: &Path) -> PathBuf {
    let common =
        directory.components().zip(file.components()).take_while(|(one, other)| one == other).count();
    let up = directory.components().skip(common).map(|_| Path::new(".."));
    let down = file.components().skip(common).map(|part| Path::new(part.as_os_str()));
    up.chain(down).collect()
}

/// Ends steps in tests, as a crash does: from a certain one on, none is done.
#[cfg(test)]
pub(crate) mod cut {
    use std::cell::Cell;

    thread_local! {
        static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// Whether this step is one that is not done.
    pub(crate) fn now() -> bool {
        match LEFT.get() {
            None => false,
            Some(0) => true,
            Some(left) => {
                LEFT.set(Some(left - 1));
                false
            }
        }
    }

    /// Runs `body`, in which only so many steps are done.
    pub(crate) fn after<T>(steps: usize, body: impl FnOnce() -> T) -> T {
        LEFT.set(Some(steps));
        let given = body();
        LEFT.set(None);
        given
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn way_from_a_directory_to_a_file_goes_up_and_down() {
        let way = |from: &str, to: &str| relative(Path::new(from), Path::new(to));
        assert_eq!(way("/a/b", "/a/b/c"), Path::new("c"));
        assert_eq!(way("/a/b", "/a/c/d"), Path::new("../c/d"));
        assert_eq!(way("/a", "/x"), Path::new("../x"));
        assert_eq!(way("/", "/x"), Path::new("x"));
    }

    #[test]
    fn file_that_is_not_there_is_removed_without_error_and_is_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        remove(&path).unwrap();
        assert!(!is_same(&path, &path));
        std::fs::write(&path, []).unwrap();
        assert!(is_same(&path, &path));
        let other = dir.path().join("b");
        link(&path, &other).unwrap();
        assert!(is_same(&path, &other));
        assert!(link(&path, &other).is_err());
        remove(&path).unwrap();
        assert!(!path.exists() && other.exists());
    }
}
