//! The test guest itself, in a machine that is not ours and without KVM: what it reports there is known beforehand.

use std::fs;
use std::process::Command;
use std::sync::Arc;

use serde_json::Value;
use tempfile::TempDir;
use vmm_tests::guest::{DEADLINE, Guest, elf};

const DISK: &[&str] = &[
    "-drive",
    "if=none,id=disk,file=disk.img,format=raw",
    "-device",
    "virtio-blk-device,drive=disk,serial=S1",
];
const RNG: &[&str] = &["-device", "virtio-rng-device"];
/// A card on a network of its own, whose only other member does not know our frames.
const NET: &[&str] =
    &["-netdev", "user,id=net,restrict=on", "-device", "virtio-net-device,netdev=net,mac=52:54:00:00:00:09"];

/// QEMU's smallest machine, emulated, with the command line `cmdline` and the options `more`.
fn qemu(cmdline: &str, more: &[&[&str]]) -> Guest {
    let dir = TempDir::new().unwrap();
    fs::File::create(dir.path().join("disk.img")).unwrap().set_len(8 << 20).unwrap();
    let mut command = Command::new("qemu-system-x86_64");
    command.args([
        "-M",
        "microvm,rtc=off,acpi=off",
        "-global",
        "virtio-mmio.force-legacy=false",
        "-accel",
        "tcg",
    ]);
    command.args([
        "-m",
        "64",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-no-reboot",
    ]);
    command.arg("-kernel").arg(elf().unwrap()).args(["-append", cmdline]);
    command.args(more.iter().copied().flatten());
    Guest::spawn(command, "qemu".to_owned(), Arc::new(dir), DEADLINE).unwrap()
}

fn result(cmdline: &str, more: &[&[&str]]) -> Value {
    let mut guest = qemu(cmdline, more);
    let result = guest.wait_event("result").unwrap();
    assert!(guest.exit_status().unwrap().success(), "{}", guest.transcript());
    result
}

fn count(result: &Value, key: &str) -> u64 {
    result[key].as_u64().unwrap_or_else(|| panic!("no number {key} in {result}"))
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn command_line_memory_and_entry_are_those_that_the_loader_passed() {
    let result = result("test=boot word=\"quoted\\\"", &[]);
    assert_eq!(result["cmdline"], "test=boot word=\"quoted\\\"");
    assert_eq!(result["entry"], "pvh");
    assert!((63 << 20..=64 << 20).contains(&count(&result, "ram")), "{result}");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn time_goes_on_and_is_measured() {
    let cpu = result("test=cpu seconds=1 every=100", &[]);
    assert!(count(&cpu, "loops") > 0 && count(&cpu, "elapsed_ns") >= 1_000_000_000, "{cpu}");
    let timer = result("test=timer count=20", &[]);
    assert_eq!(count(&timer, "samples"), 20, "{timer}");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn memory_holds_what_was_written_at_the_rate_that_was_asked_for() {
    let result = result("test=memory size=16M area=1M rate=10 seconds=1", &[]);
    assert_eq!((count(&result, "size"), count(&result, "mismatches")), (16 << 20, 0), "{result}");
    // Never faster; how much slower depends on the host.
    assert!((1..=10_100_000).contains(&count(&result, "bytes_per_second")), "{result}");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn all_processors_come_and_count() {
    let result = result("test=smp cpus=4", &[&["-smp", "4"]]);
    assert_eq!((count(&result, "cpus"), &result["all_count"]), (4, &true.into()), "{result}");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn processor_that_is_not_there_is_missed() {
    let error = qemu("test=smp cpus=3", &[&["-smp", "2"]]).wait_event("result").unwrap_err().to_string();
    assert!(error.contains("local APIC 2 does not start"), "{error}");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn interrupts_are_counted_one_by_one() {
    for via in ["rng", "ipi"] {
        let result = result(&format!("test=irq via={via} count=100"), &[RNG]);
        assert_eq!((count(&result, "interrupts"), count(&result, "samples")), (100, 100), "{result}");
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn entropy_comes_in_answers_that_differ() {
    let result = result("test=rng bytes=4K size=64", &[RNG]);
    assert_eq!(count(&result, "bytes"), 4096, "{result}");
    assert_eq!(count(&result, "distinct"), count(&result, "requests"), "{result}");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn disk_is_described_and_holds_what_was_written() {
    let info = result("test=blk-info", &[DISK]);
    assert_eq!((count(&info, "sectors"), &info["serial"]), (8 << 11, &"S1".into()), "{info}");
    for way in
        ["depth=8", "depth=4 wait=irq mode=sequential size=64K", "indirect=1 depth=16", "no-event-index=1"]
    {
        let result = result(&format!("test=blk-verify count=200 {way}"), &[DISK]);
        let counts = ["requests", "errors", "mismatches"].map(|key| count(&result, key));
        assert_eq!(counts, [400, 0, 0], "{way}: {result}");
    }
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn data_that_was_never_written_is_told_from_what_was() {
    let result = result("test=blk-verify phase=read count=50", &[DISK]);
    assert_eq!((count(&result, "errors"), count(&result, "mismatches")), (0, 50), "{result}");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn zeroed_range_reads_as_zeroes() {
    let result = result("test=blk-zeroes offset=64K span=256K", &[DISK]);
    let counts = ["status", "zero_bytes", "kept_bytes", "other_bytes"].map(|key| count(&result, key));
    assert_eq!(counts, [0, 256 << 10, 0, 0], "{result}");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn frames_that_nobody_answers_are_sent_and_lost() {
    let sent = result("test=net-tx count=100 size=1514", &[NET]);
    assert_eq!((count(&sent, "frames"), count(&sent, "bytes")), (100, 151_400), "{sent}");
    let lost = result("test=net-ping count=3 timeout=20", &[NET]);
    assert_eq!((count(&lost, "sent"), count(&lost, "lost")), (3, 3), "{lost}");
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn input_is_sent_back_up_to_the_end() {
    let mut guest = qemu("test=serial-echo", &[]);
    guest.wait_event("ready").unwrap();
    guest.send(b"one\nend \nend\n").unwrap();
    let result = guest.wait_event("result").unwrap();
    assert_eq!(count(&result, "bytes"), 13, "{}", guest.transcript());
    assert!(guest.exit_status().unwrap().success());
}

#[test]
#[ignore = "needs qemu-system-x86_64"]
fn what_goes_wrong_is_said() {
    for (cmdline, wanted) in [
        ("test=nothing", "no such workload"),
        ("test=cpu seconds=soon", "seconds=soon"),
        ("test=memory size=1000G", "are not free"),
        ("test=blk-read", "no virtio device number 0 of type 2"),
        ("test=cpu seconds=0 then=dance", "then=dance"),
        ("test=panic", "as the command line wants it"),
        ("test=crash how=fault", "fault of the processor"),
    ] {
        let mut guest = qemu(cmdline, &[]);
        let error = guest.wait_event("nothing of the kind").unwrap_err().to_string();
        assert!(error.contains("reports an error") && error.contains(wanted), "{cmdline}: {error}");
        assert!(guest.exit_status().unwrap().success(), "{}", guest.transcript());
    }
}
