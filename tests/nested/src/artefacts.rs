//! What a guest boots: kernel, initial RAM disk and root disk, made of Debian's packages; and the initial RAM disk of
//! the emulated host.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::image;
use crate::kernel;
use crate::modules::Modules;
use crate::packages::Packages;
use crate::program::run;
use crate::tree::Tree;
use crate::{Error, Result};

/// What a guest needs of the virtio drivers, and the power button.
const GUEST_MODULES: &[&str] = &["virtio_mmio", "virtio_blk", "virtio_net", "virtio-rng", "button", "evdev"];
/// What the emulated host needs: KVM, its own devices, taps, and the means to look into guests' disks.
const HOST_MODULES: &[&str] =
    &["kvm-amd", "virtio_pci", "virtio_blk", "virtio_console", "virtio-rng", "tun", "bridge", "veth", "loop"];
/// Size of a guest's root disk.
const ROOT_DISK: u64 = 64 << 20;

/// Files that a guest boots from.
#[derive(Debug, Clone)]
pub struct Artefacts {
    /// Version of the kernel, as in `uname -r`.
    pub release: String,
    /// The kernel as the distribution ships it: a bzImage.
    pub vmlinuz: PathBuf,
    /// The same kernel, unpacked: an ELF file with a PVH note.
    pub vmlinux: PathBuf,
    /// Initial RAM disk: loads drivers, mounts `root=` if the command line has one, and runs its `/sbin/init`.
    pub initrd: PathBuf,
    /// Disk image with an ext4 file system: busybox with its init, a shell on `ttyS0`, `acpid`.
    pub root_disk: PathBuf,
}

impl Artefacts {
    /// Makes the files in the directory `dir`, over those that are there.
    ///
    /// # Errors
    ///
    /// [`Error::File`], [`Error::Format`] and [`Error::Module`] where packages are not as expected,
    /// [`Error::Missing`] where a program is.
    pub fn make(packages: &Packages, dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).map_err(Error::file("create", dir))?;
        let made = Self {
            release: packages.release.clone(),
            vmlinuz: dir.join("vmlinuz"),
            vmlinux: dir.join("vmlinux"),
            initrd: dir.join("initrd.img"),
            root_disk: dir.join("root.ext4"),
        };
        copy(&packages.kernel, &made.vmlinuz)?;
        copy(&unpacked_kernel(&packages.kernel)?, &made.vmlinux)?;
        let mut tree = guest_tree(packages)?;
        let content = tempfile::tempdir_in(dir).map_err(Error::file("create a directory in", dir))?;
        tree.write_to(content.path())?;
        image::ext4(&made.root_disk, ROOT_DISK, "root", content.path())?;
        // Without one the kernel has nowhere to say that the first process cannot be run.
        tree.device("dev/console", 5, 1).program("init", include_str!("../files/l2/init"));
        write(&made.initrd, &initramfs(&tree, &made.initrd)?)?;
        Ok(made)
    }
}

/// Writes the initial RAM disk of the emulated host to `path`.
pub(crate) fn host_initramfs(packages: &Packages, path: &Path) -> Result<()> {
    let mut tree = busybox_tree(packages)?;
    Modules::scan(&packages.modules, &packages.release)?.install(HOST_MODULES, &mut tree)?;
    for dir in ["data", "root", "mnt"] {
        tree.directory(dir);
    }
    tree.device("dev/console", 5, 1)
        .file("etc/modules", HOST_MODULES.join("\n"))
        .program("init", include_str!("../files/l1/init"));
    write(path, &initramfs(&tree, path)?)
}

/// The root file system of a guest, without what only one of its two forms has.
fn guest_tree(packages: &Packages) -> Result<Tree> {
    let mut tree = busybox_tree(packages)?;
    Modules::scan(&packages.modules, &packages.release)?.install(GUEST_MODULES, &mut tree)?;
    for dir in ["mnt", "root", "var/log", "var/run"] {
        tree.directory(dir);
    }
    tree.file("etc/modules", GUEST_MODULES.join("\n"))
        .file("etc/inittab", include_str!("../files/l2/inittab"))
        .file("etc/profile", include_str!("../files/l2/profile"))
        .file("etc/passwd", "root::0:0:root:/:/bin/sh\n")
        .program("etc/rcS", include_str!("../files/l2/rcS"))
        .program("etc/rcK", include_str!("../files/l2/rcK"))
        .program("sbin/ext4-disk", include_str!("../files/l2/ext4-disk"))
        .program("etc/acpi/PWRF/00000080", include_str!("../files/l2/power-button"));
    Ok(tree)
}

/// Busybox under all its names, what makes and checks ext4, and the directories on which everything is mounted.
fn busybox_tree(packages: &Packages) -> Result<Tree> {
    let mut tree = Tree::new();
    for dir in ["dev", "proc", "sys", "run", "tmp"] {
        tree.directory(dir);
    }
    for name in run(Command::new(&packages.busybox).arg("--list-full"))?.lines() {
        tree.link(name, "/bin/busybox");
    }
    let busybox = fs::read(&packages.busybox).map_err(Error::file("read", &packages.busybox))?;
    tree.program("bin/busybox", busybox);
    for (path, file) in &packages.ext4 {
        tree.program(path, fs::read(file).map_err(Error::file("read", file))?);
    }
    Ok(tree)
}

fn initramfs(tree: &Tree, path: &Path) -> Result<Vec<u8>> {
    tree.to_initramfs().map_err(Error::file("pack", path))
}

/// The unpacked kernel, kept beside the packed one.
fn unpacked_kernel(vmlinuz: &Path) -> Result<PathBuf> {
    let path =
        vmlinuz.with_file_name(format!("vmlinux-of-{}", vmlinuz.file_name().unwrap_or_default().display()));
    if !path.is_file() {
        write(&path, &kernel::vmlinux(vmlinuz)?)?;
    }
    Ok(path)
}

pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map_err(Error::file("copy", from))?;
    Ok(())
}

/// Writes a file that is there whole or not at all.
fn write(path: &Path, content: &[u8]) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(Error::file("create a file in", dir))?;
    file.write_all(content).map_err(Error::file("write", path))?;
    // Temporary files are made for their owner alone.
    let readable = fs::Permissions::from_mode(0o644);
    file.as_file().set_permissions(readable).map_err(Error::file("create", path))?;
    let _: File = file.persist(path).map_err(|error| error.error).map_err(Error::file("create", path))?;
    Ok(())
}
