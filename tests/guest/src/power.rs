//! Ways to end.

use crate::args::Args;
use crate::{Error, acpi, cpu, interrupts};

/// What happens after the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum End {
    /// The machine is switched off.
    #[default]
    PowerOff,
    /// The machine is reset.
    Reset,
    /// The processor sleeps.
    Idle,
}

impl End {
    /// What `then=` asks for.
    ///
    /// # Errors
    ///
    /// The word is not known.
    pub fn parse(args: &Args) -> Result<Self, Error> {
        Ok(match args.choice("then", &["poweroff", "reset", "idle"])? {
            "reset" => Self::Reset,
            "idle" => Self::Idle,
            _ => Self::PowerOff,
        })
    }
}

/// Sleep control register where no table names one, and S5 in it.
const SLEEP_CONTROL: u16 = 0x600;
const SLEEP_S5: u8 = 5 << 2 | 1 << 5;
const ACPI_RESET: u16 = 0x602;
const KEYBOARD_COMMAND: u16 = 0x64;
const PULSE_RESET: u8 = 0xfe;
/// Time in cycles for a monitor to act before the next way is tried: some 20 ms.
const PATIENCE: u64 = 50_000_000;

/// Ends.
pub fn end(how: End) -> ! {
    match how {
        End::PowerOff => power_off(),
        End::Reset => reset(),
        End::Idle => idle(),
    }
}

/// Switches off through ACPI; where that does nothing, resets.
pub fn power_off() -> ! {
    let register = acpi::sleep_control();
    cpu::out8(register.unwrap_or(SLEEP_CONTROL), SLEEP_S5);
    // A machine that has the register will act, however late.
    cpu::spin(PATIENCE * if register.is_some() { 100 } else { 1 });
    reset()
}

/// Resets through the keyboard controller; where there is none, by a fault without a handler.
pub fn reset() -> ! {
    cpu::out8(KEYBOARD_COMMAND, PULSE_RESET);
    cpu::spin(PATIENCE);
    cpu::triple_fault()
}

/// Resets through the reset register of ACPI.
pub fn reset_by_acpi() -> ! {
    cpu::out8(ACPI_RESET, 1);
    cpu::spin(PATIENCE * 100);
    reset()
}

/// Sleeps for good.
pub fn idle() -> ! {
    interrupts::quiet();
    loop {
        interrupts::wait_for_any();
    }
}
