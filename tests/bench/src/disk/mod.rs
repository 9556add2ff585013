//! Disk I/O of one guest: requests a second, and the processor time of the monitor for each.
//!
//! The test guest, one vCPU, drives one disk by polling: the same ELF, orders and images of equal size and content for
//! all. Figures are the guest's own count by its time stamp counter, which is held against the host's clock. Before each
//! run the image is brought to the same state ([`images`]). Systems take turns within a case, cases within a round. Who
//! does not read again what it wrote is not measured ([`Bench::verify`]). Beside the guest's disk: the time that a
//! clone takes ([`clone`]).

pub mod cases;
mod clone;
mod fio;
pub mod images;
mod table;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::process::{self, Running};
use crate::quiet;
use crate::report::{self, Line};
use crate::stats::Samples;
use crate::systems::{self, Candidate, Disk, Format, Guest};
use cases::{Case, Image, State};
use images::Images;

/// Memory of the guest in MiB.
const MEMORY_MIB: u64 = 128;
const NAME: &str = "disk";
/// Name of the host's own figures.
pub const LIMIT: &str = "fio";
/// Longest time for what a guest does besides measuring.
const MARGIN: Duration = Duration::from_secs(30);
/// How much is written and read again before anything is measured.
const VERIFY: &str = "mode=random count=4096 size=4096 depth=32 seed=7";
/// By how much guest and host may disagree on how long a run took: the guest's clock would be wrong.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(500);

/// Options of the benchmark.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Runs of each system in each case
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Print one JSON object a line, and nothing else, on standard output
    #[arg(long)]
    pub json: bool,
    /// Only cases whose names contain this; may be given several times
    #[arg(long = "case", value_name = "NAME")]
    pub cases: Vec<String>,
    /// Only systems whose names contain this; may be given several times
    #[arg(long = "system", value_name = "NAME")]
    pub systems: Vec<String>,
    /// Seconds of a run
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub seconds: u32,
    /// Size of the disk in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512, value_parser = clap::value_parser!(u64).range(16..=1 << 20))]
    pub size: u64,
    /// Directory of the images; the system's for temporary files by default
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Longest wait before each run for a host that does nothing else
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(..=3600))]
    pub wait_idle: u64,
    /// Measure builds without optimization as well
    #[arg(long)]
    pub allow_debug: bool,
}

/// A benchmark that cannot be run, or whose result would say nothing.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not what users run.
    #[error("{0} is a debug build; measure a release build (cargo build --release), or give --allow-debug")]
    DebugBuild(String),
    /// Nothing is left to measure.
    #[error("no {what} has a name that contains {names:?}; there are {known}")]
    NoSuch {
        /// Cases or systems.
        what: &'static str,
        /// What was given.
        names: Vec<String>,
        /// What would be right.
        known: String,
    },
    /// No guest.
    #[error(transparent)]
    Guest(#[from] vmm_tests::guest::Error),
    /// No images.
    #[error(transparent)]
    Images(#[from] images::Error),
    /// No directory for a run's files.
    #[error("cannot make a temporary directory: {0}")]
    Dir(#[source] std::io::Error),
    /// Ours failed: that is no result, but a fault.
    #[error("{system} failed in {case}: {why}")]
    Failed {
        /// The system.
        system: &'static str,
        /// The case.
        case: &'static str,
        /// Why.
        why: String,
    },
}

/// What one run came to.
#[derive(Debug, Clone, Copy)]
struct Figures {
    /// Requests a second; of writes that are each followed by a flush, such pairs.
    iops: f64,
    /// Processor time of the monitor for each, in µs.
    cpu_us: f64,
}

/// One of those compared: a monitor with a kind of image, or the host itself.
#[derive(Debug)]
struct Contender {
    name: &'static str,
    image: Image,
    runner: Runner,
    /// By case: what came of it.
    results: Vec<Outcome>,
}

/// Who does the I/O.
#[derive(Debug)]
enum Runner {
    Monitor(Box<dyn systems::System>),
    Host(PathBuf),
    Nobody(String),
}

#[derive(Debug, Default)]
struct Outcome {
    iops: Vec<f64>,
    cpu_us: Vec<f64>,
    /// Why there is nothing, or nothing more.
    failed: Option<String>,
}

/// Name, monitor, kind of image and its state, in the order of reports.
const CONTENDERS: [(&str, &str, Format, State); 9] = [
    ("vmm-flat", systems::OURS, Format::Raw, State::Allocated),
    ("vmm-thin", systems::OURS, Format::Thin, State::Allocated),
    ("vmm-thin-fresh", systems::OURS, Format::Thin, State::Fresh),
    ("vmm-thin-backed", systems::OURS, Format::Thin, State::Backed),
    ("firecracker", "firecracker", Format::Raw, State::Allocated),
    ("qemu-raw", "qemu", Format::Raw, State::Allocated),
    ("qemu-qcow2", "qemu", Format::Qcow2, State::Allocated),
    ("qemu-qcow2-fresh", "qemu", Format::Qcow2, State::Fresh),
    ("qemu-qcow2-backed", "qemu", Format::Qcow2, State::Backed),
];

fn is_ours(name: &str) -> bool {
    name.starts_with(systems::OURS)
}

/// Runs the benchmark and prints its result.
///
/// # Errors
///
/// [`Error`]; if our own program failed, the results of the others are printed all the same.
pub fn run(options: &Options) -> Result<(), Error> {
    let (cases, clones) = chosen_cases(&options.cases)?;
    let mut contenders = contenders(&options.systems, cases.len())?;
    for contender in &contenders {
        if let Runner::Monitor(system) = &contender.runner
            && !options.allow_debug
            && systems::is_debug_build(system.program())
        {
            return Err(Error::DebugBuild(system.program().display().to_string()));
        }
    }
    let elf = vmm_tests::guest::elf()?;
    let parent = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::Builder::new().prefix("vmm-bench-").tempdir_in(parent).map_err(Error::Dir)?;
    if !options.json {
        print_conditions(options, &contenders, dir.path());
    }
    let mut busy = 0;
    if !cases.is_empty() {
        let mut images = Images::new(dir.path(), options.size << 20, systems::ours())?;
        let mut bench = Bench { cases: &cases, images: &mut images, elf: &elf, options };
        bench.verify(&mut contenders)?;
        busy = bench.measure(&mut contenders)?;
    }
    let cloning = clones.then(|| clone::measure(dir.path(), options.runs, &options.systems));
    let cloning = cloning.transpose()?.unwrap_or_default();
    if options.json {
        let mut lines = lines(&contenders, &cases);
        lines.extend(clone::lines(&cloning));
        print!("{}", report::json_lines(NAME, &lines));
    } else {
        print!("{}{}", table::all(&contenders, &cases), table::clones(&cloning));
        if busy > 0 {
            println!("{busy} runs began while the host was busy with something else");
        }
    }
    first_failure(&contenders, &cases).or_else(|| clone::failure(&cloning)).map_or(Ok(()), Err)
}

/// The chosen cases of guests, and whether clones are to be made.
fn chosen_cases(names: &[String]) -> Result<(Vec<Case>, bool), Error> {
    let chosen: Vec<Case> = cases::ALL.into_iter().filter(|case| is_chosen(case.name, names)).collect();
    let clones = is_chosen(clone::CASE, names);
    if chosen.is_empty() && !clones {
        let known = format!("{}, {}", cases::ALL.map(|case| case.name).join(", "), clone::CASE);
        return Err(Error::NoSuch { what: "case", names: names.to_vec(), known });
    }
    Ok((chosen, clones))
}

fn is_chosen(name: &str, names: &[String]) -> bool {
    names.is_empty() || names.iter().any(|part| name.contains(part.as_str()))
}

fn contenders(names: &[String], cases: usize) -> Result<Vec<Contender>, Error> {
    let contender = |name, image, runner| Contender {
        name,
        image,
        runner,
        results: (0..cases).map(|_| Outcome::default()).collect(),
    };
    let monitor = |name| {
        let found = systems::all().into_iter().find(|candidate| candidate.name == name);
        match found {
            Some(Candidate { system: Ok(system), .. }) => Runner::Monitor(system),
            Some(Candidate { system: Err(why), .. }) => Runner::Nobody(why),
            None => Runner::Nobody(format!("there is no system {name}")),
        }
    };
    let mut all: Vec<Contender> = CONTENDERS
        .into_iter()
        .map(|(name, program, format, state)| contender(name, Image { format, state }, monitor(program)))
        .collect();
    let raw = Image { format: Format::Raw, state: State::Allocated };
    all.push(contender(LIMIT, raw, fio::find().map_or_else(Runner::Nobody, Runner::Host)));
    let known: Vec<&str> = all.iter().map(|contender| contender.name).collect();
    let known = known.join(", ");
    all.retain(|contender| is_chosen(contender.name, names));
    if all.is_empty() {
        return Err(Error::NoSuch { what: "system", names: names.to_vec(), known });
    }
    Ok(all)
}

fn print_conditions(options: &Options, contenders: &[Contender], dir: &Path) {
    println!(
        "{} interleaved runs of {} s; test guest, 1 vCPU that polls, {MEMORY_MIB} MiB, no seccomp, no jail",
        options.runs, options.seconds
    );
    println!(
        "disk of {} MiB in {} ({}); before each run it is on the host's disk and, but for direct cases, in the page cache",
        options.size,
        dir.parent().unwrap_or(dir).display(),
        file_system(dir)
    );
    println!("each system has first read again, in another run, what its guest wrote in one");
    println!(
        "cpu: µs of the monitor's threads for each request, the vCPU's time in guest and user mode left out"
    );
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    println!("Linux {}, {processors} processors, load {load} before the first run", kernel.trim());
    let mut seen: Vec<PathBuf> = Vec::new();
    for contender in contenders {
        let program = match &contender.runner {
            Runner::Monitor(system) => system.program().to_owned(),
            Runner::Host(program) => program.clone(),
            Runner::Nobody(_) => continue,
        };
        if !seen.contains(&program) {
            let version = systems::version(&program).unwrap_or_default();
            println!("  {}  {version}", program.display());
            seen.push(program);
        }
    }
    println!();
}

/// Type of the file system that `path` is on: of the longest mount point above it.
fn file_system(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let of = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (point, kind) = (Path::new(fields.next()?), fields.next()?);
        path.starts_with(point).then(|| (point.components().count(), kind.to_owned()))
    });
    of.max_by_key(|(depth, _)| *depth).map_or_else(|| "unknown".to_owned(), |(_, kind)| kind)
}

/// What does not change from run to run.
struct Bench<'a> {
    cases: &'a [Case],
    images: &'a mut Images,
    elf: &'a Path,
    options: &'a Options,
}

impl Bench<'_> {
    /// Has each monitor write to its image in one run and read that again in another: figures of one that loses data, or
    /// serves something else, would say nothing. One that fails is left out of everything.
    fn verify(&mut self, contenders: &mut [Contender]) -> Result<(), Error> {
        for contender in contenders.iter_mut() {
            let Runner::Monitor(system) = &contender.runner else { continue };
            let verified = self.verify_one(system.as_ref(), contender.image)?;
            if let Err(why) = verified {
                contender.results.iter_mut().for_each(|outcome| outcome.failed = Some(why.clone()));
            }
        }
        Ok(())
    }

    fn verify_one(
        &mut self,
        system: &dyn systems::System,
        image: Image,
    ) -> Result<Result<(), String>, Error> {
        let path = match self.prepare(image, cases::Cache::Pieces(4096)) {
            Ok(path) => path,
            Err(why) => return Ok(Err(why)),
        };
        for phase in ["write", "read"] {
            let dir = tempfile::tempdir().map_err(Error::Dir)?;
            let size = self.images.size();
            let cmdline = format!("test=blk-verify phase={phase} span={size} {VERIFY} then=idle");
            let disk = Disk { path: &path, format: image.format, direct: false };
            let guest = Guest { elf: self.elf, cmdline: &cmdline, memory_mib: MEMORY_MIB, disk: Some(disk) };
            let result = result_of(system, &guest, dir.path(), MARGIN);
            if let Err(why) = result.and_then(|result| verified(&result)) {
                return Ok(Err(why));
            }
        }
        self.images.disturbed(&path);
        Ok(Ok(()))
    }

    fn prepare(&mut self, image: Image, cache: cases::Cache) -> Result<PathBuf, String> {
        let prepared = self.images.prepare(image, cache);
        // Where an image of ours cannot be made, ours has failed.
        let failed = if image.format == Format::Thin { "failed: " } else { "" };
        prepared.map_err(|error| format!("{failed}{error}"))
    }

    /// Runs all in turns; says how many runs began on a busy host. A system that fails in a case is left out of it from
    /// then on.
    fn measure(&mut self, contenders: &mut [Contender]) -> Result<u32, Error> {
        let mut busy = 0;
        for round in 0..self.options.runs {
            let cases = self.cases;
            for (number, case) in cases.iter().enumerate() {
                self.progress(round, case);
                let count = contenders.len();
                for turn in 0..count {
                    // Every other round goes backwards, so that none always follows the same neighbour.
                    let contender = &mut contenders[if round % 2 == 0 { turn } else { count - 1 - turn }];
                    if !contender.image.suits(case) || contender.results[number].failed.is_some() {
                        continue;
                    }
                    let dir = tempfile::tempdir().map_err(Error::Dir)?;
                    let (result, idle) = self.one_run(contender, case, dir.path());
                    busy += u32::from(!idle);
                    let outcome = &mut contender.results[number];
                    match result {
                        Ok(figures) => {
                            outcome.iops.push(figures.iops);
                            outcome.cpu_us.push(figures.cpu_us);
                        }
                        Err(why) => outcome.failed = Some(why),
                    }
                }
            }
        }
        if std::io::stderr().is_terminal() {
            eprintln!();
        }
        Ok(busy)
    }

    fn progress(&self, round: u32, case: &Case) {
        if std::io::stderr().is_terminal() {
            eprint!("\rrun {} of {}: {:<28}", round + 1, self.options.runs, case.name);
        }
    }

    /// What one run came to, and whether the host was idle before it.
    fn one_run(&mut self, contender: &Contender, case: &Case, dir: &Path) -> (Result<Figures, String>, bool) {
        if let Runner::Nobody(why) = &contender.runner {
            return (Err(why.clone()), true);
        }
        let image = match self.prepare(contender.image, case.cache) {
            Ok(image) => image,
            Err(why) => return (Err(why), true),
        };
        let idle = quiet::wait(Duration::from_secs(self.options.wait_idle));
        let seconds = self.options.seconds;
        let result = match &contender.runner {
            Runner::Monitor(system) => {
                let cmdline = case.cmdline(contender.image.state, seconds, self.images.size());
                let disk = Disk { path: &image, format: contender.image.format, direct: case.is_direct() };
                let guest =
                    Guest { elf: self.elf, cmdline: &cmdline, memory_mib: MEMORY_MIB, disk: Some(disk) };
                run_guest(system.as_ref(), &guest, dir, Duration::from_secs(seconds.into()))
            }
            Runner::Host(program) => fio::run(program, case, &image, self.images.size(), seconds),
            Runner::Nobody(why) => Err(why.clone()),
        };
        (result, idle)
    }
}

/// Runs a guest to its result.
fn run_guest(
    system: &dyn systems::System,
    guest: &Guest<'_>,
    dir: &Path,
    duration: Duration,
) -> Result<Figures, String> {
    let said = |error: process::Error| format!("failed: {error}");
    let command = system.command(guest, dir).map_err(|error| error.to_string())?;
    let mut running = Running::start(command, dir).map_err(said)?;
    running.first_line().map_err(said)?;
    let (began, before) = (Instant::now(), running.processor_time().map_err(said)?);
    let result = running.next_line(duration + MARGIN).map_err(said)?.line;
    let spent = running.processor_time().map_err(said)?.since(&before);
    figures(&result, spent, began.elapsed())
}

/// What a guest reports that is not measured.
fn result_of(
    system: &dyn systems::System,
    guest: &Guest<'_>,
    dir: &Path,
    patience: Duration,
) -> Result<serde_json::Value, String> {
    let said = |error: process::Error| format!("failed: {error}");
    let command = system.command(guest, dir).map_err(|error| error.to_string())?;
    let mut running = Running::start(command, dir).map_err(said)?;
    running.first_line().map_err(said)?;
    Ok(running.next_line(patience).map_err(said)?.line)
}

/// Whether all that was to be written, or read again, was.
fn verified(result: &serde_json::Value) -> Result<(), String> {
    let none = |key: &str| result[key] == 0;
    if none("errors") && none("mismatches") && result["requests"].as_u64() > Some(0) {
        return Ok(());
    }
    Err(format!("failed: what was written is not what is read: {result}"))
}

/// From the guest's result, the processor time and how long the host has waited for it.
fn figures(result: &serde_json::Value, spent: Duration, waited: Duration) -> Result<Figures, String> {
    let number = |key: &str| result[key].as_f64().ok_or_else(|| format!("the guest reports {result}"));
    if number("errors")? > 0.0 {
        return Err(format!("failed: the disk reports errors: {result}"));
    }
    let elapsed = number("elapsed_ns")? / 1e9;
    if (waited.as_secs_f64() - elapsed).abs() > CLOCK_TOLERANCE.as_secs_f64() {
        return Err(format!("failed: the guest's {elapsed:.3} s were {waited:.3?} on the host"));
    }
    let count = number("requests")? - result["flushes"].as_f64().unwrap_or(0.0);
    if count < 1.0 || elapsed <= 0.0 {
        return Err(format!("failed: nothing was done: {result}"));
    }
    Ok(Figures { iops: count / elapsed, cpu_us: spent.as_secs_f64() * 1e6 / count })
}

fn first_failure(contenders: &[Contender], cases: &[Case]) -> Option<Error> {
    contenders.iter().filter(|contender| is_ours(contender.name)).find_map(|contender| {
        let failed = |outcome: &Outcome| outcome.failed.clone().filter(|why| why.starts_with("failed"));
        let failures = contender.results.iter().zip(cases);
        let mut failures = failures.filter_map(|(outcome, case)| Some((failed(outcome)?, case.name)));
        failures.next().map(|(why, case)| Error::Failed { system: contender.name, case, why })
    })
}

fn lines(contenders: &[Contender], cases: &[Case]) -> Vec<Line> {
    let mut lines = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        for contender in contenders.iter().filter(|contender| contender.image.suits(case)) {
            let Outcome { iops, cpu_us, failed } = &contender.results[number];
            let figures: Vec<f64> = iops.iter().map(|iops| case.figure(*iops)).collect();
            for (name, unit, values) in [(case.name, case.unit(), &figures), (case.cpu_name, "us", cpu_us)] {
                let result = failed.clone().map_or_else(|| summary(values), Err);
                lines.push(Line { case: name, system: contender.name, unit, result });
            }
        }
    }
    lines
}

fn summary(values: &[f64]) -> Result<crate::stats::Summary, String> {
    let samples = Samples::new(values.to_vec());
    samples.map(|samples| samples.summary()).ok_or_else(|| "not measured".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn figures_count_writes_and_not_the_flushes_between_them() {
        let result = json!({"requests": 200, "flushes": 100, "errors": 0, "elapsed_ns": 500_000_000});
        let figures = figures(&result, Duration::from_millis(1), Duration::from_millis(510)).unwrap();
        assert!((figures.iops - 200.0).abs() < 1e-9 && (figures.cpu_us - 10.0).abs() < 1e-9, "{figures:?}");
    }

    #[test]
    fn errors_and_clocks_that_disagree_are_no_figures() {
        let of = |result: serde_json::Value, waited| {
            figures(&result, Duration::ZERO, Duration::from_secs(waited)).unwrap_err()
        };
        let good = json!({"requests": 1, "errors": 0, "elapsed_ns": 1_000_000_000_u64});
        assert!(of(good, 3).contains("on the host"));
        assert!(of(json!({"requests": 1, "errors": 1, "elapsed_ns": 0}), 0).contains("errors"));
        assert!(of(json!({"requests": 0, "errors": 0, "elapsed_ns": 1}), 0).contains("nothing"));
        assert!(of(json!({"message": "no disk"}), 0).contains("no disk"));
    }

    #[test]
    fn data_that_is_lost_or_not_looked_at_is_a_failure() {
        let good = json!({"requests": 9, "errors": 0, "mismatches": 0});
        assert_eq!(verified(&good), Ok(()));
        for (key, value) in [("requests", 0), ("errors", 1), ("mismatches", 1)] {
            let mut bad = good.clone();
            bad[key] = value.into();
            assert!(verified(&bad).unwrap_err().starts_with("failed"), "{bad}");
        }
        assert!(verified(&json!({"message": "no disk"})).unwrap_err().contains("no disk"));
    }

    #[test]
    fn names_choose_cases_and_systems_and_unknown_ones_are_refused() {
        let names = |name: &str| vec![name.to_owned()];
        let (all, clones) = chosen_cases(&[]).unwrap();
        assert_eq!((all.len(), clones), (cases::ALL.len(), true));
        let (flush, clones) = chosen_cases(&names("flush")).unwrap();
        assert_eq!((flush.len(), clones), (1, false));
        assert_eq!(chosen_cases(&names("clone")).unwrap(), (vec![], true));
        let error = chosen_cases(&names("tape")).unwrap_err().to_string();
        for word in ["tape", "seq-read-128k", clone::CASE] {
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(contenders(&names("fio"), 1).unwrap().len(), 1);
        assert!(contenders(&names("xen"), 1).unwrap_err().to_string().contains("qemu-raw"));
    }

    #[test]
    fn failure_of_ours_is_an_error_and_of_a_peer_a_reason() {
        let outcome = |why: &str| Outcome { failed: Some(why.to_owned()), ..Outcome::default() };
        let contender = |name, why| Contender {
            name,
            image: Image { format: Format::Raw, state: State::Allocated },
            runner: Runner::Nobody(String::new()),
            results: vec![outcome(why)],
        };
        let case = [cases::ALL[0]];
        assert!(first_failure(&[contender("qemu-raw", "failed: x")], &case).is_none());
        assert!(first_failure(&[contender("vmm-flat", "not found")], &case).is_none());
        let failure = first_failure(&[contender("vmm-flat", "failed: x")], &case).unwrap();
        assert_eq!(failure.to_string(), "vmm-flat failed in rand-read-4k-d1: failed: x");
        let lines = lines(&[contender("qemu-raw", "failed: x")], &case);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1].result, Err("failed: x".to_owned()));
    }

    #[test]
    fn file_system_of_proc_is_told() {
        assert_eq!(file_system(Path::new("/proc/self")), "proc");
    }
}
