//! Disk modes: what a guest writes is where its disk's mode says, and what becomes of it when the guest has ended.

use std::fs;
use std::path::Path;

use tempfile::TempDir;
use vmm_tests::disks::{
    SERVE, SPAN, Serving, at, contents, disk, image, make, pattern, try_image, with_disk,
};
use vmm_tests::terminal::Terminal;

fn redo(image: &Path) -> std::path::PathBuf {
    image.with_file_name("disk.img.redo")
}

fn zeroes() -> Vec<u8> {
    vec![0; usize::try_from(SPAN).unwrap()]
}

/// An image of each format.
const FORMATS: [&str; 3] = ["flat", "thin", "qcow2"];

#[test]
#[ignore = "needs /dev/kvm"]
fn persistent_disk_holds_what_was_written() {
    for format in FORMATS {
        let (setup, path) = with_disk(SERVE, format, SPAN, "");
        let mut guest = Serving::start(setup);
        guest.reads(None);
        guest.write(1);
        guest.reads(Some(1));
        let disk = guest.disk(0);
        assert_eq!((&disk["mode"], &disk["format"]), (&"persistent".into(), &format.into()), "{disk}");
        assert!(disk["redo"].is_null() && disk["at_power_off"].is_null(), "{disk}");
        assert_eq!(guest.end(), 0);
        assert!(contents(&path) == pattern(1, SPAN), "{format}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn nonpersistent_disk_is_shared_by_guests_that_do_not_see_each_other_and_leaves_nothing() {
    for format in FORMATS {
        let (setup, path) = with_disk(SERVE, format, SPAN, "mode = \"nonpersistent\"");
        let other = setup.beside(SERVE).unwrap().with(&disk("mode = \"nonpersistent\""));
        let (mut one, mut two) = (Serving::start(setup), Serving::start(other));
        one.write(1);
        two.reads(None);
        two.write(2);
        one.reads(Some(1));
        two.reads(Some(2));
        let shown = one.disk(0);
        assert_eq!((&shown["mode"], &shown["format"]), (&"nonpersistent".into(), &format.into()), "{shown}");
        assert!(shown["redo"].is_null() && shown["allocated"].as_u64() >= Some(SPAN), "{shown}");
        let names = || {
            let entries = fs::read_dir(path.parent().unwrap()).unwrap();
            entries
                .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains("disk.img"))
                .count()
        };
        assert_eq!(names(), 1);
        assert_eq!((one.end(), two.end()), (0, 0));
        assert!(contents(&path) == zeroes(), "{format}");
        assert_eq!(names(), 1);
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn undoable_disk_is_committed_discarded_or_kept_as_its_configuration_says() {
    for format in FORMATS {
        for action in ["commit", "discard", "keep"] {
            let keys = format!("mode = \"undoable\"\nat_power_off = \"{action}\"");
            let (setup, path) = with_disk(SERVE, format, SPAN, &keys);
            let mut guest = Serving::start(setup.clone());
            guest.write(1);
            let disk = guest.disk(0);
            assert_eq!((&disk["mode"], &disk["format"]), (&"undoable".into(), &format.into()), "{disk}");
            assert_eq!(
                (&disk["redo"], &disk["at_power_off"]),
                (&at(&redo(&path)).into(), &action.into()),
                "{disk}"
            );
            assert_eq!(guest.end(), 0, "{}", guest.0.transcript());
            assert_eq!(redo(&path).exists(), action == "keep", "{format} {action}");
            if action == "keep" {
                // The next start goes on with it.
                let mut guest = Serving::start(setup);
                guest.reads(Some(1));
                assert_eq!(guest.end(), 0);
                image(&["discard", at(&path)]);
                assert!(contents(&path) == zeroes(), "{format} {action}");
            } else {
                let wanted = if action == "commit" { pattern(1, SPAN) } else { zeroes() };
                assert!(contents(&path) == wanted, "{format} {action}");
            }
        }
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn action_of_the_command_line_and_of_an_order_go_before_that_of_the_configuration() {
    let keys = "mode = \"undoable\"\nat_power_off = \"keep\"";
    let (setup, path) = with_disk(SERVE, "thin", SPAN, keys);
    let setup = setup.argument("--at-power-off").argument("discard");
    let mut guest = Serving::start(setup.clone());
    guest.write(1);
    assert_eq!(guest.disk(0)["at_power_off"], "discard");
    assert_eq!(guest.end(), 0);
    assert!(!redo(&path).exists() && contents(&path) == zeroes());

    let mut guest = Serving::start(setup);
    guest.write(2);
    guest.ok(&["disk", "at-power-off", guest.0.name(), "0", "commit"]);
    assert_eq!(guest.disk(0)["at_power_off"], "commit");
    assert_eq!(guest.end(), 0);
    assert!(!redo(&path).exists() && contents(&path) == pattern(2, SPAN));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn every_end_that_the_monitor_sees_is_one_of_the_guests_writes() {
    let keys = "mode = \"undoable\"\nat_power_off = \"commit\"";
    let (setup, path) = with_disk(SERVE, "flat", SPAN, keys);
    for (seed, how) in [(1, "stop"), (2, "signal")] {
        let mut guest = Serving::start(setup.clone());
        guest.write(seed);
        if how == "stop" {
            guest.ok(&["stop", guest.0.name(), "--now"]);
        } else {
            let pid = libc::pid_t::try_from(guest.0.pid()).unwrap();
            // SAFETY: kill takes numbers; the process is our child and has not been waited for.
            assert_eq!(unsafe { libc::kill(pid, libc::SIGTERM) }, 0);
        }
        assert_eq!(guest.0.exit_status().unwrap().code(), Some(0), "{}", guest.0.transcript());
        assert!(!redo(&path).exists() && contents(&path) == pattern(seed, SPAN), "{how}");
    }
    // A guest that crashes ends too, and one that asks for a reset.
    for (cmdline, status) in [("test=crash how=triple", 1), ("test=reset", 0)] {
        let mut guest = Serving::start(setup.clone());
        guest.write(7);
        guest.0.kill().unwrap();
        assert!(redo(&path).exists(), "a monitor that is killed decides nothing");
        let mut guest = setup.beside(cmdline).unwrap().with(&disk(keys)).start().unwrap();
        assert_eq!(guest.exit_status().unwrap().code(), Some(status), "{}", guest.transcript());
        assert!(!redo(&path).exists() && contents(&path) == pattern(7, SPAN), "{cmdline}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn without_a_terminal_nobody_is_asked_and_the_log_is_kept_which_is_said() {
    let (setup, path) = with_disk(SERVE, "thin", SPAN, "mode = \"undoable\"");
    let mut guest = Serving::start(setup.clone());
    assert_eq!(guest.disk(0)["at_power_off"], "ask");
    guest.write(1);
    assert_eq!(guest.end(), 0);
    let said = guest.0.log();
    assert!(said.contains("nobody has decided") && said.contains(at(&redo(&path))), "{said}");
    image(&["commit", at(&path)]);
    assert!(contents(&path) == pattern(1, SPAN));
    // Of what is no change at all, nothing is asked.
    let mut guest = Serving::start(setup);
    guest.reads(Some(1));
    assert_eq!(guest.end(), 0);
    assert_eq!(guest.0.log(), "");
    assert!(!redo(&path).exists());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn whoever_sits_at_the_terminal_is_asked_once_it_is_no_longer_the_guests() {
    let config = disk("mode = \"undoable\"");
    for (answers, kept, committed) in [
        (["what?", "commit"].as_slice(), false, true),
        (&["D"], false, false),
        (&["", "k"], true, false),
        (&["\u{4}"], true, false),
    ] {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("disk.img");
        make(&path, "thin", SPAN);
        let (mut terminal, before) = Terminal::start_in(dir, SERVE, &config);
        terminal.wait_for("\"ready\"");
        terminal.type_in("write 5\n");
        terminal.wait_for("\"written\"");
        terminal.type_in("end\n");
        terminal.wait_for("[c]ommit, [d]iscard or [k]eep");
        assert_eq!(terminal.flags(), before);
        for (number, answer) in answers.iter().enumerate() {
            if number > 0 {
                terminal.wait_for("[c]ommit, [d]iscard or [k]eep");
            }
            let line = if *answer == "\u{4}" { String::from("\u{4}") } else { format!("{answer}\n") };
            terminal.type_in(&line);
        }
        assert_eq!(terminal.ends().code(), Some(0), "{answers:?}");
        assert_eq!(terminal.flags(), before);
        assert_eq!(redo(&path).exists(), kept, "{answers:?}");
        if !kept {
            let wanted = if committed { pattern(5, SPAN) } else { zeroes() };
            assert!(contents(&path) == wanted, "{answers:?}");
        }
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn signal_at_the_question_keeps_the_log() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk.img");
    make(&path, "flat", SPAN);
    let (mut terminal, before) = Terminal::start_in(dir, SERVE, &disk("mode = \"undoable\""));
    terminal.wait_for("\"ready\"");
    terminal.type_in("write 5\n");
    terminal.wait_for("\"written\"");
    terminal.type_in("\u{1d}q");
    terminal.wait_for("[c]ommit, [d]iscard or [k]eep");
    terminal.type_in("\u{3}");
    assert_eq!(terminal.ends().code(), Some(0));
    assert_eq!(terminal.flags(), before);
    assert!(redo(&path).exists());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn append_keeps_its_log_until_a_command_decides() {
    let (setup, path) = with_disk(SERVE, "flat", SPAN, "mode = \"append\"");
    let mut guest = Serving::start(setup.clone());
    guest.write(1);
    let disk = guest.disk(0);
    assert_eq!(
        (&disk["redo"], &disk["at_power_off"]),
        (&at(&redo(&path)).into(), &serde_json::Value::Null),
        "{disk}"
    );
    let said = guest.fails(&["disk", "at-power-off", guest.0.name(), "0", "discard"]);
    assert!(said.contains("vmm image discard"), "{said}");
    assert_eq!(guest.end(), 0);
    let mut guest = Serving::start(setup);
    guest.reads(Some(1));
    assert_eq!(guest.end(), 0);
    assert!(redo(&path).exists());
    image(&["commit", at(&path)]);
    assert!(contents(&path) == pattern(1, SPAN));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn commit_that_cannot_be_made_at_power_off_leaves_the_log_and_the_status_1() {
    let keys = "mode = \"undoable\"\nat_power_off = \"commit\"";
    let (setup, path) = with_disk(SERVE, "flat", SPAN, keys);
    let reader = setup.beside(SERVE).unwrap().with(&disk("mode = \"nonpersistent\""));
    let mut reader = Serving::start(reader);
    let mut guest = Serving::start(setup);
    guest.write(3);
    assert_eq!(guest.end(), 1);
    let said = guest.0.log();
    assert!(said.contains("cannot commit") && said.contains("in use by"), "{said}");
    assert!(redo(&path).exists());
    reader.reads(None);
    assert_eq!(reader.end(), 0);
    image(&["commit", at(&path)]);
    assert!(contents(&path) == pattern(3, SPAN));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn another_signal_while_the_log_is_committed_interrupts_that_and_it_can_be_finished() {
    let size = 128 << 20;
    let serve = "test=blk-serve span=128M size=256K depth=4";
    let keys = "mode = \"undoable\"\nat_power_off = \"commit\"\n[memory]\nsize = \"64M\"";
    let (setup, path) = with_disk(serve, "flat", size, keys);
    let mut guest = Serving::start(setup);
    guest.write(3);
    let pid = libc::pid_t::try_from(guest.0.pid()).unwrap();
    // The first ends the guest. It is over before the second is looked for.
    let signals = std::thread::spawn(move || {
        // SAFETY: kill takes numbers. Once the process was waited for, there is none of that number, since no other has been
        // started in between.
        while unsafe { libc::kill(pid, libc::SIGTERM) } == 0 {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    });
    let status = guest.0.exit_status().unwrap();
    signals.join().unwrap();
    let said = guest.0.log();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("was interrupted") && said.contains("vmm image commit"), "{said}");
    assert!(redo(&path).exists());
    image(&["commit", at(&path)]);
    assert!(!redo(&path).exists() && contents(&path) == pattern(3, size));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn guest_that_is_refused_leaves_no_redo_log() {
    let (setup, path) = with_disk("test=poweroff", "flat", SPAN, "mode = \"undoable\"");
    let refused = setup.with("[[disk]]\npath = \"none.img\"\n");
    let mut guest = refused.start().unwrap();
    assert_eq!(guest.exit_status().unwrap().code(), Some(2));
    assert!(guest.log().contains("disk.1.path"), "{}", guest.log());
    assert!(!redo(&path).exists());
}

#[test]
fn disks_that_cannot_be_opened_so_are_refused_at_the_key_that_is_wrong() {
    let refused = |keys: &str, prepare: &dyn Fn(&Path), wanted: &[&str]| {
        let (setup, path) = with_disk("test=poweroff", "thin", 1 << 20, keys);
        prepare(&path);
        let mut guest = setup.start().unwrap();
        assert_eq!(guest.exit_status().unwrap().code(), Some(2), "{keys}: {}", guest.transcript());
        for wanted in wanted {
            assert!(guest.log().contains(wanted), "{keys}: {wanted:?} is not said, but {}", guest.log());
        }
    };
    let nothing = |_: &Path| {};
    let log = |path: &Path| fs::write(redo(path), "x").unwrap();
    let snapshot = |path: &Path| drop(image(&["snapshot", "create", at(path), "a"]));
    refused("", &log, &["disk.0.mode: ", "commit or discard them first"]);
    refused("mode = \"persistent\"", &log, &["disk.0.mode = \"persistent\": "]);
    refused("format = \"flat\"", &snapshot, &["disk.0.format = \"flat\": ", "leave the format out"]);
    refused("format = \"qcow2\"", &nothing, &["disk.0.format = \"qcow2\": "]);
    refused("mode = \"undoable\"", &log, &["disk.0.path = ", "thin image"]);
    refused("", &|path| fs::write(path, b"VMM-THIN and no more").unwrap(), &["disk.0.path = ", "thin"]);
    let twice = "[[disk]]\npath = \"./link.img\"";
    let link = |path: &Path| std::os::unix::fs::symlink(path, path.with_file_name("link.img")).unwrap();
    refused(twice, &link, &["disk.1.path = ", "in use by"]);
    let marked = |path: &Path| drop(image(&["clone", at(path), at(&path.with_file_name("clone.img"))]));
    refused("", &marked, &["disk.0.path = ", "base of linked clones"]);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn readonly_disk_is_not_written_and_shared_and_its_cache_may_be_passed_by() {
    for format in FORMATS {
        let (setup, path) = with_disk(SERVE, format, SPAN, "readonly = true");
        let other = setup.beside(SERVE).unwrap().with(&disk("readonly = true\ncache = \"none\""));
        let (mut one, mut two) = (Serving::start(setup), Serving::start(other));
        assert!(one.try_write(1) > 0);
        two.reads(None);
        assert_eq!(two.disk(0)["cache"], "none");
        assert_eq!(one.disk(0)["readonly"], true);
        assert_eq!((one.end(), two.end()), (0, 0));
        assert!(contents(&path) == zeroes());
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn caches_and_queues_are_what_was_configured_and_data_is_right_with_each() {
    for format in FORMATS {
        for cache in ["writeback", "none", "unsafe"] {
            let keys = format!("cache = \"{cache}\"\nqueues = 3\nserial = \"S1\"\non_error = \"pause\"");
            let (setup, path) = with_disk(SERVE, format, SPAN, &keys);
            let mut guest = Serving::start(setup);
            guest.write(1);
            guest.reads(Some(1));
            let disk = guest.disk(0);
            for (key, value) in [("cache", cache), ("serial", "S1"), ("on_error", "pause")] {
                assert_eq!(disk[key], value, "{disk}");
            }
            assert_eq!(disk["queues"], 3, "{disk}");
            let counters = &disk["counters"];
            assert_eq!(
                (&counters["writes"], &counters["bytes_written"]),
                (&(SPAN >> 14).into(), &SPAN.into()),
                "{disk}"
            );
            assert_eq!(
                (&counters["reads"], &counters["bytes_read"]),
                (&(SPAN >> 14).into(), &SPAN.into()),
                "{disk}"
            );
            assert_eq!((&counters["flushes"], &counters["errors"]), (&1.into(), &0.into()), "{disk}");
            assert_eq!(guest.end(), 0);
            assert!(contents(&path) == pattern(1, SPAN), "{format} {cache}");
        }
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn image_in_use_by_another_guest_is_refused_in_every_mode_that_writes_to_it() {
    let (setup, path) = with_disk(SERVE, "thin", SPAN, "");
    let setups = ["persistent", "undoable", "append", "nonpersistent"]
        .map(|mode| setup.beside("test=poweroff").unwrap().with(&disk(&format!("mode = \"{mode}\""))));
    let mut guest = Serving::start(setup);
    for other in setups {
        let mut other = other.start().unwrap();
        assert_eq!(other.exit_status().unwrap().code(), Some(2), "{}", other.transcript());
        assert!(other.log().contains(guest.0.name()), "{}", other.log());
        assert!(!redo(&path).exists());
    }
    let said = try_image(&["discard", at(&path)]);
    assert_eq!(said.status.code(), Some(1));
    guest.write(1);
    assert_eq!(guest.end(), 0);
}
