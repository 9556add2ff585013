//! `vmm image` as a program calls it: what it prints, what it leaves, and with which status it ends. No guest runs here.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;
use tempfile::TempDir;
use vmm_tests::guest;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, line: &str) -> Output {
        let mut command = Command::new(guest::vmm_binary().unwrap());
        command.current_dir(self.0.path()).env("VMM_RUN_DIR", self.path("run"));
        command.arg("image").args(line.split(' ')).output().unwrap()
    }

    /// What it prints; it has to succeed.
    fn ok(&self, line: &str) -> String {
        let output = self.run(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(0), "{line}: {said}");
        assert_eq!(said, "", "{line}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one line of JSON that it prints; it has to succeed.
    fn json(&self, line: &str) -> Value {
        let text = self.ok(&format!("{line} --json"));
        assert_eq!(text.lines().count(), 1, "{line}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// What it says; it has to fail with `status`, print nothing, and leave nothing.
    fn refused(&self, line: &str, status: i32) -> String {
        let before = self.names();
        let output = self.run(line);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{line}: {said}");
        assert!(output.stdout.is_empty(), "{line}");
        assert_eq!(self.names(), before, "{line}");
        said
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A flat image of `size` bytes, with `bytes` at `offset`.
    fn flat(&self, name: &str, size: u64, offset: u64, bytes: &[u8]) {
        let file = File::create_new(self.path(name)).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }
}

fn members(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

const MIB: u64 = 1 << 20;

#[test]
fn create_makes_each_format_and_tells_it() {
    let place = Place::new();
    let made = place.json("create a.img --size 8M --max-size 2M --cluster-size 128K");
    assert_eq!((made["format"].as_str(), made["size"].as_u64()), (Some("thin"), Some(8 * MIB)));
    assert_eq!((made["max_size"].as_u64(), made["cluster_size"].as_u64()), (Some(2 * MIB), Some(128 << 10)));
    place.ok("create b.img --size 8M --format flat");
    assert_eq!(place.read("b.img"), vec![0; 8 << 20]);
    let dense = place.json("create c.img --size 8M --format flat --preallocate");
    assert!(dense["allocated"].as_u64().unwrap() >= 8 * MIB, "{dense}");
    let on = place.json("create d.img --backing b.img");
    assert_eq!((on["backing"].as_str(), on["size"].as_u64()), (Some("b.img"), Some(8 * MIB)));
    assert_eq!(place.names(), ["a.img", "b.img", "c.img", "d.img"]);
}

#[test]
fn create_refuses_what_cannot_be_and_leaves_nothing() {
    let place = Place::new();
    place.flat("there", MIB, 0, b"mine");
    for (line, status) in [
        ("create a.img", 2),
        ("create a.img --size 8", 2),
        ("create a.img --size 8M --format raw", 2),
        ("create a.img --size 8M --cluster-size 4K", 2),
        ("create a.img --size 2048T", 1),
        ("create a.img --size 8M --max-size 64K", 1),
        ("create a.img --size 8M --preallocate", 1),
        ("create a.img --size 8M --format flat --max-size 4M", 1),
        ("create a.img --size 8M --format vmdk", 1),
        ("create a.img --backing nowhere.img", 1),
        ("create nowhere/a.img --size 8M", 1),
        ("create there --size 8M", 1),
    ] {
        place.refused(line, status);
    }
    assert_eq!(place.read("there")[..4], *b"mine");
}

#[test]
fn force_replaces_a_file_once_the_new_one_is_complete() {
    let place = Place::new();
    place.flat("a.img", MIB, 0, b"mine");
    assert!(place.refused("create a.img --size 8M", 1).contains("--force"));
    assert!(place.refused("create a.img --size 2048T --force", 1).starts_with("vmm: a.img: "));
    place.refused("convert missing.img a.img --format flat --force", 1);
    assert!(place.refused("copy a.img a.img --force", 1).contains("made from"));
    assert_eq!(place.read("a.img")[..4], *b"mine");
    place.ok("create a.img --size 8M --force");
    assert_eq!(place.json("info a.img")["format"], "thin");
    place.ok("snapshot create a.img one");
    assert!(place.refused("create a.img --size 8M --force", 1).contains("has snapshots"));
    place.ok("create base.img --size 8M");
    place.ok("clone base.img top.img");
    assert!(place.refused("create base.img --size 8M --force", 1).contains("linked clones"));
}

#[test]
fn info_has_the_documented_members_for_one_and_a_chain() {
    let place = Place::new();
    place.flat("base.img", MIB, 0, b"x");
    place.ok("clone base.img top.img");
    let info = place.json("info top.img");
    assert_eq!(
        members(&info),
        [
            "allocated",
            "backing",
            "cluster_size",
            "details",
            "format",
            "in_use_by",
            "is_base",
            "max_size",
            "path",
            "pending",
            "size",
            "snapshots"
        ]
    );
    let chain = place.json("info top.img --chain");
    let chain = chain.as_array().unwrap();
    assert_eq!(chain.len(), 2);
    assert_eq!((&chain[1]["format"], &chain[1]["is_base"]), (&Value::from("flat"), &Value::from(true)));
    assert!(place.refused("info missing.img", 1).contains("missing.img"));
}

#[test]
fn check_ends_with_0_for_sound_1_for_leaks_and_2_for_damage() {
    let place = Place::new();
    place.flat("data.img", 4 * MIB, 0, &[1; 1 << 20]);
    place.ok("convert data.img a.img --format thin");
    let checked = place.json("check a.img");
    assert_eq!(members(&checked), ["format", "path", "report", "sound"]);
    assert_eq!((&checked["sound"], &checked["report"]["data"]), (&Value::from(true), &Value::from(MIB)));
    assert_eq!(place.json("check data.img")["report"], Value::Null);
    place.refused("check missing.img", 2);
    let file = File::options().write(true).open(place.path("a.img")).unwrap();
    file.set_len(file.metadata().unwrap().len() + MIB).unwrap();
    assert!(place.ok("check a.img").contains("sound; 1M behind its end, which --repair gives back"));
    assert_eq!(place.json("check a.img --repair")["report"]["repaired"]["given_back"], MIB);
    assert!(!place.ok("check a.img").contains("behind"));
    // Both superblocks.
    file.write_all_at(&[0x55; 8192], 4096).unwrap();
    assert!(place.refused("check a.img", 2).contains("superblocks"));
    fs::write(place.path("short.img"), b"VMM-THIN").unwrap();
    place.refused("check short.img", 2);
}

#[test]
fn clones_read_as_their_base_linked_or_full_or_of_a_snapshot() {
    let place = Place::new();
    place.flat("base.img", MIB, 4096, &[7; 8192]);
    place.flat("other.img", MIB, 0, &[9; 512]);
    place.ok("clone base.img linked.img");
    assert_eq!(place.json("clone base.img full.img --full")["backing"], Value::Null);
    place.ok("compare base.img linked.img");
    place.ok("compare base.img full.img");
    assert!(fs::metadata(place.path("base.img")).unwrap().permissions().readonly());
    place.ok("snapshot create linked.img then");
    place.ok("copy other.img linked.img --into");
    place.ok("clone linked.img earlier.img --snapshot then");
    place.ok("compare base.img earlier.img");
    assert_eq!(place.run("compare base.img linked.img").status.code(), Some(1));
    assert!(place.refused("clone linked.img x.img --snapshot never", 1).contains("never"));
    place.refused("clone missing.img x.img", 1);
}

#[test]
fn snapshots_are_kept_listed_gone_back_to_and_deleted() {
    let place = Place::new();
    place.flat("one.img", MIB, 0, &[1; 512]);
    place.flat("two.img", MIB, 0, &[2; 512]);
    place.ok("copy one.img web.img");
    let made = place.json("snapshot create web.img first --description fresh");
    assert_eq!(members(&made), ["done", "guest", "path", "snapshot"]);
    assert_eq!((&made["done"], &made["guest"]), (&Value::from("snapshot create"), &Value::Null));
    place.ok("copy two.img web.img --into");
    place.ok("compare two.img web.img");
    place.ok("revert web.img first --keep second");
    place.ok("compare one.img web.img");
    let tree = place.json("snapshot ls web.img");
    assert_eq!((members(&tree), &tree["head"]), (vec!["head", "path", "snapshots"], &Value::from("first")));
    let listed = tree["snapshots"].as_array().unwrap();
    let parents: Vec<_> = listed.iter().map(|one| (one["name"].as_str(), one["parent"].as_str())).collect();
    assert_eq!(parents, [(Some("first"), None), (Some("second"), Some("first"))]);
    assert!(listed[0]["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(listed[0]["description"], "fresh");
    assert!(place.refused("snapshot create web.img first", 1).contains("first"));
    assert!(place.refused("snapshot create web.img ../up", 1).contains("name"));
    assert!(place.refused("snapshot delete web.img third", 1).contains("first, second"));
    place.ok("revert web.img second");
    place.ok("compare two.img web.img");
    place.ok("snapshot delete web.img first");
    place.ok("snapshot delete web.img second");
    place.ok("compare two.img web.img");
    assert_eq!(place.ok("snapshot ls web.img"), "web.img: no snapshots\n");
}

#[test]
fn commit_brings_an_image_down_and_stream_up() {
    let place = Place::new();
    place.flat("base.img", MIB, 0, &[1; 512]);
    place.flat("wanted.img", MIB, 65536, &[2; 512]);
    place.ok("clone base.img top.img");
    place.ok("copy wanted.img top.img --into");
    assert!(place.refused("commit top.img", 1).contains("chmod u+w"));
    let mut permissions = fs::metadata(place.path("base.img")).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    fs::set_permissions(place.path("base.img"), permissions).unwrap();
    assert_eq!(place.json("commit top.img")["done"], "commit");
    place.ok("compare base.img wanted.img");
    place.ok("stream top.img");
    assert_eq!(place.json("info top.img")["backing"], Value::Null);
    place.ok("compare top.img wanted.img");
    place.refused("stream top.img", 1);
    place.refused("commit wanted.img", 1);
    assert!(place.refused("discard wanted.img", 1).contains("nothing to discard"));
}

#[test]
fn redo_log_holds_its_image_back_until_it_is_committed_or_discarded() {
    let place = Place::new();
    for end in ["commit", "discard"] {
        for name in place.names() {
            fs::remove_file(place.path(&name)).unwrap();
        }
        place.flat("web.img", MIB, 0, &[1; 512]);
        place.flat("new.img", MIB, 0, &[2; 512]);
        place.ok("clone web.img web.img.redo");
        let mut permissions = fs::metadata(place.path("web.img")).unwrap().permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
        fs::set_permissions(place.path("web.img"), permissions).unwrap();
        place.ok("copy new.img web.img.redo --into");
        assert!(place.json("info web.img")["pending"].as_str().unwrap().ends_with("web.img.redo"));
        for refused in
            ["copy web.img b.img", "clone web.img b.img", "resize web.img 2M", "snapshot create web.img x"]
        {
            let said = place.refused(refused, 1);
            assert!(said.contains("commit or discard"), "{refused}: {said}");
        }
        place.ok(&format!("{end} web.img"));
        assert_eq!(place.names(), ["new.img", "web.img"]);
        assert_eq!(place.read("web.img")[0], if end == "commit" { 2 } else { 1 });
    }
}

#[test]
fn resize_enlarges_and_never_shrinks() {
    let place = Place::new();
    for format in ["thin", "flat"] {
        place.ok(&format!("create {format}.img --size 4M --format {format}"));
        assert_eq!(place.json(&format!("resize {format}.img 8M"))["size"], 8 * MIB);
        assert_eq!(place.json(&format!("resize {format}.img +1M"))["size"], 9 * MIB);
        assert!(place.refused(&format!("resize {format}.img 4M"), 1).contains("only becomes larger"));
        place.refused(&format!("resize {format}.img"), 2);
        assert_eq!(place.json(&format!("info {format}.img"))["size"], 9 * MIB);
    }
    assert_eq!(place.json("resize thin.img --max-size 2M")["max_size"], 2 * MIB);
    assert_eq!(place.json("resize thin.img --max-size none")["max_size"], Value::Null);
    place.refused("resize flat.img --max-size 2M", 1);
    place.refused("resize thin.img --max-size 64K", 1);
}

#[test]
fn converted_there_and_back_is_the_same() {
    let place = Place::new();
    place.flat("a.img", 3 * MIB, MIB + 4096, &[5; 70_000]);
    place.ok("convert a.img b.img --format thin");
    assert_eq!(place.json("convert b.img c.img --format flat")["size"], 3 * MIB);
    assert_eq!(place.read("a.img"), place.read("c.img"));
    let dense = place.json("convert b.img d.img --format flat --preallocate");
    assert!(dense["allocated"].as_u64().unwrap() >= 3 * MIB);
    // As bytes, whatever they look like.
    place.ok("convert b.img e.img --from flat --format flat");
    assert_eq!(place.read("b.img"), place.read("e.img"));
    place.refused("convert b.img f.img --format thin --preallocate", 1);
    place.refused("convert b.img a.img --format flat", 1);
}

#[test]
fn images_of_kinds_that_are_not_read_are_converted_only_as_flat_ones() {
    let place = Place::new();
    for (name, offset, magic) in [
        ("a.vdi", 64, b"\x7f\x10\xda\xbe".as_slice()),
        ("a.vhd", 0, b"conectix"),
        ("a.qed", 0, b"QED\0"),
        ("a.hdd", 0, b"WithoutFreeSpace"),
    ] {
        place.flat(name, MIB, offset, magic);
        for line in [format!("convert {name} a.img --format thin"), format!("copy {name} a.img")] {
            let said = place.refused(&line, 1);
            assert!(said.contains("qemu-img convert") && said.contains("--from flat"), "{said}");
        }
        place.ok(&format!("convert {name} {name}.img --format thin --from flat"));
        place.ok(&format!("compare {name} {name}.img"));
    }
}

#[test]
fn copy_keeps_the_kind_and_writes_into_what_is_large_enough() {
    let place = Place::new();
    place.flat("a.img", 2 * MIB, MIB, &[5; 4096]);
    let copied = place.json("copy a.img b.img");
    assert_eq!(copied["format"], "flat");
    assert!(copied["allocated"].as_u64().unwrap() < MIB, "{copied}");
    assert_eq!(place.read("a.img"), place.read("b.img"));
    place.flat("large.img", 4 * MIB, 3 * MIB, &[9; 4096]);
    place.ok("copy a.img large.img --into");
    place.ok("compare a.img large.img");
    place.flat("small.img", MIB, 0, &[9; 4096]);
    place.refused("copy a.img small.img --into", 1);
    assert_eq!(place.read("small.img")[..4096], [9; 4096]);
    place.refused("copy a.img missing.img --into", 1);
    assert!(place.refused("copy a.img a.img --into", 1).contains("what would be copied"));
}

#[test]
fn compare_ends_with_0_1_and_2_as_diff_does() {
    let place = Place::new();
    place.flat("a.img", MIB, 0, &[1; 512]);
    place.flat("b.img", MIB, 0, &[1; 512]);
    place.flat("longer.img", 2 * MIB, 0, &[1; 512]);
    place.flat("other.img", MIB, 5000, b"x");
    assert_eq!(
        place.json("compare a.img b.img"),
        serde_json::json!({"same": true, "reason": null, "offset": null})
    );
    place.ok("compare a.img longer.img");
    for (line, wanted) in [
        (
            "compare a.img other.img --json",
            serde_json::json!({"same": false, "reason": "contents", "offset": 0}),
        ),
        (
            "compare a.img longer.img --strict --json",
            serde_json::json!({"same": false, "reason": "size", "offset": null}),
        ),
    ] {
        let output = place.run(line);
        assert_eq!(output.status.code(), Some(1), "{line}");
        assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), wanted, "{line}");
    }
    place.refused("compare a.img missing.img", 2);
}

#[test]
fn map_covers_the_disk_and_says_where_bytes_lie() {
    let place = Place::new();
    place.flat("base.img", 2 * MIB, MIB, &[5; 65536]);
    place.ok("clone base.img top.img");
    let map = place.json("map top.img");
    let pieces = map.as_array().unwrap();
    let mut at = 0;
    for piece in pieces {
        assert_eq!(piece["offset"], at, "{map}");
        at += piece["len"].as_u64().unwrap();
    }
    assert_eq!(at, 2 * MIB);
    let data: Vec<_> = pieces.iter().filter(|piece| piece["data"] == true).collect();
    assert_eq!(data.len(), 1, "{map}");
    assert_eq!((&data[0]["depth"], &data[0]["file_offset"]), (&Value::from(1), &Value::from(MIB)));
    assert!(data[0]["image"].as_str().unwrap().ends_with("base.img"));
    place.refused("map missing.img", 1);
}

#[test]
fn rebase_takes_a_backing_that_reads_the_same_and_others_only_if_accepted() {
    let place = Place::new();
    place.flat("base.img", MIB, 0, &[1; 512]);
    place.flat("same.img", MIB, 0, &[1; 512]);
    place.flat("other.img", MIB, 0, &[2; 512]);
    place.ok("clone base.img top.img");
    assert_eq!(place.json("rebase top.img --backing same.img")["backing"], "same.img");
    assert!(place.refused("rebase top.img --backing other.img", 1).contains("--accept"));
    assert_eq!(place.json("rebase top.img --backing other.img --accept")["backing"], "other.img");
    place.ok("compare top.img other.img");
    // One that was changed all the same.
    File::options().write(true).open(place.path("other.img")).unwrap().write_all_at(b"new", 0).unwrap();
    place.refused("info top.img", 1);
    place.ok("rebase top.img --accept");
    place.ok("compare top.img other.img");
    place.refused("rebase base.img --accept", 1);
    place.refused("rebase top.img", 2);
}

#[test]
fn base_of_a_clone_that_was_not_made_is_as_it_was() {
    let place = Place::new();
    place.flat("base.img", MIB, 0, b"x");
    place.refused("clone base.img nowhere/web.img", 1);
    place.refused("create web.img --backing base.img --max-size 64K", 1);
    assert!(!fs::metadata(place.path("base.img")).unwrap().permissions().readonly());
}

#[test]
fn names_that_are_no_text_reach_neither_the_terminal_nor_break_json() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let base = std::ffi::OsStr::from_bytes(b"\x1b[31m\xff.img");
    fs::write(place.path("base.img"), [1; 512]).unwrap();
    fs::rename(place.path("base.img"), place.0.path().join(base)).unwrap();
    let image = |args: &[&std::ffi::OsStr]| {
        let mut command = Command::new(guest::vmm_binary().unwrap());
        command.current_dir(place.0.path()).arg("image").args(args).output().unwrap()
    };
    assert!(image(&["clone".as_ref(), base, "web.img".as_ref()]).status.success());
    for line in ["info web.img --chain", "map web.img"] {
        let text = place.ok(line);
        assert!(text.contains("[31m") && !text.contains('\u{1b}'), "{text:?}");
        place.json(line);
    }
    for verb in ["info", "check", "map"] {
        let output = image(&[verb.as_ref(), base, "--json".as_ref()]);
        let value: Value = serde_json::from_slice(&output.stdout).expect(verb);
        assert!(value.to_string().contains(".img"), "{verb}: {value}");
    }
}

#[test]
fn interrupted_conversion_leaves_nothing() {
    let place = Place::new();
    place.flat("big.img", 256 * MIB, 0, &vec![7; 256 << 20]);
    let before = place.names();
    let mut command = Command::new(guest::vmm_binary().unwrap());
    command.current_dir(place.0.path()).args(["image", "convert", "big.img", "new.img", "--format", "thin"]);
    let mut child = command.spawn().unwrap();
    // From its first file on it ends cleanly.
    while place.names() == before && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: kill takes numbers; the child has not been waited for, or has and the answer is that there is none.
    unsafe { libc::kill(pid, libc::SIGINT) };
    match child.wait().unwrap().code() {
        Some(130) => assert_eq!(place.names(), before),
        // It was faster.
        Some(0) => place.ok("compare big.img new.img").truncate(0),
        other => panic!("{other:?}"),
    }
}

#[test]
fn dedupe_saves_what_it_said_and_changes_no_contents() {
    let place = Place::new();
    place.flat("a.raw", 4 * MIB, 0, &[7; 2 << 20]);
    fs::create_dir(place.path("d")).unwrap();
    for name in ["one", "two", "three"] {
        place.ok(&format!("convert a.raw d/{name}.img --format thin"));
    }
    let entries = || fs::read_dir(place.path("d")).unwrap().count();
    let foreseen = place.json("dedupe d --method base --dry-run");
    assert_eq!(members(&foreseen), ["bases", "images", "method", "saved"]);
    assert!(foreseen["saved"].as_u64().unwrap() >= 4 * MIB - (64 << 10), "{foreseen}");
    assert_eq!((foreseen["images"].as_array().unwrap().len(), entries()), (3, 3));
    let saved = place.json("dedupe d --method base");
    assert!(saved["saved"].as_u64().unwrap() >= 4 * MIB - (256 << 10), "{saved}");
    assert_eq!(entries(), 4);
    for name in ["one", "two", "three"] {
        place.ok(&format!("compare a.raw d/{name}.img"));
        assert!(place.json(&format!("info d/{name}.img"))["backing"].is_string());
    }
    place.refused("dedupe missing", 1);
    place.refused("dedupe d --method magic", 2);
    place.refused("dedupe d --memory 4K", 2);
}

#[test]
fn image_that_is_in_use_is_refused_with_its_holder() {
    let place = Place::new();
    place.flat("a.img", MIB, 0, &[1; 512]);
    place.ok("convert a.img b.img --format thin");
    // The lock of a writer, as this process has it: bytes of the file that the format of locks names.
    let file = File::options().read(true).write(true).open(place.path("b.img")).unwrap();
    // SAFETY: all zeroes are a valid flock structure.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(libc::F_WRLCK).unwrap();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&file);
    // SAFETY: the structure is a valid one; it covers the whole file.
    let locked = unsafe { libc::fcntl(descriptor, libc::F_OFD_SETLK, &raw const lock) };
    assert_eq!(locked, 0);
    let me = format!("process {} ", std::process::id());
    for line in [
        "snapshot create b.img x",
        "commit b.img --json",
        "stream b.img",
        "resize b.img 8M",
        "copy b.img c.img",
        "create b.img --size 1M --force",
        "clone b.img c.img",
    ] {
        // Without backing a commit and a stream have nothing to wait for.
        let needs_lock = !line.starts_with("commit");
        // A program that another test starts has this process's files for a moment, and may be the one that is found.
        let is_told = || place.refused(line, 1).contains(&me) || !needs_lock;
        assert!((0..20).any(|_| is_told()), "{line}: {}", place.refused(line, 1));
    }
    let in_use_by = || place.json("info b.img")["in_use_by"].as_str().unwrap_or_default().to_owned();
    assert!((0..20).any(|_| in_use_by().contains(&me)), "{}", in_use_by());
    let info = place.json("info b.img");
    assert_eq!(info["size"], MIB);
}

#[test]
fn every_verb_has_help_with_an_example_and_json() {
    let place = Place::new();
    let help = place.ok("--help");
    let verbs: Vec<_> = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .map_while(|line| line.strip_prefix("  "))
        .filter_map(|line| line.split_whitespace().next())
        .filter(|verb| *verb != "help")
        .collect();
    assert!(verbs.len() >= 15, "{help}");
    for verb in verbs {
        if verb == "snapshot" {
            for verb in ["create", "ls", "delete"] {
                let help = place.ok(&format!("snapshot {verb} --help"));
                assert!(help.contains("Example: vmm image snapshot") && help.contains("--json"), "{help}");
            }
            continue;
        }
        let help = place.ok(&format!("{verb} --help"));
        assert!(help.contains(&format!("Example: vmm image {verb} ")) && help.contains("--json"), "{help}");
    }
}

fn qemu_img(place: &Place, line: &str) {
    let output = Command::new("qemu-img").current_dir(place.0.path()).args(line.split(' ')).output().unwrap();
    assert!(output.status.success(), "qemu-img {line}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
#[ignore = "needs qemu-img"]
fn flat_images_that_come_out_of_thin_ones_are_what_qemu_img_says() {
    let place = Place::new();
    place.flat("a.img", 3 * MIB, MIB, &[5; 100_000]);
    place.ok("convert a.img b.img --format thin");
    place.ok("convert b.img c.img --format flat");
    qemu_img(&place, "compare -f raw -F raw a.img c.img");
    qemu_img(&place, "convert -f raw -O raw c.img d.img");
    place.ok("compare d.img b.img");
}

/// Completions of a shell name the verbs.
#[test]
fn completions_have_the_verbs() {
    let output = Command::new(guest::vmm_binary().unwrap()).args(["completions", "bash"]).output().unwrap();
    let script = String::from_utf8(output.stdout).unwrap();
    for verb in ["convert", "snapshot", "rebase", "--max-size"] {
        assert!(script.contains(verb), "{verb}");
    }
}
