//! The part of an i8042 keyboard controller that resets a PC, on ports 60h to 64h.
//!
//! No keyboard is attached: the status register says that both buffers are empty, so that a driver that
//! probes gets no answer and a `reboot` by way of the controller does not wait for it.

use std::sync::Arc;

use super::{Host, Request};
use crate::bus::BusDevice;

/// First port.
pub const PORT_BASE: u64 = 0x60;
/// Number of ports.
pub const PORT_COUNT: u64 = 5;

const COMMAND: u64 = 4;
/// Pulse output line 0, which is the processor's reset line.
const PULSE_RESET: u8 = 0xfe;

/// The controller.
#[derive(Debug)]
pub struct I8042 {
    host: Arc<dyn Host>,
}

impl I8042 {
    /// A controller whose reset line leads to `host`.
    #[must_use]
    pub fn new(host: Arc<dyn Host>) -> Self {
        Self { host }
    }
}

impl BusDevice for I8042 {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == COMMAND && data == [PULSE_RESET] {
            self.host.request(Request::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::power::tests::Recorder;
    use super::*;

    #[test]
    fn only_the_reset_pulse_on_the_command_port_asks_for_a_reset() {
        let host = Arc::new(Recorder::default());
        let controller = I8042::new(host.clone());
        controller.write(COMMAND, &[0xd1]);
        controller.write(0, &[PULSE_RESET]);
        controller.write(COMMAND, &[PULSE_RESET, 0]);
        assert!(host.taken().is_empty());
        controller.write(COMMAND, &[PULSE_RESET]);
        assert_eq!(host.taken(), [Request::Reset]);
    }

    #[test]
    fn status_reads_as_idle() {
        let controller = I8042::new(Arc::new(Recorder::default()));
        let mut data = [0xaa];
        controller.read(COMMAND, &mut data);
        assert_eq!(data, [0]);
    }
}
