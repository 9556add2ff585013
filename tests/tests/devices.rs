//! What a guest finds in its machine, and that it works: disks, entropy, interrupts, timer, processors, memory, tables.

use std::fs;

use serde_json::Value;
use vmm_tests::guest::{Guest, Setup};

/// Runs the test guest with `cmdline` and `config` to its end, and gives its result.
fn result(cmdline: &str, config: &str) -> Value {
    finish(setup(cmdline).with(config))
}

fn setup(cmdline: &str) -> Setup {
    Setup::new(cmdline).unwrap()
}

fn finish(setup: Setup) -> Value {
    let mut guest = setup.start().unwrap();
    let result = guest.wait_event("result").unwrap();
    ends(&mut guest, 0);
    result
}

fn ends(guest: &mut Guest, status: i32) {
    assert_eq!(guest.exit_status().unwrap().code(), Some(status), "{}", guest.transcript());
}

fn with_disk(cmdline: &str, len: u64, config: &str) -> Setup {
    let setup = setup(cmdline);
    fs::File::create(setup.dir().join("disk.img")).unwrap().set_len(len).unwrap();
    setup.with(&format!("[[disk]]\npath = \"disk.img\"\n{config}"))
}

#[test]
#[ignore = "needs /dev/kvm"]
fn disk_holds_what_was_written_in_any_size_depth_and_order() {
    for options in [
        "size=512 depth=1",
        "size=4096 depth=32",
        "size=128K depth=8 count=200",
        "size=4K depth=16 mode=sequential wait=irq",
        "size=4K depth=8 indirect=1",
        "size=8K depth=4 no-event-index=1",
    ] {
        let result = finish(with_disk(&format!("test=blk-verify {options}"), 64 << 20, ""));
        assert_eq!(result["errors"], 0, "{options}: {result}");
        assert_eq!(result["mismatches"], 0, "{options}: {result}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn disk_shows_its_capacity_and_serial_number() {
    let result = finish(with_disk("test=blk-info", 3 << 20, "serial = \"ABC123\"\n"));
    assert_eq!(result["sectors"], (3 << 20) / 512, "{result}");
    assert_eq!(result["serial"], "ABC123", "{result}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn what_the_guest_wrote_is_in_the_file_and_the_next_guest_finds_it() {
    let first = with_disk("test=blk-verify phase=write count=300 seed=7 flush=1", 8 << 20, "");
    let second = first
        .beside("test=blk-verify phase=read count=300 seed=7")
        .unwrap()
        .with("[[disk]]\npath = \"disk.img\"\n");
    let file = first.dir().join("disk.img");
    finish(first);
    assert!(fs::read(file).unwrap().iter().any(|byte| *byte != 0));
    let result = finish(second);
    assert_eq!((&result["errors"], &result["mismatches"]), (&0.into(), &0.into()), "{result}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn read_only_disk_is_not_written() {
    let setup = with_disk("test=blk-write count=10", 1 << 20, "readonly = true\n");
    let file = setup.dir().join("disk.img");
    let mut guest = setup.start().unwrap();
    guest.exit_status().unwrap();
    assert!(guest.transcript().contains("error"), "{}", guest.transcript());
    assert!(fs::read(file).unwrap().iter().all(|byte| *byte == 0));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn second_disk_is_found_in_its_place() {
    let setup = with_disk("test=blk-info disk=1", 1 << 20, "");
    fs::File::create(setup.dir().join("second.img")).unwrap().set_len(2 << 20).unwrap();
    let result = finish(setup.with("[[disk]]\npath = \"second.img\"\n"));
    assert_eq!(result["sectors"], (2 << 20) / 512, "{result}");
    assert_eq!(result["serial"], "disk1", "{result}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn entropy_arrives_and_is_absent_where_it_was_refused() {
    let result = result("test=rng bytes=64K", "");
    assert_eq!(result["bytes"], 64 << 10, "{result}");
    let mut guest = setup("test=rng").with_top("rng = false").start().unwrap();
    guest.exit_status().unwrap();
    assert!(guest.transcript().contains("\"error\""), "{}", guest.transcript());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn interrupts_of_devices_and_between_processors_arrive() {
    let from_device = result("test=irq via=rng count=500", "");
    assert_eq!(from_device["interrupts"], 500, "{from_device}");
    let between = result("test=irq via=ipi count=500", "[cpu]\ncount = 2\n");
    assert_eq!(between["interrupts"], 500, "{between}");
    let timer = result("test=timer count=50", "");
    assert_eq!(timer["samples"], 50, "{timer}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn all_processors_of_the_firmware_table_start() {
    for count in [1, 2, 5, 64] {
        let result = result("test=smp", &format!("[cpu]\ncount = {count}\n"));
        assert_eq!(result["cpus"], count, "{result}");
        assert_eq!(result["all_count"], true, "{result}");
        assert_eq!(result["in_tables"], count, "{result}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn firmware_tables_are_found_and_their_checksums_are_right() {
    let result = result("test=acpi", "[cpu]\ncount = 3\n");
    let text = result.to_string();
    for table in ["FACP", "APIC", "DSDT"] {
        assert!(text.contains(table), "{text}");
    }
    assert_eq!(result["cpus"], serde_json::json!([0, 1, 2]), "{text}");
    assert_eq!(result["bad_checksums"], serde_json::json!([]), "{text}");
}

fn has(result: &Value, feature: &str) -> bool {
    result["features"].as_array().unwrap().iter().any(|name| name == feature)
}

#[test]
#[ignore = "needs /dev/kvm"]
fn host_model_shows_the_hypervisor_and_its_clock() {
    let host = result("test=cpuid", "");
    assert_eq!(host["hypervisor"], "KVMKVMKVM", "{host}");
    assert!(has(&host, "hypervisor"), "{host}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn processor_model_hides_what_its_level_has_not_or_is_refused_by_the_host_that_cannot_give_it() {
    let mut guest = setup("test=cpuid").with("[cpu]\nmodel = \"x86-64-v2\"\n").start().unwrap();
    let status = guest.exit_status().unwrap();
    let said = guest.transcript();
    if status.success() {
        let result = said.lines().find(|line| line.contains("\"result\"")).unwrap();
        let result: Value = serde_json::from_str(result).unwrap();
        assert!(has(&result, "sse4_2") && !has(&result, "avx2"), "{result}");
    } else {
        // KVM without hardware virtualization does not announce what its guests have all the same.
        assert_eq!(status.code(), Some(2), "{said}");
        assert!(said.contains("cpu.model = \"x86-64-v2\"") && said.contains("sse4.2"), "{said}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn memory_of_each_backing_is_all_there() {
    for backing in ["anonymous", "memfd"] {
        let config = format!("[memory]\nsize = \"512M\"\nbacking = \"{backing}\"\n");
        let result = result("test=memory size=400M seconds=1", &config);
        assert_eq!(result["size"], 400_u64 << 20, "{result}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn memory_beyond_the_hole_is_told_to_the_guest() {
    for (size, bytes) in [("2M", 2_u64 << 20), ("3G", 3 << 30), ("8G", 8 << 30), ("256G", 256 << 30)] {
        let result = result("test=boot", &format!("[memory]\nsize = \"{size}\"\n"));
        let ram = result["ram"].as_u64().unwrap();
        // The first MiB is not all usable.
        assert!(ram <= bytes && bytes - ram <= 1 << 20, "{size}: {result}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn power_button_makes_the_guest_power_off() {
    let mut guest = setup("test=button").start().unwrap();
    guest.wait_event("ready").unwrap();
    let output = guest.vmm(&["stop", guest.name()]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ends(&mut guest, 0);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn processor_that_cannot_go_on_ends_the_guest_with_registers_and_bytes() {
    for how in ["triple", "mmio"] {
        let mut guest = setup(&format!("test=crash how={how}")).start().unwrap();
        ends(&mut guest, 1);
        let said = guest.log();
        assert!(said.contains("cannot go on: vCPU 0") && said.contains("rip "), "{how}: {said}");
        assert!(fs::read_dir(guest.run_dir()).unwrap().next().is_none());
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn kernel_without_a_note_is_entered_the_linux_way() {
    let setup = setup("");
    let mut elf = fs::read(vmm_tests::guest::elf().unwrap()).unwrap();
    // Without its name, the note is no note of Xen's.
    let at = elf.windows(4).position(|bytes| bytes == b"Xen\0").unwrap();
    elf[at] = b'x';
    fs::write(setup.dir().join("kernel"), elf).unwrap();
    fs::write(setup.dir().join("initrd"), vec![7; 100_000]).unwrap();
    let boot = "kernel = \"kernel\"\ninitrd = \"initrd\"\ncmdline = \"test=boot\"\n";
    let result = finish(setup.with_boot(boot));
    assert_eq!(result["entry"], "linux64", "{result}");
    assert_eq!(result["initrd_len"], 100_000, "{result}");
}

/// Huge pages reserved on the host for as long as it lives.
struct Reserved(String);

impl Reserved {
    const COUNT: &str = "/proc/sys/vm/nr_hugepages";

    fn pages(count: u32) -> Self {
        let before = fs::read_to_string(Self::COUNT).unwrap();
        fs::write(Self::COUNT, count.to_string()).unwrap();
        let got = fs::read_to_string(Self::COUNT).unwrap();
        assert_eq!(got.trim(), count.to_string(), "the host has not got the memory for this test");
        Self(before)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // A host that keeps a few pages reserved is no worse.
        fs::write(Self::COUNT, &self.0).unwrap_or_default();
    }
}

#[test]
#[ignore = "needs root and /dev/kvm"]
fn reserved_huge_pages_are_used_and_a_lack_of_them_is_told() {
    let config = "[memory]\nsize = \"64M\"\nbacking = \"hugetlbfs\"\n";
    let reserved = Reserved::pages(32);
    let all = result("test=memory size=48M seconds=1", config);
    assert_eq!(all["size"], 48 << 20, "{all}");
    drop(reserved);
    let _reserved = Reserved::pages(8);
    let mut guest = setup("test=poweroff").with(config).start().unwrap();
    ends(&mut guest, 1);
    assert!(guest.log().contains("HugePages_Free"), "{}", guest.log());
    assert!(fs::read_dir(guest.run_dir()).unwrap().next().is_none(), "something is left of the guest");
}
