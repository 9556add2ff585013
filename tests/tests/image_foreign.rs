//! `vmm image` with images of other programs' formats, and `qemu-img` with ours.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use vmm_tests::disks::{SERVE, SPAN, Serving, at, try_image, with_disk};
use vmm_tests::guest;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn vmm(&self, line: &str) -> Output {
        let mut command = Command::new(guest::vmm_binary().unwrap());
        command.current_dir(self.0.path()).env("VMM_RUN_DIR", self.path("run"));
        command.arg("image").args(line.split(' ')).output().unwrap()
    }

    /// What it prints; it has to succeed.
    fn ok(&self, line: &str) -> String {
        let output = self.vmm(line);
        assert_eq!(output.status.code(), Some(0), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("{line} --json"))).unwrap()
    }

    /// What it says; it has to fail with `status`, and print nothing.
    fn refused(&self, line: &str, status: i32) -> String {
        let output = self.vmm(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{line}: {said}");
        assert!(output.stdout.is_empty(), "{line}");
        said
    }

    fn qemu_img(&self, line: &str) -> String {
        let output = Command::new("qemu-img").current_dir(self.0.path()).args(line.split(' ')).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A raw image `raw` of 3 MiB with data at the start, in the middle and at the end.
    fn raw(&self) -> Vec<u8> {
        let mut bytes = vec![0; 3 << 20];
        for (at, len, seed) in [(0, 5000, 1), (1 << 20, 200_000, 7), ((3 << 20) - 512, 512, 13)] {
            for (index, byte) in bytes[at..at + len].iter_mut().enumerate() {
                *byte = u8::try_from((index * seed + index / 251) % 251 + 1).unwrap();
            }
        }
        fs::write(self.path("raw"), &bytes).unwrap();
        bytes
    }
}

#[test]
fn qcow2_is_made_described_enlarged_mapped_and_copied() {
    let place = Place::new();
    assert_eq!(place.ok("create a.qcow2 --size 1G --format qcow2"), "a.qcow2: qcow2, 1G\n");
    let info = place.json("info a.qcow2");
    assert_eq!(info["format"], "qcow2");
    assert_eq!((&info["size"], &info["cluster_size"]), (&Value::from(1_u64 << 30), &Value::from(65536)));
    assert_eq!(info["details"][0], serde_json::json!(["qcow2 version", "3"]));
    assert_eq!(place.ok("resize a.qcow2 +1G"), "a.qcow2: qcow2, 2G\n");
    let map = place.json("map a.qcow2");
    assert_eq!(map.as_array().unwrap().len(), 1, "{map}");
    assert_eq!((&map[0]["len"], &map[0]["present"]), (&Value::from(2_u64 << 30), &Value::from(false)));
    assert_eq!(place.ok("copy a.qcow2 b.qcow2"), "b.qcow2: qcow2, 2G\n");
    assert_eq!(place.ok("compare a.qcow2 b.qcow2"), "the same\n");
    place.ok("create c.qcow2 --size 8M --format qcow2 --cluster-size 4K");
    assert_eq!(place.json("info c.qcow2")["cluster_size"], 4096);
    let said = place.refused("create d.qcow2 --size 1T --format qcow2 --cluster-size 1K", 1);
    assert!(said.contains("take larger clusters"), "{said}");
    let said = place.refused("create d.qcow2 --size 8M --format qcow2 --max-size 4M", 1);
    assert!(said.contains("a thin image has the first two"), "{said}");
    let said = place.refused("create d.img --size 8M --cluster-size 4K", 2);
    assert!(said.contains("only a qcow2 image"), "{said}");
    for format in ["vmdk", "vhdx"] {
        for line in
            [format!("create d --size 8M --format {format}"), format!("convert a.qcow2 d --format {format}")]
        {
            let said = place.refused(&line, 1);
            assert!(said.contains("flat, thin and qcow2 can be made"), "{line}: {said}");
            assert!(!place.path("d").exists());
        }
    }
}

#[test]
fn linked_clone_and_redo_log_of_qcow2_read_as_it_does() {
    let place = Place::new();
    let bytes = place.raw();
    assert_eq!(place.ok("convert raw base.qcow2 --format qcow2"), "base.qcow2: qcow2, 3M\n");
    assert_eq!(place.ok("clone base.qcow2 web.img"), "web.img: thin, 3M on base.qcow2\n");
    let chain = place.json("info web.img --chain");
    assert_eq!((&chain[0]["format"], &chain[1]["format"]), (&Value::from("thin"), &Value::from("qcow2")));
    assert_eq!(place.ok("compare raw web.img"), "the same\n");
    place.ok("convert web.img back --format flat");
    assert!(fs::read(place.path("back")).unwrap() == bytes);
    let map = place.json("map web.img");
    assert_eq!((&map[0]["depth"], &map[0]["data"]), (&Value::from(1), &Value::from(true)));
    let said = place.refused("snapshot create base.qcow2 fresh", 1);
    assert!(said.contains("base of linked clones") || said.contains("no snapshots can be made"), "{said}");
    assert_eq!(place.ok("stream web.img"), "web.img: lies on no other image any more\n");
    assert_eq!(place.ok("compare raw web.img"), "the same\n");
}

#[test]
fn check_of_qcow2_says_what_it_examined_and_finds_a_table_out_of_place() {
    let place = Place::new();
    place.raw();
    place.ok("convert raw a.qcow2 --format qcow2");
    let said = place.refused("check a.qcow2", 2);
    assert!(said.contains("its header and tables are in order"), "{said}");
    let mut bytes = fs::read(place.path("a.qcow2")).unwrap();
    let l1 = usize::try_from(u64::from_be_bytes(bytes[40..48].try_into().unwrap())).unwrap();
    bytes[l1 + 3] ^= 1;
    fs::write(place.path("a.qcow2"), bytes).unwrap();
    let said = place.refused("check a.qcow2", 2);
    assert!(said.contains("is not a sound qcow2 image") && said.contains("L1 table"), "{said}");
}

#[test]
fn vhdx_is_recognised_and_not_taken_for_a_flat_image() {
    let place = Place::new();
    let mut bytes = vec![0; 1 << 20];
    bytes[..8].copy_from_slice(b"vhdxfile");
    fs::write(place.path("disk.vhdx"), bytes).unwrap();
    for (line, status) in
        [("info disk.vhdx", 1), ("convert disk.vhdx a.img --format thin", 1), ("check disk.vhdx", 2)]
    {
        let said = place.refused(line, status);
        assert!(said.contains("vhdx"), "{line}: {said}");
    }
    assert_eq!(place.ok("convert disk.vhdx a.img --format thin --from flat"), "a.img: thin, 1M\n");
}

#[test]
#[ignore = "needs qemu-img"]
fn images_convert_to_and_from_those_of_qemu_img() {
    let place = Place::new();
    let bytes = place.raw();
    place.qemu_img("convert -c -f raw -O qcow2 raw theirs.qcow2");
    place.qemu_img("convert -f raw -O vmdk -o subformat=monolithicFlat raw theirs.vmdk");
    fs::copy(place.path("raw"), place.path("base")).unwrap();
    place.qemu_img("create -q -f qcow2 -F raw -b base chain.qcow2");
    for source in ["theirs.qcow2", "theirs.vmdk", "chain.qcow2"] {
        assert_eq!(place.ok(&format!("compare raw {source}")), "the same\n");
        for format in ["flat", "thin", "qcow2"] {
            let to = format!("{source}.{format}");
            place.ok(&format!("convert {source} {to} --format {format}"));
            assert_eq!(place.ok(&format!("compare raw {to}")), "the same\n", "{to}");
            if format == "qcow2" {
                place.qemu_img(&format!("check -q -f qcow2 {to}"));
                place.qemu_img(&format!("compare -q -f raw -F qcow2 raw {to}"));
            }
        }
    }
    assert!(fs::read(place.path("theirs.vmdk.flat")).unwrap() == bytes);
    let info = place.json("info chain.qcow2");
    assert_eq!((&info["backing"], &info["size"]), (&Value::from("base"), &Value::from(3 << 20)));
    place.qemu_img("convert -f raw -O vmdk raw sparse.vmdk");
    let said = place.refused("convert sparse.vmdk a.img --format thin", 1);
    assert!(said.contains("qemu-img convert"), "{said}");
    // What was written over it is what qemu-img reads.
    place.qemu_img("create -q -f qcow2 target.qcow2 4M");
    place.ok("copy theirs.vmdk target.qcow2 --into");
    place.qemu_img("check -q -f qcow2 target.qcow2");
    place.qemu_img("compare -q -f raw -F qcow2 raw target.qcow2");
}

#[test]
#[ignore = "needs qemu-img"]
fn qcow2_in_use_by_qemu_is_refused_and_the_other_way_round() {
    let place = Place::new();
    place.ok("create a.qcow2 --size 64M --format qcow2");
    let io = || {
        let mut command = Command::new("qemu-io");
        command.current_dir(place.0.path());
        command
    };
    let Ok(mut qemu) = io()
        .args(["-f", "qcow2", "a.qcow2"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
    else {
        panic!("qemu-io is beside qemu-img in Debian's package");
    };
    // It has the image once its lock is there; what can be told without one is told.
    let mut info = Value::Null;
    for _ in 0..3000 {
        info = place.json("info a.qcow2");
        if info["in_use_by"].is_string() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    assert!(info["in_use_by"].is_string() && info["size"] == 64 << 20, "{info}");
    assert!(place.refused("resize a.qcow2 65M", 1).contains("in use by"));
    let said = place.refused("convert a.qcow2 b.img --format thin", 1);
    assert!(said.contains("in use by"), "{said}");
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    place.ok("convert a.qcow2 b.img --format thin");
}

#[test]
#[ignore = "needs /dev/kvm, qemu-img"]
fn monitor_killed_while_its_guest_writes_leaves_a_sound_qcow2_disk() {
    for pause in [2, 5, 11, 23] {
        let (setup, path) = with_disk(SERVE, "qcow2", SPAN, "");
        let mut guest = Serving::start(setup.clone());
        if pause % 2 == 1 {
            guest.write(1);
        }
        guest.0.send(b"write 2\n").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(pause));
        guest.0.kill().unwrap();
        // What the kernel still had to do for the process that was killed holds its files a little longer.
        let wait = std::time::Duration::from_millis(10);
        for _ in 0..1000 {
            if try_image(&["map", at(&path)]).status.success() {
                break;
            }
            std::thread::sleep(wait);
        }
        let check = Command::new("qemu-img").args(["check", "-f", "qcow2", at(&path)]).output().unwrap();
        // 3 is leaked clusters.
        let said = String::from_utf8_lossy(&check.stdout).into_owned();
        assert!(
            matches!(check.status.code(), Some(0 | 3)),
            "{said}{}",
            String::from_utf8_lossy(&check.stderr)
        );
        // And it is a disk as before.
        let mut guest = Serving::start(setup);
        guest.write(3);
        guest.reads(Some(3));
        assert_eq!(guest.end(), 0);
        let check = Command::new("qemu-img").args(["check", "-f", "qcow2", at(&path)]).output().unwrap();
        assert!(matches!(check.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&check.stdout));
    }
}
