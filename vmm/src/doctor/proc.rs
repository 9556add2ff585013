//! Reading what the kernel tells as text.

use std::fmt;
use std::fs;
use std::io;

/// A file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path} cannot be read: {source}")]
pub(super) struct Error {
    path: &'static str,
    pub source: io::Error,
}

/// The text of `path`, without the blanks and line ends around it.
pub(super) fn read(path: &'static str) -> Result<String, Error> {
    fs::read(path)
        .map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
        .map_err(|source| Error { path, source })
}

/// The number in `path`.
pub(super) fn number(path: &'static str) -> Option<u64> {
    read(path).ok()?.parse().ok()
}

/// The value of `key` in the text of `/proc/meminfo` (lines of `key: value kB`), in KiB.
pub(super) fn field_kib(meminfo: &str, key: &str) -> Option<u64> {
    field(meminfo, key)?.strip_suffix("kB")?.trim().parse().ok()
}

/// The value of `key` in lines of `key: value`.
pub(super) fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == key).then(|| value.trim())
    })
}

/// The word in brackets of a list such as `always [madvise] never`, by which the kernel shows a choice.
pub(super) fn chosen(list: &str) -> Option<&str> {
    list.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

/// An amount of memory in KiB, written with a fitting unit.
pub(super) struct Kib(pub u64);

impl fmt::Display for Kib {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0..0x10_0000 => write!(f, "{} MiB", self.0 >> 10),
            kib => write!(f, "{}.{} GiB", kib >> 20, ((kib % (1 << 20)) * 10) >> 20),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "HugePages_Total:       3\nHugePages_Free: 2\nShmem:  64 kB\nbroken\n";
        assert_eq!(field(text, "HugePages_Free"), Some("2"));
        assert_eq!(field(text, "HugePages"), None);
        assert_eq!(field_kib(text, "Shmem"), Some(64));
        assert_eq!(field_kib(text, "HugePages_Free"), None, "a count is no size");
    }

    #[test]
    fn choice_is_the_bracketed_word() {
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("always madvise [never]\n"), Some("never"));
        assert_eq!(chosen("always"), None);
    }

    #[test]
    fn sizes_are_rounded_down_to_a_tenth() {
        assert_eq!(Kib(512 << 10).to_string(), "512 MiB");
        assert_eq!(Kib((1 << 20) - 1).to_string(), "1023 MiB");
        assert_eq!(Kib(3 << 19).to_string(), "1.5 GiB");
    }

    #[test]
    fn unreadable_file_is_named() {
        assert!(read("/proc/nothing").unwrap_err().to_string().starts_with("/proc/nothing cannot be read: "));
        assert_eq!(number("/proc/nothing"), None);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".*", key in ".*") {
            chosen(&text);
            field_kib(&text, &key);
        }
    }
}
