//! Power control of a hardware-reduced ACPI machine: sleep and reset registers, and the selector that the
//! generic event device reads to learn that the power button was pressed.
//!
//! ACPI 6.5, sections 4.8.3.7 (sleep control and status), 4.8.3.6 (reset register) and 5.6.9 (interrupt-signaled events).
//! The tables that describe these registers use the constants here.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::{Host, Request};
use crate::Interrupt;
use crate::bus::BusDevice;

/// First port.
pub const PORT_BASE: u16 = 0x600;
/// Number of ports.
pub const PORT_COUNT: u16 = 8;
/// Sleep control register: `SLP_TYPx` in bits 2 to 4, `SLP_EN` in bit 5.
pub const SLEEP_CONTROL: u16 = PORT_BASE;
/// Sleep status register: `WAK_STS` in bit 7.
pub const SLEEP_STATUS: u16 = PORT_BASE + 1;
/// Reset register.
pub const RESET: u16 = PORT_BASE + 2;
/// Value that resets.
pub const RESET_VALUE: u8 = 1;
/// Pending events of the generic event device; reading takes them.
pub const EVENTS: u16 = PORT_BASE + 4;
/// Bit of [`EVENTS`]: the power button was pressed.
pub const EVENT_POWER_BUTTON: u8 = 1;
/// `SLP_TYPx` of the soft-off state S5.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 7;

/// The registers.
#[derive(Debug)]
pub struct Power {
    host: Arc<dyn Host>,
    line: Arc<dyn Interrupt>,
    pending: AtomicU8,
}

impl Power {
    /// Registers that lead to `host`, with `line` as the interrupt of the generic event device.
    #[must_use]
    pub fn new(host: Arc<dyn Host>, line: Arc<dyn Interrupt>) -> Self {
        Self { host, line, pending: AtomicU8::new(0) }
    }

    /// Presses the power button. What follows is up to the guest's system.
    ///
    /// # Errors
    ///
    /// The interrupt cannot be raised.
    pub fn press_button(&self) -> io::Result<()> {
        self.pending.fetch_or(EVENT_POWER_BUTTON, Ordering::SeqCst);
        self.line.trigger()
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == u64::from(EVENTS - PORT_BASE)
            && let Some(first) = data.first_mut()
        {
            *first = self.pending.swap(0, Ordering::SeqCst);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(value) = data.first().copied() else { return };
        if offset == u64::from(SLEEP_CONTROL - PORT_BASE) {
            // S5 is the only state the tables offer; others are ignored.
            if value & SLP_EN != 0 && value >> SLP_TYP_SHIFT & SLP_TYP_MASK == SLEEP_TYPE_S5 {
                self.host.request(Request::PowerOff);
            }
        } else if offset == u64::from(RESET - PORT_BASE) && value == RESET_VALUE {
            self.host.request(Request::Reset);
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::sync::Mutex;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[derive(Debug, Default)]
    pub struct Recorder(Mutex<Vec<Request>>);

    impl Recorder {
        pub fn taken(&self) -> Vec<Request> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl Host for Recorder {
        fn request(&self, request: Request) {
            self.0.lock().unwrap().push(request);
        }
    }

    fn power() -> (Power, Arc<Recorder>, Arc<EventFd>) {
        let (host, line) = (Arc::new(Recorder::default()), Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()));
        (Power::new(host.clone(), line.clone()), host, line)
    }

    #[test]
    fn s5_with_enable_bit_powers_off_and_nothing_else_does() {
        let (power, host, _) = power();
        for value in (0..=u8::MAX).filter(|v| v & 0x3c != 0x34) {
            power.write(0, &[value]);
        }
        assert!(host.taken().is_empty());
        power.write(0, &[0x34]);
        assert_eq!(host.taken(), [Request::PowerOff]);
    }

    #[test]
    fn reset_register_takes_only_its_value() {
        let (power, host, _) = power();
        power.write(2, &[0]);
        power.write(3, &[1]);
        assert!(host.taken().is_empty());
        power.write(2, &[1]);
        assert_eq!(host.taken(), [Request::Reset]);
    }

    #[test]
    fn pressed_button_raises_the_line_and_is_read_once() {
        let (power, _, line) = power();
        power.press_button().unwrap();
        assert_eq!(line.read().unwrap(), 1);
        let mut data = [0xff; 4];
        power.read(4, &mut data);
        assert_eq!(data, [1, 0, 0, 0]);
        power.read(4, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
