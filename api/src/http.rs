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
    /// Something to be done with the disk of this index.
    Disk(usize, DiskVerb),
    Jobs,
    Job(u64),
    CancelJob(u64),
}

/// What can be asked of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskVerb {
    Snapshot,
    Commit,
    Stream,
    Size,
    MaxSize,
    Medium,
    Retry,
    Limits,
    AtPowerOff,
}

/// Stands for a number in a path.
const NUMBER: &str = "{n}";

impl Resource {
    /// One of each kind.
    pub const ALL: [Self; 17] = [
        Self::Status,
        Self::Pause,
        Self::Resume,
        Self::PowerButton,
        Self::Stop,
        Self::Disk(0, DiskVerb::Snapshot),
        Self::Disk(0, DiskVerb::Commit),
        Self::Disk(0, DiskVerb::Stream),
        Self::Disk(0, DiskVerb::Size),
        Self::Disk(0, DiskVerb::MaxSize),
        Self::Disk(0, DiskVerb::Medium),
        Self::Disk(0, DiskVerb::Retry),
        Self::Disk(0, DiskVerb::Limits),
        Self::Disk(0, DiskVerb::AtPowerOff),
        Self::Jobs,
        Self::Job(0),
        Self::CancelJob(0),
    ];

    /// The resource at `path`.
    pub fn at(path: &str) -> Option<Self> {
        Self::ALL.into_iter().find_map(|resource| resource.matched(path))
    }

    /// Its path, with `{n}` where a number stands.
    pub fn pattern(self) -> &'static str {
        match self {
            Self::Status => "/v1/status",
            Self::Pause => "/v1/pause",
            Self::Resume => "/v1/resume",
            Self::PowerButton => "/v1/power-button",
            Self::Stop => "/v1/stop",
            Self::Disk(_, DiskVerb::Snapshot) => "/v1/disks/{n}/snapshot",
            Self::Disk(_, DiskVerb::Commit) => "/v1/disks/{n}/commit",
            Self::Disk(_, DiskVerb::Stream) => "/v1/disks/{n}/stream",
            Self::Disk(_, DiskVerb::Size) => "/v1/disks/{n}/size",
            Self::Disk(_, DiskVerb::MaxSize) => "/v1/disks/{n}/max-size",
            Self::Disk(_, DiskVerb::Medium) => "/v1/disks/{n}/medium",
            Self::Disk(_, DiskVerb::Retry) => "/v1/disks/{n}/retry",
            Self::Disk(_, DiskVerb::Limits) => "/v1/disks/{n}/limits",
            Self::Disk(_, DiskVerb::AtPowerOff) => "/v1/disks/{n}/at-power-off",
            Self::Jobs => "/v1/jobs",
            Self::Job(_) => "/v1/jobs/{n}",
            Self::CancelJob(_) => "/v1/jobs/{n}/cancel",
        }
    }

    /// Its path.
    pub fn path(self) -> String {
        let number = match self {
            Self::Disk(index, _) => index.to_string(),
            Self::Job(id) | Self::CancelJob(id) => id.to_string(),
            _ => String::new(),
        };
        self.pattern().replace(NUMBER, &number)
    }

    /// Itself with the number in `path`, if that is its path.
    fn matched(self, path: &str) -> Option<Self> {
        let Some((before, after)) = self.pattern().split_once(NUMBER) else {
            return (self.pattern() == path).then_some(self);
        };
        let number = path.strip_prefix(before)?.strip_suffix(after)?;
        // One path for each: no sign, no leading zero.
        let plain =
            number.bytes().all(|byte| byte.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
        let number: u64 = number.parse().ok().filter(|_| plain)?;
        Some(match self {
            Self::Disk(_, verb) => Self::Disk(usize::try_from(number).ok()?, verb),
            Self::CancelJob(_) => Self::CancelJob(number),
            _ => Self::Job(number),
        })
    }

    /// With which method it is asked for. What is asked for by `PUT` may be asked for twice.
    pub fn method(self) -> &'static str {
        match self {
            Self::Status | Self::Jobs | Self::Job(_) => "GET",
            Self::Disk(_, DiskVerb::Snapshot | DiskVerb::Commit | DiskVerb::Stream) => "POST",
            _ => "PUT",
        }
    }

    /// Whether a request for it has content.
    pub fn takes_body(self) -> bool {
        matches!(
            self,
            Self::Disk(
                _,
                DiskVerb::Snapshot
                    | DiskVerb::Size
                    | DiskVerb::MaxSize
                    | DiskVerb::Medium
                    | DiskVerb::Limits
                    | DiskVerb::AtPowerOff
            )
        )
    }

    /// What it is called in a sentence.
    pub fn name(self) -> &'static str {
        match self {
            Self::Job(_) => "job",
            Self::CancelJob(_) => "cancel",
            _ => self.pattern().rsplit('/').next().unwrap_or_default(),
        }
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
    fn every_resource_is_found_by_its_path_and_nothing_else_is() {
        let numbered =
            [Resource::Disk(17, DiskVerb::AtPowerOff), Resource::Job(3), Resource::CancelJob(u64::MAX)];
        for resource in Resource::ALL.into_iter().chain(numbered) {
            assert_eq!(Resource::at(&resource.path()), Some(resource));
        }
        for wrong in [
            "/v1/disks/{n}/retry",
            "/v1/disks//retry",
            "/v1/disks/00/retry",
            "/v1/disks/+1/retry",
            "/v1/disks/1/2/retry",
            "/v1/disks/1/",
            "/v1/jobs/",
            "/v1/jobs/18446744073709551616",
            "/v1/jobs/1/cancel/",
            "/v1/jobs/cancel",
        ] {
            assert_eq!(Resource::at(wrong), None, "{wrong}");
        }
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
