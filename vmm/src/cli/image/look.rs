//! Verbs that look at images and change nothing.

use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::Path;

use serde::Serialize;
use vmfs_image::ops::{self, Comparison, Piece};
use vmfs_image::thin::check::{self, Report};
use vmfs_image::{Error, Format, OpenOptions, foreign, snapshot};

use super::super::{Failure, print_json};
use super::output::{lossy, plain, with_bytes};
use super::progress::Progress;
use super::{failure, output, trouble};

/// `vmm image info`
pub fn info(path: &Path, chain: bool, json: bool) -> Result<(), Failure> {
    output::show(&output::examine(path).map_err(failure)?, chain, json)
}

/// `vmm image snapshot ls`
pub fn snapshots(path: &Path, json: bool) -> Result<(), Failure> {
    output::show_tree(path, &snapshot::list(path).map_err(failure)?, json)
}

#[derive(Debug, Serialize)]
struct Checked<'a> {
    path: &'a Path,
    format: Format,
    /// Nothing is wrong, and nothing has leaked.
    sound: bool,
    /// What was found; only thin images have something to find.
    report: Option<Report>,
}

/// `vmm image check`
pub fn check(path: &Path, repair: bool, json: bool) -> Result<(), Failure> {
    let format = vmfs_image::probe(path).map_err(trouble)?;
    let report = match format {
        Format::Thin => Some(check::check(path, repair).map_err(trouble)?),
        // Whether it opens is all that there is to examine.
        Format::Flat | Format::Vmdk => {
            vmfs_image::open(path, &OpenOptions::default()).map(|_| None).map_err(trouble)?
        }
        Format::Qcow2 => {
            foreign::check_tables(path).map_err(trouble)?;
            let what = "a check of the refcounts of qcow2 images (\"qemu-img check\" examines them; its header and tables are in \
                        order)";
            return Err(trouble(Error::Unsupported { path: path.to_owned(), what: what.to_owned() }));
        }
        format => {
            let what = format!("a check of {format} images");
            return Err(trouble(Error::Unsupported { path: path.to_owned(), what }));
        }
    };
    let status = report.as_ref().map_or(0, verdict);
    if json {
        print_json(&Checked { path: &lossy(path), format, sound: status == 0, report })?;
    } else {
        print_check(path, format, report.as_ref())?;
    }
    if status == 0 { Ok(()) } else { Err(Failure::Told(status)) }
}

/// Exit status that a report leads to.
fn verdict(report: &Report) -> u8 {
    match (report.error_count, report.leaked, &report.repaired) {
        (1.., _, _) => 2,
        (0, 0, _) | (0, _, Some(_)) => 0,
        (0, _, None) => 1,
    }
}

fn print_check(path: &Path, format: Format, report: Option<&Report>) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let path = path.display();
    let Some(report) = report else {
        return Ok(writeln!(out, "{path}: {format}, which has nothing that could be wrong")?);
    };
    for error in &report.errors {
        writeln!(out, "{path}: {error}")?;
    }
    if let Some(more) = report.error_count.checked_sub(report.errors.len() as u64).filter(|more| *more > 0) {
        writeln!(out, "{path}: and {more} errors more")?;
    }
    let verdict = match (verdict(report), &report.repaired) {
        (0, Some(repaired)) => format!("sound; {} given back", with_bytes(repaired.given_back)),
        (0, None) if report.beyond > 0 => {
            format!("sound; {} behind its end, which --repair gives back", with_bytes(report.beyond))
        }
        (0, None) => "sound".to_owned(),
        (1, _) => format!("{} leaked; --repair gives that back", with_bytes(report.leaked)),
        _ => format!("{} errors", report.error_count),
    };
    writeln!(
        out,
        "{path}: {verdict}; {} of data in {} clusters, {} pieces",
        with_bytes(report.data),
        report.clusters,
        report.fragments
    )?;
    Ok(())
}

/// `vmm image compare`
pub fn compare(first: &Path, second: &Path, strict: bool, json: bool) -> Result<(), Failure> {
    let mut progress = Progress::begin("comparing").map_err(|error| Failure::Error(Box::new(error), 2))?;
    let mut compared = || {
        let options = OpenOptions::default();
        let (one, other) = (vmfs_image::open(first, &options)?, vmfs_image::open(second, &options)?);
        ops::compare(&*one, &*other, strict, &mut |done, total| progress.report(done, total))
    };
    let result = compared().map_err(trouble)?;
    drop(progress);
    let (text, reason, offset) = match result {
        Comparison::Identical => ("the same".to_owned(), None, None),
        Comparison::Different { offset } => {
            (format!("they differ at byte {offset}"), Some("contents"), Some(offset))
        }
        Comparison::Sizes { first, second } => {
            (format!("they have {first} and {second} bytes"), Some("size"), None)
        }
        Comparison::Allocation { offset } => {
            (format!("only one has space for the zeroes at byte {offset}"), Some("allocation"), Some(offset))
        }
    };
    let same = reason.is_none();
    if json {
        print_json(&serde_json::json!({"same": same, "reason": reason, "offset": offset}))?;
    } else {
        writeln!(io::stdout(), "{text}")?;
    }
    if same { Ok(()) } else { Err(Failure::Told(1)) }
}

/// `vmm image map`
pub fn map(path: &Path, json: bool) -> Result<(), Failure> {
    let image = vmfs_image::open(path, &OpenOptions::default()).map_err(failure)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    let mut error: Option<Failure> = None;
    if json {
        write!(out, "[")?;
    } else {
        writeln!(out, "{:>16}  {:>16}  {:7}  {:>16}  IMAGE", "OFFSET", "LENGTH", "HOLDS", "AT")?;
    }
    let mut first = true;
    let told = ops::map(&*image, &mut |piece| {
        let written = if json { json_piece(&mut out, piece, first) } else { row(&mut out, piece) };
        first = false;
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(failure) => {
                error = Some(failure);
                ControlFlow::Break(())
            }
        }
    });
    if let Some(error) = error {
        return Err(error);
    }
    told.map_err(failure)?;
    if json {
        writeln!(out, "]")?;
    }
    Ok(out.flush()?)
}

fn json_piece(out: &mut dyn Write, piece: &Piece<'_>, first: bool) -> Result<(), Failure> {
    let comma = if first { "" } else { "," };
    let image = piece.image.map(lossy);
    let piece = Piece { image: image.as_deref(), ..*piece };
    Ok(write!(out, "{comma}{}", serde_json::to_string(&piece)?)?)
}

fn row(out: &mut dyn Write, piece: &Piece<'_>) -> Result<(), Failure> {
    let holds = match (piece.data, piece.present) {
        (true, _) => "data",
        (false, true) => "zeroes",
        (false, false) => "nothing",
    };
    let at = piece.file_offset.map_or("-".to_owned(), |offset| offset.to_string());
    let image = piece.image.map_or("-".to_owned(), |path| plain(path.display()));
    Ok(writeln!(out, "{:>16}  {:>16}  {holds:7}  {at:>16}  {image}", piece.offset, piece.len)?)
}
