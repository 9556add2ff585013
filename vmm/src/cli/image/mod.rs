//! `vmm image`: disks as files.

pub mod args;
mod change;
mod dedupe;
mod look;
mod make;
pub mod output;
pub mod progress;
mod replace;
mod running;

use vmfs_image::Error;
use vmfs_image::dedupe::Options;

use super::Failure;
use args::{ImageVerb, SnapshotVerb};

/// Exit status of what was interrupted, as shells have it: 128 and the signal's number.
const INTERRUPTED: u8 = 130;

/// Does what the verb says.
pub fn carry_out(verb: ImageVerb) -> Result<(), Failure> {
    match verb {
        ImageVerb::Create {
            path,
            size,
            format,
            max_size,
            backing,
            preallocate,
            cluster_size,
            output,
            force,
        } => {
            let wanted =
                make::Wanted { size, format, max_size, backing, preallocate, cluster_bits: cluster_size };
            make::create(&path, &wanted, force.force, output.json)
        }
        ImageVerb::Info { path, chain, output } => look::info(&path, chain, output.json),
        ImageVerb::Check { path, repair, output } => look::check(&path, repair, output.json),
        ImageVerb::Clone { base, path, full, snapshot, output, force } => {
            make::clone(&base, &path, full, snapshot.as_deref(), force.force, output.json)
        }
        ImageVerb::Snapshot(SnapshotVerb::Create { path, name, description, output }) => {
            change::snapshot(&path, &name, description, output.json)
        }
        ImageVerb::Snapshot(SnapshotVerb::Ls { path, output }) => look::snapshots(&path, output.json),
        ImageVerb::Snapshot(SnapshotVerb::Delete { path, name, output }) => {
            change::delete_snapshot(&path, &name, output.json)
        }
        ImageVerb::Revert { path, name, keep, output } => {
            change::revert(&path, &name, keep.as_deref(), output.json)
        }
        ImageVerb::Commit { path, output } => change::commit(&path, output.json),
        ImageVerb::Discard { path, output } => change::discard(&path, output.json),
        ImageVerb::Stream { path, onto, output } => change::stream(&path, onto.as_deref(), output.json),
        ImageVerb::Resize { path, size, max_size, output } => {
            change::resize(&path, size, max_size, output.json)
        }
        ImageVerb::Convert { source, path, format, from, preallocate, no_zeroes, output, force } => {
            let how = make::How { format: Some(format), from, preallocate, detect_zeroes: !no_zeroes };
            make::convert(&source, &path, how, force.force, output.json)
        }
        ImageVerb::Copy { source, path, into: true, output, .. } => {
            make::copy_into(&source, &path, output.json)
        }
        ImageVerb::Copy { source, path, into: false, output, force } => {
            let how = make::How { format: None, from: None, preallocate: false, detect_zeroes: false };
            make::convert(&source, &path, how, force.force, output.json)
        }
        ImageVerb::Compare { first, second, strict, output } => {
            look::compare(&first, &second, strict, output.json)
        }
        ImageVerb::Map { path, output } => look::map(&path, output.json),
        ImageVerb::Dedupe { directory, dry_run, method, memory, output } => {
            let options = Options { method, dry_run, ..Options::default() };
            let memory = memory.unwrap_or(options.memory);
            dedupe::dedupe(&directory, &Options { memory, ..options }, output.json)
        }
        ImageVerb::Rebase { path, backing, accept, output } => {
            change::rebase(&path, backing.as_deref(), accept, output.json)
        }
    }
}

/// What has to be done first by somebody whose image a guest has.
#[derive(Debug, thiserror::Error)]
#[error("{error}. `vmm stop {guest}` ends that guest")]
struct InUse {
    error: Error,
    guest: String,
}

/// An error with its exit status.
fn failure(error: Error) -> Failure {
    with_status(error, 1)
}

/// The same where 1 is no error but an answer.
fn trouble(error: Error) -> Failure {
    with_status(error, 2)
}

fn with_status(error: Error, status: u8) -> Failure {
    let guest = match &error {
        Error::Interrupted { .. } => return Failure::Error(Box::new(error), INTERRUPTED),
        Error::Locked { path, .. } => running::find(path).map(|running| running.guest),
        _ => None,
    };
    match guest {
        Some(guest) => Failure::Error(Box::new(InUse { error, guest }), status),
        None => Failure::Error(Box::new(error), status),
    }
}
