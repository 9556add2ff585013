//! The disk benchmark as a program calls it.

use std::process::{Command, Stdio};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmm-bench"));
    command.arg("disk").args(arguments).stdin(Stdio::null());
    for peer in ["FIRECRACKER", "QEMU", "QEMU_IMG", "FIO"] {
        command.env(peer, "/nonexistent");
    }
    command
}

/// Ours is beside this test's programs only if the whole workspace was built.
fn assert_measured(line: &Value, unit: &str) {
    if line["skipped"].is_null() {
        assert_eq!((&line["runs"], &line["unit"]), (&2.into(), &unit.into()), "{line}");
        let figures = ["min", "median", "max"].map(|key| line[key].as_f64().unwrap());
        assert!(figures[0] >= 0.0 && figures.is_sorted(), "{line}");
    }
}

#[test]
#[ignore = "needs /dev/kvm"]
fn every_system_has_two_lines_for_a_case_and_json_is_all_there_is() {
    let output = bench(&["--runs", "2", "--json", "--size", "16", "--wait-idle", "0", "--allow-debug"])
        .args(["--case", "rand-read-4k-d32", "--case", "rand-write-4k-d1", "--case", "clone-100g"])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for case in ["rand-read-4k-d32", "rand-write-4k-d1"] {
        for (name, unit) in [(case.to_owned(), "IOPS"), (format!("{case}-cpu"), "us")] {
            let of = |system: &str| {
                let mut found = lines.iter().filter(|line| line["case"] == *name && line["system"] == system);
                let line = found.next().unwrap_or_else(|| panic!("{system} has no line for {name}:\n{text}"));
                assert!(found.next().is_none(), "{system} has two lines for {name}");
                assert_eq!(line["bench"], "disk");
                line
            };
            for peer in ["firecracker", "qemu-raw", "qemu-qcow2", "fio"] {
                assert!(of(peer)["skipped"].as_str().unwrap().contains("/nonexistent"));
            }
            for ours in ["vmm-flat", "vmm-thin", "vmm-thin-backed"] {
                assert_measured(of(ours), unit);
            }
        }
    }
    let clones: Vec<&Value> = lines.iter().filter(|line| line["case"] == "clone-100g").collect();
    assert_eq!(clones.len(), 4, "{text}");
    for line in clones {
        match line["system"].as_str().unwrap() {
            "vmm-flat" | "vmm-thin" => assert_measured(line, "ms"),
            _ => assert!(line["skipped"].as_str().unwrap().contains("/nonexistent"), "{line}"),
        }
    }
}

#[test]
fn case_that_does_not_exist_is_refused_with_those_that_do() {
    let output = bench(&["--case", "tape"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("tape") && errors.contains("write-flush-4k"), "{errors}");
}
