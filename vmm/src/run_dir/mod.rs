//! Where the guests of a host are found: one directory per guest under the run directory.
//!
//! | file | what |
//! | --- | --- |
//! | `lock` | locked (open-file-description lock, fcntl(2)) by the monitor as long as it lives |
//! | `pid` | its process, in decimal |
//! | `api.sock` | its control socket |
//!
//! No daemon keeps this: the lock alone says whether a guest is there, and the kernel takes it back however the
//! monitor ends. What a dead monitor left is cleaned up by the next one of the same name.

mod lock;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// Environment variable that moves the run directory.
pub const VARIABLE: &str = "VMM_RUN_DIR";
/// Longest path of a Unix socket, in bytes (`sun_path` of unix(7) less its terminator).
const SOCKET_PATH_MAX: usize = 107;

/// A run directory that cannot be used, or a guest in it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another monitor has the name.
    #[error("guest {name} is running already, in process {}", show_pid(*pid))]
    Held {
        /// Name of the guest.
        name: String,
        /// The monitor, where it has written its number.
        pid: Option<u32>,
    },
    /// There is no such guest.
    #[error("no guest called {name} is running here (looked in {}); `vmm ps` lists those that are", root.display())]
    Unknown {
        /// Name asked for.
        name: String,
        /// The run directory.
        root: PathBuf,
    },
    /// Something in it cannot be made, read or locked.
    #[error("cannot {what} {}; {VARIABLE} names another run directory", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// The path of the socket is too long for the system.
    #[error("the path of the control socket, {}, is longer than {SOCKET_PATH_MAX} bytes; {VARIABLE} names a shorter run directory", path.display())]
    Long {
        /// The path.
        path: PathBuf,
    },
}

fn show_pid(pid: Option<u32>) -> String {
    pid.map_or("that has not said its number yet".to_owned(), |pid| pid.to_string())
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// The run directory of this host and user.
#[derive(Debug, Clone)]
pub struct Root(PathBuf);

impl Root {
    /// A run directory at `path`, which need not exist.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// What `VMM_RUN_DIR` says; else `/run/vmm` for root and `$XDG_RUNTIME_DIR/vmm` for other users, where they
    /// have one.
    #[must_use]
    pub fn from_environment() -> Self {
        let given = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(path) = given(VARIABLE) {
            return Self(path);
        }
        // SAFETY: geteuid has no preconditions.
        let root = unsafe { libc::geteuid() } == 0;
        let base = given("XDG_RUNTIME_DIR").filter(|_| !root).unwrap_or_else(|| "/run".into());
        Self(base.join("vmm"))
    }

    /// Takes `name` for this process until the claim is dropped.
    ///
    /// # Errors
    ///
    /// [`Error::Held`] if another process has it; [`Error::Io`].
    pub fn claim(&self, name: &str) -> Result<Claim, Error> {
        let dir = self.0.join(name);
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.0)
            .map_err(io_error("make the directory", &self.0))?;
        loop {
            match DirBuilder::new().mode(0o700).create(&dir) {
                // What stands there may also be a link to nowhere, or a file.
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists || is_no_directory(&dir) => {
                    return Err(io_error("make the directory", &dir)(error));
                }
                _ => {}
            }
            if let Some(claim) = self.try_claim(name, &dir)? {
                return Ok(claim);
            }
        }
    }

    /// `None` if the directory was removed meanwhile by a monitor that ended.
    fn try_claim(&self, name: &str, dir: &Path) -> Result<Option<Claim>, Error> {
        let path = dir.join("lock");
        let opened = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path);
        let lock = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(io_error("open", &path))?,
        };
        if !lock::acquire(&lock).map_err(io_error("lock", &path))? {
            return Err(Error::Held { name: name.to_owned(), pid: read_pid(dir) });
        }
        let mine = lock.metadata().map_err(io_error("examine", &path))?;
        let same = |there: fs::Metadata| (there.dev(), there.ino()) == (mine.dev(), mine.ino());
        if !fs::metadata(&path).is_ok_and(same) {
            return Ok(None);
        }
        if let Some(pid) = read_pid(dir) {
            tracing::info!("guest {name}: cleaning up after process {pid}, which has ended without doing so");
        }
        let claim = Claim { dir: dir.to_owned(), _lock: lock };
        claim.clear();
        let pid = dir.join("pid");
        let mut file = File::create(&pid).map_err(io_error("write", &pid))?;
        file.write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(io_error("write", &pid))?;
        Ok(Some(claim))
    }

    /// The guest called `name`, if its monitor lives.
    ///
    /// # Errors
    ///
    /// [`Error::Unknown`] if it does not.
    pub fn find(&self, name: &str) -> Result<Guest, Error> {
        let unknown = || Error::Unknown { name: name.to_owned(), root: self.0.clone() };
        // A name is one component of the path, whatever the user typed.
        if name.is_empty() || name.contains('/') || name == "." || name == ".." {
            return Err(unknown());
        }
        let guest = Guest { name: name.to_owned(), dir: self.0.join(name) };
        if guest.is_alive() { Ok(guest) } else { Err(unknown()) }
    }

    /// All guests whose monitors live, by name.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if the directory is there and cannot be read.
    pub fn list(&self) -> Result<Vec<Guest>, Error> {
        let entries = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_error("list", &self.0))?,
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut guests: Vec<_> = names.filter_map(|name| self.find(&name).ok()).collect();
        guests.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(guests)
    }
}

fn is_no_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|there| !there.is_dir())
}

fn read_pid(dir: &Path) -> Option<u32> {
    fs::read_to_string(dir.join("pid")).ok()?.trim().parse().ok()
}

/// A guest of this host.
#[derive(Debug, Clone)]
pub struct Guest {
    name: String,
    dir: PathBuf,
}

impl Guest {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.dir.join("api.sock")
    }

    /// The process of its monitor, once that has written its number.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        read_pid(&self.dir)
    }

    /// Whether its monitor lives.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        // To ask for a lock without taking it, the file has to be open for what the lock is for.
        let lock = OpenOptions::new().write(true).custom_flags(libc::O_NOFOLLOW).open(self.dir.join("lock"));
        lock.is_ok_and(|file| lock::is_held(&file))
    }
}

/// A name that is this process's.
#[derive(Debug)]
pub struct Claim {
    dir: PathBuf,
    _lock: File,
}

impl Claim {
    /// Begins to listen on the guest's control socket, which only its owner may open.
    ///
    /// # Errors
    ///
    /// [`Error::Long`] or [`Error::Io`].
    pub fn listen(&self) -> Result<UnixListener, Error> {
        let path = self.dir.join("api.sock");
        if path.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(Error::Long { path });
        }
        let listener = UnixListener::bind(&path).map_err(io_error("make the control socket", &path))?;
        // The directory is closed to others already; this says the same on the socket itself.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).map_err(io_error("protect", &path))?;
        Ok(listener)
    }

    /// Removes all but the lock.
    fn clear(&self) {
        for name in ["api.sock", "pid"] {
            let path = self.dir.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!("cannot remove {}: {error}", path.display());
                }
                _ => {}
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.clear();
        // The lock goes last of the files: whoever opens it before finds it held, whoever comes after makes a new one.
        let removed = fs::remove_file(self.dir.join("lock")).and_then(|()| fs::remove_dir(&self.dir));
        match removed {
            // The next monitor of this name has come already.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::NotFound) => {}
            Err(error) => tracing::warn!("cannot remove {}: {error}", self.dir.display()),
            Ok(()) => {}
        }
    }
}

#[cfg(test)]
mod tests;
