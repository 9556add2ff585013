//! Making a file where there may be one already.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmfs_image::lock::{Mode, OfdLock};
use vmfs_image::{Error, clone, redo, snapshot};

fn invalid<T>(path: &Path, what: &str) -> Result<T, Error> {
    Err(Error::Invalid { path: path.to_owned(), what: what.to_owned() })
}

fn failed<'a>(path: &'a Path, what: &'static str) -> impl Fn(std::io::Error) -> Error + 'a {
    move |source| Error::Io { path: path.to_owned(), what, source }
}

/// Removes a file that did not become what it should have.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// The error with the name that the user gave in place of the one that the new file had meanwhile.
pub fn renamed(error: Error, hidden: &Path, path: &Path) -> Error {
    match error {
        // Whatever was interrupted.
        Error::Interrupted { .. } => Error::Interrupted { path: path.to_owned() },
        error => error.about(hidden, path),
    }
}

/// Whether both are names of one file.
pub fn is_same(one: &Path, other: &Path) -> bool {
    let (Ok(one), Ok(other)) = (std::fs::metadata(one), std::fs::metadata(other)) else { return false };
    (one.dev(), one.ino()) == (other.dev(), other.ino())
}

/// Has `make` make a file at `path`. What is there is replaced if `force` says so, in one step and not before the new one is
/// complete; `source` is what it is made from.
///
/// # Errors
///
/// [`Error::Invalid`] where something is there and stays; [`Error::Locked`] if somebody uses it; those of `make`. What was
/// there is still there then, and nothing else.
pub fn make(
    path: &Path,
    force: bool,
    source: Option<&Path>,
    make: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<(), Error> {
    let about = match path.symlink_metadata() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return make(path).map_err(|error| renamed(error, path, path));
        }
        Err(error) => return Err(failed(path, "examine")(error)),
        Ok(_) if !force => {
            return invalid(path, "there is something of that name already; --force replaces it");
        }
        Ok(about) => about,
    };
    if !about.is_file() {
        return invalid(path, "is no regular file, and is not replaced");
    }
    if source.is_some_and(|source| is_same(source, path)) {
        return invalid(path, "is what the new image would be made from, and is not replaced");
    }
    if clone::is_base(path) {
        return invalid(
            path,
            "is marked as the base of linked clones (nobody may write to it), and is not replaced",
        );
    }
    if redo::pending(path).is_some() {
        return invalid(
            path,
            "has changes that were not decided upon, and is not replaced: commit or discard them",
        );
    }
    if !snapshot::list(path)?.snapshots.is_empty() {
        return invalid(path, "has snapshots, and is not replaced: delete them first");
    }
    let open = |source| Error::Open { path: path.to_owned(), writable: true, source };
    let file = Arc::new(File::options().read(true).write(true).open(path).map_err(open)?);
    let _alone = OfdLock::acquire(&file, path, Mode::Exclusive, None)?;
    let Some(name) = path.file_name() else { return invalid(path, "is no name of a file") };
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".new-{}", std::process::id()));
    let new = Unfinished(path.with_file_name(hidden));
    make(&new.0).map_err(|error| renamed(error, &new.0, path))?;
    std::fs::rename(&new.0, path).map_err(failed(path, "replace"))?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed(directory, "write"))
}
