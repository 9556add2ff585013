//! What was said of a snapshot when it was made: a small text file beside it.
//!
//! ```text
//! created 1700000000.5
//! guest running
//! format flat
//!
//! Before the upgrade.
//! ```

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{DELETING, check_name, directory};
use crate::image::{Error, Format};
use crate::steps::{self, failed};

/// Longest description that is kept, in bytes.
const MAX_DESCRIPTION: usize = 4096;
/// Longest file that is read, in bytes.
const MAX_FILE: u64 = 8192;

/// What is said of a snapshot when it is made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct About {
    /// For whoever reads the list; up to 4096 bytes are kept.
    pub description: String,
    /// Whether a guest runs.
    pub running: bool,
    /// When it was made; without, now.
    pub created: Option<SystemTime>,
    /// The kind of its image, which need not be what its bytes look like: a guest may have written them.
    pub(super) format: Option<Format>,
}

fn file(path: &Path, name: &str) -> PathBuf {
    directory(path).join(format!(".{name}.about"))
}

impl About {
    fn encode(&self, format: Format) -> String {
        let created = self.created.unwrap_or_else(SystemTime::now);
        let since = created.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut end = self.description.len().min(MAX_DESCRIPTION);
        while !self.description.is_char_boundary(end) {
            end -= 1;
        }
        let guest = if self.running { "running" } else { "off" };
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "created {}.{:09}\nguest {guest}\nformat {format}\n\n{}",
            since.as_secs(),
            since.subsec_nanos(),
            &self.description[..end]
        );
        text
    }

    /// What is not understood is left out.
    fn decode(text: &str) -> Self {
        let (head, description) = text.split_once("\n\n").unwrap_or((text, ""));
        let mut about = Self { description: description.to_owned(), ..Self::default() };
        for line in head.lines() {
            match line.split_once(' ') {
                Some(("created", time)) => about.created = parse_time(time),
                Some(("format", format)) => about.format = format.parse().ok(),
                Some(("guest", state)) => about.running = state == "running",
                _ => {}
            }
        }
        about
    }

    /// What is said of a snapshot; nothing if nothing is to be found.
    pub(super) fn read(path: &Path, name: &str) -> Self {
        use std::io::Read;
        let mut text = String::new();
        let read = std::fs::File::open(file(path, name))
            .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text));
        if read.is_ok() { Self::decode(&text) } else { Self::default() }
    }

    pub(super) fn write(&self, path: &Path, name: &str, format: Format) -> Result<(), Error> {
        steps::write(&file(path, name), self.encode(format).as_bytes())
    }

    pub(super) fn remove(path: &Path, name: &str) -> Result<(), Error> {
        steps::remove(&file(path, name))
    }

    /// Removes what is said of snapshots that there are not.
    pub(super) fn clean(path: &Path) -> Result<(), Error> {
        let directory = directory(path);
        let Ok(listing) = std::fs::read_dir(&directory) else { return Ok(()) };
        for entry in listing {
            let entry = entry.map_err(failed(&directory, "list"))?;
            let Ok(file) = entry.file_name().into_string() else { continue };
            let Some(name) = file.strip_prefix('.') else { continue };
            let name = name.strip_suffix(".tmp").unwrap_or(name);
            let Some(name) = name.strip_suffix(".about").filter(|name| check_name(name).is_ok()) else {
                continue;
            };
            let is_there = |file: &str| directory.join(file).symlink_metadata().is_ok();
            if file.ends_with(".tmp") || !is_there(name) && !is_there(&format!("{DELETING}{name}")) {
                steps::remove(&entry.path())?;
            }
        }
        Ok(())
    }
}

fn parse_time(text: &str) -> Option<SystemTime> {
    let (seconds, nanos) = text.split_once('.').unwrap_or((text, "0"));
    let since =
        Duration::new(seconds.parse().ok()?, nanos.parse().ok().filter(|nanos| *nanos < 1_000_000_000)?);
    UNIX_EPOCH.checked_add(since)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_read_back() {
        let created = Some(UNIX_EPOCH + Duration::new(1_700_000_000, 5));
        let about =
            About { description: "a\n\nb".to_owned(), running: true, created, format: Some(Format::Flat) };
        assert_eq!(About::decode(&about.encode(Format::Flat)), about);
    }

    #[test]
    fn what_is_not_understood_is_left_out() {
        for text in ["", "\n\n", "created x\nguest", "created 99999999999999999999.0", "created 1.9999999999"]
        {
            assert_eq!(About::decode(text), About::default(), "{text:?}");
        }
    }

    #[test]
    fn long_description_is_cut_between_two_characters() {
        let about = About { description: "ä".repeat(3000).replacen('ä', "a", 1), ..About::default() };
        let kept = About::decode(&about.encode(Format::Thin)).description;
        assert!(about.description.starts_with(&kept) && kept.len() == MAX_DESCRIPTION - 1);
    }
}
