//! What may stand behind `vmm image`.

use std::path::PathBuf;

use clap::Subcommand;
use vmfs_image::Format;
use vmfs_image::dedupe::Method;

use crate::config;

/// What to do with an image.
#[derive(Debug, Subcommand)]
pub enum ImageVerb {
    /// Make an empty image
    #[command(after_help = "Example: vmm image create web.img --size 10G --format thin")]
    Create {
        /// Where it is made; nothing may be there yet
        path: PathBuf,
        /// Size as a disk, as in 10G; with --backing that of the backing if it is not given
        #[arg(long, value_parser = config::parse_size, required_unless_present = "backing")]
        size: Option<u64>,
        /// Kind of image: flat, thin or qcow2
        #[arg(long, default_value = "thin")]
        format: Format,
        /// The most that a thin image may take of its file system, as in 4G
        #[arg(long, value_name = "SIZE", value_parser = config::parse_size)]
        max_size: Option<u64>,
        /// Image that is read where the new one has nothing of its own; it must not change any more, and is marked so
        #[arg(long, value_name = "IMAGE", conflicts_with = "preallocate")]
        backing: Option<PathBuf>,
        /// Give a flat image all of its space at once
        #[arg(long)]
        preallocate: bool,
        /// Unit of allocation: 64K to 2M; of a qcow2 image from 1K on
        #[arg(long, value_name = "SIZE", value_parser = cluster_bits)]
        cluster_size: Option<u8>,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        force: Force,
    },
    /// Say what an image is, what it takes and what it lies on
    #[command(after_help = "Example: vmm image info web.img --chain")]
    Info {
        /// The image
        path: PathBuf,
        /// All images that it lies on, too
        #[arg(long)]
        chain: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Look whether an image is sound
    #[command(
        after_help = "Exit status: 0 sound, 1 space has leaked, which --repair gives back, 2 damaged or not examined.\nExample: vmm image check web.img --repair"
    )]
    Check {
        /// The image
        path: PathBuf,
        /// Give back what has leaked; an image with other damage is left as it is
        #[arg(long)]
        repair: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Make another disk of the same contents: at once and sharing them, or in full
    #[command(after_help = "Example: vmm image clone template.img web.img")]
    Clone {
        /// The image, which becomes read-only unless --full is given
        base: PathBuf,
        /// Where the clone is made
        path: PathBuf,
        /// Share nothing with the image
        #[arg(long)]
        full: bool,
        /// Clone what the image was at a snapshot
        #[arg(long, value_name = "NAME")]
        snapshot: Option<String>,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        force: Force,
    },
    /// Keep, list and delete states of an image
    #[command(subcommand)]
    Snapshot(SnapshotVerb),
    /// Make an image what it was at a snapshot; what it is now is lost unless it is kept
    #[command(after_help = "Example: vmm image revert web.img fresh --keep broken")]
    Revert {
        /// The image
        path: PathBuf,
        /// Name of the snapshot
        name: String,
        /// Keep what it is now as a snapshot of this name
        #[arg(long, value_name = "NAME")]
        keep: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Write a redo log to its image; or, where there is none, an image to its backing
    #[command(after_help = "Example: vmm image commit web.img")]
    Commit {
        /// The image
        path: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// Throw a redo log away
    #[command(after_help = "Example: vmm image discard web.img")]
    Discard {
        /// The image
        path: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// Copy into an image what it reads from others, so that it needs them no more
    #[command(after_help = "Example: vmm image stream web.img")]
    Stream {
        /// The image
        path: PathBuf,
        /// An image below, which stays its backing
        #[arg(long, value_name = "IMAGE")]
        onto: Option<PathBuf>,
        #[command(flatten)]
        output: Output,
    },
    /// Make an image larger, or change what it may take
    #[command(after_help = "Example: vmm image resize web.img +5G")]
    Resize {
        /// The image
        path: PathBuf,
        /// New size as in 20G, or how much is added as in +5G
        #[arg(value_parser = size_change, required_unless_present = "max_size")]
        size: Option<SizeChange>,
        /// The most that a thin image may take of its file system, as in 4G; or "none"
        #[arg(long, value_name = "SIZE", value_parser = limit)]
        max_size: Option<Limit>,
        #[command(flatten)]
        output: Output,
    },
    /// Make an image of another kind with the same contents
    #[command(after_help = "Example: vmm image convert disk.img web.img --format thin")]
    Convert {
        /// The image, with all that it lies on
        source: PathBuf,
        /// Where the new image is made
        path: PathBuf,
        /// What it becomes: flat, thin or qcow2
        #[arg(long)]
        format: Format,
        /// Kind of the source, if its first bytes are not to be believed
        #[arg(long, value_name = "FORMAT")]
        from: Option<Format>,
        /// Give a flat image all of its space at once
        #[arg(long)]
        preallocate: bool,
        /// Do not look for zeroes: faster where the file system shares space
        #[arg(long)]
        no_zeroes: bool,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        force: Force,
    },
    /// Copy an image, holes staying holes and space shared where the file system can
    #[command(after_help = "Example: vmm image copy web.img backup.img")]
    Copy {
        /// The image, with all that it lies on
        source: PathBuf,
        /// Where the copy is made, of the same kind; or, with --into, an image or block device
        path: PathBuf,
        /// Write over the contents of an image or block device that is there and at least as large
        #[arg(long, conflicts_with = "force")]
        into: bool,
        #[command(flatten)]
        output: Output,
        #[command(flatten)]
        force: Force,
    },
    /// Compare what two images read as
    #[command(
        after_help = "Exit status: 0 the same, 1 different, 2 an error.\nExample: vmm image compare web.img backup.img"
    )]
    Compare {
        /// One image
        first: PathBuf,
        /// The other image
        second: PathBuf,
        /// Sizes, and what has space, have to be the same too
        #[arg(long)]
        strict: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Say where everything of an image lies
    #[command(after_help = "Example: vmm image map web.img")]
    Map {
        /// The image
        path: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// Share what the images of a directory have in common
    #[command(after_help = "Example: vmm image dedupe /srv/disks --dry-run")]
    Dedupe {
        /// The directory; snapshots of its images count
        directory: PathBuf,
        /// Change nothing, and say what would be saved
        #[arg(long)]
        dry_run: bool,
        /// "extents": in the file system, which guests do not notice; "base": thin images that nobody uses are laid on a new
        /// one; "auto": extents where the file system can
        #[arg(long, default_value = "auto", value_parser = method)]
        method: Method,
        /// The most that the table of what was seen may take, as in 64M; with less, files are read several times
        #[arg(long, value_name = "SIZE", value_parser = memory)]
        memory: Option<usize>,
        #[command(flatten)]
        output: Output,
    },
    /// Lay an image on another backing that reads the same, or accept the one that it has as it is
    #[command(after_help = "Example: vmm image rebase web.img --backing /srv/templates/debian.img")]
    Rebase {
        /// The image
        path: PathBuf,
        /// The new backing
        #[arg(long, value_name = "IMAGE", required_unless_present = "accept")]
        backing: Option<PathBuf>,
        /// Compare nothing: what the image reads as changes wherever the backing does
        #[arg(long)]
        accept: bool,
        #[command(flatten)]
        output: Output,
    },
}

/// What to do with the snapshots of an image.
#[derive(Debug, Subcommand)]
pub enum SnapshotVerb {
    /// Keep what an image is now under a name
    #[command(after_help = "Example: vmm image snapshot create web.img fresh --description 'just installed'")]
    Create {
        /// The image
        path: PathBuf,
        /// Name of the snapshot
        name: String,
        /// What is said of it in the list
        #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
        description: String,
        #[command(flatten)]
        output: Output,
    },
    /// Show an image's snapshots as a tree
    #[command(after_help = "Example: vmm image snapshot ls web.img")]
    Ls {
        /// The image
        path: PathBuf,
        #[command(flatten)]
        output: Output,
    },
    /// Delete a snapshot; all others, and the image, stay what they are
    #[command(after_help = "Example: vmm image snapshot delete web.img fresh")]
    Delete {
        /// The image
        path: PathBuf,
        /// Name of the snapshot
        name: String,
        #[command(flatten)]
        output: Output,
    },
}

/// How results are told.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Output {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// What may be lost.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Force {
    /// Replace the file that is there, once the new one is complete
    #[arg(long)]
    pub force: bool,
}

/// What becomes of a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeChange {
    /// It becomes so many bytes.
    To(u64),
    /// So many bytes are added.
    By(u64),
}

/// What an image may take of its file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit(pub Option<u64>);

fn size_change(text: &str) -> Result<SizeChange, String> {
    match text.strip_prefix('+') {
        Some(more) => config::parse_size(more).map(SizeChange::By),
        None => config::parse_size(text).map(SizeChange::To),
    }
}

fn limit(text: &str) -> Result<Limit, String> {
    if text == "none" { Ok(Limit(None)) } else { config::parse_size(text).map(|size| Limit(Some(size))) }
}

fn method(text: &str) -> Result<Method, String> {
    match text {
        "auto" => Ok(Method::Auto),
        "extents" => Ok(Method::Extents),
        "base" => Ok(Method::Base),
        _ => Err("has to be one of \"auto\", \"extents\", \"base\"".to_owned()),
    }
}

fn memory(text: &str) -> Result<usize, String> {
    let bytes = config::parse_size(text)?;
    usize::try_from(bytes).ok().filter(|_| bytes >= 1 << 20).ok_or_else(|| "has to be 1M at least".to_owned())
}

fn cluster_bits(text: &str) -> Result<u8, String> {
    let wrong =
        || "a cluster has 64K, 128K, 256K, 512K, 1M or 2M; of a qcow2 image also 1K to 32K".to_owned();
    let size = config::parse_size(text)?;
    (10..=21).find(|bits| size == 1 << bits).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_given_whole_or_as_what_is_added() {
        assert_eq!(size_change("20G"), Ok(SizeChange::To(20 << 30)));
        assert_eq!(size_change("+5G"), Ok(SizeChange::By(5 << 30)));
        for wrong in ["", "+", "-1G", "++1G", "5"] {
            assert!(size_change(wrong).is_err(), "{wrong}");
        }
        assert_eq!((limit("none"), limit("4G")), (Ok(Limit(None)), Ok(Limit(Some(4 << 30)))));
    }

    #[test]
    fn clusters_that_the_format_has_not_are_refused() {
        assert_eq!((cluster_bits("1K"), cluster_bits("64K"), cluster_bits("2M")), (Ok(10), Ok(16), Ok(21)));
        for wrong in ["4M", "96K", "64"] {
            assert!(cluster_bits(wrong).is_err(), "{wrong}");
        }
    }
}
