//! `vmm --config FILE`.

use std::path::Path;

use api::AtPowerOff;

use super::attendant::Terminal;
use super::{Failure, USAGE, report};
use crate::machine::Ended;
use crate::machine::ending::Outcome;
use crate::run_dir::Root;
use crate::{config, machine};

/// Runs the guest of the configuration at `path` to its end. `at_power_off` takes the place of what that says of undoable disks.
pub fn run(path: &Path, at_power_off: Option<AtPowerOff>) -> Result<(), Failure> {
    let mut loaded = config::load(path).map_err(|error| Failure::Error(Box::new(error), USAGE))?;
    if let Some(action) = at_power_off {
        loaded.config.disks.iter_mut().for_each(|disk| disk.at_power_off = action);
    }
    let mut terminal = Terminal::new(&loaded.config.name);
    let ended = machine::run(&loaded, &Root::from_environment(), &mut terminal);
    let Ended { outcome, undone } = ended.map_err(|error| {
        let status = error.exit_status();
        Failure::Error(Box::new(error), status)
    })?;
    undone.iter().for_each(|error| report(error));
    if undone.is_empty() && !matches!(outcome, Outcome::Crashed(_)) { Ok(()) } else { Err(Failure::Told(1)) }
}
