//! `vmm --config FILE`.

use std::path::Path;

use super::{Failure, USAGE, log};
use crate::machine::ending::Outcome;
use crate::run_dir::Root;
use crate::{config, machine};

/// Runs the guest of the configuration at `path` to its end.
pub fn run(path: &Path) -> Result<(), Failure> {
    let loaded = config::load(path).map_err(|error| Failure::Error(Box::new(error), USAGE))?;
    let outcome = machine::run(&loaded, &Root::from_environment()).map_err(|error| {
        let status = error.exit_status();
        Failure::Error(Box::new(error), status)
    })?;
    let name = &loaded.config.name;
    match outcome {
        Outcome::PowerOff => tracing::info!("guest {name} has powered off"),
        Outcome::Reset => tracing::info!("guest {name} has asked for a reset, which ends it"),
        Outcome::Stopped => tracing::info!("guest {name} was stopped"),
        Outcome::Crashed(diagnosis) => {
            log::say(&format!("vmm: guest {name} cannot go on: {diagnosis}"));
            return Err(Failure::Told(1));
        }
    }
    Ok(())
}
