//! `vmm image dedupe`

use std::io::{self, Write};
use std::path::Path;

use vmfs_image::dedupe::{self, Method, Options};

use super::super::{Failure, print_json};
use super::failure;
use super::output::with_bytes;
use super::progress::Progress;

/// `vmm image dedupe`
pub fn dedupe(directory: &Path, options: &Options, json: bool) -> Result<(), Failure> {
    let mut progress = Progress::begin("sharing")?;
    let shared = dedupe::dedupe(directory, options, &mut |done, total| progress.report(done, total));
    drop(progress);
    let report = shared.map_err(failure)?;
    if json {
        return print_json(&report);
    }
    let mut out = io::stdout().lock();
    for image in &report.images {
        match &image.skipped {
            Some(why) => writeln!(out, "{}: left as it is: {why}", image.path.display())?,
            None => writeln!(out, "{}: takes {} less", image.path.display(), with_bytes(image.saved))?,
        }
    }
    for (path, bytes) in &report.bases {
        writeln!(out, "{}: new, takes {}", path.display(), with_bytes(*bytes))?;
    }
    let way = match report.method {
        Method::Base => "by images below",
        Method::Auto | Method::Extents => "in the file system",
    };
    let would = if options.dry_run { "would be " } else { "" };
    Ok(writeln!(out, "{} {would}saved {way}", with_bytes(report.saved))?)
}
