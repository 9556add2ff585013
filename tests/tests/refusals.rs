//! What the monitor refuses, and that nothing is left of a guest that was refused. No guest runs here.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;
use vmm_tests::guest;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path().join(name), content).unwrap();
    }

    fn vmm(&self, args: &[&str]) -> Output {
        let mut command = Command::new(guest::vmm_binary().unwrap());
        command.current_dir(self.path()).env("VMM_RUN_DIR", self.path().join("run")).args(args);
        command.output().unwrap()
    }

    /// Runs the guest of `config` and expects a refusal with `status` that says all of `wanted`.
    fn refused(&self, config: &str, status: i32, wanted: &[&str]) {
        self.write("vm.toml", config);
        let output = self.vmm(&["--config", "vm.toml"]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{config}\n{said}");
        assert!(output.stdout.is_empty());
        for wanted in wanted {
            assert!(said.contains(wanted), "{wanted:?} is not said of\n{config}\nbut\n{said}");
        }
        self.nothing_left();
    }

    fn nothing_left(&self) {
        let left = fs::read_dir(self.path().join("run")).map_or(0, |entries| entries.count());
        assert_eq!(left, 0, "something is left in the run directory");
    }
}

fn garbage() -> Vec<u8> {
    let step = |x: &mut u64| {
        *x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        Some(x.to_be_bytes()[0])
    };
    std::iter::successors(Some(1_u64), |x| Some(x.wrapping_add(1)))
        .scan(7, |x, _| step(x))
        .take(65536)
        .collect()
}

#[test]
fn files_that_are_no_kernel_are_refused_by_name() {
    let place = Place::new();
    let elf = fs::read(guest::elf().unwrap()).unwrap();
    place.write("garbage", garbage());
    place.write("empty", "");
    place.write("truncated", &elf[..elf.len() / 2]);
    place.write("short", &elf[..40]);
    fs::create_dir(place.path().join("directory")).unwrap();
    symlink("nowhere", place.path().join("dangling")).unwrap();
    let cases = [
        ("garbage", "neither an ELF file nor a bzImage"),
        ("empty", "is empty"),
        ("truncated", "truncated"),
        ("short", "not a little-endian 64-bit ELF file"),
        ("directory", "not a regular file"),
        ("dangling", "No such file"),
        ("missing", "No such file"),
        ("/dev/null", "not a regular file"),
    ];
    for (kernel, wanted) in cases {
        let config = format!("[boot]\nkernel = {kernel:?}\n");
        place.refused(&config, 2, &["vm.toml:2:10: boot.kernel = ", kernel, wanted]);
    }
}

#[test]
fn program_of_the_host_is_no_kernel() {
    let place = Place::new();
    fs::copy(guest::vmm_binary().unwrap(), place.path().join("vmm")).unwrap();
    place.refused("[boot]\nkernel = \"vmm\"\n", 2, &["boot.kernel", "kernels begin at 1 MiB"]);
}

#[test]
fn files_that_are_no_initrd_are_refused_by_name() {
    let place = Place::new();
    fs::copy(guest::elf().unwrap(), place.path().join("kernel")).unwrap();
    place.write("empty", "");
    for (initrd, wanted) in [("empty", "is empty"), ("/tmp", "not a regular file"), ("none", "No such file")]
    {
        let config = format!("[boot]\nkernel = \"kernel\"\ninitrd = {initrd:?}\n");
        place.refused(&config, 2, &["vm.toml:3:10: boot.initrd = ", wanted]);
    }
    place.write("large", vec![1; 3 << 20]);
    let config = "[boot]\nkernel = \"kernel\"\ninitrd = \"large\"\n[memory]\nsize = \"4M\"\n";
    place.refused(config, 2, &["vm.toml:5:8: memory.size = \"4M\"", "does not fit"]);
}

#[test]
fn memory_smaller_than_the_kernel_is_refused_at_its_key() {
    let place = Place::new();
    let mut elf = fs::read(guest::elf().unwrap()).unwrap();
    // The size in memory of the last segment that is loaded (ELF-64 program headers: p_type, …, p_memsz at 40).
    let headers = u64::from_le_bytes(elf[32..40].try_into().unwrap());
    let count = u16::from_le_bytes(elf[56..58].try_into().unwrap());
    let header = |i: u16| usize::try_from(headers).unwrap() + 56 * usize::from(i);
    let last = (0..count).rev().map(header).find(|at| elf[*at..*at + 4] == [1, 0, 0, 0]).unwrap();
    elf[last + 40..last + 48].copy_from_slice(&(64_u64 << 20).to_le_bytes());
    place.write("kernel", elf);
    let config = "[boot]\nkernel = \"kernel\"\n[memory]\nsize = \"32M\"\n";
    place.refused(config, 2, &["vm.toml:4:8: memory.size = \"32M\"", "needs guest memory"]);
}

#[test]
fn files_that_are_no_disk_are_refused_by_name() {
    let place = Place::new();
    fs::copy(guest::elf().unwrap(), place.path().join("kernel")).unwrap();
    place.write("empty", "");
    for (disk, wanted) in
        [("empty", "less than one sector"), ("/tmp", "is a directory"), ("none", "No such file")]
    {
        let config = format!("[boot]\nkernel = \"kernel\"\n[[disk]]\npath = {disk:?}\n");
        place.refused(&config, 2, &["vm.toml:4:8: disk.0.path = ", disk, wanted]);
    }
}

#[test]
fn console_file_that_cannot_be_opened_is_refused_at_its_key() {
    let place = Place::new();
    fs::copy(guest::elf().unwrap(), place.path().join("kernel")).unwrap();
    let config = "[boot]\nkernel = \"kernel\"\n[serial]\noutput = \"file:none/console\"\n";
    place.refused(config, 2, &["vm.toml:4:10: serial.output = ", "No such file"]);
}

#[test]
fn all_that_is_wrong_is_said_at_once() {
    let place = Place::new();
    let config = "[boot]\nkernel = \"none\"\ninitrd = \"none\"\n[[disk]]\npath = \"none\"\n";
    place.refused(config, 2, &["vm.toml:2:10:", "vm.toml:3:10:", "vm.toml:5:8:"]);
}

#[test]
fn configurations_with_wrong_keys_and_values_are_refused_with_their_place() {
    let place = Place::new();
    place.refused(
        "[boot]\nkernel = \"k\"\n[cpu]\ncount = 0\n",
        2,
        &["vm.toml:4:9: cpu.count = 0", "1 to 64"],
    );
    place.refused("[boot]\nkernle = \"k\"\n", 2, &["vm.toml:2:1: boot.kernle", "did you mean kernel?"]);
    place.refused("[cpu\n", 2, &["vm.toml:1:"]);
    place.refused("", 2, &["vm.toml:1:1: boot.kernel: is missing"]);
    let output = place.vmm(&["--config", "other.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("other.toml"));
    place.nothing_left();
}

#[test]
fn command_about_a_guest_that_is_not_there_says_so() {
    let place = Place::new();
    for verb in ["show", "pause", "resume", "stop", "kill"] {
        let output = place.vmm(&[verb, "web"]);
        assert_eq!(output.status.code(), Some(1), "{verb}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("no guest called web"), "{verb}");
    }
    let list = place.vmm(&["ps", "--json"]);
    assert_eq!((list.status.code(), &list.stdout[..]), (Some(0), &b"[]\n"[..]));
}

#[test]
fn log_that_cannot_be_written_is_refused() {
    let place = Place::new();
    let output = place.vmm(&["--log", "none/log", "--config", "vm.toml"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("none/log"));
}

#[test]
fn doctor_prints_checks_in_both_forms() {
    let place = Place::new();
    let text = place.vmm(&["doctor"]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("kvm"));
    let json: serde_json::Value = serde_json::from_slice(&place.vmm(&["doctor", "--json"]).stdout).unwrap();
    assert!(json["checks"].as_array().is_some_and(|checks| checks.len() > 5));
    let kind = json["virtualization"].as_str().unwrap();
    assert!(["hardware", "interpreted", "none"].contains(&kind));
    assert_eq!(text.status.success(), kind != "none");
}

#[test]
fn completions_are_scripts_for_the_shell() {
    let place = Place::new();
    for (shell, wanted) in [("bash", "complete "), ("zsh", "#compdef vmm"), ("fish", "complete -c vmm")] {
        let output = place.vmm(&["completions", shell]);
        assert!(String::from_utf8_lossy(&output.stdout).contains(wanted), "{shell}");
    }
}

#[test]
fn console_pipe_without_a_reader_is_refused_instead_of_waited_for() {
    let place = Place::new();
    fs::copy(guest::elf().unwrap(), place.path().join("kernel")).unwrap();
    assert!(Command::new("mkfifo").arg(place.path().join("pipe")).status().unwrap().success());
    let config = "[boot]\nkernel = \"kernel\"\n[serial]\noutput = \"file:pipe\"\n";
    place.refused(config, 2, &["vm.toml:4:10: serial.output = ", "cannot be opened"]);
}

#[test]
#[ignore = "needs /dev/kvm"]
fn command_line_longer_than_the_kernel_takes_is_refused_at_its_key() {
    let place = Place::new();
    fs::copy(guest::elf().unwrap(), place.path().join("kernel")).unwrap();
    let config = format!("[boot]\nkernel = \"kernel\"\ncmdline = \"{}\"\n", "x".repeat(3000));
    place.refused(&config, 2, &["vm.toml:3:11: boot.cmdline = ", "3035 bytes", "takes 2047"]);
}

#[test]
fn refusal_that_cannot_be_printed_keeps_its_exit_status() {
    let place = Place::new();
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = Command::new(guest::vmm_binary().unwrap());
    let status =
        command.args(["--config", "none.toml"]).current_dir(place.path()).stderr(full).status().unwrap();
    assert_eq!(status.code(), Some(2));
}
