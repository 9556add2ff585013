//! What may stand on the command line.

use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use api::AtPowerOff;
use clap::error::ErrorKind;
use clap::{Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use super::disk::DiskVerb;
use super::image::args::ImageVerb;

/// Verbs of the contract that are still to come.
const LATER: [&str; 9] =
    ["top", "reset", "console", "set", "snapshot", "restore", "receive", "migrate", "switch"];

/// A KVM virtual machine monitor for consolidating servers
///
/// With --config, runs one guest in the foreground, its serial console on standard input and output. The other commands
/// look at guests of this host and control them.
#[derive(Debug, Parser)]
#[command(
    name = "vmm",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Exit status: 0 the guest powered off or the command was done, 1 an error, 2 usage or configuration."
)]
struct Line {
    /// Run the guest that FILE describes
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// With --config: what becomes of the redo logs of undoable disks at power-off (ask, commit, discard or keep), whatever
    /// FILE says
    #[arg(long, value_name = "ACTION", requires = "config", value_parser = str::parse::<AtPowerOff>)]
    at_power_off: Option<AtPowerOff>,
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    verb: Option<Verb>,
}

#[derive(Debug, clap::Args)]
struct LogArgs {
    /// Say more: -v what happens, -vv details, -vvv everything
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Write the log to FILE instead of standard error
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a guest; how `--config` arrives here.
    #[command(skip)]
    Run {
        /// Its configuration.
        config: PathBuf,
        /// What becomes of the redo logs of undoable disks, if that is to be other than configured.
        at_power_off: Option<AtPowerOff>,
    },
    /// List the guests of this host
    Ps {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
    },
    /// Show what a guest is and does
    Show {
        /// Name of the guest
        name: String,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Hold a guest: its processors and devices stand still
    Pause {
        /// Name of the guest
        name: String,
    },
    /// Let a paused guest go on
    Resume {
        /// Name of the guest
        name: String,
    },
    /// Press a guest's power button and wait until it has powered off
    Stop {
        /// Name of the guest
        name: String,
        /// How long to wait for the guest, in seconds
        #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
        timeout: Duration,
        /// End it at once, without asking the guest
        #[arg(long, conflicts_with = "timeout")]
        now: bool,
    },
    /// Kill a guest's monitor and clean up after it
    Kill {
        /// Name of the guest
        name: String,
    },
    /// Limit, exchange and decide on disks of a running guest: `vmm disk --help`
    #[command(subcommand)]
    Disk(DiskVerb),
    /// Make, copy, examine and change disks: `vmm image --help`
    #[command(subcommand)]
    Image(ImageVerb),
    /// Say what this host can do for guests, and what to do about what it cannot
    Doctor {
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print completions for a shell
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

/// A command line that has been understood.
#[derive(Debug)]
pub struct Asked {
    /// How often -v was given.
    pub verbosity: u8,
    /// Where the log goes; standard error if absent.
    pub log: Option<PathBuf>,
    /// What to do.
    pub verb: Verb,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: u32 = text.parse().map_err(|_| "a whole number of seconds is expected".to_owned())?;
    Ok(Duration::from_secs(seconds.into()))
}

fn command() -> Command {
    let later = LATER.map(|name| {
        let rest = clap::Arg::new("rest").num_args(0..).trailing_var_arg(true).allow_hyphen_values(true);
        Command::new(name).hide(true).disable_help_flag(true).arg(rest)
    });
    Line::command().subcommands(later)
}

/// Understands `args`, the program's name first.
///
/// # Errors
///
/// What is to be printed instead: an explanation, the help, or the version.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Asked, clap::Error> {
    let mut command = command();
    let matches = command.try_get_matches_from_mut(args)?;
    if let Some(name) = matches.subcommand_name().filter(|name| LATER.contains(name)) {
        return Err(command.error(ErrorKind::InvalidSubcommand, format!("`vmm {name}` is not supported yet")));
    }
    let Line { config, at_power_off, log: LogArgs { verbose, log }, verb } =
        Line::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    let verb = match (verb, config) {
        (Some(verb), _) => verb,
        (None, Some(config)) => Verb::Run { config, at_power_off },
        (None, None) => {
            let wanted =
                "nothing to do: `vmm --config FILE` runs a guest, `vmm --help` lists the other commands";
            return Err(command.error(ErrorKind::MissingRequiredArgument, wanted));
        }
    };
    Ok(Asked { verbosity: verbose, log, verb })
}

/// Prints completions for `shell`.
///
/// # Errors
///
/// They cannot be printed.
pub fn completions(shell: clap_complete::Shell) -> io::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Line::command(), "vmm", &mut script);
    io::Write::write_all(&mut io::stdout(), &script)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(line: &str) -> Result<Asked, clap::Error> {
        parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn command_line_is_consistent() {
        command().debug_assert();
    }

    #[test]
    fn contract_commands_are_understood() {
        assert!(
            matches!(asked("vmm --config a.toml").unwrap().verb, Verb::Run { config, at_power_off: None } if config.ends_with("a.toml"))
        );
        assert!(matches!(asked("vmm ps --json").unwrap().verb, Verb::Ps { json: true }));
        assert!(matches!(asked("vmm show web").unwrap().verb, Verb::Show { json: false, .. }));
        assert!(
            matches!(asked("vmm stop web --timeout 5").unwrap().verb, Verb::Stop { timeout, .. } if timeout.as_secs() == 5)
        );
        assert!(matches!(asked("vmm stop web --now").unwrap().verb, Verb::Stop { now: true, .. }));
        let run = asked("vmm -vv --log l --config a.toml").unwrap();
        assert_eq!((run.verbosity, run.log.as_deref()), (2, Some(std::path::Path::new("l"))));
    }

    #[test]
    fn orders_to_disks_of_guests_are_understood() {
        for line in [
            "vmm disk retry web",
            "vmm disk retry web 1",
            "vmm disk limits web 0 --iops 500 --bandwidth 20M --burst 250ms",
            "vmm disk medium web 1 tools.img --format flat",
            "vmm disk at-power-off web 0 discard",
        ] {
            assert!(matches!(asked(line).expect(line).verb, Verb::Disk(_)), "{line}");
        }
        for line in [
            "vmm disk",
            "vmm disk retry",
            "vmm disk retry web -1",
            "vmm disk limits web 0 --iops 0",
            "vmm disk limits web 0 --bandwidth 20",
            "vmm disk medium web 1",
            "vmm disk at-power-off web 0 forget",
        ] {
            assert_eq!(asked(line).map(|_| ()).expect_err(line).exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn wrong_lines_end_with_the_usage_status() {
        for line in [
            "vmm",
            "vmm frobnicate",
            "vmm show",
            "vmm --config",
            "vmm ps extra",
            "vmm --config a ps",
            "vmm --at-power-off commit",
            "vmm --config a --at-power-off never",
            "vmm stop web --timeout x",
            "vmm stop web --timeout -1",
            "vmm stop web --now --timeout 3",
            "vmm completions tcsh",
        ] {
            let error = asked(line).map(|_| ()).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn verbs_still_to_come_are_refused_by_name() {
        for name in LATER {
            let error = asked(&format!("vmm {name} web --flag 3")).map(|_| ()).expect_err(name);
            assert_eq!(error.exit_code(), 2);
            assert!(error.to_string().contains(&format!("`vmm {name}` is not supported yet")), "{error}");
        }
    }
}
