//! How results are shown: for people as tables, for programs as JSON. The shapes of the JSON are part of the interface
//! (`docs/images.md`).

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use vmfs_image::snapshot::{Snapshot, Tree};
use vmfs_image::{Error, Format, Image, Info, OpenOptions, clone, redo, snapshot, thin};

use super::super::{Failure, print_json};
use super::change::backing_of;
use crate::config::show_size;

/// A path that JSON can hold: what is not UTF-8 is replaced.
pub fn lossy(path: impl AsRef<Path>) -> PathBuf {
    path.as_ref().to_string_lossy().into_owned().into()
}

/// Text for a terminal. What names come from an image may be meant for the terminal itself.
pub fn plain(text: impl std::fmt::Display) -> String {
    text.to_string().chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// An image as it is shown.
#[derive(Debug, Serialize)]
pub struct Shown {
    #[serde(flatten)]
    info: Info,
    /// The redo log or other file of changes that wait to be decided upon.
    pending: Option<PathBuf>,
    /// How many snapshots it has.
    snapshots: usize,
    /// Whether it is marked as the base of linked clones.
    is_base: bool,
    /// Who has it open to write to it.
    in_use_by: Option<String>,
}

impl Shown {
    fn new(mut info: Info, in_use_by: Option<String>) -> Self {
        let path = &info.path;
        let snapshots = snapshot::list(path).map_or(0, |tree| tree.snapshots.len());
        let (pending, is_base) = (redo::pending(path).map(lossy), clone::is_base(path));
        info.path = lossy(&info.path);
        info.backing = info.backing.map(lossy);
        Self { pending, snapshots, is_base, in_use_by, info }
    }

    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let info = &self.info;
        let mut row =
            |name: &str, value: &dyn std::fmt::Display| writeln!(out, "{name:<13} {}", plain(value));
        row("image", &info.path.display())?;
        row("format", &info.format)?;
        row("size", &with_bytes(info.size))?;
        row("allocated", &with_bytes(info.allocated))?;
        if let Some(size) = info.cluster_size {
            row("cluster size", &show_size(size))?;
        }
        if let Some(size) = info.max_size {
            row("max size", &with_bytes(size))?;
        }
        if let Some(backing) = &info.backing {
            row("backing", &backing.display())?;
        }
        if let Some(pending) = &self.pending {
            row("pending", &pending.display())?;
        }
        if self.snapshots > 0 {
            row("snapshots", &self.snapshots)?;
        }
        if self.is_base {
            row("base", &"of linked clones: nobody has permission to write to it")?;
        }
        if let Some(holder) = &self.in_use_by {
            row("in use by", holder)?;
        }
        for (name, value) in &info.details {
            row(name, value)?;
        }
        Ok(())
    }
}

/// What there is to say of the image at `path`, and of those that it lies on; also while a guest has it.
pub fn examine(path: &Path) -> Result<Vec<Shown>, Error> {
    let image = match vmfs_image::open(path, &OpenOptions::default()) {
        Ok(image) => image,
        Err(Error::Locked { holder, .. }) => return in_use(path, holder),
        Err(error) => return Err(error),
    };
    chain_of(&*image)
}

fn chain_of(image: &dyn Image) -> Result<Vec<Shown>, Error> {
    let mut shown = Vec::new();
    let mut next = Some(image);
    while let Some(image) = next {
        let failed = |source| Error::Io { path: image.path().to_owned(), what: "examine", source };
        shown.push(Shown::new(image.info().map_err(failed)?, None));
        next = image.backing().map(|below| &**below);
    }
    Ok(shown)
}

/// The same of one that is not to be opened: what can be told without.
fn in_use(path: &Path, holder: String) -> Result<Vec<Shown>, Error> {
    use std::os::unix::fs::MetadataExt;
    let failed = |source| Error::Io { path: path.to_owned(), what: "examine", source };
    let about = std::fs::metadata(path).map_err(failed)?;
    let format = vmfs_image::probe(path)?;
    let (mut cluster_size, mut max_size, mut below) = (None, None, None);
    let (size, backing) = match format {
        Format::Flat => (about.len(), None),
        Format::Thin => {
            let (cluster, limit) = thin::peek_limits(path)?;
            (cluster_size, max_size) = (Some(cluster), limit);
            below = thin::peek_backing(path)?;
            (thin::peek_size(path)?, below.as_ref().map(|noted| noted.path.clone()))
        }
        format => vmfs_image::foreign::peek(path, format)?,
    };
    let info = Info {
        path: path.to_owned(),
        format,
        size,
        allocated: about.blocks().saturating_mul(512),
        cluster_size,
        max_size,
        backing,
        details: Vec::new(),
    };
    let mut shown = vec![Shown::new(info, Some(holder))];
    // What it lies on is only read.
    if let Some(noted) = below {
        let options = OpenOptions { format: Some(noted.format), ..OpenOptions::default() };
        shown.extend(chain_of(&*vmfs_image::open(&backing_of(path, &noted.path), &options)?)?);
    }
    Ok(shown)
}

/// Shows images: one as an object, a chain as an array.
pub fn show(images: &[Shown], chain: bool, json: bool) -> Result<(), Failure> {
    if json && chain {
        return print_json(&images);
    }
    let images = if chain { images } else { images.get(..1).unwrap_or_default() };
    if json {
        return images.iter().try_for_each(print_json);
    }
    let mut out = io::stdout().lock();
    for (index, image) in images.iter().enumerate() {
        if index > 0 {
            writeln!(out)?;
        }
        image.print(&mut out)?;
    }
    Ok(())
}

/// Says what an image is that was just made or changed.
pub fn made(path: &Path, json: bool) -> Result<(), Failure> {
    let images = examine(path)?;
    if json {
        return show(&images, false, true);
    }
    if let Some(Shown { info, .. }) = images.first() {
        let on =
            info.backing.as_ref().map_or(String::new(), |below| format!(" on {}", plain(below.display())));
        writeln!(io::stdout(), "{}: {}, {}{on}", plain(path.display()), info.format, show_size(info.size))?;
    }
    Ok(())
}

/// What was done to an image.
#[derive(Debug, Serialize)]
pub struct Done<'a> {
    /// The image.
    pub path: &'a Path,
    /// What was done: the verb.
    pub done: &'static str,
    /// The snapshot concerned.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<&'a str>,
    /// The guest that did it while it ran.
    pub guest: Option<String>,
}

impl Done<'_> {
    /// Says so; `sentence` to people.
    pub fn say(&self, json: bool, sentence: &str) -> Result<(), Failure> {
        if json {
            return print_json(&Done { path: &lossy(self.path), guest: self.guest.clone(), ..*self });
        }
        let by = self.guest.as_ref().map_or(String::new(), |guest| format!(", by the running guest {guest}"));
        Ok(writeln!(io::stdout(), "{}: {sentence}{by}", plain(self.path.display()))?)
    }
}

/// A size for people, and its bytes where these say more.
pub fn with_bytes(bytes: u64) -> String {
    match show_size(bytes) {
        exact if exact.len() <= 6 => exact,
        _ => format!("{bytes} bytes"),
    }
}

/// A snapshot as programs are given it.
#[derive(Debug, Serialize)]
struct Listed<'a> {
    name: &'a str,
    path: PathBuf,
    parent: Option<&'a str>,
    /// Seconds since 1970.
    created: u64,
    description: &'a str,
    running: bool,
    size: Option<u64>,
    allocated: u64,
    format: vmfs_image::Format,
    deleting: bool,
}

/// Shows snapshots.
pub fn show_tree(path: &Path, tree: &Tree, json: bool) -> Result<(), Failure> {
    if json {
        let listed: Vec<_> = tree
            .snapshots
            .iter()
            .map(|snapshot| Listed {
                name: &snapshot.name,
                path: lossy(&snapshot.path),
                parent: snapshot.parent.as_deref(),
                created: seconds(snapshot.created),
                description: &snapshot.description,
                running: snapshot.running,
                size: snapshot.size,
                allocated: snapshot.allocated,
                format: snapshot.format,
                deleting: snapshot.deleting,
            })
            .collect();
        return print_json(&serde_json::json!({"path": lossy(path), "head": tree.head, "snapshots": listed}));
    }
    if tree.snapshots.is_empty() {
        return Ok(writeln!(io::stdout(), "{}: no snapshots", plain(path.display()))?);
    }
    let mut rows = Vec::new();
    branch(tree, None, "", &mut rows);
    let width = rows.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    let mut out = io::stdout().lock();
    for (label, rest) in rows {
        writeln!(out, "{}", format!("{label:width$}  {rest}").trim_end())?;
    }
    Ok(())
}

/// Appends the rows of what lies on `parent`. Recursion ends: a parent is listed before its children, and an image lies on at
/// most [`vmfs_image::image::MAX_DEPTH`] others.
fn branch(tree: &Tree, parent: Option<&str>, indent: &str, rows: &mut Vec<(String, String)>) {
    let mut children: Vec<Option<&Snapshot>> =
        tree.snapshots.iter().filter(|child| child.parent.as_deref() == parent).map(Some).collect();
    if tree.head.as_deref() == parent {
        children.push(None);
    }
    let count = children.len();
    for (index, child) in children.into_iter().enumerate() {
        let last = index + 1 == count;
        let joint = match (parent, last) {
            (None, _) => "",
            (_, true) => "└─ ",
            (_, false) => "├─ ",
        };
        let Some(child) = child else {
            rows.push((format!("{indent}{joint}(now)"), String::new()));
            continue;
        };
        let mut about = format!("{}  {}", date(child.created), with_bytes(child.allocated));
        if child.running {
            about += "  running";
        }
        if child.deleting {
            about += "  its deletion was interrupted";
        }
        if !child.description.is_empty() {
            about += "  ";
            about += &plain(&child.description);
        }
        rows.push((format!("{indent}{joint}{}", child.name), about));
        let indent = match (parent, last) {
            (None, _) => String::new(),
            (_, true) => format!("{indent}   "),
            (_, false) => format!("{indent}│  "),
        };
        branch(tree, Some(&child.name), &indent, rows);
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Date and time in UTC.
fn date(time: SystemTime) -> String {
    let seconds = seconds(time);
    let (mut days, minutes) = (seconds / 86400, seconds / 60 % 1440);
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    // 400 years have 146097 days, and begin with the same weekday and leap years.
    let mut year = 1970 + days / 146_097 * 400;
    days %= 146_097;
    loop {
        let length = 365 + u64::from(is_leap(year));
        if days < length {
            break;
        }
        (days, year) = (days - length, year + 1);
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        (days, month) = (days - length, month + 1);
    }
    format!("{year}-{month:02}-{:02} {:02}:{:02}Z", days + 1, minutes / 60, minutes % 60)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00Z"),
            (951_782_400, "2000-02-29 00:00Z"),
            (1_709_210_096, "2024-02-29 12:34Z"),
            (4_107_542_399, "2100-02-28 23:59Z"),
            (4_107_542_400, "2100-03-01 00:00Z"),
        ] {
            assert_eq!(date(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn sizes_of_many_digits_are_told_in_bytes() {
        assert_eq!(with_bytes(10 << 30), "10G");
        assert_eq!(with_bytes((1 << 30) + 512), "1073742336 bytes");
    }

    #[test]
    fn tree_shows_branches_and_the_present() {
        let snapshot = |name: &str, parent: Option<&str>| Snapshot {
            name: name.to_owned(),
            path: name.into(),
            parent: parent.map(str::to_owned),
            created: UNIX_EPOCH,
            description: String::new(),
            running: false,
            size: None,
            allocated: 0,
            format: vmfs_image::Format::Thin,
            deleting: false,
        };
        let snapshots = vec![
            snapshot("fresh", None),
            snapshot("fixed", Some("fresh")),
            snapshot("tried", Some("fixed")),
            snapshot("other", Some("fresh")),
        ];
        let tree = Tree { snapshots, head: Some("fixed".to_owned()) };
        let mut rows = Vec::new();
        branch(&tree, None, "", &mut rows);
        let labels: Vec<_> = rows.iter().map(|(label, _)| label.as_str()).collect();
        assert_eq!(labels, ["fresh", "├─ fixed", "│  ├─ tried", "│  └─ (now)", "└─ other"]);
    }
}
