//! The archive format of initial RAM file systems: cpio, "newc" (Linux,
//! `Documentation/driver-api/early-userspace/buffer-format.rst`).

use std::io::{self, Write};

use crate::tree::{Node, Tree};

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";
const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// The fields of a header that differ between entries.
#[derive(Default)]
struct Header {
    inode: u32,
    mode: u32,
    links: u32,
    device: (u32, u32),
}

/// Writes `tree` as an archive.
///
/// # Errors
///
/// Of `to`; [`io::ErrorKind::InvalidInput`] for a file of 4 GiB or more.
pub fn write(to: &mut impl Write, tree: &Tree) -> io::Result<()> {
    for (inode, (path, node)) in (1..).zip(tree.nodes()) {
        let (mode, device, body): (u32, (u32, u32), &[u8]) = match node {
            Node::Directory => (DIRECTORY, (0, 0), &[]),
            Node::File { mode, content } => (FILE | (mode & 0o7777), (0, 0), content),
            Node::Link { target } => (LINK, (0, 0), target.as_bytes()),
            Node::Device { major, minor } => (CHARACTER_DEVICE, (*major, *minor), &[]),
        };
        let links = if *node == Node::Directory { 2 } else { 1 };
        entry(to, &Header { inode, mode, links, device }, path, body)?;
    }
    entry(to, &Header { links: 1, ..Header::default() }, TRAILER, &[])
}

/// Header, name and body, each padded to four bytes.
fn entry(to: &mut impl Write, header: &Header, path: &str, body: &[u8]) -> io::Result<()> {
    let too_large = |_| io::Error::new(io::ErrorKind::InvalidInput, format!("{path} is too large for cpio"));
    let size = u32::try_from(body.len()).map_err(too_large)?;
    let name_size = u32::try_from(path.len() + 1).map_err(too_large)?;
    let fields = [
        header.inode,
        header.mode,
        0, // uid
        0, // gid
        header.links,
        0, // mtime
        size,
        0, // major number of the device that holds the file
        0, // and its minor
        header.device.0,
        header.device.1,
        name_size,
        0, // checksum, unused in this variant
    ];
    let mut head = String::from(MAGIC);
    for field in fields {
        head.push_str(&format!("{field:08x}"));
    }
    head.push_str(path);
    head.push('\0');
    to.write_all(head.as_bytes())?;
    pad(to, head.len())?;
    to.write_all(body)?;
    pad(to, body.len())
}

fn pad(to: &mut impl Write, written: usize) -> io::Result<()> {
    to.write_all(&[0; 3][..written.next_multiple_of(4) - written])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Path, mode, device and body.
    type Entry = (String, u32, (u32, u32), Vec<u8>);

    /// Reads an archive back, as the format's description says.
    fn parse(archive: &[u8]) -> Vec<Entry> {
        let mut at = 0;
        let mut found = Vec::new();
        loop {
            assert_eq!(&archive[at..at + 6], MAGIC.as_bytes());
            let field = |index: usize| {
                let start = at + 6 + 8 * index;
                u32::from_str_radix(std::str::from_utf8(&archive[start..start + 8]).unwrap(), 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let device = (field(9), field(10));
            let name = &archive[at + 110..at + 110 + name_size];
            let (0, name) = name.split_last().map(|(end, name)| (*end, name)).unwrap() else {
                panic!("a name without its end")
            };
            let name = String::from_utf8(name.to_vec()).unwrap();
            at = (at + 110 + name_size).next_multiple_of(4);
            let body = archive[at..at + size].to_vec();
            at = (at + size).next_multiple_of(4);
            if name == TRAILER {
                assert_eq!(at, archive.len());
                return found;
            }
            found.push((name, mode, device, body));
        }
    }

    fn archive(tree: &Tree) -> Vec<u8> {
        let mut archive = Vec::new();
        write(&mut archive, tree).unwrap();
        archive
    }

    #[test]
    fn empty_tree_is_a_trailer() {
        assert_eq!(parse(&archive(&Tree::new())), []);
    }

    #[test]
    fn every_kind_of_entry_keeps_its_type_and_content() {
        let mut tree = Tree::new();
        tree.program("bin/sh", "#!").link("init", "bin/sh").device("dev/console", 5, 1);
        let entries = parse(&archive(&tree));
        let entry = |name: &str, mode, device, body: &[u8]| (name.to_owned(), mode, device, body.to_vec());
        assert_eq!(
            entries,
            [
                entry("bin", 0o040_755, (0, 0), b""),
                entry("bin/sh", 0o100_755, (0, 0), b"#!"),
                entry("dev", 0o040_755, (0, 0), b""),
                entry("dev/console", 0o020_600, (5, 1), b""),
                entry("init", 0o120_777, (0, 0), b"bin/sh"),
            ]
        );
    }

    proptest! {
        #[test]
        fn any_tree_is_read_back_whole_and_directories_come_first(
            files in proptest::collection::btree_map("[a-z]{1,3}(/[a-z0-9.-]{1,4}){0,3}",
                proptest::collection::vec(any::<u8>(), 0..40), 0..20)
        ) {
            let mut tree = Tree::new();
            for (path, content) in &files {
                tree.file(&format!("f/{path}.file"), content.clone());
            }
            let entries = parse(&archive(&tree));
            let read: std::collections::BTreeMap<_, _> = entries
                .iter()
                .filter(|entry| entry.1 & 0o170_000 == FILE)
                .map(|entry| (entry.0["f/".len()..entry.0.len() - ".file".len()].to_owned(), entry.3.clone()))
                .collect();
            prop_assert_eq!(read, files);
            for (index, (name, ..)) in entries.iter().enumerate() {
                if let Some((above, _)) = name.rsplit_once('/') {
                    prop_assert!(entries[..index].iter().any(|entry| entry.0 == above));
                }
            }
        }
    }

    #[test]
    fn busybox_cpio_or_the_hosts_reads_the_archive() {
        let Ok(version) = std::process::Command::new("cpio").arg("--version").output() else {
            return;
        };
        assert!(version.status.success());
        let mut tree = Tree::new();
        tree.file("a/b", "content").link("c", "a/b");
        let dir = tempfile::tempdir().unwrap();
        let mut child = std::process::Command::new("cpio")
            .args(["--extract", "--quiet", "--make-directories"])
            .current_dir(dir.path())
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&archive(&tree)).unwrap();
        assert!(child.wait().unwrap().success());
        assert_eq!(std::fs::read(dir.path().join("c")).unwrap(), b"content");
    }
}
