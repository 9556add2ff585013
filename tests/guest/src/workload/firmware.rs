//! The firmware's tables.

use crate::json::Line;
use crate::{Error, Machine, acpi};

/// `test=acpi`
pub fn run(_: &Machine) -> Result<(), Error> {
    let root = acpi::root().ok_or("there is no ACPI root pointer")?;
    let tables = acpi::tables(root);
    let bad = tables.iter().filter(|table| !table.sums_up());
    let mut line = Line::result("acpi");
    line.number("root", root)
        .flag("root_ok", acpi::root_sums_up(root))
        .texts("tables", tables.iter().map(acpi::Table::signature))
        .numbers("addresses", tables.iter().map(|table| table.address))
        .numbers("lengths", tables.iter().map(acpi::Table::len))
        .texts("bad_checksums", bad.map(acpi::Table::signature))
        .numbers("cpus", acpi::processors().into_iter().map(u64::from));
    if let Some(port) = acpi::sleep_control() {
        line.number("sleep_control", port.into());
    }
    line.send();
    Ok(())
}
