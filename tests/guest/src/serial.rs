//! COM1, a 16550A, polled.

use core::sync::atomic::{AtomicU32, Ordering};

use crate::cpu::{in8, out8, relax};

const COM1: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = COM1 + 1;
const FIFO_CONTROL: u16 = COM1 + 2;
const MODEM_CONTROL: u16 = COM1 + 4;
const LINE_STATUS: u16 = COM1 + 5;
/// Its interrupt, an input of the I/O APIC.
pub const IRQ: u32 = 4;

const DATA_READY: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
const FIFO_LEN: u32 = 16;

/// Bytes that the transmit FIFO has certainly room for.
static ROOM: AtomicU32 = AtomicU32::new(1);

/// Switches the FIFOs on.
pub fn init() {
    out8(FIFO_CONTROL, 1);
}

/// Sends a byte. The line status, an expensive look at hardware, is read once per FIFO.
pub fn put(byte: u8) {
    let mut room = ROOM.load(Ordering::Relaxed);
    if room == 0 {
        while in8(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
            relax();
        }
        room = FIFO_LEN;
    }
    out8(COM1, byte);
    ROOM.store(room - 1, Ordering::Relaxed);
}

/// A received byte, if there is one.
pub fn get() -> Option<u8> {
    (in8(LINE_STATUS) & DATA_READY != 0).then(|| in8(COM1))
}

/// Interrupts from now on when a byte has been received.
pub fn interrupt_on_input() {
    const OUT2: u8 = 1 << 3; // gates the interrupt on a PC
    out8(MODEM_CONTROL, OUT2 | 3);
    out8(INTERRUPT_ENABLE, 1);
}
