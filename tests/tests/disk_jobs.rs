//! Jobs: the chain of a disk made shorter while its guest writes and reads.

use std::path::Path;

use serde_json::{Value, json};
use vmm_tests::disks::{Serving, at, contents, disk, image, make, pattern, with_disk};
use vmm_tests::guest::Setup;

/// What the guest writes and reads; some steps of a job.
const SPAN: u64 = 32 << 20;
const SERVE: &str = "test=blk-serve span=32M size=128K depth=4";

/// Has the guest write and read until the job `id` is over; gives the last seed, and the job.
fn work_beside(guest: &mut Serving, id: u64, mut seed: u64) -> (u64, Value) {
    loop {
        let job = guest.job(id);
        if job["state"] != "running" {
            return (seed, job);
        }
        seed += 1;
        guest.write(seed);
        guest.reads(Some(seed));
    }
}

fn redo(path: &Path) -> std::path::PathBuf {
    path.with_file_name("disk.img.redo")
}

#[test]
#[ignore = "needs /dev/kvm"]
fn redo_log_is_committed_while_the_guest_writes() {
    for (format, mode) in [("flat", "undoable"), ("thin", "append"), ("qcow2", "append")] {
        let (setup, path) = with_disk(SERVE, format, SPAN, &format!("mode = \"{mode}\""));
        let mut guest = Serving::start(setup);
        guest.write(1);
        let before = guest.disk(0)["allocated"].as_u64().unwrap();
        let id = guest.begin(0, "commit");
        let (seed, job) = work_beside(&mut guest, id, 1);
        assert_eq!((&job["state"], &job["error"]), (&"done".into(), &Value::Null), "{job}");
        assert_eq!(job["done"], job["total"], "{job}");
        guest.reads(Some(seed));
        assert!(before >= SPAN && guest.disk(0)["redo"] == at(&redo(&path)));
        // Nothing is written beside the second: what is left is in the image afterwards.
        let id = guest.begin(0, "commit");
        assert_eq!(guest.wait_job(id)["state"], "done");
        assert!(guest.disk(0)["allocated"].as_u64().unwrap() < 1 << 20, "{}", guest.disk(0));
        guest.reads(Some(seed));
        guest.0.kill().unwrap();
        image(&["discard", at(&path)]);
        assert!(contents(&path) == pattern(seed, SPAN), "{format} {mode}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshot_is_committed_away_while_the_guest_writes() {
    for format in ["flat", "thin"] {
        let (setup, path) = with_disk(SERVE, format, SPAN, "");
        let mut guest = Serving::start(setup);
        guest.write(1);
        assert_eq!(guest.api("POST", "disks/0/snapshot", "{\"name\":\"a\"}").0, 204);
        guest.write(2);
        let id = guest.begin(0, "commit");
        let (seed, job) = work_beside(&mut guest, id, 2);
        assert_eq!(job["state"], "done", "{job}");
        guest.reads(Some(seed));
        let disk = guest.disk(0);
        assert_eq!((&disk["backing"], &disk["format"]), (&json!([]), &format.into()), "{disk}");
        let said = guest.refused("POST", "disks/0/commit", "", 409);
        assert!(said.contains("lies on no"), "{said}");
        // It can be done again, by the command line too.
        guest.ok(&["image", "snapshot", "create", at(&path), "b"]);
        guest.write(seed + 1);
        guest.ok(&["image", "commit", at(&path)]);
        guest.reads(Some(seed + 1));
        assert_eq!(guest.end(), 0);
        assert!(contents(&path) == pattern(seed + 1, SPAN), "{format}");
        let tree: Value = serde_json::from_str(&image(&["snapshot", "ls", at(&path), "--json"])).unwrap();
        assert_eq!((&tree["snapshots"], &tree["head"]), (&json!([]), &Value::Null), "{tree}");
    }
}

/// A guest whose disk is a linked clone of what a guest has written with seed 1; and the clone.
fn clone() -> (Serving, std::path::PathBuf) {
    let (setup, base) = with_disk(SERVE, "thin", SPAN, "");
    let mut guest = Serving::start(setup.clone());
    guest.write(1);
    assert_eq!(guest.end(), 0);
    let path = base.with_file_name("clone.img");
    image(&["clone", at(&base), at(&path)]);
    let guest = setup.beside(SERVE).unwrap().with("[[disk]]\npath = \"clone.img\"\n");
    (Serving::start(guest), path)
}

#[test]
#[ignore = "needs /dev/kvm"]
fn clone_is_streamed_while_the_guest_writes_and_needs_its_base_no_more() {
    let (mut guest, path) = clone();
    let base = path.with_file_name("disk.img");
    guest.reads(Some(1));
    assert_eq!(guest.disk(0)["backing"], json!([base]));
    let id = guest.begin(0, "stream");
    let (seed, job) = work_beside(&mut guest, id, 1);
    assert_eq!(job["state"], "done", "{job}");
    assert_eq!(guest.disk(0)["backing"], json!([]));
    std::fs::remove_file(base).unwrap();
    guest.reads(Some(seed));
    let said = guest.refused("POST", "disks/0/stream", "", 409);
    assert!(said.contains("lies on no other image"), "{said}");
    assert_eq!(guest.end(), 0);
    assert!(contents(&path) == pattern(seed, SPAN));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn base_of_clones_is_not_committed_to() {
    let (mut guest, path) = clone();
    guest.write(2);
    let said = guest.refused("POST", "disks/0/commit", "", 409);
    assert!(said.contains("no snapshot of it"), "{said}");
    guest.reads(Some(2));
    assert_eq!(guest.end(), 0);
    assert!(contents(&path.with_file_name("disk.img")) == pattern(1, SPAN));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn cancelled_job_changes_nothing_of_what_the_guest_sees_and_can_be_repeated() {
    let (setup, path) = with_disk(SERVE, "flat", SPAN, "mode = \"undoable\"\nat_power_off = \"commit\"");
    let mut guest = Serving::start(setup.clone());
    let mut seed = 0;
    // It may be over before it hears of that.
    let (mut states, mut tries) = (Vec::new(), 0);
    while !states.contains(&Value::from("cancelled")) && tries < 20 {
        seed += 1;
        tries += 1;
        guest.write(seed);
        let id = guest.begin(0, "commit");
        assert_eq!(guest.api("PUT", &format!("jobs/{id}/cancel"), "").0, 204);
        let job = guest.wait_job(id);
        assert!(job["error"].is_null(), "{job}");
        states.push(job["state"].clone());
        guest.reads(Some(seed));
    }
    assert!(states.contains(&"cancelled".into()), "{states:?}");
    let id = guest.begin(0, "commit");
    assert_eq!(guest.wait_job(id)["state"], "done");
    guest.reads(Some(seed));
    // Over is over.
    assert_eq!(guest.api("PUT", &format!("jobs/{id}/cancel"), "").0, 204);
    assert_eq!(guest.job(id)["state"], "done");
    assert_eq!(guest.end(), 0);
    assert!(!redo(&path).exists() && contents(&path) == pattern(seed, SPAN));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_that_ends_takes_its_job_along_and_its_log_is_committed() {
    let (setup, path) = with_disk(SERVE, "thin", SPAN, "mode = \"undoable\"\nat_power_off = \"commit\"");
    let mut guest = Serving::start(setup.clone());
    guest.write(1);
    let _ = guest.begin(0, "commit");
    assert_eq!(guest.end(), 0, "{}", guest.0.transcript());
    assert!(!redo(&path).exists() && contents(&path) == pattern(1, SPAN));
    // One that was killed in the middle goes on where it was.
    let mut guest = Serving::start(setup.clone());
    guest.write(2);
    let _ = guest.begin(0, "commit");
    guest.0.kill().unwrap();
    let mut guest = Serving::start(setup);
    guest.reads(Some(2));
    assert_eq!(guest.end(), 0, "{}", guest.0.transcript());
    assert!(!redo(&path).exists() && contents(&path) == pattern(2, SPAN));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn monitor_that_is_killed_in_the_middle_of_a_job_leaves_what_was_flushed_and_the_job_can_be_finished() {
    for (keys, what) in [("mode = \"append\"", "commit"), ("", "commit"), ("", "stream")] {
        let (setup, path) = with_disk(SERVE, "thin", SPAN, keys);
        for round in 1..=6_u64 {
            let mut guest = Serving::start(setup.clone());
            if round > 1 {
                guest.reads(Some(10 * round - 9));
            }
            guest.write(10 * round);
            if keys.is_empty() {
                // One that is refused finds a deletion unfinished, which is gone on with.
                let _ = guest.api("POST", "disks/0/snapshot", &format!("{{\"name\":\"s{round}\"}}"));
            }
            guest.write(10 * round + 1);
            let _ = guest.begin(0, what);
            std::thread::sleep(std::time::Duration::from_millis(round * round));
            guest.0.kill().unwrap();
        }
        let mut guest = Serving::start(setup);
        guest.reads(Some(61));
        if what == "commit" {
            // Once for each that is below, if one is.
            while guest.disk(0)["backing"] != json!([]) {
                let id = guest.begin(0, "commit");
                assert_eq!(guest.wait_job(id)["state"], "done", "{keys}");
            }
        }
        guest.reads(Some(61));
        guest.write(62);
        assert_eq!(guest.end(), 0);
        if !keys.is_empty() {
            image(&["commit", at(&path)]);
        }
        image(&["check", at(&path), "--repair"]);
        assert!(contents(&path) == pattern(62, SPAN), "{keys} {what}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn beside_a_job_other_changes_of_the_disk_are_refused_and_of_another_disk_are_not() {
    // Large enough to be under way when it is looked at.
    let serve = "test=blk-serve span=128M size=256K depth=4";
    let (setup, path) =
        with_disk(serve, "thin", 128 << 20, "mode = \"undoable\"\nat_power_off = \"discard\"");
    make(&path.with_file_name("second.img"), "thin", SPAN);
    let setup = setup.with("[memory]\nsize = \"64M\"\n[[disk]]\npath = \"second.img\"\n");
    let mut guest = Serving::start(setup);
    guest.write(1);
    let id = guest.begin(0, "commit");
    for (method, path, body) in [
        ("POST", "disks/0/commit", ""),
        ("PUT", "disks/0/size", "{\"bytes\":1073741824}"),
        ("PUT", "disks/0/medium", "{\"path\":\"/none\"}"),
    ] {
        let said = guest.refused(method, path, body, 409);
        assert!(said.contains(&format!("job {id} goes on with it")), "{path}: {said}");
    }
    assert_eq!(guest.api("POST", "disks/1/snapshot", "{\"name\":\"a\"}").0, 204);
    guest.ok(&["pause", guest.0.name()]);
    guest.ok(&["resume", guest.0.name()]);
    assert_eq!(guest.api("PUT", &format!("jobs/{id}/cancel"), "").0, 204);
    // On a busy machine this comes too late, and the job is done.
    let over = guest.wait_job(id);
    assert!(over["state"] == "cancelled" || over["state"] == "done", "{over}");
    guest.reads(Some(1));
    guest.write(2);
    // What it has begun to write down counts as committed: only what came afterwards can be discarded.
    assert_eq!(guest.end(), 0, "{}", guest.0.transcript());
    assert!(!redo(&path).exists() && contents(&path) == pattern(1, 128 << 20));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn jobs_of_a_paused_guest_go_on_and_the_latest_sixteen_are_remembered() {
    let (setup, _) = with_disk("test=blk-serve span=64K size=4K", "thin", 1 << 20, "mode = \"append\"");
    let mut guest = Serving::start(setup);
    assert_eq!(guest.api("GET", "jobs", "").1, json!([]));
    guest.refused("GET", "jobs/1", "", 404);
    guest.refused("PUT", "jobs/1/cancel", "", 404);
    guest.write(1);
    guest.ok(&["pause", guest.0.name()]);
    for number in 1..=20 {
        let id = guest.begin(0, "commit");
        assert_eq!(id, number);
        assert_eq!(guest.wait_job(id)["state"], "done");
    }
    guest.ok(&["resume", guest.0.name()]);
    guest.reads(Some(1));
    let (_, jobs) = guest.api("GET", "jobs", "");
    let ids: Vec<_> = jobs.as_array().unwrap().iter().map(|job| job["id"].as_u64().unwrap()).collect();
    assert_eq!(ids, (5..=20).collect::<Vec<_>>());
    guest.refused("GET", "jobs/4", "", 404);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn jobs_are_refused_of_disks_that_have_nothing_to_merge() {
    for (keys, what, wanted) in [
        ("readonly = true", "commit", "only read"),
        ("mode = \"nonpersistent\"", "commit", "thrown away"),
        ("mode = \"nonpersistent\"", "stream", "thrown away"),
        ("mode = \"undoable\"", "stream", "commit it"),
    ] {
        let setup = Setup::new(SERVE).unwrap().with(&disk(keys));
        make(&setup.dir().join("disk.img"), "flat", SPAN);
        let guest = Serving::start(setup);
        let said = guest.refused("POST", &format!("disks/0/{what}"), "", 409);
        assert!(said.contains(wanted), "{keys} {what}: {said}");
    }
}
