//! The images, and the state in which every run finds them.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::cases::{Cache, Image, State};
use crate::systems::{self, Format};

/// What is handled at a time: no folio of the page cache is larger, and each lies within one.
const PIECE: usize = 4 << 20;

/// An image that cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// A program.
    #[error("{0}")]
    Tool(String),
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { what, path, source }
}

/// A directory with images of one size, made when they are wanted.
#[derive(Debug)]
pub struct Images {
    dir: PathBuf,
    size: u64,
    /// Our own program, which makes thin images, or why there is none.
    vmm: Result<PathBuf, String>,
    /// How the page cache holds each file.
    cached: HashMap<PathBuf, Cache>,
}

impl Images {
    /// Images of `size` bytes in `dir`, the raw one made at once. Thin ones are made by the program `vmm`.
    ///
    /// # Errors
    ///
    /// The file cannot be written.
    pub fn new(dir: &Path, size: u64, vmm: Result<PathBuf, String>) -> Result<Self, Error> {
        let images = Self { dir: dir.to_owned(), size, vmm, cached: HashMap::new() };
        images.write(&images.raw())?;
        Ok(images)
    }

    /// Makes a raw image, all of it written, with data that does not compress.
    fn write(&self, path: &Path) -> Result<(), Error> {
        let write = || {
            let mut source = File::open("/dev/urandom")?;
            let mut piece = vec![0; PIECE];
            source.read_exact(&mut piece)?;
            let mut file = File::create(path)?;
            for number in 0..self.size / PIECE as u64 {
                // No two blocks are alike.
                for block in piece.chunks_mut(4096) {
                    block[..8].copy_from_slice(&number.to_le_bytes());
                }
                file.write_all(&piece)?;
            }
            file.set_len(self.size)?;
            file.sync_all()
        };
        write().map_err(io_error("write", path))
    }

    /// Size of the disks in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The raw image, which the host's own benchmark uses as well.
    #[must_use]
    pub fn raw(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    /// Makes `image` ready for a run and gives its path: all that was written, to it or another, is on the disk, its data
    /// in the page cache as `cache` says. Images that a run fills are new.
    ///
    /// # Errors
    ///
    /// A file cannot be made, or the program that makes it is not there.
    pub fn prepare(&mut self, image: Image, cache: Cache) -> Result<PathBuf, Error> {
        let path = match (image.state, image.format) {
            (State::Allocated, Format::Raw) => self.raw(),
            (State::Allocated, format) => self.full(format)?,
            (State::Fresh, format) => self.fresh(format)?,
            (State::Backed, format) => {
                let base = self.base(cache)?;
                self.backed(format, &base)?
            }
        };
        if image.state == State::Allocated {
            self.settle(&path, cache)?;
        }
        // What is not yet on the disk would be written there during the run, whoever wrote it.
        sync_all(&self.dir).map_err(io_error("write to the disk", &self.dir))?;
        Ok(path)
    }

    fn settle(&mut self, path: &Path, cache: Cache) -> Result<(), Error> {
        if self.cached.get(path) == Some(&cache) && cache != Cache::Nothing {
            return Ok(());
        }
        self.cached.remove(path);
        fill(path, cache).map_err(io_error("prepare", path))?;
        self.cached.insert(path.to_owned(), cache);
        Ok(())
    }

    /// The image with the contents of the raw one, made when it is not there.
    fn full(&self, format: Format) -> Result<PathBuf, Error> {
        let (raw, full) = (self.raw(), self.dir.join(format!("full.{}", extension(format))));
        if full.exists() {
            return Ok(full);
        }
        let mut command = self.tool(format)?;
        match format {
            Format::Thin => {
                command.args(["image", "convert", "--format", "thin", "--from", "flat"]).args([&raw, &full])
            }
            _ => command.args(["convert", "-f", "raw", "-O", extension(format)]).args([&raw, &full]),
        };
        run(command)?;
        Ok(full)
    }

    /// A new image with nothing in it.
    fn fresh(&self, format: Format) -> Result<PathBuf, Error> {
        let new = self.new_path(format)?;
        let mut command = self.tool(format)?;
        match format {
            Format::Thin => {
                let size = format!("{}K", self.size >> 10);
                command.args(["image", "create", "--format", "thin", "--size", &size]).arg(&new)
            }
            _ => command.args(create(format)).arg(&new).arg(self.size.to_string()),
        };
        run(command)?;
        Ok(new)
    }

    /// A new image with nothing in it that lies on `base`.
    fn backed(&self, format: Format, base: &Path) -> Result<PathBuf, Error> {
        let new = self.new_path(format)?;
        let mut command = self.tool(format)?;
        match format {
            Format::Thin => command.args(["image", "clone"]).args([base, &new]),
            _ => command.args(create(format)).args(["-F", "raw", "-b"]).args([base, &new]),
        };
        run(command)?;
        Ok(new)
    }

    /// The raw image that others lie on. Nothing is ever written to it, and images that lie on it until now are void.
    fn base(&mut self, cache: Cache) -> Result<PathBuf, Error> {
        let base = self.dir.join("base.raw");
        if !base.exists() {
            self.write(&base)?;
        }
        // A clone takes it away.
        fs::set_permissions(&base, fs::Permissions::from_mode(0o644)).map_err(io_error("prepare", &base))?;
        self.settle(&base, cache)?;
        Ok(base)
    }

    /// Where a new image is made; none is there.
    fn new_path(&self, format: Format) -> Result<PathBuf, Error> {
        let new = self.dir.join(format!("new.{}", extension(format)));
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &new)(error)),
            _ => Ok(new),
        }
    }

    /// The program that makes images of this kind.
    fn tool(&self, format: Format) -> Result<Command, Error> {
        let program = match format {
            Format::Thin => self.vmm.clone(),
            Format::Raw | Format::Qcow2 => systems::tool("qemu-img", "QEMU_IMG"),
        };
        program.map(Command::new).map_err(Error::Tool)
    }

    /// Says that `path` was written to in another way than by the requests of a case.
    pub fn disturbed(&mut self, path: &Path) {
        self.cached.remove(path);
    }
}

/// How qemu-img makes a new image: qcow2 as it is fastest where little of a cluster is written at a time, with
/// subclusters of 4 KiB.
fn create(format: Format) -> Vec<&'static str> {
    let mut args = vec!["create", "-q", "-f", extension(format)];
    if format == Format::Qcow2 {
        args.extend(["-o", "extended_l2=on,cluster_size=128k"]);
    }
    args
}

/// What names of such files end in.
fn extension(format: Format) -> &'static str {
    match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
        Format::Thin => "thin",
    }
}

/// Runs a program that makes an image.
pub(super) fn run(mut command: Command) -> Result<(), Error> {
    let output = command.stdin(Stdio::null()).output();
    let program = command.get_program().to_string_lossy().into_owned();
    let output = output.map_err(|error| Error::Tool(format!("cannot run {program}: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let verb: Vec<_> = command.get_args().take(2).map(|arg| arg.to_string_lossy()).collect();
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::Tool(format!("{program} {} ended with {}: {}", verb.join(" "), output.status, said.trim())))
}

/// Writes all files of a directory to the disk.
pub(super) fn sync_all(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        File::open(entry?.path())?.sync_all()?;
    }
    Ok(())
}

/// Writes the file to the disk and brings it anew into the page cache.
fn fill(path: &Path, cache: Cache) -> io::Result<()> {
    let mut file = OpenOptions::new().read(true).write(true).open(path)?;
    file.sync_all()?;
    let len = file.metadata()?.len();
    match cache {
        Cache::Nothing => advise(&file, 0, len, libc::POSIX_FADV_DONTNEED),
        Cache::ReadAhead => {
            advise(&file, 0, len, libc::POSIX_FADV_DONTNEED)?;
            let mut piece = vec![0; PIECE];
            while file.read(&mut piece)? > 0 {}
            Ok(())
        }
        Cache::Pieces(size) => {
            // What is read is not to bring its neighbours along.
            advise(&file, 0, len, libc::POSIX_FADV_RANDOM)?;
            let mut piece = vec![0; PIECE];
            let mut at = 0;
            while at < len {
                let wanted = usize::try_from(len - at).map_or(PIECE, |left| left.min(PIECE));
                let piece = &mut piece[..wanted];
                file.read_exact_at(piece, at)?;
                advise(&file, at, wanted as u64, libc::POSIX_FADV_DONTNEED)?;
                for part in piece.chunks(usize::try_from(size).unwrap_or(PIECE)) {
                    file.write_all_at(part, at)?;
                    at += part.len() as u64;
                }
            }
            file.sync_all()
        }
    }
}

fn advise(file: &File, offset: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
    let place = |number: u64| libc::off_t::try_from(number).map_err(|_| io::ErrorKind::InvalidInput);
    // SAFETY: no memory is involved.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), place(offset)?, place(len)?, advice) } {
        0 => Ok(()),
        refused => Err(io::Error::from_raw_os_error(refused)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: Image = Image { format: Format::Raw, state: State::Allocated };

    #[test]
    fn raw_image_is_full_and_its_blocks_differ() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = Images::new(dir.path(), 4 << 20, Err("no vmm".to_owned())).unwrap();
        let raw = images.prepare(RAW, Cache::Pieces(4096)).unwrap();
        let bytes = std::fs::read(&raw).unwrap();
        assert_eq!(bytes.len(), 4 << 20);
        let mut blocks: Vec<&[u8]> = bytes.chunks(4096).collect();
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), 1024);
    }

    #[test]
    fn thin_images_are_made_by_the_program_that_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        let (program, log, work) =
            (dir.path().join("vmm"), dir.path().join("log"), dir.path().join("images"));
        fs::create_dir(&work).unwrap();
        let script = format!("#!/bin/sh\necho \"$@\" >>{}\n", log.display());
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let mut images = Images::new(&work, 4 << 20, Ok(program)).unwrap();
        for state in [State::Fresh, State::Backed] {
            images.prepare(Image { format: Format::Thin, state }, Cache::Pieces(4096)).unwrap();
        }
        let said = fs::read_to_string(&log).unwrap().replace(&format!("{}/", work.display()), "");
        let wanted =
            "image create --format thin --size 4096K new.thin\nimage clone base.raw new.thin\n".to_owned();
        assert_eq!(said, wanted);
        assert_eq!(fs::metadata(work.join("base.raw")).unwrap().len(), 4 << 20);

        let full = Image { format: Format::Thin, state: State::Allocated };
        let error = images.prepare(full, Cache::Nothing).unwrap_err().to_string();
        assert!(error.contains("full.thin"), "made nothing: {error}");
        let said = fs::read_to_string(&log).unwrap();
        assert!(said.contains("image convert --format thin --from flat"), "{said}");
    }

    #[test]
    fn program_that_is_not_there_or_fails_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let fresh = Image { format: Format::Thin, state: State::Fresh };
        let error = |vmm| {
            let mut images = Images::new(dir.path(), 1 << 20, vmm).unwrap();
            images.prepare(fresh, Cache::Nothing).unwrap_err().to_string()
        };
        assert_eq!(error(Err("no vmm".to_owned())), "no vmm");
        assert_eq!(error(Ok("/bin/false".into())), "/bin/false image create ended with exit status: 1: ");
        assert!(error(Ok("/nonexistent/vmm".into())).contains("cannot run /nonexistent/vmm"));
    }

    #[test]
    fn preparation_changes_no_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let bytes: Vec<u8> = (0..PIECE + 5 * 512).map(|at| u8::try_from(at % 251).unwrap()).collect();
        std::fs::write(&path, &bytes).unwrap();
        for cache in [Cache::Pieces(4096), Cache::Pieces(128 << 10), Cache::ReadAhead, Cache::Nothing] {
            fill(&path, cache).unwrap();
            assert!(std::fs::read(&path).unwrap() == bytes, "{cache:?}");
        }
    }

    #[test]
    fn file_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let mut images = Images::new(dir.path(), 1 << 20, Err("no vmm".to_owned())).unwrap();
        std::fs::remove_file(images.raw()).unwrap();
        let error = images.prepare(RAW, Cache::Nothing).unwrap_err().to_string();
        assert!(error.contains("disk.raw"), "{error}");
    }
}
