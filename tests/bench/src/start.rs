//! Process start → first guest byte on COM1, and memory beside the guest's own with the guest idle.
//!
//! The clock (`CLOCK_MONOTONIC`) runs from just before the process is started to the arrival of the first byte of the
//! guest's first line on its standard output. Then, once no thread of it runs any more, the proportional set size (Pss)
//! of all its mappings but the guest's memory is taken. Systems take turns, so that what else the host does meets all.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::process::{self, Running};
use crate::quiet;
use crate::report::{self, Line};
use crate::stats::Samples;
use crate::systems::{self, Candidate, Guest, System};

/// Memory of the guest in MiB.
const MEMORY_MIB: u64 = 128;
/// Orders for the test guest: print one line and halt.
const CMDLINE: &str = "test=hello";
const NAME: &str = "start";

/// Options of the benchmark.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Measured runs of each system, after one that is not measured
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Print one JSON object a line, and nothing else, on standard output
    #[arg(long)]
    pub json: bool,
    /// Longest wait before each run for a host that does nothing else
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=3600))]
    pub wait_idle: u64,
    /// Run this ELF instead of the test guest: with a PVH note, its first line on COM1 a JSON object
    #[arg(long, value_name = "ELF")]
    pub guest: Option<PathBuf>,
    /// Measure builds without optimization as well
    #[arg(long)]
    pub allow_debug: bool,
}

/// A benchmark that cannot be run, or whose result would say nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not what users run.
    #[error(
        "{program} is a debug build; measure a release build (cargo build --release), or give --allow-debug"
    )]
    DebugBuild {
        /// The program.
        program: String,
    },
    /// The harness is slower than it need be, and so is the floor beside it.
    #[error("this is a debug build, and so is the floor; build with --release, or give --allow-debug")]
    DebugHarness,
    /// No guest.
    #[error(transparent)]
    Guest(#[from] vmm_tests::guest::Error),
    /// No directory for a run's files.
    #[error("cannot make a temporary directory: {0}")]
    Dir(#[source] std::io::Error),
    /// One of ours failed: that is no result, but a fault.
    #[error("{system} failed: {why}")]
    Failed {
        /// The system.
        system: &'static str,
        /// Why.
        why: String,
    },
}

/// What one system did.
#[derive(Debug)]
struct Contender {
    name: &'static str,
    system: Result<Box<dyn System>, String>,
    first_byte: Vec<f64>,
    pss: Vec<f64>,
}

/// Runs the benchmark and prints its result.
///
/// # Errors
///
/// [`Error`]; if one of our own programs failed, the results of the others are printed all the same.
pub fn run(options: &Options) -> Result<(), Error> {
    let candidates = systems::all();
    if !options.allow_debug {
        refuse_debug_builds(&candidates)?;
    }
    let elf = options.guest.clone().map_or_else(vmm_tests::guest::elf, Ok)?;
    let guest = Guest { elf: &elf, cmdline: CMDLINE, memory_mib: MEMORY_MIB, disk: None };
    if !options.json {
        print_conditions(options, &candidates);
    }
    let mut contenders: Vec<Contender> = candidates
        .into_iter()
        .map(|Candidate { name, system }| Contender { name, system, first_byte: vec![], pss: vec![] })
        .collect();
    let patience = Duration::from_secs(options.wait_idle);
    let measured = measure(&mut contenders, &guest, options.runs, patience)?;
    let lines = lines(&contenders);
    if options.json {
        print!("{}", report::json_lines(NAME, &lines));
    } else {
        print!("{}", report::table(NAME, &lines));
        if measured.busy > 0 {
            println!(
                "{} of {} runs began while the host was busy with something else",
                measured.busy, measured.runs
            );
        }
    }
    measured.failure.map_or(Ok(()), Err)
}

fn refuse_debug_builds(candidates: &[Candidate]) -> Result<(), Error> {
    if cfg!(debug_assertions) {
        return Err(Error::DebugHarness);
    }
    for system in candidates.iter().filter_map(|candidate| candidate.system.as_ref().ok()) {
        if systems::is_debug_build(system.program()) {
            return Err(Error::DebugBuild { program: system.program().display().to_string() });
        }
    }
    Ok(())
}

fn print_conditions(options: &Options, candidates: &[Candidate]) {
    println!(
        "{} interleaved runs of each after one to warm up; {MEMORY_MIB} MiB, 1 vCPU, no seccomp, no jail",
        options.runs
    );
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    println!("Linux {}, {processors} processors, load {load} before the first run", kernel.trim());
    for system in candidates.iter().filter_map(|candidate| candidate.system.as_ref().ok()) {
        let version = systems::version(system.program()).unwrap_or_default();
        println!("  {:<18}{}  {version}", system.name(), system.program().display());
    }
    println!();
}

/// What is known of a measurement beside its samples.
#[derive(Debug, Default)]
struct Measured {
    /// Runs that counted.
    runs: u32,
    /// Those of them that began while the host was busy.
    busy: u32,
    /// The first failure of one of ours.
    failure: Option<Error>,
}

/// Runs all in turns. A peer that fails is left out from then on.
fn measure(
    contenders: &mut [Contender],
    guest: &Guest<'_>,
    runs: u32,
    patience: Duration,
) -> Result<Measured, Error> {
    let mut measured = Measured::default();
    for round in 0..=runs {
        progress(round, runs);
        let count = contenders.len();
        for turn in 0..count {
            // Every other round goes backwards, so that none always follows the same neighbour.
            let contender = &mut contenders[if round % 2 == 0 { turn } else { count - 1 - turn }];
            let Ok(system) = &contender.system else { continue };
            let dir = tempfile::tempdir().map_err(Error::Dir)?;
            let busy = round > 0 && !quiet::wait(patience);
            match one_run(system.as_ref(), guest, dir.path()) {
                Ok((first_byte, pss)) if round > 0 => {
                    contender.first_byte.push(first_byte);
                    contender.pss.push(pss);
                    measured.runs += 1;
                    measured.busy += u32::from(busy);
                }
                Ok(_) => {}
                Err(error) => {
                    let why = format!("failed: {error}");
                    if is_ours(contender.name) {
                        measured.failure = measured
                            .failure
                            .or(Some(Error::Failed { system: contender.name, why: error.to_string() }));
                    }
                    contender.system = Err(why);
                }
            }
        }
    }
    Ok(measured)
}

fn is_ours(name: &str) -> bool {
    [systems::OURS, report::BASE].contains(&name)
}

fn progress(round: u32, runs: u32) {
    if std::io::stderr().is_terminal() {
        let end = if round == runs { '\n' } else { '\r' };
        eprint!("run {round} of {runs}{end}");
    }
}

/// Milliseconds to the first byte and MiB beside the guest's.
fn one_run(system: &dyn System, guest: &Guest<'_>, dir: &Path) -> Result<(f64, f64), process::Error> {
    let program = system.program().display().to_string();
    let command = system.command(guest, dir).map_err(|source| process::Error::Start { program, source })?;
    let mut running = Running::start(command, dir)?;
    let first = running.first_line()?;
    let kib = running.memory_beside_guest(guest.memory_mib << 20)?;
    let mib = u32::try_from(kib).map_or(f64::INFINITY, f64::from) / 1024.0;
    Ok((first.after.as_secs_f64() * 1000.0, mib))
}

fn lines(contenders: &[Contender]) -> Vec<Line> {
    let of = |case, unit, pick: fn(&Contender) -> &Vec<f64>| {
        contenders.iter().map(move |contender| Line {
            case,
            system: contender.name,
            unit,
            result: contender.system.as_ref().map_err(Clone::clone).and_then(|_| {
                let samples = Samples::new(pick(contender).clone());
                samples.map(|samples| samples.summary()).ok_or_else(|| "not measured".to_owned())
            }),
        })
    };
    of("first-byte", "ms", |contender| &contender.first_byte)
        .chain(of("pss", "MiB", |contender| &contender.pss))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::process::Command;

    #[derive(Debug)]
    struct Script(&'static str);

    impl System for Script {
        fn name(&self) -> &'static str {
            "script"
        }

        fn program(&self) -> &Path {
            Path::new("sh")
        }

        fn command(&self, _guest: &Guest<'_>, _dir: &Path) -> io::Result<Command> {
            let mut command = Command::new("sh");
            command.args(["-c", self.0]);
            Ok(command)
        }
    }

    fn contender(name: &'static str, system: Result<Box<dyn System>, String>) -> Contender {
        Contender { name, system, first_byte: vec![], pss: vec![] }
    }

    fn guest() -> Guest<'static> {
        Guest { elf: Path::new("guest"), cmdline: "", memory_mib: 128, disk: None }
    }

    #[test]
    fn peer_that_fails_is_skipped_and_ours_is_a_failure() {
        let failing =
            || -> Result<Box<dyn System>, String> { Ok(Box::new(Script("echo broken >&2; exit 1"))) };
        let mut peers = [contender("qemu", failing()), contender("firecracker", Err("not found".to_owned()))];
        assert!(measure(&mut peers, &guest(), 1, Duration::ZERO).unwrap().failure.is_none());
        let mut ours = [contender("vmm", failing())];
        let failure = measure(&mut ours, &guest(), 1, Duration::ZERO).unwrap().failure.unwrap();
        assert!(failure.to_string().contains("broken"), "{failure}");

        let lines = lines(&peers);
        assert_eq!(lines.len(), 4, "two cases of two systems");
        assert!(lines[0].result.as_ref().unwrap_err().starts_with("failed: ended with exit status: 1"));
        assert_eq!(lines[1].result.as_ref().unwrap_err(), "not found");
    }

    #[test]
    fn samples_of_a_run_become_lines_of_both_cases() {
        let mut one = contender("vmm", Ok(Box::new(Script(""))));
        one.first_byte = vec![3.0, 1.0, 2.0];
        one.pss = vec![0.5];
        let lines = lines(&[one]);
        assert_eq!((lines[0].case, lines[0].unit), ("first-byte", "ms"));
        assert_eq!(lines[0].result.as_ref().unwrap().runs, 3);
        assert_eq!((lines[1].case, lines[1].unit), ("pss", "MiB"));
        assert!((lines[1].result.as_ref().unwrap().median - 0.5).abs() < 1e-9);
    }
}
