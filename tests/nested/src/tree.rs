//! A directory tree in memory, written out as an initial RAM file system or as a directory.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use crate::cpio;
use crate::{Error, Result};

/// One entry of a [`Tree`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Directory,
    /// A file with its permission bits.
    File {
        /// Permission bits.
        mode: u32,
        /// What is in it.
        content: Vec<u8>,
    },
    /// A symbolic link.
    Link {
        /// Where it points.
        target: String,
    },
    /// A character device.
    Device {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// A directory tree; paths are relative and separated by `/`. Everything belongs to root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// An empty tree.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, and those above it.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        self.insert(path, Node::Directory)
    }

    /// Adds a file that is only read.
    pub fn file(&mut self, path: &str, content: impl Into<Vec<u8>>) -> &mut Self {
        self.insert(path, Node::File { mode: 0o644, content: content.into() })
    }

    /// Adds a file that may be run.
    pub fn program(&mut self, path: &str, content: impl Into<Vec<u8>>) -> &mut Self {
        self.insert(path, Node::File { mode: 0o755, content: content.into() })
    }

    /// Adds a symbolic link at `path` to `target`.
    pub fn link(&mut self, path: &str, target: &str) -> &mut Self {
        self.insert(path, Node::Link { target: target.to_owned() })
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) -> &mut Self {
        self.insert(path, Node::Device { major, minor })
    }

    /// Adds `node` at `path` in place of what was there; what is missing above it becomes directories.
    pub fn insert(&mut self, path: &str, node: Node) -> &mut Self {
        let path = path.trim_matches('/');
        for (slash, _) in path.match_indices('/') {
            self.nodes.entry(path[..slash].to_owned()).or_insert(Node::Directory);
        }
        self.nodes.insert(path.to_owned(), node);
        self
    }

    /// Every entry, each directory before what is in it.
    pub fn nodes(&self) -> impl Iterator<Item = (&str, &Node)> {
        self.nodes.iter().map(|(path, node)| (path.as_str(), node))
    }

    /// The tree as an initial RAM file system, packed with gzip.
    ///
    /// # Errors
    ///
    /// What is too large for the format.
    pub fn to_initramfs(&self) -> io::Result<Vec<u8>> {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        cpio::write(&mut packed, self)?;
        packed.finish()
    }

    /// Writes the tree below the directory `root`. Needs no privileges; devices are left out, since a system that
    /// boots from a disk mounts its own `/dev`.
    ///
    /// # Errors
    ///
    /// [`Error::File`].
    pub fn write_to(&self, root: &Path) -> Result<()> {
        for (path, node) in self.nodes() {
            let path = root.join(path);
            match node {
                Node::Directory => fs::create_dir_all(&path),
                Node::File { mode, content } => fs::File::create(&path).and_then(|mut file| {
                    file.write_all(content)?;
                    file.set_permissions(fs::Permissions::from_mode(*mode))
                }),
                Node::Link { target } => symlink(target, &path),
                Node::Device { .. } => Ok(()),
            }
            .map_err(Error::file("create", &path))?;
        }
        Ok(())
    }
}
