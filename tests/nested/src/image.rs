//! Disk images with an ext4 file system, made without root.

use std::fs::File;
use std::path::Path;
use std::process::Command;

use crate::program::{find, run};
use crate::{Error, Result};

/// Makes the file `image` of `size` bytes with an ext4 file system labelled `label` that has the content of
/// the directory `content`, which belongs to root in it.
///
/// # Errors
///
/// [`Error::Missing`] where there is no `mkfs.ext4`, and what that says.
pub fn ext4(image: &Path, size: u64, label: &str, content: &Path) -> Result<()> {
    let file = File::create(image).map_err(Error::file("create", image))?;
    file.set_len(size).map_err(Error::file("create", image))?;
    let mkfs = find("mkfs.ext4", "e2fsprogs")?;
    run(Command::new(mkfs)
        .args(["-q", "-F", "-E", "root_owner=0:0", "-L", label, "-d"])
        .arg(content)
        .arg(image))?;
    Ok(())
}

/// Checks the file system in `image` without changing it.
///
/// # Errors
///
/// What `e2fsck` finds wrong.
pub fn check(image: &Path) -> Result<()> {
    run(Command::new(find("e2fsck", "e2fsprogs")?).args(["-f", "-n"]).arg(image))?;
    Ok(())
}
