//! The systems compared: where each is found and how it is told to run a guest.
//!
//! All run without seccomp filters and jails, none has a device beyond a serial port (and a disk,
//! where there is one) that is not built into it, and all
//! write the guest's COM1 to standard output.

mod cloud_hypervisor;
mod firecracker;
mod floor;
mod qemu;
mod vmm;

use std::ffi::OsStr;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Name of our own monitor in reports.
pub const OURS: &str = "vmm";

/// The guest that every system runs.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// ELF with a PVH note.
    pub elf: &'a Path,
    /// Its command line.
    pub cmdline: &'a str,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Its disk, if it has one.
    pub disk: Option<Disk<'a>>,
}

/// A disk of the guest.
#[derive(Clone, Copy, Debug)]
pub struct Disk<'a> {
    /// The image.
    pub path: &'a Path,
    /// Its kind.
    pub format: Format,
    /// Whether the host's page cache is passed by.
    pub direct: bool,
}

/// Kinds of image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's.
    Qcow2,
    /// Ours.
    Thin,
}

/// A system that can run a guest of one vCPU.
pub trait System: std::fmt::Debug {
    /// Its name in reports.
    fn name(&self) -> &'static str;

    /// Its program.
    fn program(&self) -> &Path;

    /// The command that runs `guest` in the foreground, with COM1 on standard output. Files that it needs are made in
    /// `dir`, which is empty and outlives the process.
    ///
    /// # Errors
    ///
    /// If such a file cannot be written.
    fn command(&self, guest: &Guest<'_>, dir: &Path) -> io::Result<Command>;
}

/// A system, or why there is none.
#[derive(Debug)]
pub struct Candidate {
    /// Its name in reports.
    pub name: &'static str,
    /// The system if its program was found, else what was looked for.
    pub system: Result<Box<dyn System>, String>,
}

/// All systems in the order of reports: ours, the peers, the floor.
#[must_use]
pub fn all() -> Vec<Candidate> {
    vec![
        candidate(vmm::NAME, Some("VMM_BINARY"), &["vmm"], true, |path| Box::new(vmm::Vmm(path))),
        candidate(firecracker::NAME, Some("FIRECRACKER"), &["firecracker"], false, |path| {
            Box::new(firecracker::Firecracker(path))
        }),
        candidate(cloud_hypervisor::NAME, Some("CLOUD_HYPERVISOR"), &["cloud-hypervisor"], false, |path| {
            Box::new(cloud_hypervisor::CloudHypervisor(path))
        }),
        candidate(qemu::NAME, Some("QEMU"), &["qemu-system-x86_64", "qemu-kvm"], false, |path| {
            Box::new(qemu::Qemu(path))
        }),
        candidate(floor::NAME, None, &["floor"], true, |path| Box::new(floor::Floor(path))),
    ]
}

/// Our own monitor's program.
///
/// # Errors
///
/// There is none: what was looked for.
pub fn ours() -> Result<PathBuf, String> {
    let ours = all().into_iter().find(|candidate| candidate.name == OURS);
    let ours = ours.ok_or_else(|| format!("there is no system {OURS}"))?;
    ours.system.map(|system| system.program().to_owned())
}

/// The program called `program`, as the environment variable `variable` names it, else of `$PATH`; else what was looked for.
///
/// # Errors
///
/// There is none.
pub fn tool(program: &str, variable: &str) -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os(variable) {
        return named_program(variable, path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    search(&[program], std::env::split_paths(&path), &format!("in $PATH; {variable} names another"))
}

fn candidate(
    name: &'static str,
    variable: Option<&str>,
    programs: &[&str],
    ours: bool,
    make: fn(PathBuf) -> Box<dyn System>,
) -> Candidate {
    let named = variable.and_then(|variable| Some((variable, std::env::var_os(variable)?)));
    let found = if let Some((variable, path)) = named {
        named_program(variable, path.into())
    } else if ours {
        let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
        search(programs, beside, "beside this program")
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let wanted =
            variable.map_or_else(String::new, |variable| format!("in $PATH; {variable} names another"));
        search(programs, std::env::split_paths(&path), &wanted)
    };
    Candidate { name, system: found.map(make) }
}

fn named_program(variable: &str, path: PathBuf) -> Result<PathBuf, String> {
    if executable(&path) {
        Ok(path)
    } else {
        Err(format!("{variable} names {}, which is not a program", path.display()))
    }
}

fn search(
    programs: &[&str],
    dirs: impl IntoIterator<Item = PathBuf>,
    place: &str,
) -> Result<PathBuf, String> {
    dirs.into_iter()
        .flat_map(|dir| programs.iter().map(move |program| dir.join(program)).collect::<Vec<_>>())
        .find(|path| executable(path))
        .ok_or_else(|| format!("no {} {place}", programs.join(" or ")))
}

/// What a system says of a guest that it cannot run.
fn unsupported<T>(what: &str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::Unsupported, what))
}

fn executable(path: &Path) -> bool {
    path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
}

/// The first line of `program --version`, if it says one.
#[must_use]
pub fn version(program: &Path) -> Option<String> {
    let output = Command::new(program).arg("--version").stdin(std::process::Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok().filter(|_| output.status.success())?;
    text.lines().next().map(str::to_owned)
}

/// Whether `program` lies where cargo puts what it builds without optimization.
#[must_use]
pub fn is_debug_build(program: &Path) -> bool {
    let real = program.canonicalize().unwrap_or_else(|_| program.to_owned());
    real.parent().and_then(Path::file_name) == Some(OsStr::new("debug"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn guest() -> Guest<'static> {
        Guest { elf: Path::new("/a \"guest\".elf"), cmdline: "workload=hello", memory_mib: 128, disk: None }
    }

    fn with_disk(format: Format, direct: bool) -> Guest<'static> {
        Guest { disk: Some(Disk { path: Path::new("/a,b"), format, direct }), ..guest() }
    }

    fn program(dir: &Path, name: &str, mode: u32) -> PathBuf {
        let path = dir.join(name);
        fs::write(&path, "#!/bin/sh\necho version 1; echo more\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    #[test]
    fn search_takes_the_first_program_that_can_be_run() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("1"), dir.path().join("2"));
        fs::create_dir(&first).unwrap();
        fs::create_dir(&second).unwrap();
        program(&first, "a", 0o644);
        let wanted = program(&second, "b", 0o755);
        assert_eq!(search(&["a", "b"], [first.clone(), second], "there"), Ok(wanted));
        assert_eq!(search(&["a", "b"], [first], "there"), Err("no a or b there".to_owned()));
    }

    #[test]
    fn variable_that_names_no_program_is_not_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let why = named_program("QEMU", dir.path().to_owned()).unwrap_err();
        assert!(why.contains("QEMU names"), "{why}");
        let path = program(dir.path(), "q", 0o755);
        assert_eq!(named_program("QEMU", path.clone()), Ok(path));
    }

    #[test]
    fn version_is_the_first_line() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(version(&program(dir.path(), "a", 0o755)).as_deref(), Some("version 1"));
        assert_eq!(version(Path::new("/nonexistent")), None);
    }

    #[test]
    fn build_without_optimization_is_known_by_its_place() {
        assert!(is_debug_build(Path::new("/src/target/debug/vmm")));
        assert!(!is_debug_build(Path::new("/src/target/release/vmm")));
        assert!(!is_debug_build(Path::new("/usr/bin/vmm")));
    }

    #[test]
    fn our_configuration_has_five_lines_and_a_quoted_path() {
        let dir = tempfile::tempdir().unwrap();
        vmm::Vmm("vmm".into()).command(&guest(), dir.path()).unwrap();
        let text = fs::read_to_string(dir.path().join("vm.toml")).unwrap();
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(text.contains(r#"kernel = "/a \"guest\".elf""#), "{text}");
        assert!(text.contains("\n[memory]\nsize = \"128M\""), "{text}");
    }

    #[test]
    fn firecracker_is_given_the_guest_in_its_configuration() {
        let dir = tempfile::tempdir().unwrap();
        firecracker::Firecracker("fc".into()).command(&guest(), dir.path()).unwrap();
        let text = fs::read(dir.path().join("firecracker.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(config["boot-source"]["kernel_image_path"], "/a \"guest\".elf");
        assert_eq!(config["boot-source"]["boot_args"], "workload=hello");
        assert_eq!(config["machine-config"]["mem_size_mib"], 128);
        assert_eq!(config["drives"], serde_json::json!([]));
    }

    #[test]
    fn disk_comes_with_asynchronous_io_and_a_cache_that_can_be_flushed() {
        let dir = tempfile::tempdir().unwrap();
        let guest = with_disk(Format::Raw, false);
        firecracker::Firecracker("fc".into()).command(&guest, dir.path()).unwrap();
        let text = fs::read(dir.path().join("firecracker.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(config["drives"][0]["io_engine"], "Async");
        assert_eq!(config["drives"][0]["cache_type"], "Writeback");

        let qemu = |format, direct| {
            let command = qemu::Qemu("q".into()).command(&with_disk(format, direct), dir.path()).unwrap();
            let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
            words.into_iter().find(|word| word.starts_with("id=disk")).unwrap()
        };
        assert_eq!(
            qemu(Format::Raw, false),
            "id=disk,if=none,format=raw,aio=io_uring,cache=writeback,file=/a,,b"
        );
        assert!(qemu(Format::Qcow2, true).contains("format=qcow2,aio=io_uring,cache=none"));

        let ours = |format, direct| {
            vmm::Vmm("vmm".into()).command(&with_disk(format, direct), dir.path()).unwrap();
            fs::read_to_string(dir.path().join("vm.toml")).unwrap()
        };
        let disk = "[[disk]]\npath = \"/a,b\"\nformat = ";
        let text = ours(Format::Raw, false);
        assert!(text.ends_with(&format!("{disk}\"flat\"\ncache = \"writeback\"\n")), "{text}");
        let text = ours(Format::Thin, true);
        assert!(text.ends_with(&format!("{disk}\"thin\"\ncache = \"none\"\n")), "{text}");
    }

    #[test]
    fn disk_that_a_system_cannot_have_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let firecracker = firecracker::Firecracker("fc".into());
        assert!(firecracker.command(&with_disk(Format::Raw, true), dir.path()).is_err());
        assert!(firecracker.command(&with_disk(Format::Qcow2, false), dir.path()).is_err());
        let ch = cloud_hypervisor::CloudHypervisor("ch".into());
        assert!(ch.command(&with_disk(Format::Raw, false), dir.path()).is_err());
    }
}
