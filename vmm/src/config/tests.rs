//! Configurations as users write them, right and wrong.

use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use vmfs_image::{Cache, Format};

use super::disk::check_limits;
use super::model::{AtPowerOff, Backing, CpuModel, Limits, Mode, OnError, Serial};
use super::schema::interpret;
use super::{Error, load};

const FILE: &str = "/guests/web.toml";

fn problems(text: &str) -> Vec<String> {
    let problems = interpret(Path::new(FILE), text).expect_err("it was taken");
    problems.iter().map(|p| format!("{}:{}: {p}", p.place.line, p.place.column)).collect()
}

fn only_problem(text: &str) -> String {
    let mut all = problems(text);
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

#[test]
fn two_lines_are_enough() {
    let (config, _) = interpret(Path::new(FILE), "[boot]\nkernel = \"vmlinux\"\n").unwrap();
    assert_eq!(config.name, "web");
    assert_eq!(config.boot.kernel, Path::new("/guests/vmlinux"));
    assert_eq!(config.boot.cmdline, "console=ttyS0");
    assert_eq!((config.cpu.count, config.memory.size), (1, 256 << 20));
    assert!(config.rng && config.disks.is_empty() && config.nets.is_empty());
    assert_eq!(config.serial, Serial::Stdio);
}

#[test]
fn every_supported_key_is_understood() {
    let text = r#"
name = "db-1"
rng = false
[boot]
kernel = "/boot/vmlinuz"
initrd = "initrd.img"
cmdline = "console=ttyS0 root=/dev/vda rw"
[cpu]
count = 64
model = "x86-64-v3"
[memory]
size = "256G"
backing = "hugetlbfs"
[[disk]]
path = "db.img"
mode = "undoable"
serial = "DB0001"
format = "thin"
cache = "none"
queues = 8
poll_us = 0
on_error = "pause"
iops = 500
bandwidth = "100M"
burst = "2s"
at_power_off = "commit"
[[disk]]
path = "ro.img"
readonly = true
[[net]]
tap = "tap0"
mac = "52:54:00:12:34:56"
host_address = "10.0.0.1/24"
[[net]]
tap = "tap1"
[serial]
output = "file:console.log"
"#;
    let (config, _) = interpret(Path::new(FILE), text).unwrap();
    assert_eq!(config.name, "db-1");
    assert!(!config.rng);
    assert_eq!((config.cpu.count, config.cpu.model), (64, CpuModel::X86_64V3));
    assert_eq!((config.memory.size, config.memory.backing), (256 << 30, Backing::Hugetlbfs));
    assert_eq!(config.disks[0].serial, "DB0001");
    assert_eq!(config.disks[1].serial, "disk1");
    assert!(!config.disks[0].readonly && config.disks[1].readonly);
    let disk = &config.disks[0];
    assert_eq!((disk.mode, disk.format, disk.cache), (Mode::Undoable, Some(Format::Thin), Cache::None));
    assert_eq!((disk.queues, disk.on_error, disk.at_power_off), (8, OnError::Pause, AtPowerOff::Commit));
    assert_eq!((disk.poll, config.disks[1].poll), (Duration::ZERO, Duration::from_micros(50)));
    let limits = Limits { iops: Some(500), bandwidth: Some(100 << 20), burst: Some(Duration::from_secs(2)) };
    assert_eq!(disk.limits, limits);
    let disk = &config.disks[1];
    assert_eq!((disk.mode, disk.format, disk.cache), (Mode::Persistent, None, Cache::Writeback));
    assert_eq!((disk.queues, disk.on_error, disk.limits), (4, OnError::Report, Limits::default()));
    assert_eq!(config.nets[0].mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    assert_eq!(config.nets[0].host_address.map(|a| a.1), Some(24));
    assert_eq!(&config.nets[1].mac[..2], [0x52, 0x54]);
    assert_eq!(config.serial, Serial::File("/guests/console.log".into()));
}

#[test]
fn all_problems_are_reported_at_once_in_the_order_of_the_file() {
    let text = "nmae = \"x\"\n[boot]\ninitrd = 5\n[cpu]\ncount = 0\n[memory]\nsize = \"1M\"\n";
    let all = problems(text);
    assert_eq!(all.len(), 5, "{all:#?}");
    assert_eq!(all[0], "1:1: nmae: is not a key of this section; did you mean name?");
    assert!(all[1].starts_with("2:1: boot.kernel: is missing"), "{}", all[1]);
    assert_eq!(all[2], "3:10: boot.initrd = 5: has to be a string, in quotes");
    assert_eq!(all[3], "5:9: cpu.count = 0: has to be a number of vCPUs from 1 to 64");
    assert!(all[4].starts_with("7:8: memory.size = \"1M\": guest memory is from 2M to 256G"), "{}", all[4]);
}

#[test]
fn keys_of_the_format_that_come_later_are_refused_by_name() {
    let later = [
        ("cpu", "shares = \"normal\""),
        ("cpu", "min = 10"),
        ("cpu", "max = 200"),
        ("memory", "min = \"128M\""),
        ("memory", "shares = \"high\""),
    ];
    for (section, line) in later {
        let problem = only_problem(&format!("[boot]\nkernel = \"k\"\n[{section}]\n{line}\n"));
        let key = line.split(' ').next().unwrap();
        assert_eq!(problem, format!("4:1: {section}.{key}: is not supported yet"));
    }
    for line in ["vlan = 0", "average = \"1M\"", "peak = \"1M\"", "burst = \"1M\""] {
        let problem = only_problem(&format!("[boot]\nkernel = \"k\"\n[[net]]\ntap = \"t\"\n{line}\n"));
        assert!(problem.ends_with("is not supported yet") && problem.starts_with("5:1: net.0."), "{problem}");
    }
    let shares = only_problem("[boot]\nkernel = \"k\"\n[[disk]]\npath = \"d\"\nshares = \"low\"\n");
    assert_eq!(shares, "5:1: disk.0.shares: is not supported yet");
}

#[test]
fn impossible_values_are_refused_with_what_would_be_right() {
    let cases = [
        ("[cpu]\ncount = 65", "cpu.count = 65: has to be a number of vCPUs from 1 to 64"),
        ("[cpu]\ncount = -1", "from 1 to 64"),
        ("[cpu]\ncount = \"2\"", "from 1 to 64"),
        ("[cpu]\ncount = 99999999999999999999", "from 1 to 64"),
        ("[cpu]\nmodel = \"i386\"", "\"x86-64-v2\""),
        ("[memory]\nsize = \"257G\"", "from 2M to 256G"),
        ("[memory]\nsize = \"3M\"", "multiple of 2M"),
        ("[memory]\nsize = 512", "has to be a string"),
        ("[memory]\nsize = \"512\"", "as in \"512M\""),
        ("[memory]\nbacking = \"tape\"", "\"memfd\""),
        ("[[disk]]\npath = \"\"", "path of a file"),
        ("[[disk]]\npath = \"a\"\nserial = \"123456789012345678901\"", "1 to 20"),
        ("[[disk]]\npath = \"a\"\nmode = \"volatile\"", "\"nonpersistent\""),
        ("[[disk]]\nreadonly = true", "disk.0.path: is missing"),
        (
            "[[disk]]\npath = \"a\"\nmode = \"append\"\nreadonly = true",
            "disk.0.mode = \"append\": is about what",
        ),
        ("[[disk]]\npath = \"a\"\nformat = \"raw\"", "\"flat\""),
        ("[[disk]]\npath = \"a\"\ncache = \"writethrough\"", "\"unsafe\""),
        ("[[disk]]\npath = \"a\"\nqueues = 0", "of queues from 1 to 16"),
        ("[[disk]]\npath = \"a\"\nqueues = 17", "of queues from 1 to 16"),
        ("[[disk]]\npath = \"a\"\nqueues = 65537", "of queues from 1 to 16"),
        ("[[disk]]\npath = \"a\"\npoll_us = 1001", "of microseconds from 0 to 1000"),
        ("[[disk]]\npath = \"a\"\non_error = \"stop\"", "\"pause\""),
        ("[[disk]]\npath = \"a\"\niops = 0", "from 1 to 10000000"),
        ("[[disk]]\npath = \"a\"\niops = \"500\"", "of requests a second from 1"),
        ("[[disk]]\npath = \"a\"\nbandwidth = \"1K\"", "from 4K to 1T bytes a second"),
        ("[[disk]]\npath = \"a\"\nbandwidth = \"2T\"", "from 4K to 1T bytes a second"),
        ("[[disk]]\npath = \"a\"\nbandwidth = 100", "has to be a string"),
        ("[[disk]]\npath = \"a\"\niops = 5\nburst = \"0ms\"", "from 1ms to 60s"),
        ("[[disk]]\npath = \"a\"\niops = 5\nburst = \"61s\"", "from 1ms to 60s"),
        ("[[disk]]\npath = \"a\"\niops = 5\nburst = \"5\"", "as in \"2s\""),
        ("[[disk]]\npath = \"a\"\nburst = \"1s\"", "disk.0.burst = \"1s\": means nothing without"),
        ("[[disk]]\npath = \"a\"\nmode = \"undoable\"\nat_power_off = \"burn\"", "\"discard\""),
        ("[[disk]]\npath = \"a\"\nat_power_off = \"keep\"", "mode = \"undoable\" only"),
        ("[[disk]]\npath = \"a\"\nmode = \"append\"\nat_power_off = \"ask\"", "mode = \"undoable\" only"),
        ("disk = 5", "begun by [[disk]]"),
        ("[[net]]\nmac = \"52:54:00:12:34:56\"", "net.0.tap: is missing"),
        ("[[net]]\ntap = \"a/b\"", "1 to 15"),
        ("[[net]]\ntap = \"interface-too-long\"", "1 to 15"),
        ("[[net]]\ntap = \"a\"\nmac = \"01:00:00:00:00:00\"", "no card's address"),
        ("[[net]]\ntap = \"a\"\nhost_address = \"10.0.0.1\"", "prefix length"),
        ("[serial]\noutput = \"tty\"", "\"file:PATH\""),
        ("cpu = 3", "has to be a section"),
    ];
    for (text, wanted) in cases {
        let (top, sections) = if text.starts_with('[') { ("", text) } else { (text, "") };
        let problem = only_problem(&format!("{top}\n[boot]\nkernel = \"k\"\n{sections}\n"));
        assert!(problem.contains(wanted), "{text}: {problem}");
    }
}

#[test]
fn second_use_of_a_disk_tap_or_address_is_refused() {
    let twice = |section: &str, first: &str, second: &str| {
        only_problem(&format!("[boot]\nkernel = \"k\"\n[[{section}]]\n{first}\n[[{section}]]\n{second}\n"))
    };
    assert!(twice("disk", "path = \"a\"", "path = \"a\"\nreadonly = true").contains("disk.1.path"));
    let modes = twice("disk", "path = \"a\"\nmode = \"nonpersistent\"", "path = \"a\"\nmode = \"undoable\"");
    assert!(modes.contains("readonly or nonpersistent"), "{modes}");
    let nonpersistent = "[[disk]]\npath = \"a\"\nmode = \"nonpersistent\"\n";
    let text = format!("[boot]\nkernel = \"k\"\n{nonpersistent}{nonpersistent}");
    assert_eq!(interpret(Path::new(FILE), &text).unwrap().0.disks.len(), 2);
    assert!(twice("net", "tap = \"a\"", "tap = \"a\"").contains("net.1.tap"));
    let mac = "mac = \"52:54:00:00:00:01\"";
    let problem = twice("net", &format!("tap = \"a\"\n{mac}"), &format!("tap = \"b\"\n{mac}"));
    assert_eq!(
        problem,
        "8:7: net.1.mac = \"52:54:00:00:00:01\": another card of this guest has the same address"
    );
}

#[test]
fn more_devices_than_the_machine_has_lines_for_are_refused() {
    let disks: String = (0..18).map(|i| format!("[[disk]]\npath = \"{i}\"\n")).collect();
    let text = format!("rng = false\n[boot]\nkernel = \"k\"\n{disks}");
    assert_eq!(interpret(Path::new(FILE), &text).unwrap().0.disks.len(), 18);
    let problem = only_problem(&format!("[boot]\nkernel = \"k\"\n{disks}"));
    assert!(problem.contains("room for 18 devices; these would be 19"), "{problem}");
}

#[test]
fn text_that_is_no_toml_is_refused_with_its_place() {
    assert!(only_problem("[boot\nkernel").starts_with("1:"));
    assert!(only_problem("[boot]\nkernel = \"a\"\nkernel = \"b\"\n").starts_with("3:1: "));
}

#[test]
fn name_has_to_be_given_when_the_file_has_none_that_could_be() {
    let text = "[boot]\nkernel = \"k\"\n";
    let problems = interpret(Path::new("/a/my guest.toml"), text).unwrap_err();
    assert_eq!(problems[0].key, "name");
    for name in ["", "-a", ".a", "a b", "a/b", "ä", &"x".repeat(65)] {
        let text = format!("name = \"{name}\"\n{text}");
        assert!(interpret(Path::new(FILE), &text).is_err(), "{name}");
    }
}

#[test]
fn missing_directory_binary_and_huge_files_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let missing = load(&dir.path().join("none.toml")).unwrap_err();
    assert!(matches!(missing, Error::Read { .. }) && missing.to_string().contains("none.toml"));
    assert!(matches!(load(dir.path()), Err(Error::Kind { .. })));
    let file = dir.path().join("a.toml");
    std::fs::write(&file, [0xff, 0xfe]).unwrap();
    assert!(matches!(load(&file), Err(Error::Kind { .. })));
    std::fs::write(&file, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(matches!(load(&file), Err(Error::Kind { .. })));
}

#[test]
fn problems_found_later_carry_the_place_of_their_value() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.toml");
    std::fs::write(&file, "[boot]\nkernel = \"k\"\n").unwrap();
    let loaded = load(&file).unwrap();
    let problems =
        vec![loaded.problem("memory.size", "too small"), loaded.problem("boot.kernel", "no kernel")];
    let text = loaded.error(problems).to_string();
    let file = file.display();
    assert_eq!(
        text,
        format!("{file}:1:1: memory.size: too small\n{file}:2:10: boot.kernel = \"k\": no kernel")
    );
}

/// Lines that are mostly right.
fn line() -> impl Strategy<Value = String> {
    let key = prop_oneof![
        Just("name"),
        Just("[boot]"),
        Just("kernel"),
        Just("[cpu]"),
        Just("count"),
        Just("[memory]"),
        Just("size"),
        Just("[[disk]]"),
        Just("path"),
        Just("[[net]]"),
        Just("tap"),
        Just("mac"),
        Just("[serial]"),
        Just("output"),
        Just("host_address"),
        Just("rng"),
        Just("mode"),
        Just("serial"),
        Just("readonly"),
        Just("format"),
        Just("cache"),
        Just("queues"),
        Just("poll_us"),
        Just("on_error"),
        Just("iops"),
        Just("bandwidth"),
        Just("burst"),
        Just("at_power_off"),
    ];
    let value = prop_oneof![
        Just("\"a\"".to_owned()),
        Just("3".to_owned()),
        Just("\"4M\"".to_owned()),
        Just("true".to_owned()),
        Just("[]".to_owned()),
        Just("{}".to_owned()),
        Just("\"52:54:00:00:00:01\"".to_owned()),
        Just("\"undoable\"".to_owned()),
        Just("\"commit\"".to_owned()),
        Just("\"2s\"".to_owned()),
        "\\PC{0,12}",
    ];
    (key, value).prop_map(|(k, v)| if k.starts_with('[') { k.to_owned() } else { format!("{k} = {v}") })
}

proptest! {
    #[test]
    fn any_document_is_taken_or_refused_with_places_inside_it(lines in prop::collection::vec(line(), 0..12)) {
        let text = lines.join("\n");
        if let Err(problems) = interpret(Path::new(FILE), &text) {
            prop_assert!(!problems.is_empty());
            for problem in problems {
                prop_assert!(problem.place.line >= 1 && problem.place.line <= lines.len() + 1, "{:?}", problem);
                prop_assert!(!problem.message.is_empty());
            }
        }
    }

    #[test]
    fn limits_that_stand_in_a_file_are_those_that_pass_the_check(
        iops in prop::option::of(prop_oneof![0_u64..3, 9_999_999_u64..10_000_002]),
        kib in prop::option::of(prop_oneof![1_u64..9, (1_u64 << 30) - 1..(1 << 30) + 2]),
        ms in prop::option::of(prop_oneof![0_u64..3, 59_999_u64..60_002]),
    ) {
        let line = |key: &str, value: Option<String>| value.map_or(String::new(), |value| format!("{key} = {value}\n"));
        let text = [
            "[boot]\nkernel = \"k\"\n[[disk]]\npath = \"a\"\n".to_owned(),
            line("iops", iops.map(|iops| iops.to_string())),
            line("bandwidth", kib.map(|kib| format!("\"{kib}K\""))),
            line("burst", ms.map(|ms| format!("\"{ms}ms\""))),
        ];
        let read = interpret(Path::new(FILE), &text.concat()).map(|(config, _)| config.disks[0].limits);
        let limits = Limits { iops, bandwidth: kib.map(|kib| kib << 10), burst: ms.map(Duration::from_millis) };
        prop_assert_eq!(read.is_ok(), check_limits(&limits).is_ok());
        prop_assert_eq!(read.unwrap_or(limits), limits);
    }

    #[test]
    fn any_text_is_taken_or_refused(text in "\\PC{0,200}") {
        let _: Result<_, _> = interpret(Path::new(FILE), &text);
    }
}
