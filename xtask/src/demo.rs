//! `cargo xtask demo`: a stock Debian kernel in our monitor, with a clone of a template as its disk and a network card, to
//! look at.

use std::io::IsTerminal;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::Value;
use vmm_nested::demo::{CONFIG, Demo, Place};
use vmm_tests::guest::Setup;

use crate::{Error, cargo, needs};

/// How the demo runs.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Use an emulated host even where this one has hardware virtualization
    #[arg(long)]
    nested: bool,
    /// Only look whether the guest works, even on a terminal
    #[arg(long)]
    check: bool,
}

/// What KVM is on this host, as `vmm doctor` has found out by timing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Virtualization {
    Hardware,
    Interpreted,
    None,
}

/// Runs the demo.
pub fn run(options: &Options) -> Result<(), Error> {
    let started = Instant::now();
    let mut progress = |step: &str| eprintln!("[{:4} s] {step} …", started.elapsed().as_secs());
    progress("looking for the programs that this needs");
    needs::install();
    vmm_nested::ensure_packages()?;
    progress("building the monitor");
    let vmm = cargo::release("vmm", "vmm")?;
    let found = virtualization(&vmm)?;
    if found != Virtualization::None {
        progress("running the test guest on this host's own KVM");
        println!("{}", test_guest(&vmm)?);
    }
    let place = if found == Virtualization::Hardware && !options.nested {
        eprintln!("This host has hardware virtualization: the guest runs on it.");
        Place::Here { dir: cargo::root().join("demo") }
    } else {
        let why = match found {
            Virtualization::Hardware => "As asked for",
            Virtualization::Interpreted => {
                "This host's KVM interprets kernel code, which is too slow for Linux"
            }
            Virtualization::None => "This host has no KVM",
        };
        eprintln!("{why}: the guest runs inside a host that QEMU emulates, and everything takes its time.");
        progress("building the agent of the emulated host");
        Place::Nested { agent: cargo::release("vmm-nested", "l1-agent")? }
    };
    eprintln!("\nvm.toml:\n\n{}", CONFIG.lines().map(|line| format!("    {line}\n")).collect::<String>());
    let mut demo = Demo::start(&vmm, &place, &mut progress)?;
    eprintln!("\nThe guest's disk is a clone, made on this machine:\n");
    for step in demo.cloning() {
        eprintln!("    $ {}\n    {}  ({:.1} ms)", step.command, step.output, step.took.as_secs_f64() * 1e3);
    }
    eprintln!();
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() && !options.check {
        eprintln!(
            "The console is the guest's from here on. `poweroff` ends it; Ctrl-] ? tells of the monitor's keys.\n"
        );
        let status = demo.interact()?;
        eprintln!("\r\nThe monitor has ended with {status}.");
        // Who has ended it before the guest could write anything has seen enough, too.
        if let Ok(clone) = demo.clone_after() {
            eprintln!("{clone}.");
        }
        return Ok(());
    }
    let seen = demo.check(&mut progress)?;
    println!("kernel   {}", seen.kernel);
    println!("disk     {}", seen.disk);
    println!("clone    {}", seen.clone);
    println!("network  {}", seen.network);
    println!("entropy  {}", seen.entropy);
    println!("The guest has powered off, and the monitor has ended with status 0.");
    Ok(())
}

fn virtualization(vmm: &Path) -> Result<Virtualization, Error> {
    let program = || format!("{} doctor --json", vmm.display());
    let output = Command::new(vmm).args(["doctor", "--json"]).output();
    let output = output.map_err(|source| cargo::Error::Start { program: program(), source })?;
    let report: Option<Value> = serde_json::from_slice(&output.stdout).ok();
    match report.as_ref().and_then(|report| report["virtualization"].as_str()) {
        Some("hardware") => Ok(Virtualization::Hardware),
        Some("interpreted") => Ok(Virtualization::Interpreted),
        Some("none") => Ok(Virtualization::None),
        _ => Err(cargo::Error::Failed { program: program() }.into()),
    }
}

/// Runs the test guest on local KVM, and says what it did.
fn test_guest(vmm: &Path) -> Result<String, Error> {
    let setup = Setup::new("test=blk-verify count=1000 size=4096 depth=16 wait=irq")?.monitor(vmm);
    let disk = setup.dir().join("disk.img");
    let made = std::fs::File::create(&disk).and_then(|file| file.set_len(64 << 20));
    made.map_err(|source| cargo::Error::Start {
        program: format!("the test guest's disk {}", disk.display()),
        source,
    })?;
    let mut guest = setup.with("[[disk]]\npath = \"disk.img\"\n").start()?;
    let result = guest.wait_event("result")?;
    let status = guest.exit_status()?;
    if !status.success() || result["errors"] != 0 || result["mismatches"] != 0 {
        return Err(Error::TestGuest { result: result.to_string(), status });
    }
    Ok(format!(
        "test guest: 1000 requests of 4 KiB written to its disk and read back without error: {result}"
    ))
}
