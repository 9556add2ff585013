//! File systems of a guest on disks of every format in every mode, and what is left of them when the monitor is killed.

use std::process::Command;

use vmm_nested::{Guest, L1, Status};

use super::{LONG, ended, ok, on_host};

/// What is written in every mode; `backed` is a thin image on another.
const FORMATS: [&str; 4] = ["flat", "thin", "backed", "qcow2"];
const MODES: [&str; 4] = ["persistent", "nonpersistent", "undoable", "append"];
/// What is never written itself. With it and its entropy device the guest has all the devices that there is room for.
const READ: Disk = Disk { format: "vmdk", mode: "append" };

/// Makes an image of format `$1` for the disk `$2`, as small as ext4 still has a journal. What lies on another, and that
/// of VMware's, has noise, which must not be seen where something was written.
const MAKE: &str = r#"
set -e
mkdir -p /tmp/disks
cd /tmp/disks
[ -e base.img ] || head -c 16777216 /dev/urandom >base.img
case $1 in
flat) vmm image create $2.img --format flat --size 16M ;;
thin) vmm image create $2.img --size 16M ;;
backed) vmm image clone base.img $2.img ;;
qcow2) vmm image create $2.img --size 16M --format qcow2 ;;
vmdk)
    cp base.img $2-flat.vmdk
    cat >$2.img <<END
# Disk DescriptorFile
version=1
CID=5ca1ab1e
parentCID=ffffffff
createType="monolithicFlat"
RW 32768 FLAT "$2-flat.vmdk" 0
END
    ;;
esac
"#;

/// A disk, by its format and mode.
#[derive(Clone, Copy)]
struct Disk {
    format: &'static str,
    mode: &'static str,
}

impl Disk {
    fn all() -> Vec<Self> {
        let of = |format| MODES.map(|mode| Self { format, mode });
        FORMATS.into_iter().flat_map(of).chain([READ]).collect()
    }

    fn name(self) -> String {
        format!("{}-{}", self.format, self.mode)
    }

    fn image(self) -> String {
        format!("/tmp/disks/{}.img", self.name())
    }

    fn log(self) -> String {
        format!("{}.redo", self.image())
    }

    fn config(self) -> String {
        let Self { format, mode } = self;
        let format = if format == "backed" { "thin" } else { format };
        let rest = if mode == "undoable" { "at_power_off = \"commit\"\n" } else { "" };
        let (path, serial) = (self.image(), self.name());
        format!(
            "[[disk]]\npath = \"{path}\"\nserial = \"{serial}\"\nformat = \"{format}\"\nmode = \"{mode}\"\n{rest}"
        )
    }

    /// Whether nothing is ever written to the image itself.
    fn is_read(self) -> bool {
        self.format == READ.format
    }

    /// Whether what the guest writes is there when it runs again.
    fn lasts(self) -> bool {
        self.mode != "nonpersistent"
    }
}

fn config(disks: &[Disk]) -> String {
    let head = super::SMALL.replace("KERNEL", "vmlinuz").replace("small", "disks");
    head + "[memory]\nsize = \"384M\"\n" + &disks.iter().map(|disk| disk.config()).collect::<String>()
}

/// What is in the image's own files, as long as it is not written.
fn sum(l1: &L1, disk: Disk) -> String {
    let extent = format!("/tmp/disks/{}-flat.vmdk", disk.name());
    let files = if disk.format == "vmdk" { extent } else { disk.image() };
    l1.check(&format!("cat {files} | md5sum"), LONG).unwrap()
}

/// The image is sound; a crash may have left space that nothing uses, no more.
fn assert_sound(l1: &L1, disk: Disk) {
    let path = disk.image();
    if disk.format == "qcow2" {
        // Who made the format knows best.
        let copy = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(copy.path(), l1.read_file(&path).unwrap()).unwrap();
        let mut check = Command::new("qemu-img");
        let checked = check.args(["check", "-f", "qcow2"]).arg(copy.path()).output().unwrap();
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{path}: {checked:?}");
    } else {
        assert_sound_at(l1, &path);
    }
}

fn assert_sound_at(l1: &L1, path: &str) {
    let checked = l1.run(&format!("vmm image check {path} --json"), LONG).unwrap();
    let known = [Status::Code(0), Status::Code(1)].contains(&checked.status);
    assert!(known && checked.text().starts_with('{'), "{path}: {checked:?}");
}

#[test]
#[ignore = "needs qemu-system-x86_64, qemu-img and Debian's packages"]
fn ext4_is_whole_on_each_format_and_mode_after_the_monitor_was_killed_in_mid_write() {
    on_host(|host| {
        let l1 = &host.l1;
        let disks = Disk::all();
        l1.write_file("/tmp/make", MAKE.as_bytes()).unwrap();
        l1.check("rm -rf /tmp/disks", LONG).unwrap();
        for disk in &disks {
            l1.check(&format!("sh /tmp/make {} {}", disk.format, disk.name()), LONG).unwrap();
        }
        let before: Vec<String> = disks.iter().map(|disk| sum(l1, *disk)).collect();
        let unchanged = |disk: &Disk| {
            let at = disks.iter().position(|other| other.name() == disk.name()).unwrap();
            sum(l1, *disk) == before[at]
        };

        let mut guest = Guest::start(l1, &config(&disks)).unwrap();
        for disk in &disks {
            ok(&mut guest, &format!("ext4-disk fill {}", disk.name()));
        }
        for disk in &disks {
            ok(&mut guest, &format!("ext4-disk churn {}", disk.name()));
        }
        // All at once: what is typed while they write takes its time.
        ok(&mut guest, "touch /run/churn");
        let (written, all) = ("ls /run | grep -c churned-", disks.len().to_string());
        ok(&mut guest, &format!("until [ $({written}) = {all} ]; do usleep 200000; done"));
        l1.check("kill -9 $(cat /run/vmm/disks/pid)", LONG).unwrap();
        assert_eq!(ended(guest.console()), Status::Signal(9));

        for disk in &disks {
            let has_log = l1.run(&format!("test -e {}", disk.log()), LONG).unwrap().status.success();
            assert_eq!(has_log, matches!(disk.mode, "undoable" | "append"), "log of {}", disk.name());
            assert_eq!(unchanged(disk), disk.mode != "persistent", "image of {}", disk.name());
            assert_sound(l1, *disk);
            if has_log {
                assert_sound_at(l1, &disk.log());
            }
        }

        let mut guest = Guest::start(l1, &config(&disks)).unwrap();
        for disk in &disks {
            let name = disk.name();
            if disk.lasts() {
                ok(&mut guest, &format!("ext4-disk check {name}"));
            } else {
                ok(&mut guest, &format!("ext4-disk blank {name}"));
                ok(&mut guest, &format!("ext4-disk fill {name}"));
            }
        }
        guest.console().send("poweroff\n");
        assert_eq!(ended(guest.console()), Status::Code(0));

        for disk in &disks {
            let (name, log) = (disk.name(), disk.log());
            let has_log = l1.run(&format!("test -e {log}"), LONG).unwrap().status.success();
            assert_eq!(has_log, disk.mode == "append", "log of {name}");
            assert_eq!(unchanged(disk), matches!(disk.mode, "nonpersistent" | "append"), "image of {name}");
            if has_log {
                let verb = if disk.is_read() { "discard" } else { "commit" };
                l1.check(&format!("vmm image {verb} {}", disk.image()), LONG).unwrap();
                assert!(!l1.run(&format!("test -e {log}"), LONG).unwrap().status.success(), "log of {name}");
            }
            assert_sound(l1, *disk);
            assert_eq!(unchanged(disk), disk.is_read() || !disk.lasts(), "image of {name} in the end");
            if disk.lasts() && !disk.is_read() {
                assert_files(l1, *disk);
            }
        }
        l1.check("rm -r /tmp/disks", LONG).unwrap();
    });
}

/// The host finds in the image what the guest put there.
fn assert_files(l1: &L1, disk: Disk) {
    let flat = "/tmp/disks/flat.raw";
    l1.check(&format!("vmm image convert {} {flat} --format flat --force", disk.image()), LONG).unwrap();
    l1.check(&format!("vmm image compare {} {flat}", disk.image()), LONG).unwrap();
    l1.check(&format!("e2fsck -fn {flat} 2>&1"), LONG).unwrap();
    let look =
        "mkdir -p /tmp/seen && mount -o loop,ro,noload FLAT /tmp/seen && cd /tmp/seen && sha256sum -c sums";
    l1.check(&look.replace("FLAT", flat), LONG).unwrap();
    l1.check("umount /tmp/seen", LONG).unwrap();
}
