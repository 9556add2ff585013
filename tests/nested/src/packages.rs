//! Debian's packages: those that this machine needs, and those that guests are made of.
//!
//! Guests are made of packages that are downloaded by `apt-get download` and unpacked beside the build's output;
//! neither needs root, and nothing is installed. They are kept by version, so that they are downloaded once.

use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::program::{find, run};
use crate::{Error, Result};

/// Programs that this machine needs, with the package of each.
const NEEDED: &[(&str, &str)] =
    &[("qemu-system-x86_64", "qemu-system-x86"), ("mkfs.ext4", "e2fsprogs"), ("dpkg-deb", "dpkg")];
/// Names under which distributions keep their small kernel for virtual machines: Debian, Ubuntu.
const KERNELS: &[&str] = &["linux-image-cloud-amd64", "linux-image-virtual"];
const BUSYBOX: &str = "busybox-static";
const EXT4: &str = "e2fsprogs";
/// Programs of [`EXT4`], and the libraries that they are linked with, which are in packages that it depends on.
const EXT4_PROGRAMS: &[(&str, &str)] = &[("sbin/mke2fs", "sbin/mkfs.ext4"), ("sbin/e2fsck", "sbin/e2fsck")];
const EXT4_LIBRARIES: &[&str] =
    &["libext2fs.so.2", "libe2p.so.2", "libcom_err.so.2", "libblkid.so.1", "libuuid.so.1", "libc.so.6"];
/// Where the libraries are, and what links them with a program when it starts.
const LIBRARY_DIR: &str = "lib/x86_64-linux-gnu";
const LINKER: &str = "ld-linux-x86-64.so.2";

/// Where packages and what is made of them are kept: `nested` below the build's target directory.
#[must_use]
pub fn cache_dir() -> PathBuf {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from);
    target.join("nested")
}

/// The root of the source tree that this was built from.
pub(crate) fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// Installs with `apt-get` what this machine needs and does not have.
///
/// # Errors
///
/// [`Error::Packages`] where something is missing and this user is not root, [`Error::Missing`] where there is
/// no `apt-get`, and what `apt-get` says.
pub fn ensure_packages() -> Result<()> {
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(program, package)| find(program, package).is_err())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let apt = find("apt-get", "apt")?;
    if !is_root() {
        return Err(Error::Packages { packages: missing });
    }
    run(Command::new(&apt).arg("update"))?;
    let install = ["install", "--yes", "--no-install-recommends"];
    run(Command::new(&apt).env("DEBIAN_FRONTEND", "noninteractive").args(install).args(missing))?;
    Ok(())
}

/// What guests are made of, unpacked.
#[derive(Debug, Clone)]
pub struct Packages {
    /// Version of the kernel, as in `uname -r`.
    pub release: String,
    /// The kernel as the distribution ships it: a bzImage.
    pub kernel: PathBuf,
    /// Its modules: `/lib/modules/<release>`.
    pub modules: PathBuf,
    /// A busybox that needs no libraries.
    pub busybox: PathBuf,
    /// Programs that make and check ext4, and all that they need, by their path in a guest.
    pub ext4: Vec<(String, PathBuf)>,
}

impl Packages {
    /// Finds the packages in `cache`, or downloads them.
    ///
    /// # Errors
    ///
    /// [`Error::Missing`] where there is no apt or dpkg, [`Error::Archive`] where the archive does not have them,
    /// and what these programs say.
    pub fn get(cache: &Path) -> Result<Self> {
        let cache = cache.join("packages");
        fs::create_dir_all(&cache).map_err(Error::file("create", &cache))?;
        // One process at a time; the lock goes with the file.
        let lock = cache.join("lock");
        let lock_file = File::create(&lock).map_err(Error::file("create", &lock))?;
        lock_file.lock().map_err(Error::file("lock", &lock))?;

        let image = kernel_package()?;
        let release = image.trim_start_matches("linux-image-").to_owned();
        // Ubuntu has the modules in a package of their own.
        let modules_package =
            dependencies(&image)?.into_iter().find(|name| *name == format!("linux-modules-{release}"));
        let mut ext4_packages = vec![EXT4.to_owned()];
        ext4_packages.extend(dependencies(EXT4)?.into_iter().filter(|name| name.starts_with("lib")));

        let mut names = vec![image.clone(), BUSYBOX.to_owned()];
        names.extend(ext4_packages.iter().chain(&modules_package).cloned());
        let shown = show(&names)?;
        let unpacked = |package: &str| unpacked(&cache, package, &shown);
        let image_dir = unpacked(&image)?;
        let modules_dir =
            modules_package.map_or_else(|| Ok(image_dir.clone()), |package| unpacked(&package))?;
        let busybox_dir = unpacked(BUSYBOX)?;
        let ext4_dirs = ext4_packages.iter().map(|package| unpacked(package)).collect::<Result<Vec<_>>>()?;
        let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| busybox_dir.join(path));
        Ok(Self {
            kernel: image_dir.join(format!("boot/vmlinuz-{release}")),
            modules: ["lib", "usr/lib"]
                .map(|lib| modules_dir.join(lib).join("modules").join(&release))
                .into_iter()
                .find(|dir| dir.is_dir())
                .unwrap_or_else(|| modules_dir.join("lib/modules").join(&release)),
            busybox: busybox
                .into_iter()
                .find(|file| file.is_file())
                .unwrap_or_else(|| busybox_dir.join("bin/busybox")),
            ext4: ext4(&ext4_dirs)?,
            release,
        })
    }
}

/// Programs that make and check ext4, and all that they need, by their path in a guest; of the packages in `dirs`.
fn ext4(dirs: &[PathBuf]) -> Result<Vec<(String, PathBuf)>> {
    // Distributions differ in whether there is anything outside of /usr.
    let found = |path: &str| {
        let places = dirs.iter().flat_map(|dir| [dir.join(path), dir.join("usr").join(path)]);
        places
            .into_iter()
            .find(|place| place.is_file())
            .ok_or_else(|| Error::Archive { name: path.to_owned() })
    };
    let programs = EXT4_PROGRAMS.iter().map(|(from, to)| Ok(((*to).to_owned(), found(from)?)));
    let libraries = EXT4_LIBRARIES.iter().map(|name| {
        let path = format!("{LIBRARY_DIR}/{name}");
        found(&path).map(|file| (path, file))
    });
    let linker =
        std::iter::once_with(|| Ok((format!("lib64/{LINKER}"), found(&format!("{LIBRARY_DIR}/{LINKER}"))?)));
    programs.chain(libraries).chain(linker).collect()
}

/// The package of the kernel itself, on which the one without a version depends.
fn kernel_package() -> Result<String> {
    let look = || {
        KERNELS.iter().find_map(|name| {
            let depends = dependencies(name).ok()?;
            depends.into_iter().find(|name| {
                name.strip_prefix("linux-image-")
                    .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
            })
        })
    };
    if let Some(package) = look() {
        return Ok(package);
    }
    update()?;
    look().ok_or_else(|| Error::Archive { name: KERNELS.join(" or ") })
}

/// Brings apt's lists up to date where this user may.
fn update() -> Result<()> {
    let apt = find("apt-get", "apt")?;
    if is_root() {
        run(Command::new(apt).arg("update"))?;
    }
    Ok(())
}

fn is_root() -> bool {
    // SAFETY: the call takes no arguments and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The packages on which `package` depends.
fn dependencies(package: &str) -> Result<Vec<String>> {
    let listed = run(Command::new(find("apt-cache", "apt")?).args(["depends", package]))?;
    Ok(parse_dependencies(&listed))
}

fn parse_dependencies(listed: &str) -> Vec<String> {
    let depends = |line: &str| {
        let line = line.trim();
        line.strip_prefix("Depends: ").or_else(|| line.strip_prefix("PreDepends: ")).map(str::to_owned)
    };
    listed.lines().filter_map(depends).collect()
}

/// What the archive says of these packages, in the versions that apt would install. Asked once for all: apt looks
/// through its lists each time.
fn show(packages: &[String]) -> Result<String> {
    let shown =
        run(Command::new(find("apt-cache", "apt")?).args(["show", "--no-all-versions"]).args(packages));
    shown.map_err(|_| Error::Archive { name: packages.join(" or ") })
}

/// The version of `package` among what `apt-cache show` says of several.
fn version<'a>(shown: &'a str, package: &str) -> Option<&'a str> {
    let of = |paragraph: &'a str, field: &str| paragraph.lines().find_map(|line| line.strip_prefix(field));
    let found = shown.split("\n\n").find(|paragraph| of(paragraph, "Package: ") == Some(package))?;
    of(found, "Version: ")
}

/// The directory below `cache` with the content of `package`, in the version that is in `shown`.
fn unpacked(cache: &Path, package: &str, shown: &str) -> Result<PathBuf> {
    let version = version(shown, package).ok_or_else(|| Error::Archive { name: package.to_owned() })?;
    let dir = cache.join(format!("{package}_{version}"));
    if dir.is_dir() {
        return Ok(dir);
    }
    // Made under another name, so that a directory under the right one is complete.
    let work = tempfile::tempdir_in(cache).map_err(Error::file("create a directory in", cache))?;
    let apt = find("apt-get", "apt")?;
    let mut download = Command::new(apt);
    download.args(["download", package]).current_dir(work.path());
    if run(&mut download).is_err() {
        // The lists may be older than the archive.
        update()?;
        run(&mut download)?;
    }
    let deb = fs::read_dir(work.path())
        .map_err(Error::file("list", work.path()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.as_os_str().as_bytes().ends_with(b".deb"))
        .ok_or_else(|| Error::Archive { name: package.to_owned() })?;
    let content = work.path().join("content");
    run(Command::new(find("dpkg-deb", "dpkg")?).arg("--extract").arg(deb).arg(&content))?;
    fs::rename(&content, &dir).map_err(Error::file("create", &dir))?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_found_among_other_relations() {
        let listed = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-9-cloud-amd64\n  Suggests: doc\n";
        assert_eq!(parse_dependencies(listed), ["linux-image-6.1.0-9-cloud-amd64"]);
        let listed = "e2fsprogs\n  PreDepends: libc6\n  Depends: logsave\n  Recommends: e2fsprogs-l10n\n";
        assert_eq!(parse_dependencies(listed), ["libc6", "logsave"]);
    }

    #[test]
    fn version_is_that_of_the_package_that_was_asked_for() {
        let shown = "Package: a\nSource: b\nVersion: 1:2-3\nDescription: x\n Version: 9\n\nPackage: b\nVersion: 4\n\n";
        assert_eq!((version(shown, "a"), version(shown, "b")), (Some("1:2-3"), Some("4")));
        assert_eq!(version(shown, "c"), None);
    }

    #[test]
    fn workspace_holds_this_crate() {
        assert!(workspace().join("tests/nested/src/packages.rs").is_file());
    }
}
