//! The header of every frame (virtio 1.2, section 5.1.6).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

use super::ETHERNET_HEADER;
use super::backend::Offloads;

/// Bytes of a header.
pub const HEADER_LEN: usize = 12;

/// Offset of the checksum in a TCP header (RFC 9293, section 3.1).
const TCP_CHECKSUM: u16 = 16;
/// Bytes of a TCP header without options.
const TCP_HEADER: usize = 20;
/// Offset of the checksum in a UDP header (RFC 768).
const UDP_CHECKSUM: u16 = 6;

/// What is still to be done to a frame.
///
/// A value that [`from_guest`](Self::from_guest) or [`for_guest`](Self::for_guest) returns names only places inside the
/// frame, only work that was agreed on, and nothing in fields that do not matter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

/// A header that promises or asks for what it must not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The checksum.
    #[error("a checksum is to be filled in, which was not negotiated")]
    Checksum,
    /// Where the checksum is.
    #[error("the checksum of a frame of {len} bytes is said to be at {start} + {offset}")]
    Place {
        /// First byte that it covers.
        start: u16,
        /// Where it lies from there.
        offset: u16,
        /// Length of the frame.
        len: usize,
    },
    /// Segmentation.
    #[error("segmentation of type {gso_type:#x} was not negotiated, or there is no such type")]
    Segmentation {
        /// `gso_type`.
        gso_type: u8,
    },
    /// Sizes.
    #[error(
        "a frame of {len} bytes is to be cut into segments of {gso_size} bytes with headers of {hdr_len}"
    )]
    Sizes {
        /// `gso_size`.
        gso_size: u16,
        /// `hdr_len`.
        hdr_len: u16,
        /// Length of the frame.
        len: usize,
    },
}

/// The low byte of a constant that is one.
const fn byte(value: u32) -> u8 {
    value.to_le_bytes()[0]
}

const NEEDS_CSUM: u8 = byte(VIRTIO_NET_HDR_F_NEEDS_CSUM);
const DATA_VALID: u8 = byte(VIRTIO_NET_HDR_F_DATA_VALID);
const ECN: u8 = byte(VIRTIO_NET_HDR_GSO_ECN);
const NONE: u8 = byte(VIRTIO_NET_HDR_GSO_NONE);
const TCPV4: u8 = byte(VIRTIO_NET_HDR_GSO_TCPV4);
const TCPV6: u8 = byte(VIRTIO_NET_HDR_GSO_TCPV6);
const UDP: u8 = byte(VIRTIO_NET_HDR_GSO_UDP);
const UDP_L4: u8 = byte(VIRTIO_NET_HDR_GSO_UDP_L4);

impl Header {
    fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// The header as it lies in memory, in front of a frame that spans `num_buffers` buffers.
    #[must_use]
    pub fn bytes(self, num_buffers: u16) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..2].copy_from_slice(&[self.flags, self.gso_type]);
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, num_buffers];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Checks a header that a driver has put in front of a frame of `len` bytes, `allowed` being what the device offered
    /// and the driver accepted.
    ///
    /// # Errors
    ///
    /// [`Error`]: the frame is not to be passed on.
    pub fn from_guest(bytes: &[u8; HEADER_LEN], allowed: Offloads, len: usize) -> Result<Self, Error> {
        // Flags that mean nothing in this direction are ignored (section 5.1.6.2.2).
        let header = Self::parse(bytes).check(allowed, len, NEEDS_CSUM)?;
        let Self { gso_type, csum_start: start, csum_offset: offset, .. } = header;
        if gso_type == NONE {
            return Ok(header);
        }
        // A frame to be cut needs new checksums, and must have said where they belong (section 5.1.6.2.1).
        let (place, least) = match gso_type & !ECN {
            TCPV4 | TCPV6 => (Some(TCP_CHECKSUM), TCP_HEADER),
            UDP_L4 => (Some(UDP_CHECKSUM), 8),
            _ => (None, 8),
        };
        if header.flags & NEEDS_CSUM == 0 {
            return Err(Error::Checksum);
        }
        if place.is_some_and(|place| place != offset) || usize::from(start) + least > len {
            return Err(Error::Place { start, offset, len });
        }
        Ok(header)
    }

    /// Checks a header on its way to a driver that has accepted `allowed`, in front of a frame of `len` bytes.
    ///
    /// # Errors
    ///
    /// [`Error`]: the driver would not know what to do with the frame.
    pub fn for_guest(bytes: &[u8; HEADER_LEN], allowed: Offloads, len: usize) -> Result<Self, Error> {
        let valid = if allowed.csum { DATA_VALID } else { 0 };
        Self::parse(bytes).check(allowed, len, NEEDS_CSUM | valid)
    }

    fn check(self, allowed: Offloads, len: usize, flags: u8) -> Result<Self, Error> {
        let Self { gso_type, hdr_len, gso_size, csum_start: start, csum_offset: offset, .. } = self;
        let mut checked = Self { flags: self.flags & flags, ..Self::default() };
        if checked.flags & NEEDS_CSUM != 0 {
            if !allowed.csum {
                return Err(Error::Checksum);
            }
            let end = usize::from(start) + usize::from(offset) + 2;
            if usize::from(start) < ETHERNET_HEADER || end > len {
                return Err(Error::Place { start, offset, len });
            }
            (checked.csum_start, checked.csum_offset) = (start, offset);
        }
        let agreed = match gso_type & !ECN {
            NONE if gso_type == NONE => return Ok(checked),
            TCPV4 => allowed.tso4,
            TCPV6 => allowed.tso6,
            UDP => allowed.ufo && gso_type == UDP,
            UDP_L4 => allowed.uso && gso_type == UDP_L4,
            _ => false,
        };
        if !agreed || gso_type & ECN != 0 && !allowed.ecn {
            return Err(Error::Segmentation { gso_type });
        }
        if gso_size == 0 || usize::from(hdr_len) > len {
            return Err(Error::Sizes { gso_size, hdr_len, len });
        }
        Ok(Self { gso_type, hdr_len, gso_size, ..checked })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Offloads = Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true };

    fn tso4() -> Header {
        Header {
            flags: NEEDS_CSUM,
            gso_type: TCPV4,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
        }
    }

    fn check(header: Header, allowed: Offloads) -> Result<Header, Error> {
        Header::from_guest(&header.bytes(7), allowed, 4000)
    }

    #[test]
    fn plain_header_is_passed_and_fields_without_meaning_are_cleared() {
        let noise =
            Header { flags: 0xfe, gso_type: NONE, hdr_len: 1, gso_size: 2, csum_start: 3, csum_offset: 4 };
        assert_eq!(check(noise, Offloads::default()), Ok(Header::default()));
        assert_eq!(Header::default().bytes(0x102)[10..], [2, 1]);
    }

    #[test]
    fn every_kind_of_segmentation_needs_its_own_feature() {
        let without = |change: fn(&mut Offloads)| {
            let mut allowed = ALL;
            change(&mut allowed);
            allowed
        };
        for (gso_type, offset, missing) in [
            (TCPV4, 16, without(|o| o.tso4 = false)),
            (TCPV6, 16, without(|o| o.tso6 = false)),
            (TCPV4 | ECN, 16, without(|o| o.ecn = false)),
            (TCPV6 | ECN, 16, without(|o| o.ecn = false)),
            (UDP, 6, without(|o| o.ufo = false)),
            (UDP_L4, 6, without(|o| o.uso = false)),
        ] {
            let header = Header { gso_type, csum_offset: offset, ..tso4() };
            assert_eq!(check(header, ALL), Ok(header));
            assert_eq!(check(header, missing), Err(Error::Segmentation { gso_type }));
        }
        assert_eq!(check(tso4(), Offloads { csum: false, ..ALL }), Err(Error::Checksum));
        for gso_type in [2, 6, 0x40, ECN, UDP | ECN, UDP_L4 | ECN] {
            let header = Header { gso_type, csum_offset: 6, ..tso4() };
            assert_eq!(check(header, ALL), Err(Error::Segmentation { gso_type }));
        }
    }

    #[test]
    fn checksum_outside_of_the_frame_or_in_its_ethernet_header_is_refused() {
        let plain = Header { gso_type: NONE, hdr_len: 0, gso_size: 0, ..tso4() };
        for (start, offset, good) in [
            (13, 16, false),
            (14, 16, true),
            (3982, 16, true),
            (3983, 16, false),
            (u16::MAX, u16::MAX, false),
        ] {
            let header = Header { csum_start: start, csum_offset: offset, ..plain };
            assert_eq!(check(header, ALL).is_ok(), good, "{start} {offset}");
        }
        assert!(check(Header { csum_start: 3981, ..tso4() }, ALL).is_err(), "no room for a TCP header");
        assert!(check(Header { csum_offset: 6, ..tso4() }, ALL).is_err(), "not where TCP has its checksum");
    }

    #[test]
    fn segmentation_without_size_or_checksum_or_with_headers_past_the_end_is_refused() {
        let sizes = |gso_size, hdr_len| Err(Error::Sizes { gso_size, hdr_len, len: 4000 });
        assert_eq!(check(Header { gso_size: 0, ..tso4() }, ALL), sizes(0, 54));
        assert_eq!(check(Header { hdr_len: 4001, ..tso4() }, ALL), sizes(1448, 4001));
        assert_eq!(check(Header { flags: 0, ..tso4() }, ALL), Err(Error::Checksum));
    }

    #[test]
    fn driver_without_checksums_is_told_nothing_about_them() {
        let valid = Header { flags: DATA_VALID, ..Header::default() };
        let none = Offloads::default();
        assert_eq!(Header::for_guest(&valid.bytes(0), none, 60), Ok(Header::default()));
        assert_eq!(Header::for_guest(&valid.bytes(0), ALL, 60), Ok(valid));
        let partial = Header { gso_type: NONE, hdr_len: 0, gso_size: 0, ..tso4() };
        assert_eq!(Header::for_guest(&partial.bytes(0), none, 60), Err(Error::Checksum));
    }

    proptest! {
        #[test]
        fn header_that_is_passed_stays_as_it_is_and_within_the_frame(
            bytes in any::<[u8; HEADER_LEN]>(),
            kind in prop_oneof![Just(None), prop_oneof![Just(TCPV4), Just(TCPV6), Just(UDP), Just(UDP_L4)].prop_map(Some)],
            bits in any::<[bool; 6]>(),
            len in ETHERNET_HEADER..70_000,
        ) {
            let [csum, tso4, tso6, ecn, ufo, uso] = bits;
            let allowed = Offloads { csum, tso4, tso6, ecn, ufo, uso }.consistent();
            let mut bytes = bytes;
            if let Some(kind) = kind {
                (bytes[0], bytes[1]) = (bytes[0] | NEEDS_CSUM, kind);
            }
            for check in [Header::from_guest, Header::for_guest] {
                let Ok(header) = check(&bytes, allowed, len) else { continue };
                prop_assert_eq!(check(&header.bytes(0), allowed, len), Ok(header));
                if header.flags & NEEDS_CSUM != 0 {
                    prop_assert!(csum);
                    prop_assert!(usize::from(header.csum_start) + usize::from(header.csum_offset) + 2 <= len);
                }
                if header.gso_type != NONE {
                    prop_assert!(allowed.large_frames() && usize::from(header.hdr_len) <= len);
                    prop_assert!(header.gso_size > 0);
                }
            }
        }
    }
}
