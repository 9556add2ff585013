//! What tests need of a machine. A test that needs something says so as the reason for which it is ignored:
//! `#[ignore = "needs root, tun and network namespaces"]`.

use std::fs::OpenOptions;
use std::path::Path;
use std::process::Command;

use crate::cargo;

/// How the reason of a test that needs something begins.
pub const PREFIX: &str = "needs ";

type Check = fn() -> bool;

/// Requirements by the name that tests use.
const NEEDS: [(&str, Check); 10] = [
    ("root", is_root),
    ("/dev/kvm", || opens("/dev/kvm")),
    ("tun", || opens("/dev/net/tun")),
    ("loop devices", || opens("/dev/loop-control")),
    ("network namespaces", || is_root() && Path::new("/proc/self/ns/net").exists()),
    ("XFS", || is_program("mkfs.xfs") && has_file_system("xfs")),
    ("curl", || is_program("curl")),
    ("qemu-img", || is_program("qemu-img")),
    ("qemu-system-x86_64", || is_program("qemu-system-x86_64")),
    ("Debian's packages", || is_program("apt-get") && is_program("dpkg-deb")),
];

fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions.
    unsafe { libc::geteuid() == 0 }
}

fn opens(path: &str) -> bool {
    OpenOptions::new().read(true).write(true).open(path).is_ok()
}

fn has_file_system(name: &str) -> bool {
    let known = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    known.lines().any(|line| line.trim() == name)
}

fn is_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(name).is_file())
}

/// Programs that tests call, with Debian's package of each.
const PROGRAMS: [(&str, &str); 5] = [
    ("curl", "curl"),
    ("losetup", "mount"),
    ("mkfifo", "coreutils"),
    ("mkfs.xfs", "xfsprogs"),
    ("qemu-img", "qemu-utils"),
];

/// Installs what tests call and this machine has not got, where the user may; says which where not.
pub fn install() {
    let missing: Vec<_> = PROGRAMS.iter().filter(|program| !is_program(program.0)).map(|p| p.1).collect();
    if missing.is_empty() {
        return;
    }
    if !is_root() || !is_program("apt-get") {
        eprintln!("xtask: some tests need packages that are not installed: {}", missing.join(" "));
        return;
    }
    let apt = |args: &[&str]| {
        cargo::run(Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive"))
    };
    let install: Vec<_> =
        ["install", "--yes", "--no-install-recommends"].into_iter().chain(missing).collect();
    if let Err(error) = apt(&["update"]).and_then(|()| apt(&install)) {
        eprintln!("xtask: {error}");
    }
}

/// All names.
pub fn known() -> Vec<&'static str> {
    NEEDS.iter().map(|need| need.0).collect()
}

/// The requirements in `reason`, the text of an `#[ignore]`.
pub fn parse(reason: &str) -> Vec<String> {
    let list = reason.strip_prefix(PREFIX).unwrap_or(reason);
    list.replace(" and ", ", ").split(", ").map(|need| need.trim().to_owned()).collect()
}

/// Whether this machine has `need`; `None` if that is no known requirement.
pub fn met(need: &str) -> Option<bool> {
    NEEDS.iter().find(|known| known.0 == need).map(|known| known.1())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_lists_in_english() {
        assert_eq!(parse("needs root"), ["root"]);
        assert_eq!(parse("needs root and tun"), ["root", "tun"]);
        assert_eq!(parse("needs root, tun and loop devices"), ["root", "tun", "loop devices"]);
    }

    #[test]
    fn requirement_that_is_not_known_is_neither_met_nor_unmet() {
        assert_eq!(met("a miracle"), None);
        assert!(met("root").is_some());
    }
}
