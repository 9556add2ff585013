//! Commands about guests that run: each looks the guest up in the run directory and talks to its control socket.

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use api::client::{self, Client};
use api::{DiskLimits, DiskStatus, State, Status};

use super::image::output::with_bytes;
use super::process::Process;
use super::{Failure, print_json};
use crate::run_dir::{self, Guest, Root};

/// How long a monitor may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same where one that hangs must not keep the others from being listed.
const PS_PATIENCE: Duration = Duration::from_secs(1);
/// How long a process that was killed may take to be gone.
const KILL_PATIENCE: Duration = Duration::from_secs(10);

/// A command to a guest that failed.
#[derive(Debug, thiserror::Error)]
enum Error {
    /// It does not power off.
    #[error("guest {name} has not powered off within {} s of its power button; `vmm stop {name} --now` ends it", limit.as_secs())]
    Deaf { name: String, limit: Duration },
    /// It does not end though it was told to.
    #[error("guest {name} has not ended within {} s; `vmm kill {name}` kills its monitor", limit.as_secs())]
    Held { name: String, limit: Duration },
    /// It has, and what it wrote is being decided upon.
    #[error("guest {name} has ended, but process {pid}, its monitor, is not done with its redo logs yet")]
    Settling { name: String, pid: u32 },
    /// Its process is still there.
    #[error("process {pid} of guest {name} does not end though it was killed; the kernel holds it")]
    Stuck { name: String, pid: u32 },
    /// It has just begun.
    #[error("the monitor of guest {name} has not written its process number yet; try again")]
    NoPid { name: String },
    /// The process cannot be waited for or killed.
    #[error("cannot {what} process {pid} of guest {name}")]
    Process { what: &'static str, name: String, pid: u32, source: io::Error },
}

fn find(name: &str) -> Result<Guest, run_dir::Error> {
    Root::from_environment().find(name)
}

fn connect(guest: &Guest) -> Result<Client, client::Error> {
    Client::connect(&guest.socket(), PATIENCE)
}

/// A connection to the monitor of the guest `name`.
pub fn connect_to(name: &str) -> Result<Client, Failure> {
    Ok(connect(&find(name)?)?)
}

/// What `vmm ps` knows of a guest: what it says of itself, or why it says nothing.
enum Listed {
    Answers(Box<Status>),
    Silent { name: String, pid: Option<u32>, error: String },
}

/// `vmm ps`
pub fn ps(json: bool) -> Result<(), Failure> {
    let guests: Vec<_> = Root::from_environment()
        .list()?
        .into_iter()
        .map(|guest| {
            let status = Client::connect(&guest.socket(), PS_PATIENCE).and_then(|mut client| client.status());
            match status {
                Ok(status) => Listed::Answers(Box::new(status)),
                Err(error) => Listed::Silent {
                    name: guest.name().to_owned(),
                    pid: guest.pid(),
                    error: error.to_string(),
                },
            }
        })
        .collect();
    if json {
        let value = |guest: &Listed| match guest {
            Listed::Answers(status) => serde_json::to_value(status),
            Listed::Silent { name, pid, error } => {
                Ok(serde_json::json!({"name": name, "state": "silent", "pid": pid, "error": error}))
            }
        };
        return print_json(&guests.iter().map(value).collect::<Result<Vec<_>, _>>()?);
    }
    let mut rows = vec![["NAME", "STATE", "PID", "VCPUS", "MEMORY", "UP"].map(str::to_owned)];
    for guest in guests {
        rows.push(match guest {
            Listed::Answers(status) => [
                status.name.clone(),
                status.state.as_str().to_owned(),
                status.pid.to_string(),
                status.cpus.to_string(),
                crate::config::show_size(status.memory),
                uptime(&status),
            ],
            Listed::Silent { name, pid, error } => {
                tracing::warn!("guest {name}: {error}");
                let pid = pid.map_or("-".to_owned(), |pid| pid.to_string());
                [name, "silent".to_owned(), pid, "-".to_owned(), "-".to_owned(), "-".to_owned()]
            }
        });
    }
    Ok(print_table(&rows)?)
}

/// `vmm show NAME`
pub fn show(name: &str, json: bool) -> Result<(), Failure> {
    let status = connect(&find(name)?)?.status()?;
    if json {
        return print_json(&status);
    }
    let mut out = io::stdout().lock();
    writeln!(out, "name     {}", status.name)?;
    writeln!(out, "state    {}, up {}", status.state.as_str(), uptime(&status))?;
    writeln!(out, "monitor  process {}, version {}", status.pid, status.version)?;
    writeln!(out, "kernel   {}", status.kernel.display())?;
    writeln!(out, "vcpus    {}", status.cpus)?;
    writeln!(out, "memory   {}", crate::config::show_size(status.memory))?;
    writeln!(out, "serial   {}", status.serial.as_deref().unwrap_or("null"))?;
    for (index, disk) in status.disks.iter().enumerate() {
        show_disk(&mut out, index, disk)?;
    }
    for net in &status.nets {
        writeln!(out, "net      {} on tap {}", net.mac, net.tap)?;
    }
    Ok(())
}

/// A disk in some lines: only what there is to say of it.
fn show_disk(out: &mut impl Write, index: usize, disk: &DiskStatus) -> io::Result<()> {
    let DiskStatus { path, readonly, bytes, more } = disk;
    let mut about = vec![path.display().to_string(), more.format.clone(), with_bytes(*bytes)];
    about.push(if *readonly { "read-only".to_owned() } else { more.mode.clone() });
    about.retain(|part| !part.is_empty());
    writeln!(out, "{:<9}{}", format!("disk {index}"), about.join(", "))?;
    let mut line = |text: String| writeln!(out, "         {text}");
    if let Some(redo) = &more.redo {
        line(format!("redo log {}", redo.display()))?;
    }
    if let Some(action) = more.at_power_off {
        line(format!("at power-off: {action}"))?;
    }
    if !more.backing.is_empty() {
        let below: Vec<_> = more.backing.iter().map(|below| below.display().to_string()).collect();
        line(format!("lies on {}", below.join(", ")))?;
    }
    if let Some(allocated) = more.allocated.filter(|_| !readonly) {
        let limit = more.max_size.map_or(String::new(), |max| format!(" of at most {}", with_bytes(max)));
        line(format!("takes {}{limit}", with_bytes(allocated)))?;
    }
    let DiskLimits { iops, bandwidth, .. } = more.limits;
    let iops = iops.map(|iops| format!("{iops} requests/s"));
    let limits: Vec<_> = iops.into_iter().chain(bandwidth.map(|b| format!("{}/s", with_bytes(b)))).collect();
    if !limits.is_empty() {
        line(format!("limited to {}", limits.join(" and ")))?;
    }
    if let Some(why) = &more.waiting {
        line(format!("waits: {why}"))?;
    }
    Ok(())
}

/// `vmm pause NAME`
pub fn pause(name: &str) -> Result<(), Failure> {
    Ok(connect(&find(name)?)?.pause()?)
}

/// `vmm resume NAME`
pub fn resume(name: &str) -> Result<(), Failure> {
    Ok(connect(&find(name)?)?.resume()?)
}

/// `vmm stop NAME`
pub fn stop(name: &str, limit: Duration, now: bool) -> Result<(), Failure> {
    let guest = find(name)?;
    let Some((pid, process)) = process(&guest)? else { return Ok(()) };
    let mut client = connect(&guest)?;
    if now { client.stop() } else { client.power_button() }?;
    let limit = if now { PATIENCE } else { limit };
    let ended = process.wait(limit).map_err(|source| Error::Process {
        what: "wait for",
        name: name.to_owned(),
        pid,
        source,
    })?;
    if ended {
        return Ok(());
    }
    // The connection may have been idle for too long.
    let is_settling = connect(&guest).and_then(|mut client| client.status());
    if is_settling.is_ok_and(|status| status.state == State::Stopping) {
        return Err(Error::Settling { name: name.to_owned(), pid }.into());
    }
    let name = name.to_owned();
    Err(if now { Error::Held { name, limit } } else { Error::Deaf { name, limit } }.into())
}

/// `vmm kill NAME`
pub fn kill(name: &str) -> Result<(), Failure> {
    let guest = find(name)?;
    let Some((pid, process)) = process(&guest)? else { return Ok(()) };
    let failed = |what| {
        let name = name.to_owned();
        move |source| Error::Process { what, name, pid, source }
    };
    process.kill().map_err(failed("kill"))?;
    if !process.wait(KILL_PATIENCE).map_err(failed("wait for"))? {
        return Err(Error::Stuck { name: name.to_owned(), pid }.into());
    }
    // Taking the name cleans up what the monitor left; giving it back leaves nothing.
    match Root::from_environment().claim(name) {
        Ok(claim) => drop(claim),
        // Somebody has started the guest again already.
        Err(run_dir::Error::Held { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(())
}

/// The monitor's process; `None` if it has ended. That the guest is alive after its process was opened means that the
/// number is its own and not one that was given to another process since.
fn process(guest: &Guest) -> Result<Option<(u32, Process)>, Failure> {
    let name = || guest.name().to_owned();
    let pid = guest.pid().ok_or_else(|| Error::NoPid { name: name() })?;
    let opened =
        Process::open(pid).map_err(|source| Error::Process { what: "open", name: name(), pid, source })?;
    Ok(opened.filter(|_| guest.is_alive() && guest.pid() == Some(pid)).map(|process| (pid, process)))
}

fn uptime(status: &Status) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let seconds = now.saturating_sub(status.started);
    let (days, hours, minutes) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{minutes}m"),
        _ => format!("{days}d{hours}h"),
    }
}

fn print_table<const N: usize>(rows: &[[String; N]]) -> io::Result<()> {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.len().max(*width);
        }
    }
    let mut out = io::stdout().lock();
    for row in rows {
        let cells: Vec<_> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}
