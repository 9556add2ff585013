//! The start benchmark as a program calls it.

use std::process::{Command, Stdio};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm-bench"));
    command.args(arguments).stdin(Stdio::null());
    for peer in ["FIRECRACKER", "CLOUD_HYPERVISOR", "QEMU"] {
        command.env(peer, "/nonexistent");
    }
    command
}

#[test]
#[ignore = "needs /dev/kvm"]
fn every_system_has_a_line_for_each_case_and_json_is_all_there_is() {
    let output =
        bench(&["start", "--runs", "2", "--json", "--wait-idle", "0", "--allow-debug"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (case, unit) in [("first-byte", "ms"), ("pss", "MiB")] {
        let of = |system: &str| {
            let mut found = lines.iter().filter(|line| line["case"] == case && line["system"] == system);
            let line = found.next().unwrap_or_else(|| panic!("{system} has no line for {case}:\n{text}"));
            assert!(found.next().is_none(), "{system} has two lines for {case}");
            assert_eq!(line["bench"], "start");
            line
        };
        for peer in ["firecracker", "cloud-hypervisor", "qemu"] {
            assert!(of(peer)["skipped"].as_str().unwrap().contains("/nonexistent"));
        }
        let floor = of("floor");
        assert_eq!((&floor["runs"], &floor["unit"]), (&2.into(), &unit.into()), "{floor}");
        let figures = ["min", "median", "max"].map(|key| floor[key].as_f64().unwrap());
        assert!(figures[0] > 0.0 && figures.is_sorted(), "{floor}");
        // Ours is beside this test's programs only if the whole workspace was built.
        let vmm = of("vmm");
        assert!(vmm["runs"] == 2 || vmm["skipped"].is_string(), "{vmm}");
    }
    assert_eq!(lines.len(), 10);
}

#[test]
fn wrong_number_of_runs_is_a_usage_error() {
    let output = bench(&["start", "--runs", "0"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(output.stdout.is_empty());
}

#[test]
#[ignore = "needs /dev/kvm"]
fn elf_without_pvh_note_fails_with_the_reason() {
    let program = env!("CARGO_BIN_EXE_floor");
    let output =
        bench(&["start", "--runs", "1", "--json", "--wait-idle", "0", "--allow-debug", "--guest", program])
            .output()
            .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("failed"), "{errors}");
    assert!(!output.stdout.is_empty(), "the other lines are printed all the same");
}
