//! What the keys of `vm.toml` mean.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use toml::de::DeTable;

use super::error::{Error, Problem};
use super::model::{Backing, Boot, Config, Cpu, CpuModel, Memory, Net, Serial};
use super::reader::{self, Keys, Reader, Section};
use super::{address, disk, size};
use crate::interrupt;

/// Longest configuration, in bytes.
pub const MAX_LEN: u64 = 1 << 20;
/// Smallest and largest guest memory, and its granularity, in bytes.
const MEMORY_MIN: u64 = 2 << 20;
const MEMORY_MAX: u64 = 256 << 30;
const MEMORY_STEP: u64 = 2 << 20;
const MEMORY_DEFAULT: u64 = 256 << 20;
const VCPUS_MAX: u8 = 64;
/// Longest name of a network interface (`IFNAMSIZ` less its terminator), in bytes.
const TAP_MAX: usize = 15;
/// Longest name of a guest, in characters.
const NAME_MAX: usize = 64;

const DEFAULT_CMDLINE: &str = "console=ttyS0";

const TOP: Keys =
    Keys { known: &["name", "boot", "cpu", "memory", "disk", "net", "serial", "rng"], later: &[] };
const BOOT: Keys = Keys { known: &["kernel", "initrd", "cmdline"], later: &[] };
const CPU: Keys = Keys { known: &["count", "model"], later: &["shares", "min", "max"] };
const MEMORY: Keys = Keys { known: &["size", "backing"], later: &["min", "shares"] };
const NET: Keys =
    Keys { known: &["tap", "mac", "host_address"], later: &["switch", "vlan", "average", "peak", "burst"] };
const SERIAL: Keys = Keys { known: &["output"], later: &[] };

/// A configuration and where it stands in its file.
#[derive(Debug)]
pub struct Loaded {
    /// What it says.
    pub config: Config,
    file: PathBuf,
    text: String,
    places: BTreeMap<String, Range<usize>>,
}

impl Loaded {
    /// What is wrong with the value of `key` (`boot.kernel`, `disk.0.path`), found out after the file was read.
    #[must_use]
    pub fn problem(&self, key: &str, message: impl Into<String>) -> Problem {
        reader::problem(&self.text, &self.places, key, message.into())
    }

    /// The error that lists `problems`, of which there is at least one.
    #[must_use]
    pub fn error(&self, mut problems: Vec<Problem>) -> Error {
        problems.sort_by_key(|problem| problem.place);
        Error::Problems { path: self.file.clone(), problems }
    }
}

/// Reads and checks the configuration at `path`. No file that it names is opened.
///
/// # Errors
///
/// [`Error`]; all problems with the contents at once.
pub fn load(path: &Path) -> Result<Loaded, Error> {
    let text = read(path)?;
    let read = interpret(path, &text);
    let (config, places) = read.map_err(|problems| Error::Problems { path: path.to_owned(), problems })?;
    Ok(Loaded { config, file: path.to_owned(), text, places })
}

fn read(path: &Path) -> Result<String, Error> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    // O_NONBLOCK: a FIFO without a writer is refused instead of waited for.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    let wrong_kind = || Error::Kind { path: path.to_owned() };
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(wrong_kind());
    }
    let mut bytes = Vec::new();
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(wrong_kind());
    }
    String::from_utf8(bytes).map_err(|_| wrong_kind())
}

type Interpreted = (Config, BTreeMap<String, Range<usize>>);

/// Reads `text`, which stands in the file at `path`.
pub(super) fn interpret(path: &Path, text: &str) -> Result<Interpreted, Vec<Problem>> {
    let document = DeTable::parse(text).map_err(|error| {
        let place = reader::place(text, error.span().map_or(0, |span| span.start));
        let message = error.message().replace('\n', ", ");
        vec![Problem { place, key: String::new(), given: None, message }]
    })?;
    let mut reader = Reader::new(text);
    // Absolute, so that what is shown of a guest means the same to whoever asks from another directory.
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let base = absolute.parent().unwrap_or(Path::new("/"));
    let config = config(&mut reader, document.get_ref(), path, base);
    match (config, reader.finish()) {
        (Some(config), (places, problems)) if problems.is_empty() => Ok((config, places)),
        (_, (_, problems)) => Err(problems),
    }
}

fn config<'t>(
    reader: &mut Reader<'t>,
    document: &'t DeTable<'t>,
    file: &Path,
    base: &Path,
) -> Option<Config> {
    let top = reader.top(document, TOP);
    let name = name(reader, &top, file);
    let boot = boot(reader, &top, base);
    let cpu = cpu(reader, &top);
    let memory = memory(reader, &top);
    let disks = disk::disks(reader, &top, base, cpu.count);
    let nets = nets(reader, &top, name.as_deref().unwrap_or_default());
    let serial = serial(reader, &top, base);
    let rng = reader.boolean(&top, "rng").unwrap_or(true);
    let devices = disks.len() + nets.len() + usize::from(rng);
    let room = interrupt::device_lines().count();
    if devices > room {
        let last = if nets.is_empty() { "disk" } else { "net" };
        reader.refuse(&top, last, format!("a machine has room for {room} devices; these would be {devices}"));
    }
    Some(Config { name: name?, boot: boot?, cpu, memory, disks, nets, serial, rng })
}

fn name<'t>(reader: &mut Reader<'t>, top: &Section<'t>, file: &Path) -> Option<String> {
    let check = |name: &str| {
        let mut characters = name.chars();
        let first = characters.next().is_some_and(|c| c.is_ascii_alphanumeric());
        let others = characters.all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if first && others && name.len() <= NAME_MAX {
            Ok(name.to_owned())
        } else {
            Err(format!("a name is 1 to {NAME_MAX} of A-Z a-z 0-9 . _ -, beginning with a letter or a digit"))
        }
    };
    let given = reader.parsed(top, "name", check);
    let stem = || file.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| check(stem).ok());
    let name = given.or_else(stem);
    if name.is_none() {
        reader.missing(top, "name", "the name of the file, which is taken without it, cannot be a guest's");
    }
    name
}

/// The file at `text`, seen from the configuration.
pub(super) fn file(base: &Path, text: &str) -> Result<PathBuf, String> {
    if text.is_empty() || text.contains('\0') {
        Err("has to be the path of a file".to_owned())
    } else {
        Ok(base.join(text))
    }
}

fn boot<'t>(reader: &mut Reader<'t>, top: &Section<'t>, base: &Path) -> Option<Boot> {
    let section = reader.section(top, "boot", BOOT);
    reader.missing(&section, "kernel", "it names the kernel to boot, an ELF file or a bzImage");
    let kernel = reader.parsed(&section, "kernel", |text| file(base, text));
    let initrd = reader.parsed(&section, "initrd", |text| file(base, text));
    let cmdline = reader.parsed(&section, "cmdline", |text| {
        if text.chars().any(|c| c.is_control() && c != '\t') {
            return Err("a kernel command line is one line of text".to_owned());
        }
        Ok(text.to_owned())
    });
    Some(Boot { kernel: kernel?, initrd, cmdline: cmdline.unwrap_or_else(|| DEFAULT_CMDLINE.to_owned()) })
}

fn cpu<'t>(reader: &mut Reader<'t>, top: &Section<'t>) -> Cpu {
    let section = reader.section(top, "cpu", CPU);
    let count = reader.number(&section, "count", 1..=VCPUS_MAX, "of vCPUs").unwrap_or(1);
    let model = reader.parsed(&section, "model", |text| match text {
        "host" => Ok(CpuModel::Host),
        "x86-64-v2" => Ok(CpuModel::X86_64V2),
        "x86-64-v3" => Ok(CpuModel::X86_64V3),
        _ => Err("has to be one of \"host\", \"x86-64-v2\", \"x86-64-v3\"".to_owned()),
    });
    Cpu { count, model: model.unwrap_or_default() }
}

fn memory<'t>(reader: &mut Reader<'t>, top: &Section<'t>) -> Memory {
    let section = reader.section(top, "memory", MEMORY);
    let size = reader.parsed(&section, "size", |text| {
        let bytes = size::parse(text)?;
        if !(MEMORY_MIN..=MEMORY_MAX).contains(&bytes) {
            let (min, max) = (size::show(MEMORY_MIN), size::show(MEMORY_MAX));
            return Err(format!("guest memory is from {min} to {max}"));
        }
        if !bytes.is_multiple_of(MEMORY_STEP) {
            return Err(format!("guest memory is a multiple of {}", size::show(MEMORY_STEP)));
        }
        Ok(bytes)
    });
    let backing = reader.parsed(&section, "backing", |text| match text {
        "anonymous" => Ok(Backing::Anonymous),
        "memfd" => Ok(Backing::Memfd),
        "hugetlbfs" => Ok(Backing::Hugetlbfs),
        _ => Err("has to be one of \"anonymous\", \"memfd\", \"hugetlbfs\"".to_owned()),
    });
    Memory { size: size.unwrap_or(MEMORY_DEFAULT), backing: backing.unwrap_or_default() }
}

fn nets<'t>(reader: &mut Reader<'t>, top: &Section<'t>, name: &str) -> Vec<Net> {
    let mut nets: Vec<Net> = Vec::new();
    for (index, section) in reader.sections(top, "net", NET).into_iter().enumerate() {
        reader.missing(
            &section,
            "tap",
            "it names the tap interface of the host that the card is plugged into",
        );
        let tap = reader.parsed(&section, "tap", |text| {
            let plain = |b: u8| b.is_ascii_graphic() && !b"/:%".contains(&b);
            if text.is_empty()
                || text.len() > TAP_MAX
                || !text.bytes().all(plain)
                || [".", ".."].contains(&text)
            {
                return Err(format!(
                    "the name of an interface is 1 to {TAP_MAX} characters without space, / and :"
                ));
            }
            Ok(text.to_owned())
        });
        let mac = reader.parsed(&section, "mac", address::parse_mac);
        let host_address = reader.parsed(&section, "host_address", address::parse_network);
        let mac = mac.unwrap_or_else(|| address::derive_mac(name, index));
        let Some(tap) = tap else { continue };
        if nets.iter().any(|other| other.tap == tap) {
            reader.refuse(&section, "tap", "another card of this guest is plugged into the same interface");
        }
        if nets.iter().any(|other| other.mac == mac) {
            reader.refuse(&section, "mac", "another card of this guest has the same address");
        }
        nets.push(Net { tap, mac, host_address });
    }
    nets
}

fn serial<'t>(reader: &mut Reader<'t>, top: &Section<'t>, base: &Path) -> Serial {
    let section = reader.section(top, "serial", SERIAL);
    let output = reader.parsed(&section, "output", |text| match text {
        "stdio" => Ok(Serial::Stdio),
        "pty" => Ok(Serial::Pty),
        "null" => Ok(Serial::Null),
        _ => match text.strip_prefix("file:") {
            Some(path) => file(base, path).map(Serial::File),
            None => Err("has to be one of \"stdio\", \"pty\", \"file:PATH\", \"null\"".to_owned()),
        },
    });
    output.unwrap_or_default()
}
