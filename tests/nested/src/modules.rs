//! Kernel modules: which ones a module needs, and in what order.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

use crate::tree::Tree;
use crate::{Error, Result};

/// The modules of one kernel, as its package ships them.
#[derive(Debug)]
pub struct Modules {
    release: String,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Looks through `dir`, the `/lib/modules/<release>` of a kernel.
    ///
    /// # Errors
    ///
    /// [`Error::File`].
    pub fn scan(dir: &Path, release: &str) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut pending = vec![dir.join("kernel")];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(&dir).map_err(Error::file("list", &dir))? {
                let path = entry.map_err(Error::file("list", &dir))?.path();
                if path.is_dir() {
                    pending.push(path);
                } else if let Some(name) = module_name(&path) {
                    files.insert(name, path);
                }
            }
        }
        let list = dir.join("modules.builtin");
        let builtin = fs::read_to_string(&list).map_err(Error::file("read", &list))?;
        let builtin = builtin.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { release: release.to_owned(), files, builtin })
    }

    /// Adds the modules `names` and all that they need to `tree`, with the list of what needs what, so that
    /// `modprobe` loads them. Those built into the kernel are passed over.
    ///
    /// # Errors
    ///
    /// [`Error::Module`] where there is no such module, [`Error::Format`] where one is damaged.
    pub fn install(&self, names: &[&str], tree: &mut Tree) -> Result<()> {
        let mut needs = BTreeMap::new();
        let mut pending: Vec<String> = names.iter().map(|name| normal(name)).collect();
        while let Some(name) = pending.pop() {
            if needs.contains_key(&name) || self.builtin.contains(&name) {
                continue;
            }
            let path = self
                .files
                .get(&name)
                .ok_or_else(|| Error::Module { release: self.release.clone(), name: name.clone() })?;
            let module = unpack(path)?;
            let depends = depends(&module)
                .map_err(|reason| Error::Format { path: path.clone(), reason: reason.to_owned() })?;
            tree.file(&format!("lib/modules/{}/{name}.ko", self.release), module);
            pending.extend(depends.iter().cloned());
            needs.insert(name, depends);
        }
        let mut list = String::new();
        for name in needs.keys() {
            // All that is needed, directly or not, the last to be loaded first (modules.dep(5)).
            let mut order = Vec::new();
            for needed in &needs[name] {
                visit(needed, &needs, &mut order);
            }
            list.push_str(&format!("{name}.ko:"));
            for needed in order.iter().rev() {
                list.push_str(&format!(" {needed}.ko"));
            }
            list.push('\n');
        }
        tree.file(&format!("lib/modules/{}/modules.dep", self.release), list);
        Ok(())
    }
}

/// Appends what `name` needs, then `name`. The kernel's build refuses circles.
fn visit(name: &str, needs: &BTreeMap<String, Vec<String>>, order: &mut Vec<String>) {
    if order.iter().any(|known| known == name) {
        return;
    }
    let Some(below) = needs.get(name) else {
        return; // Built in.
    };
    for needed in below {
        visit(needed, needs, order);
    }
    order.push(name.to_owned());
}

/// Dashes and underscores are the same in names of modules.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

/// The name of the module in a file, if it is one.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let (stem, packing) = name.split_once(".ko")?;
    ["", ".xz", ".zst", ".gz"].contains(&packing).then(|| normal(stem))
}

/// The module in a file, which distributions may have packed.
fn unpack(path: &Path) -> Result<Vec<u8>> {
    let packed = fs::read(path).map_err(Error::file("read", path))?;
    let mut module = Vec::new();
    let read = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => lzma_rust2::XzReader::new(packed.as_slice(), true).read_to_end(&mut module),
        Some("gz") => flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut module),
        Some("zst") => ruzstd::decoding::StreamingDecoder::new(packed.as_slice())
            .map_err(std::io::Error::other)
            .and_then(|mut decoder| decoder.read_to_end(&mut module)),
        _ => return Ok(packed),
    };
    read.map_err(Error::file("unpack", path))?;
    Ok(module)
}

/// The modules that `module` says it needs (the `depends` entry of its section `.modinfo`).
fn depends(module: &[u8]) -> Result<Vec<String>, &'static str> {
    let elf = object::File::parse(module).map_err(|_| "not an ELF file")?;
    let section = elf.section_by_name(".modinfo").ok_or("no section .modinfo, so not a module")?;
    let info = section.data().map_err(|_| "the section .modinfo is truncated")?;
    let depends = info.split(|byte| *byte == 0).find_map(|entry| entry.strip_prefix(b"depends="));
    let depends = String::from_utf8_lossy(depends.unwrap_or_default()).into_owned();
    Ok(depends.split(',').filter(|name| !name.is_empty()).map(normal).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_in_packed_and_plain_files() {
        let name = |path: &str| module_name(Path::new(path));
        assert_eq!(name("a/kvm-amd.ko").as_deref(), Some("kvm_amd"));
        assert_eq!(name("a/kvm-amd.ko.zst").as_deref(), Some("kvm_amd"));
        assert_eq!(name("a/modules.order"), None);
        assert_eq!(name("a/kvm.kombi"), None);
    }

    #[test]
    fn what_is_needed_comes_before_what_needs_it() {
        let needs = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let graph = BTreeMap::from([
            ("net".to_owned(), needs(&["failover", "ring"])),
            ("failover".to_owned(), needs(&[])),
            ("ring".to_owned(), needs(&["virtio"])),
            ("virtio".to_owned(), needs(&["ring", "builtin"])[1..].to_vec()),
        ]);
        let mut order = Vec::new();
        visit("net", &graph, &mut order);
        assert_eq!(order, ["failover", "virtio", "ring", "net"]);
    }

    #[test]
    fn something_else_than_a_module_is_refused() {
        assert_eq!(depends(b"text"), Err("not an ELF file"));
    }
}
