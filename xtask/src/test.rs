//! `cargo xtask test`: runs every test that this machine can run, and says by name which it cannot.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use crate::cargo::{self, TestProgram};
use crate::results::{self, Result as Outcome};
use crate::{Error, needs};

/// What to test.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Run only tests whose names contain this
    filter: Option<String>,
}

/// What came out of all tests so far.
#[derive(Debug, Default)]
struct Tally {
    passed: usize,
    failed: Vec<String>,
    /// Name and what is missing.
    skipped: Vec<(String, String)>,
}

/// Runs the tests.
pub fn run(options: &Options) -> Result<(), Error> {
    if let Err(error) = vmm_nested::ensure_packages() {
        eprintln!("xtask: {error}");
    }
    needs::install();
    eprintln!("xtask: building the monitor and the tests");
    let vmm = cargo::release("vmm", "vmm")?;
    let programs = cargo::test_programs()?;
    let mut tally = Tally::default();
    for program in &programs {
        run_program(program, &vmm, options.filter.as_deref(), &mut tally)?;
    }
    let Tally { passed, failed, skipped } = tally;
    println!();
    for (name, missing) in &skipped {
        println!("skipped: {name}: this machine lacks {missing}");
    }
    for name in &failed {
        println!("FAILED: {name}");
    }
    let result = if failed.is_empty() { "ok" } else { "FAILED" };
    println!("test result: {result}. {passed} passed; {} failed; {} skipped", failed.len(), skipped.len());
    if failed.is_empty() { Ok(()) } else { Err(Error::Tests(failed.len())) }
}

/// Runs the tests of one program: first those that need nothing, then of the others those that can be run here.
fn run_program(
    program: &TestProgram,
    vmm: &std::path::Path,
    filter: Option<&str>,
    tally: &mut Tally,
) -> Result<(), Error> {
    println!("\n== {}", program.title);
    let command = |args: &[&str]| {
        let mut command = Command::new(&program.path);
        command.args(args).current_dir(&program.dir).env("CARGO_MANIFEST_DIR", &program.dir);
        command.env("VMM_BINARY", vmm);
        command
    };
    let mut able = Vec::new();
    let first: Vec<_> = filter.into_iter().collect();
    for (name, outcome) in results_of(command(&first), program, tally)? {
        let Outcome::Ignored(reason) = outcome else { continue };
        // What is ignored for another reason is no test by itself.
        if !reason.starts_with(needs::PREFIX) {
            continue;
        }
        let mut missing = Vec::new();
        for need in needs::parse(&reason) {
            match needs::met(&need) {
                Some(true) => {}
                Some(false) => missing.push(need),
                None => {
                    let known = needs::known().join(", ");
                    let name = format!("{}: {name} needs {need:?}, which is none of {known}", program.title);
                    tally.failed.push(name);
                }
            }
        }
        if missing.is_empty() {
            able.push(name);
        } else {
            tally.skipped.push((format!("{}: {name}", program.title), missing.join(", ")));
        }
    }
    if !able.is_empty() {
        let args: Vec<_> =
            ["--ignored", "--exact"].into_iter().chain(able.iter().map(String::as_str)).collect();
        results_of(command(&args), program, tally)?;
    }
    Ok(())
}

/// Runs `command`, shows what it prints, and counts its results.
fn results_of(
    mut command: Command,
    program: &TestProgram,
    tally: &mut Tally,
) -> Result<Vec<(String, Outcome)>, Error> {
    let start = |source| cargo::Error::Start { program: program.title.clone(), source };
    let mut child = command.stdout(Stdio::piped()).spawn().map_err(start)?;
    let mut all = Vec::new();
    let lines = child.stdout.take().into_iter().flat_map(|out| BufReader::new(out).lines());
    for line in lines.map_while(Result::ok) {
        let result = results::parse(&line);
        if !matches!(result, Some((_, Outcome::Ignored(_)))) {
            println!("{line}");
        }
        let Some((name, outcome)) = result else { continue };
        let full = format!("{}: {name}", program.title);
        match &outcome {
            Outcome::Passed => tally.passed += 1,
            Outcome::Failed => tally.failed.push(full),
            Outcome::Ignored(_) => {}
        }
        all.push((name.to_owned(), outcome));
    }
    let failed = all.iter().any(|(_, outcome)| *outcome == Outcome::Failed);
    let status = child.wait().map_err(start)?;
    if !status.success() && !failed {
        // It was killed, or ended without telling: whatever it left out did not pass.
        tally.failed.push(format!("{} as a whole ({status})", program.title));
    }
    Ok(all)
}
