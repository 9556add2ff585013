//! A disk without room: its guest waits, everybody else is told, and it goes on once there is room.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmm_tests::disks::{SERVE, SPAN, Serving, at, contents, disk, image, pattern};
use vmm_tests::guest::{DEADLINE, Setup};

/// A guest whose image may take less than what the guest will write.
fn small(keys: &str) -> (Serving, PathBuf) {
    let setup = Setup::new(SERVE).unwrap().with(&disk(keys));
    let path = setup.dir().join("disk.img");
    image(&["create", at(&path), "--size", "4M", "--max-size", "2M"]);
    (Serving::start(setup), path)
}

/// Waits until requests of the disk wait; gives why.
fn waits(guest: &Serving) -> String {
    let until = Instant::now() + DEADLINE;
    loop {
        if let Some(why) = guest.disk(0)["waiting"].as_str() {
            return why.to_owned();
        }
        assert!(Instant::now() < until, "nothing waits\n{}", guest.0.transcript());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_waits_at_the_max_size_whatever_its_mode_and_goes_on_when_that_is_raised() {
    for keys in
        ["", "on_error = \"pause\"", "mode = \"undoable\"\nat_power_off = \"commit\"", "mode = \"append\""]
    {
        let (mut guest, path) = small(keys);
        assert_eq!(guest.disk(0)["max_size"], 2 << 20);
        guest.tell("write 1");
        let why = waits(&guest);
        let shown = guest.ok(&["show", guest.0.name()]);
        assert!(shown.contains(&format!("waits: {why}")), "{shown}");
        assert!(guest.0.log().contains("`vmm disk retry"), "{}", guest.0.log());
        assert!(guest.disk(0)["allocated"].as_u64().unwrap() <= 2 << 20);
        // As long as there is no room it waits again.
        guest.ok(&["disk", "retry", guest.0.name()]);
        guest.ok(&["pause", guest.0.name()]);
        guest.ok(&["resume", guest.0.name()]);
        waits(&guest);
        let said = guest.refused("PUT", "disks/0/max-size", "{\"bytes\":4096}", 409);
        assert!(said.contains("at least"), "{said}");
        if keys.is_empty() {
            guest.ok(&["image", "resize", at(&path), "--max-size", "16M"]);
            assert_eq!(guest.disk(0)["max_size"], 16 << 20);
        } else {
            assert_eq!(guest.api("PUT", "disks/0/max-size", "{\"bytes\":null}").0, 204);
            assert_eq!(guest.disk(0)["max_size"], Value::Null);
        }
        let written = guest.0.wait_event("written").unwrap();
        assert_eq!(written["errors"], 0, "{written}");
        guest.reads(Some(1));
        let after = guest.disk(0);
        assert!(after["waiting"].is_null() && after["counters"]["errors"] == 0, "{after}");
        assert_eq!(guest.end(), if keys.contains("undoable") { 1 } else { 0 }, "{}", guest.0.transcript());
        if keys.contains("undoable") || keys.contains("append") {
            // The image itself still has its limit, which is lifted before the log goes into it.
            let said = String::from_utf8(vmm_tests::disks::try_image(&["commit", at(&path)]).stderr).unwrap();
            assert!(said.contains("write to"), "{said}");
            continue;
        }
        assert!(contents(&path) == pattern(1, SPAN), "{keys}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_that_waits_for_room_can_be_stopped_and_what_was_flushed_is_there() {
    let (mut guest, path) = small("");
    guest.tell("write 1");
    waits(&guest);
    guest.ok(&["stop", guest.0.name(), "--now"]);
    assert_eq!(guest.0.exit_status().unwrap().code(), Some(0), "{}", guest.0.transcript());
    image(&["check", at(&path), "--repair"]);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn another_medium_and_a_snapshot_are_ways_out_for_a_guest_that_waits() {
    let (mut guest, path) = small("");
    let other = path.with_file_name("other.img");
    image(&["create", at(&other), "--size", "4M"]);
    guest.tell("write 1");
    waits(&guest);
    guest.ok(&["disk", "medium", guest.0.name(), "0", at(&other)]);
    assert_eq!(guest.0.wait_event("written").unwrap()["errors"], 0);
    guest.write(2);
    guest.reads(Some(2));
    assert_eq!(guest.end(), 0);
    assert!(contents(&other) == pattern(2, SPAN));
}
