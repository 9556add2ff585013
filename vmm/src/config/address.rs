//! Addresses of network cards.

use std::net::Ipv4Addr;

/// Reads `52:54:00:12:34:56`, the address of one card: not a group's, not zero.
pub fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || "a MAC address is six pairs of hexadecimal digits, as in \"52:54:00:12:34:56\"".to_owned();
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
        *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(wrong)?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if mac == [0; 6] || mac[0] & 1 != 0 {
        return Err(
            "this is no card's address: the first byte of one is even, and not all are zero".to_owned()
        );
    }
    Ok(mac)
}

/// Writes an address as [`parse_mac`] reads it.
pub fn show_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The address of card `index` of guest `name` where none is given: 52:54 and four bytes of the FNV-1a hash (64 bits,
/// folded) of both, so that a guest keeps its addresses wherever and however often it is started.
pub fn derive_mac(name: &str, index: usize) -> [u8; 6] {
    let bytes = name.bytes().chain([0]).chain(index.to_string().into_bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [.., a, b, c, d] = (hash ^ hash >> 32).to_be_bytes();
    [0x52, 0x54, a, b, c, d]
}

/// Reads `10.0.0.1/24`.
pub fn parse_network(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let wrong = || "an address with its prefix length, as in \"10.0.0.1/24\", is expected".to_owned();
    let (address, prefix) = text.split_once('/').ok_or_else(wrong)?;
    let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
    let digits = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
    let prefix =
        prefix.parse().ok().filter(|prefix| digits && (1..=32).contains(prefix)).ok_or_else(wrong)?;
    if address.is_unspecified() || address.is_multicast() || address.is_broadcast() {
        return Err("this is no interface's address".to_owned());
    }
    Ok((address, prefix))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn group_zero_short_and_long_mac_addresses_are_refused() {
        for text in
            ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "01:00:5e:00:00:01", "00:00:00:00:00:00", "52-54"]
        {
            assert!(parse_mac(text).is_err(), "{text}");
        }
        assert!(parse_mac("+1:54:00:12:34:56").is_err());
    }

    #[test]
    fn derived_addresses_differ_by_name_and_card_and_stay_the_same() {
        assert_eq!(derive_mac("web", 0), derive_mac("web", 0));
        let all = [derive_mac("web", 0), derive_mac("web", 1), derive_mac("we", 0), derive_mac("web0", 0)];
        for (i, mac) in all.iter().enumerate() {
            assert!(!all[..i].contains(mac) && parse_mac(&show_mac(*mac)) == Ok(*mac));
        }
        // What a release has once given out is never changed.
        assert_eq!(show_mac(derive_mac("web", 0)), "52:54:6f:2f:c6:07");
    }

    #[test]
    fn networks_need_a_host_address_and_a_prefix() {
        assert_eq!(parse_network("10.0.0.1/24"), Ok((Ipv4Addr::new(10, 0, 0, 1), 24)));
        for text in [
            "10.0.0.1",
            "10.0.0.1/",
            "10.0.0.1/33",
            "10.0.0.1/0",
            "0.0.0.0/8",
            "224.0.0.1/4",
            "::1/64",
            "10.0.0.1/+8",
        ] {
            assert!(parse_network(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_refused(text in "[0-9a-fg:./+]{0,24}") {
            if let Ok(mac) = parse_mac(&text) {
                prop_assert_eq!(show_mac(mac), text.to_lowercase());
            }
            if let Ok((address, prefix)) = parse_network(&text) {
                prop_assert_eq!(parse_network(&format!("{address}/{prefix}")), Ok((address, prefix)));
            }
        }
    }
}
