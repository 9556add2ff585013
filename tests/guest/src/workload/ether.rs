//! Ethernet frames.

use alloc::format;
use alloc::string::String;

use crate::Error;
use crate::args::Args;

/// EtherType for local experiments (IEEE 802, section 9.2.4).
pub const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
/// EtherType of ARP.
pub const ARP: [u8; 2] = [0x08, 0x06];
/// EtherType of IPv4.
pub const IPV4: [u8; 2] = [0x08, 0x00];
/// Everybody's address.
pub const BROADCAST: [u8; 6] = [0xff; 6];
/// Length of the two addresses and the type.
pub const HEADER_LEN: usize = 14;
const SEQUENCE: core::ops::Range<usize> = HEADER_LEN..HEADER_LEN + 8;

/// Fills `frame` with an experimental frame.
pub fn build(frame: &mut [u8], from: [u8; 6], to: [u8; 6], sequence: u64) {
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&from);
    frame[12..HEADER_LEN].copy_from_slice(&EXPERIMENT);
    frame[SEQUENCE].copy_from_slice(&sequence.to_le_bytes());
    let (head, rest) = frame.split_at_mut(SEQUENCE.end);
    // The bytes after the sequence number follow from it.
    rest.fill(head[SEQUENCE.start]);
}

/// Type of a frame.
pub fn kind(frame: &[u8]) -> Option<[u8; 2]> {
    frame.get(12..HEADER_LEN)?.try_into().ok()
}

/// Sequence number of an experimental frame, and whether what follows it is as it was sent.
pub fn sequence(frame: &[u8]) -> Option<(u64, bool)> {
    if kind(frame)? != EXPERIMENT {
        return None;
    }
    let sequence = frame.get(SEQUENCE)?.try_into().ok()?;
    let rest = &frame[SEQUENCE.end..];
    Some((u64::from_le_bytes(sequence), rest.iter().all(|byte| *byte == sequence[0])))
}

/// Sends `frame` back where it came from.
pub fn turn_round(frame: &mut [u8], own: [u8; 6]) {
    frame.copy_within(6..12, 0);
    frame[6..12].copy_from_slice(&own);
}

/// The address that `key=` gives, or `default`.
///
/// # Errors
///
/// It is no address.
pub fn address(args: &Args, key: &str, default: [u8; 6]) -> Result<[u8; 6], Error> {
    let Some(text) = args.all(key).next() else { return Ok(default) };
    let mut address = [0; 6];
    let mut bytes = text.split(':').map(|byte| u8::from_str_radix(byte, 16));
    let filled =
        address.iter_mut().all(|place| bytes.next().and_then(Result::ok).map(|byte| *place = byte).is_some());
    if filled && bytes.next().is_none() {
        return Ok(address);
    }
    Err(format!("{key}={text}: an address is wanted, as 52:54:00:12:34:56"))
}

/// An address as text.
pub fn text(address: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = address;
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}
