//! Opening: what an image says of itself is examined, and what it names opened if it may name it.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, RwLock};

use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::disk::{Disk, Plain};
use super::order::Order;
use super::qcow2::{self, Bad};
use super::{About, Foreign, Inner, vmdk};
use crate::image::{Error, Format, Image, MAX_DEPTH, SECTOR};
use crate::lock::Lock;
use crate::open::{self, Cache, OpenOptions, Opened};
use crate::overlay;

impl Foreign {
    /// Opens and locks the image at `path`, which is of `format`, and what it lies on.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn open(path: &Path, format: Format, options: &OpenOptions) -> Result<Self, Error> {
        Self::open_above(path, format, options, &mut Vec::new())
    }

    /// `above` are the images that lie on this one, by device and inode.
    fn open_above(
        path: &Path,
        format: Format,
        options: &OpenOptions,
        above: &mut Vec<(u64, u64)>,
    ) -> Result<Self, Error> {
        let unsupported = |what: &str| Error::Unsupported { path: path.to_owned(), what: what.to_owned() };
        match format {
            Format::Qcow2 => {}
            Format::Vmdk if options.writable => {
                return Err(unsupported(
                    "writing to VMDK images (they are read, and can have a redo log or a thin image on top)",
                ));
            }
            Format::Vmdk => {}
            _ => return Err(unsupported(&format!("images of format {format}"))),
        }
        let (opened, lock) = Opened::open(path, options)?;
        let failed = |source| Error::Io { path: path.to_owned(), what: "examine", source };
        let about = opened.file.metadata().map_err(failed)?;
        let inode = (about.dev(), about.ino());
        let wrong = |what: String| Error::Backing { path: path.to_owned(), what };
        if above.contains(&inode) {
            return Err(wrong("it lies on itself".to_owned()));
        }
        if above.len() == MAX_DEPTH {
            return Err(wrong(format!("the chain is longer than {MAX_DEPTH} images")));
        }
        above.push(inode);
        let plain = plain(path, &opened, options)?;
        match format {
            Format::Qcow2 => Self::qcow2(plain, opened.len, lock, options, above),
            _ => Self::vmdk(plain, opened.len, lock, options),
        }
    }

    fn qcow2(
        plain: Plain,
        len: u64,
        lock: Box<dyn Lock>,
        options: &OpenOptions,
        above: &mut Vec<(u64, u64)>,
    ) -> Result<Self, Error> {
        let path = plain.path.clone();
        let header = qcow2::Header::read(&plain, len).map_err(refuse(&path, Format::Qcow2))?;
        let mut details = vec![("qcow2 version".to_owned(), header.version.to_string())];
        details.push(("refcounts".to_owned(), format!("{} bits", 1 << header.layout.refcount_order)));
        if header.lazy_refcounts {
            details
                .push(("features".to_owned(), "lazy refcounts (not used when it is written to)".to_owned()));
        }
        if header.snapshots > 0 {
            details.push(("internal snapshots".to_owned(), header.snapshots.to_string()));
        }
        let backing = match &header.backing {
            None => None,
            Some((name, format)) => Some(below(&path, name, format.as_deref(), options, above)?),
        };
        let size = whole_sectors(&path, header.size);
        let mut image = Self {
            format: Format::Qcow2,
            files: vec![Arc::clone(&plain.file)],
            own: 1,
            about: About {
                cluster: Some(header.layout.cluster()),
                has_zeroes: header.version >= 3,
                backing: header.backing.map(|backing| PathBuf::from(backing.0)),
                details,
            },
            size: AtomicU64::new(size),
            writable: options.writable,
            unfrozen: AtomicBool::new(options.writable && !options.frozen),
            dirty: AtomicBool::new(false),
            no_holes: AtomicBool::new(false),
            inner: RwLock::new(load(&plain, backing.as_ref(), options.writable && !options.frozen)?),
            locks: vec![lock],
            backing,
            plain,
            path,
        };
        if let Some(backing) = &image.backing {
            image.files.extend(backing.files().iter().map(Arc::clone));
        }
        Ok(image)
    }

    fn vmdk(plain: Plain, len: u64, lock: Box<dyn Lock>, options: &OpenOptions) -> Result<Self, Error> {
        let path = plain.path.clone();
        let refused = refuse(&path, Format::Vmdk);
        let descriptor = descriptor(&plain, len).map_err(&refused)?;
        let mut files = vec![Arc::clone(&plain.file)];
        let mut locks = vec![lock];
        let mut extents = Vec::new();
        for extent in &descriptor.extents {
            let Some((name, offset)) = &extent.file else {
                extents.push(None);
                continue;
            };
            let file =
                beside(&path, name).map_err(|what| refused(Bad::Corrupt(format!("its extent {what}"))))?;
            let (opened, lock) = Opened::open(&file, options)?;
            if offset + extent.len > opened.len {
                return Err(refused(Bad::Corrupt(format!(
                    "its extent {} ends at byte {}, and has {} bytes",
                    file.display(),
                    offset + extent.len,
                    opened.len
                ))));
            }
            locks.push(lock);
            files.push(Arc::clone(&opened.file));
            extents.push(Some(Disk::file(self::plain(&file, &opened, options)?)));
        }
        let size = descriptor.extents.iter().map(|extent| extent.len).sum();
        let text = Disk::text(descriptor.text());
        let image = imago::vmdk::Vmdk::<Disk>::builder(text)
            .open(Extents(extents))
            .map_err(|error| refused(error.into()))?;
        Ok(Self {
            format: Format::Vmdk,
            own: files.len(),
            files,
            about: About {
                cluster: None,
                has_zeroes: false,
                backing: None,
                details: vec![
                    ("type".to_owned(), descriptor.kind),
                    ("extents".to_owned(), descriptor.extents.len().to_string()),
                ],
            },
            size: AtomicU64::new(size),
            writable: false,
            unfrozen: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            no_holes: AtomicBool::new(false),
            inner: RwLock::new(Inner { image: FormatAccess::new(image), writable: false, order: None }),
            locks,
            backing: None,
            path: plain.path.clone(),
            plain,
        })
    }
}

/// Gives the extents of a VMDK image to the library, by their number.
struct Extents(Vec<Option<Disk>>);

impl imago::format::gate::ImplicitOpenGate<Disk> for Extents {
    fn open_format<F: FormatDriverBuilder<Disk>>(&mut self, _: F) -> io::Result<FormatAccess<Disk>> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn open_storage(&mut self, named: StorageOpenOptions) -> io::Result<Disk> {
        let index = named.get_filename().and_then(Path::to_str).and_then(|name| name.parse::<usize>().ok());
        let extent = index.and_then(|index| self.0.get_mut(index)).and_then(Option::take);
        extent.ok_or_else(|| io::ErrorKind::PermissionDenied.into())
    }
}

/// A file as it is used.
pub(super) fn plain(path: &Path, opened: &Opened, options: &OpenOptions) -> Result<Plain, Error> {
    let direct = match options.cache {
        Cache::None => Some(open::set_direct(&opened.file, path)?),
        Cache::Writeback | Cache::Unsafe => None,
    };
    Ok(Plain {
        file: Arc::clone(&opened.file),
        path: path.to_owned(),
        direct,
        is_device: opened.is_device,
        syncs: options.cache != Cache::Unsafe,
        order: None,
    })
}

/// The descriptor in a file of `len` bytes.
pub(super) fn descriptor(plain: &Plain, len: u64) -> Result<vmdk::Descriptor, Bad> {
    let start = plain.bytes(0, usize::try_from(len.min(vmdk::MAX_LEN)).unwrap_or_default())?;
    let found = vmdk::Descriptor::parse(&start)?;
    if len > vmdk::MAX_LEN {
        let what = format!("its descriptor has {len} bytes, and {} is the most", vmdk::MAX_LEN);
        return Err(Bad::Corrupt(what));
    }
    Ok(found)
}

/// Hands a qcow2 image to the library.
pub(super) fn load(plain: &Plain, backing: Option<&Arc<dyn Image>>, writable: bool) -> Result<Inner, Error> {
    let refused = refuse(&plain.path, Format::Qcow2);
    let mut plain = plain.clone();
    if writable {
        let len = if plain.is_device {
            open::device_size(&plain.file).map(|size| size.0)
        } else {
            plain.file.metadata().map(|about| about.len())
        };
        let len = len.map_err(|error| refused(error.into()))?;
        // Anew: since it was looked at, it was locked as what is read is.
        let layout = qcow2::Header::read(&plain, len).map_err(&refused)?.layout;
        let tables = qcow2::check_tables(&plain, &layout, len).map_err(&refused)?;
        plain.order = Some(Arc::new(Order::new(layout, tables)));
    }
    let order = plain.order.clone();
    let below = match backing {
        None => None,
        Some(image) => {
            let raw = imago::raw::Raw::open_image(Disk::below(Arc::clone(image)), false);
            Some(FormatAccess::new(raw.map_err(|error| refused(error.into()))?))
        }
    };
    let file = Arc::clone(&plain.file);
    let changed = || file.metadata().and_then(|about| about.modified());
    let before = changed().map_err(|error| refused(error.into()))?;
    let image = imago::qcow2::Qcow2::<Disk>::builder(Disk::file(plain))
        .write(writable)
        .data_file(None)
        .backing(below)
        .open(DenyImplicitOpenGate::default())
        .map_err(|error| refused(error.into()))?;
    // Features that it does not keep up to date are taken out of the header, which changes nothing of what the disk is; what
    // lies on the image need not notice.
    if changed().is_ok_and(|now| now != before) {
        file.set_modified(before).map_err(|error| refused(error.into()))?;
    }
    Ok(Inner { image: FormatAccess::new(image), writable, order })
}

/// Opens the backing that a qcow2 image names.
fn below(
    path: &Path,
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
    above: &mut Vec<(u64, u64)>,
) -> Result<Arc<dyn Image>, Error> {
    let wrong = |what: String| Error::Backing { path: path.to_owned(), what };
    let file = beside(path, name).map_err(&wrong)?;
    let format = match format {
        Some("raw" | "file") => Format::Flat,
        Some("qcow2") => Format::Qcow2,
        Some("vmdk") => Format::Vmdk,
        Some(other) => {
            let what = format!(
                "it is of format {}, and one of raw, qcow2 and vmdk can be read",
                other.escape_debug()
            );
            return Err(wrong(what));
        }
        None => {
            let what = format!(
                "its format is not noted, and is not guessed from its bytes, which a guest may have written; note it with \
                 \"qemu-img rebase -u -b {} -F FORMAT\"",
                name.escape_debug()
            );
            return Err(wrong(what));
        }
    };
    let options = OpenOptions { writable: false, frozen: false, format: Some(format), ..options.clone() };
    let opened = match format {
        Format::Flat => crate::open(&file, &options),
        _ => {
            Foreign::open_above(&file, format, &options, above).map(|image| Arc::new(image) as Arc<dyn Image>)
        }
    };
    match opened {
        Err(error @ (Error::Backing { .. } | Error::BackingOpen { .. })) => Err(error),
        opened => {
            opened.map_err(|error| Error::BackingOpen { path: path.to_owned(), source: Box::new(error) })
        }
    }
}

/// Where the regular file is that an image names, if it may name it.
fn beside(image: &Path, name: &str) -> Result<PathBuf, String> {
    let shown = name.escape_debug();
    let is_protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    if is_protocol {
        return Err(format!("is named \"{shown}\", which is no file"));
    }
    let is_below = Path::new(name)
        .components()
        .all(|component| matches!(component, Component::Normal(_) | Component::CurDir));
    if name.is_empty() || name.contains('\0') || !is_below {
        return Err(format!(
            "is named \"{shown}\", and what an image of another's format names is only opened in its own directory or \
             below, by a relative path without \"..\""
        ));
    }
    let path = overlay::home(image).join(name);
    match std::fs::metadata(&path) {
        Ok(about) if !about.is_file() => Err(format!("is named \"{shown}\", which is not a regular file")),
        _ => Ok(path),
    }
}

pub(super) fn whole_sectors(path: &Path, size: u64) -> u64 {
    let odd = size % SECTOR;
    if odd != 0 {
        tracing::warn!(
            "the last {odd} bytes of disk {} are not a whole sector and not shown to the guest",
            path.display()
        );
    }
    size - odd
}

/// Gives the error for an image that is not used.
pub(super) fn refuse(path: &Path, format: Format) -> impl Fn(Bad) -> Error + '_ {
    move |bad| {
        let path = path.to_owned();
        match bad {
            Bad::Corrupt(what) => Error::Corrupt { path, format, what },
            Bad::Unsupported(what) => Error::Unsupported { path, what },
            Bad::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                Error::Corrupt { path, format, what: error.to_string() }
            }
            Bad::Io(source) => Error::Io { path, what: "read", source },
        }
    }
}
