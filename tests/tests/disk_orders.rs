//! What is done with a disk while its guest runs: snapshots, size, medium, limits; and what is refused.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use vmm_tests::disks::{SERVE, SPAN, Serving, at, contents, image, make, pattern, with_disk};

fn zeroes() -> Vec<u8> {
    vec![0; usize::try_from(SPAN).unwrap()]
}

fn snapshot(path: &Path, name: &str) -> std::path::PathBuf {
    path.with_file_name("disk.img.snapshots").join(name)
}

/// The names in the tree of snapshots, and the one that the disk lies on.
fn tree(path: &Path) -> (Vec<String>, Value) {
    let tree: Value = serde_json::from_str(&image(&["snapshot", "ls", at(path), "--json"])).unwrap();
    let names = tree["snapshots"].as_array().unwrap().iter();
    assert!(names.clone().all(|snapshot| snapshot["running"] == true), "{tree}");
    (names.map(|snapshot| snapshot["name"].as_str().unwrap().to_owned()).collect(), tree["head"].clone())
}

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshots_of_a_running_and_of_a_paused_guest_hold_what_it_had_written() {
    for format in ["flat", "thin"] {
        let (setup, path) = with_disk(SERVE, format, SPAN, "");
        let mut guest = Serving::start(setup);
        guest.write(1);
        let (status, body) = guest.api("POST", "disks/0/snapshot", "{\"name\":\"one\"}");
        assert_eq!((status, body), (204, Value::Null));
        guest.reads(Some(1));
        guest.write(2);
        guest.ok(&["pause", guest.0.name()]);
        guest.ok(&["image", "snapshot", "create", at(&path), "two"]);
        guest.ok(&["resume", guest.0.name()]);
        guest.reads(Some(2));
        guest.write(3);
        let disk = guest.disk(0);
        let below = [snapshot(&path, "two"), snapshot(&path, "one")];
        assert_eq!(disk["backing"], json!(below), "{disk}");
        assert_eq!((&disk["format"], &disk["path"]), (&"thin".into(), &at(&path).into()), "{disk}");
        assert_eq!(tree(&path), (vec!["one".to_owned(), "two".to_owned()], "two".into()));
        let said = guest.refused("POST", "disks/0/snapshot", "{\"name\":\"one\"}", 409);
        assert!(said.contains("has a snapshot one already"), "{said}");
        let said = guest.refused("POST", "disks/0/snapshot", "{\"name\":\"../one\"}", 409);
        assert!(said.contains("begins with a letter or digit"), "{said}");
        guest.reads(Some(3));
        assert_eq!(guest.end(), 0);
        assert!(contents(&path) == pattern(3, SPAN), "{format}");
        for (name, seed) in [("one", 1), ("two", 2)] {
            image(&["revert", at(&path), name]);
            assert!(contents(&path) == pattern(seed, SPAN), "{format} {name}");
        }
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshots_are_refused_of_disks_that_have_none() {
    for (keys, wanted) in [
        ("readonly = true", "only read"),
        ("mode = \"nonpersistent\"", "nonpersistent"),
        ("mode = \"undoable\"", "redo log"),
        ("mode = \"append\"", "redo log"),
    ] {
        let (setup, path) = with_disk(SERVE, "thin", SPAN, keys);
        let guest = Serving::start(setup);
        let said = guest.refused("POST", "disks/0/snapshot", "{\"name\":\"one\"}", 409);
        assert!(said.contains(wanted) && said.contains("disk 0 of guest"), "{keys}: {said}");
        assert!(!snapshot(&path, "one").exists());
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn larger_disk_is_seen_by_the_guest_and_in_the_status_and_is_what_the_mode_makes_of_it() {
    for (format, keys, kept) in [
        ("flat", "", true),
        ("thin", "", true),
        ("thin", "mode = \"nonpersistent\"", false),
        ("flat", "mode = \"undoable\"\nat_power_off = \"commit\"", true),
        ("flat", "mode = \"undoable\"\nat_power_off = \"discard\"", false),
    ] {
        let (setup, path) = with_disk(SERVE, format, SPAN, keys);
        let mut guest = Serving::start(setup);
        guest.write(1);
        assert_eq!(guest.size(), SPAN);
        let body = format!("{{\"bytes\":{}}}", 2 * SPAN);
        assert_eq!(guest.api("PUT", "disks/0/size", &body).0, 204);
        assert_eq!(guest.size_after_change(), 2 * SPAN, "{format} {keys}");
        assert_eq!(guest.disk(0)["bytes"], 2 * SPAN);
        // The same again is no change.
        assert_eq!(guest.api("PUT", "disks/0/size", &body).0, 204);
        guest.reads(Some(1));
        assert_eq!(guest.end(), 0);
        assert_eq!(contents(&path).len() as u64, if kept { 2 * SPAN } else { SPAN }, "{format} {keys}");
    }
    let (setup, path) = with_disk(SERVE, "thin", SPAN, "");
    let mut guest = Serving::start(setup);
    guest.size();
    guest.ok(&["image", "resize", at(&path), "+4M"]);
    assert_eq!(guest.size_after_change(), 2 * SPAN);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn sizes_that_a_disk_cannot_have_are_refused_and_change_nothing() {
    let (setup, _) = with_disk(SERVE, "flat", SPAN, "");
    let guest = Serving::start(setup);
    for bytes in [0, 512, SPAN - 512, SPAN + 1, SPAN + 511, (1 << 50) + 512, u64::MAX - 511, u64::MAX] {
        let said = guest.refused("PUT", "disks/0/size", &format!("{{\"bytes\":{bytes}}}"), 409);
        assert!(said.contains("multiple of 512"), "{bytes}: {said}");
    }
    for body in
        ["{}", "{\"bytes\":-1}", "{\"bytes\":\"1G\"}", "{\"bytes\":1.5}", "{\"bytes\":512,\"x\":1}", "[", ""]
    {
        let said = guest.refused("PUT", "disks/0/size", body, 400);
        assert!(said.contains("not the JSON"), "{body}: {said}");
    }
    assert_eq!(guest.disk(0)["bytes"], SPAN);
    let (setup, _) = with_disk(SERVE, "flat", SPAN, "readonly = true");
    let said =
        Serving::start(setup).refused("PUT", "disks/0/size", &format!("{{\"bytes\":{}}}", 2 * SPAN), 409);
    assert!(said.contains("only read"), "{said}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn another_medium_is_shown_to_the_guest_and_the_old_one_is_free() {
    let (setup, path) = with_disk(SERVE, "flat", SPAN, "");
    let other = path.with_file_name("other.img");
    make(&other, "thin", 2 * SPAN);
    let mut guest = Serving::start(setup);
    guest.write(1);
    guest.size();
    guest.ok(&["disk", "medium", guest.0.name(), "0", at(&other)]);
    assert_eq!(guest.size_after_change(), 2 * SPAN);
    guest.reads(None);
    guest.write(2);
    let disk = guest.disk(0);
    assert_eq!((&disk["path"], &disk["format"]), (&at(&other).into(), &"thin".into()), "{disk}");
    assert_eq!(disk["bytes"], 2 * SPAN, "{disk}");
    // Nobody has the old one any more, and it can come back.
    assert!(contents(&path) == pattern(1, SPAN));
    guest.ok(&["disk", "medium", guest.0.name(), "0", at(&path), "--format", "flat"]);
    guest.reads(Some(1));
    assert_eq!(guest.end(), 0);
    assert!(contents(&other)[..zeroes().len()] == pattern(2, SPAN));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn medium_is_opened_in_the_disks_mode_and_its_log_outlives_it() {
    let (setup, path) = with_disk(SERVE, "thin", SPAN, "mode = \"undoable\"\nat_power_off = \"commit\"");
    let [other, third] = ["other.img", "third.img"].map(|name| path.with_file_name(name));
    make(&other, "thin", SPAN);
    make(&third, "thin", SPAN);
    let mut guest = Serving::start(setup);
    guest.write(1);
    for path in [&third, &other] {
        guest.ok(&["disk", "medium", guest.0.name(), "0", at(path)]);
        guest.reads(None);
    }
    guest.write(2);
    assert_eq!(guest.disk(0)["redo"], at(&path.with_file_name("other.img.redo")));
    assert_eq!(guest.end(), 0);
    assert!(contents(&other) == pattern(2, SPAN));
    assert!(!path.with_file_name("third.img.redo").exists(), "nothing was written to that one");
    // What was decided for the disk is not for what is no longer in it.
    assert!(path.with_file_name("disk.img.redo").exists());
    image(&["commit", at(&path)]);
    assert!(contents(&path) == pattern(1, SPAN));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn medium_that_cannot_be_used_is_refused_and_the_old_one_stays() {
    let (setup, path) = with_disk(SERVE, "flat", SPAN, "mode = \"undoable\"");
    let dir = path.parent().unwrap().to_owned();
    let guest = setup.beside(SERVE).unwrap().with("[[disk]]\npath = \"used.img\"\n");
    make(&dir.join("used.img"), "flat", SPAN);
    make(&dir.join("thin.img"), "thin", SPAN);
    fs::write(dir.join("empty.img"), "").unwrap();
    let user = Serving::start(guest);
    let mut guest = Serving::start(setup);
    guest.write(1);
    let place = |name: &str| at(&dir.join(name)).to_owned();
    for (path, format, wanted) in [
        (place("none.img"), Value::Null, "No such file"),
        (place("empty.img"), Value::Null, "less than one sector"),
        (place("used.img"), Value::Null, user.0.name()),
        (place("disk.img"), Value::Null, guest.0.name()),
        (place("thin.img"), "qcow2".into(), "qcow2"),
        (place("thin.img"), "floppy".into(), "has to be one of"),
        (dir.to_str().unwrap().to_owned(), Value::Null, "directory"),
        ("used.img".to_owned(), Value::Null, "absolute"),
        (String::new(), Value::Null, "absolute"),
    ] {
        let body = json!({"path": path, "format": format}).to_string();
        let said = guest.refused("PUT", "disks/0/medium", &body, 409);
        assert!(said.contains(wanted), "{body}: {said}");
    }
    for body in ["{}", "{\"path\":3}", "{\"path\":\"/x\",\"mode\":\"persistent\"}"] {
        let said = guest.refused("PUT", "disks/0/medium", body, 400);
        assert!(said.contains("not the JSON"), "{body}: {said}");
    }
    let left = fs::read_dir(&dir)
        .unwrap()
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".redo"));
    assert_eq!(left.count(), 1, "a redo log is left of what was refused");
    guest.reads(Some(1));
    assert_eq!(guest.disk(0)["path"], at(&path));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn limits_are_set_shown_and_refused_out_of_range() {
    let (setup, _) = with_disk(SERVE, "flat", SPAN, "iops = 100000\nburst = \"2s\"");
    let mut guest = Serving::start(setup);
    assert_eq!(guest.disk(0)["limits"], json!({"iops": 100_000, "bandwidth": null, "burst": 2000}));
    guest.ok(&["disk", "limits", guest.0.name(), "0", "--bandwidth", "1G"]);
    assert_eq!(guest.disk(0)["limits"], json!({"iops": null, "bandwidth": 1_u64 << 30, "burst": null}));
    for (body, wanted) in [
        ("{\"iops\":0}", "iops has to be"),
        ("{\"iops\":10000001}", "iops has to be"),
        ("{\"bandwidth\":4095}", "bandwidth has to be"),
        ("{\"iops\":1,\"burst\":0}", "burst has to be"),
        ("{\"iops\":1,\"burst\":60001}", "burst has to be"),
        ("{\"burst\":10}", "burst means nothing"),
    ] {
        let said = guest.refused("PUT", "disks/0/limits", body, 409);
        assert!(said.contains(wanted), "{body}: {said}");
    }
    let said = guest.refused("PUT", "disks/0/limits", "{\"iopses\":5}", 400);
    assert!(said.contains("iopses"), "{said}");
    assert_eq!(guest.disk(0)["limits"]["bandwidth"], 1_u64 << 30);
    assert_eq!(guest.api("PUT", "disks/0/limits", "{}").0, 204);
    assert_eq!(guest.disk(0)["limits"], json!({"iops": null, "bandwidth": null, "burst": null}));
    guest.write(1);
    guest.ok(&["disk", "retry", guest.0.name()]);
    assert!(guest.disk(0)["waiting"].is_null());
    guest.reads(Some(1));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn orders_to_disks_that_are_not_there_or_have_no_choice_are_refused() {
    let (setup, _) = with_disk(SERVE, "flat", SPAN, "");
    let mut guest = Serving::start(setup);
    for (method, path, body) in [
        ("POST", "snapshot", "{\"name\":\"a\"}"),
        ("POST", "commit", ""),
        ("PUT", "size", "{\"bytes\":512}"),
        ("PUT", "retry", ""),
    ] {
        let said = guest.refused(method, &format!("disks/1/{path}"), body, 404);
        assert!(said.contains("there is no disk 1"), "{path}: {said}");
    }
    guest.refused("PUT", "disks/-1/retry", "", 404);
    guest.refused("PUT", "disks/18446744073709551616/retry", "", 404);
    let said = guest.refused("PUT", "disks/0/at-power-off", "{\"action\":\"commit\"}", 409);
    assert!(said.contains("no choice") && said.contains("persistent"), "{said}");
    guest.refused("PUT", "disks/0/at-power-off", "{\"action\":\"forget\"}", 400);
    for what in ["commit", "stream"] {
        let said = guest.refused("POST", &format!("disks/0/{what}"), "", 409);
        assert!(said.contains("lies on nothing"), "{said}");
    }
    guest.write(1);
    guest.reads(Some(1));
    assert_eq!(guest.end(), 0);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn orders_pauses_and_the_end_may_come_at_any_moment() {
    use std::sync::atomic::{AtomicBool, Ordering};
    for round in 0..4 {
        let (setup, path) = with_disk(SERVE, "thin", SPAN, "queues = 2");
        let mut guest = Serving::start(setup);
        guest.write(1);
        let socket = guest.socket();
        let over = AtomicBool::new(false);
        let ask = |method: &str, path: &str, body: &str, good: &[u16]| {
            let (status, answer) = vmm_tests::disks::request(&socket, method, path, body);
            // The guest may be at its end.
            let is_end = status == 0 || status == 409 && answer.to_string().contains("end");
            assert!(good.contains(&status) || is_end, "{path}: {status} {answer}");
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    ask("PUT", "pause", "", &[204]);
                    ask("PUT", "resume", "", &[204]);
                }
            });
            scope.spawn(|| {
                for number in 0.. {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    ask("POST", "disks/0/snapshot", &format!("{{\"name\":\"s{number}\"}}"), &[204, 409]);
                    ask("POST", "disks/0/commit", "", &[202, 409]);
                    ask("POST", "disks/0/commit", "", &[202, 409]);
                }
            });
            scope.spawn(|| {
                for number in 1.. {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    let bytes = SPAN + (number << 12);
                    ask("PUT", "disks/0/size", &format!("{{\"bytes\":{bytes}}}"), &[204, 409]);
                    ask("GET", "status", "", &[200]);
                    ask("PUT", "disks/0/retry", "", &[204]);
                    ask("PUT", "disks/0/limits", "{\"iops\":1000000}", &[204]);
                    ask("GET", "jobs", "", &[200]);
                }
            });
            for seed in 2..10 {
                guest.write(seed);
                guest.reads(Some(seed));
            }
            if round % 2 == 0 {
                guest.ok(&["stop", guest.0.name(), "--now"]);
                assert_eq!(guest.0.exit_status().unwrap().code(), Some(0), "{}", guest.0.transcript());
            } else {
                guest.0.kill().unwrap();
            }
            over.store(true, Ordering::Relaxed);
        });
        // What was begun with a snapshot may have to be finished.
        let tree: Value = serde_json::from_str(&image(&["snapshot", "ls", at(&path), "--json"])).unwrap();
        for snapshot in tree["snapshots"].as_array().unwrap().iter().filter(|one| one["deleting"] == true) {
            image(&["snapshot", "delete", at(&path), snapshot["name"].as_str().unwrap()]);
        }
        image(&["check", at(&path), "--repair"]);
        assert!(contents(&path)[..zeroes().len()] == pattern(9, SPAN), "round {round}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn disks_of_a_guest_are_shown_to_people() {
    let (setup, path) = with_disk(SERVE, "thin", SPAN, "mode = \"undoable\"");
    make(&path.with_file_name("second.img"), "flat", 1 << 20);
    let setup = setup.with("[[disk]]\npath = \"second.img\"\nreadonly = true\niops = 100\n");
    let guest = Serving::start(setup);
    let text = guest.ok(&["show", guest.0.name()]);
    for wanted in [
        at(&path),
        "thin, 4M, undoable",
        "disk.img.redo",
        "at power-off: ask",
        "flat, 1M, read-only",
        "100 requests/s",
    ] {
        assert!(text.contains(wanted), "{wanted:?} is not in\n{text}");
    }
}
