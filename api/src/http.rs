//! What the server and the client must agree on.

use httparse::Header;

/// Most bytes before a body: the first line and the header fields.
pub const HEAD_LIMIT: usize = 16 << 10;
/// Most header fields.
pub const FIELD_LIMIT: usize = 64;

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    Status,
    Pause,
    Resume,
    PowerButton,
    Stop,
}

impl Resource {
    pub const ALL: [Self; 5] = [Self::Status, Self::Pause, Self::Resume, Self::PowerButton, Self::Stop];

    pub fn path(self) -> &'static str {
        match self {
            Self::Status => "/v1/status",
            Self::Pause => "/v1/pause",
            Self::Resume => "/v1/resume",
            Self::PowerButton => "/v1/power-button",
            Self::Stop => "/v1/stop",
        }
    }

    pub fn method(self) -> &'static str {
        match self {
            Self::Status => "GET",
            _ => "PUT",
        }
    }

    /// What it is called in a sentence.
    pub fn name(self) -> &'static str {
        self.path().trim_start_matches("/v1/")
    }
}

/// The length that a message states for its body (RFC 9112, section 6.3), if it states one. A number that does not
/// fit counts as the largest.
pub fn content_length(fields: &[Header<'_>]) -> Result<Option<u64>, &'static str> {
    let mut values = named(fields, "content-length");
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err("there is more than one Content-Length");
    }
    let value = value.trim_ascii();
    if value.is_empty() || !value.iter().all(u8::is_ascii_digit) {
        return Err("Content-Length is not a decimal number");
    }
    let digit = |sum: u64, digit: &u8| sum.saturating_mul(10).saturating_add(u64::from(digit - b'0'));
    Ok(Some(value.iter().fold(0, digit)))
}

/// The values of all header fields called `name`.
pub fn named<'a>(fields: &'a [Header<'_>], name: &'a str) -> impl Iterator<Item = &'a [u8]> {
    fields.iter().filter(move |field| field.name.eq_ignore_ascii_case(name)).map(|field| field.value)
}

/// Whether `token` is in the comma-separated lists of the fields called `name`.
pub fn lists(fields: &[Header<'_>], name: &str, token: &str) -> bool {
    named(fields, name)
        .flat_map(|value| value.split(|byte| *byte == b','))
        .any(|item| item.trim_ascii().eq_ignore_ascii_case(token.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(values: &[&str]) -> Result<Option<u64>, &'static str> {
        let fields: Vec<_> =
            values.iter().map(|value| Header { name: "CONTENT-length", value: value.as_bytes() }).collect();
        content_length(&fields)
    }

    #[test]
    fn content_length_is_one_plain_decimal_number_or_refused() {
        assert_eq!(lengths(&[]), Ok(None));
        assert_eq!(lengths(&["0"]), Ok(Some(0)));
        assert_eq!(lengths(&["0065536"]), Ok(Some(65536)));
        assert_eq!(lengths(&["99999999999999999999999"]), Ok(Some(u64::MAX)));
        for wrong in ["", "+5", "-1", "5, 5", "0x10", "1 2", "٣"] {
            assert!(lengths(&[wrong]).is_err(), "{wrong:?}");
        }
        assert!(lengths(&["5", "5"]).is_err());
    }

    #[test]
    fn token_is_found_in_any_line_and_case_but_not_inside_a_word() {
        let field = |value: &'static str| Header { name: "connection", value: value.as_bytes() };
        assert!(lists(&[field("upgrade, Close")], "Connection", "close"));
        assert!(lists(&[field("te"), field("close")], "Connection", "close"));
        assert!(!lists(&[field("closed"), field("not close")], "Connection", "close"));
        assert!(!lists(&[field("close")], "Expect", "close"));
    }
}
