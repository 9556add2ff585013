//! The workloads, one of which `test=` on the command line names.
//!
//! Sizes may end in K, M or G. When a workload is done, the machine is switched off, or `then=` says what else: `reset`, `idle`.
//!
//! | `test=` | what happens | keys |
//! | --- | --- | --- |
//! | `hello` (default) | says hello and sleeps | |
//! | `poweroff` | switches off through ACPI, else resets | |
//! | `reset` | resets | `via=i8042`, `acpi` |
//! | `cpu` | counts loops a second | `seconds=5` |
//! | `serial-echo` | sends back what comes in on COM1, up to a line `end` | |

mod compute;
mod serial_echo;

use alloc::format;

use crate::{Error, Machine, power};

/// Runs the workload that the command line names.
///
/// # Errors
///
/// What the workload could not do, or that there is no such workload.
pub fn run(machine: &Machine) -> Result<(), Error> {
    match machine.args.test() {
        "hello" => power::idle(),
        "poweroff" => Ok(()),
        "reset" => match machine.args.choice("via", &["i8042", "acpi"])? {
            "acpi" => power::reset_by_acpi(),
            _ => power::reset(),
        },
        "cpu" => compute::run(machine),
        "serial-echo" => serial_echo::run(machine),
        other => Err(format!("test={other}: there is no such workload")),
    }
}
