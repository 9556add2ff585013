//! What a process takes of the host's memory, by mapping (`/proc/PID/smaps`, proc_pid_smaps(5)).

/// One mapping of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// Whether the process may write to it.
    pub writable: bool,
    /// The file, or the kernel's name for the mapping in brackets, or nothing.
    pub name: String,
    /// Proportional set size in KiB: pages shared with n - 1 others count one n-th.
    pub pss_kib: u64,
}

impl Mapping {
    /// Length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.end - self.start
    }
}

/// Text that is not what the kernel writes, or a process whose guest memory cannot be told from the rest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A line that is neither a mapping nor a field of one.
    #[error("line {line} of smaps is neither a mapping nor one of its fields: {text:?}")]
    Line {
        /// Number of the line, from 1.
        line: usize,
        /// The line.
        text: String,
    },
    /// A mapping without a proportional set size.
    #[error(
        "mapping {start:#x} has no Pss; this kernel is too old or built without CONFIG_PROC_PAGE_MONITOR"
    )]
    NoPss {
        /// Where the mapping starts.
        start: u64,
    },
    /// Guest memory not found.
    #[error("no mapping can be told to be the guest's memory ({} MiB); candidates: {candidates:?}", size >> 20)]
    GuestMemory {
        /// Bytes looked for.
        size: u64,
        /// Sizes of the mappings that may be it.
        candidates: Vec<u64>,
    },
}

/// Reads the mappings from the text of a `smaps` file.
///
/// # Errors
///
/// [`Error::Line`] or [`Error::NoPss`].
pub fn parse(text: &str) -> Result<Vec<Mapping>, Error> {
    let mut mappings: Vec<(Mapping, bool)> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let unknown = || Error::Line { line: index + 1, text: line.to_owned() };
        if let Some(mapping) = header(line) {
            mappings.push((mapping, false));
            continue;
        }
        let (name, value) = line.split_once(':').ok_or_else(unknown)?;
        let (mapping, has_pss) = mappings.last_mut().ok_or_else(unknown)?;
        if name == "Pss" {
            mapping.pss_kib =
                value.trim().strip_suffix(" kB").and_then(|kib| kib.parse().ok()).ok_or_else(unknown)?;
            *has_pss = true;
        }
    }
    mappings
        .into_iter()
        .map(
            |(mapping, has_pss)| {
                if has_pss { Ok(mapping) } else { Err(Error::NoPss { start: mapping.start }) }
            },
        )
        .collect()
}

/// `start-end perms offset device inode      name`
fn header(line: &str) -> Option<Mapping> {
    let (range, rest) = line.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok().filter(|end| *end >= start)?;
    let (permissions, rest) = rest.split_once(' ')?;
    let name = rest.splitn(4, ' ').nth(3).unwrap_or_default().trim_start().to_owned();
    Some(Mapping { start, end, writable: permissions.as_bytes().get(1) == Some(&b'w'), name, pss_kib: 0 })
}

/// Pss in KiB of everything but the guest's memory of `guest_size` bytes.
///
/// Guest memory is the writable mapping of exactly that size; else the run of adjacent writable mappings that make up
/// exactly that size (the kernel splits a mapping when advice or protection differ); else the one writable mapping that
/// is larger (the kernel merges like neighbours; what was merged then counts as the guest's).
///
/// # Errors
///
/// [`Error::GuestMemory`] if none or several may be it.
pub fn beside_guest(mappings: &[Mapping], guest_size: u64) -> Result<u64, Error> {
    let guest = guest_memory(mappings, guest_size).ok_or_else(|| Error::GuestMemory {
        size: guest_size,
        candidates: mappings
            .iter()
            .filter(|m| m.writable && m.size() >= guest_size / 4)
            .map(Mapping::size)
            .collect(),
    })?;
    let beside = mappings[..guest.start].iter().chain(&mappings[guest.end..]);
    Ok(beside.map(|mapping| mapping.pss_kib).sum())
}

/// Pss in KiB of all mappings.
#[must_use]
pub fn total(mappings: &[Mapping]) -> u64 {
    mappings.iter().map(|mapping| mapping.pss_kib).sum()
}

fn guest_memory(mappings: &[Mapping], size: u64) -> Option<std::ops::Range<usize>> {
    let exact = |start: usize| {
        let mut length = 0;
        for (index, mapping) in mappings.iter().enumerate().skip(start) {
            let follows = index == start || mappings[index - 1].end == mapping.start;
            if !mapping.writable || !follows {
                return None;
            }
            length = mapping.size().saturating_add(length);
            if length >= size {
                return (length == size).then_some(start..index + 1);
            }
        }
        None
    };
    let only = |mut found: Vec<std::ops::Range<usize>>| if found.len() == 1 { found.pop() } else { None };
    let runs: Vec<_> = (0..mappings.len()).filter_map(exact).collect();
    let single: Vec<_> = runs.iter().filter(|run| run.len() == 1).cloned().collect();
    if !single.is_empty() {
        return only(single);
    }
    if !runs.is_empty() {
        return only(runs);
    }
    let larger = |(index, m): (usize, &Mapping)| (m.writable && m.size() > size).then_some(index..index + 1);
    only(mappings.iter().enumerate().filter_map(larger).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;
    const TEXT: &str = "\
55d0c8a00000-55d0c8a02000 r--p 00000000 fe:00 1234                       /usr/bin/a program
Size:                  8 kB
KernelPageSize:        4 kB
Rss:                   8 kB
Pss:                   5 kB
Pss_Dirty:             0 kB
VmFlags: rd mr mw me
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Pss:                2048 kB
VmFlags: rd wr mr mw me ac sd hg
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0                          [stack]
Pss:                  12 kB
";

    fn at(start: u64, size: u64, writable: bool, pss_kib: u64) -> Mapping {
        Mapping { start, end: start + size, writable, name: String::new(), pss_kib }
    }

    #[test]
    fn mappings_are_read_with_name_and_pss() {
        let mappings = parse(TEXT).unwrap();
        assert_eq!(mappings.len(), 3);
        assert_eq!(mappings[0].name, "/usr/bin/a program");
        assert_eq!((mappings[0].pss_kib, mappings[0].writable, mappings[0].size()), (5, false, 0x2000));
        assert_eq!((mappings[1].pss_kib, mappings[1].name.as_str()), (2048, ""));
        assert_eq!((mappings[2].pss_kib, mappings[2].name.as_str()), (12, "[stack]"));
        assert_eq!(total(&mappings), 2065);
        assert_eq!(beside_guest(&mappings, 128 * MIB), Ok(17));
    }

    #[test]
    fn text_that_is_not_smaps_is_refused_with_its_line() {
        let cut = &TEXT[..TEXT.len() - "Pss:                  12 kB\n".len()];
        assert_eq!(parse(cut), Err(Error::NoPss { start: 0x7ffd_0000_0000 }));
        assert!(matches!(parse("Pss: 1 kB\n"), Err(Error::Line { line: 1, .. })));
        assert!(matches!(parse("1000-2000 r--p 0 0 0\nPss: many kB\n"), Err(Error::Line { line: 2, .. })));
        assert!(matches!(parse("1000-2000 r--p 0 0 0\ngarbage\n"), Err(Error::Line { line: 2, .. })));
        assert_eq!(parse(""), Ok(vec![]));
    }

    #[test]
    fn guest_memory_in_adjacent_pieces_is_left_out_whole() {
        let pieces = [at(0, MIB, true, 1), at(2 * MIB, 2 * MIB, true, 10), at(4 * MIB, 6 * MIB, true, 20)];
        assert_eq!(beside_guest(&pieces, 8 * MIB), Ok(1));
    }

    #[test]
    fn an_exact_mapping_wins_over_pieces_and_larger_ones() {
        let mappings = [
            at(0, 8 * MIB, true, 1),
            at(9 * MIB, 4 * MIB, true, 2),
            at(13 * MIB, 4 * MIB, true, 4),
            at(99 * MIB, 9 * MIB, true, 8),
        ];
        assert_eq!(beside_guest(&mappings, 8 * MIB), Ok(14));
    }

    #[test]
    fn a_merged_mapping_counts_as_the_guests() {
        let mappings = [at(0, MIB, true, 3), at(MIB * 2, 9 * MIB, true, 5)];
        assert_eq!(beside_guest(&mappings, 8 * MIB), Ok(3));
    }

    #[test]
    fn no_or_several_candidates_are_an_error() {
        let error = |mappings: &[Mapping]| beside_guest(mappings, 8 * MIB).unwrap_err();
        assert_eq!(
            error(&[at(0, 8 * MIB, false, 3)]),
            Error::GuestMemory { size: 8 * MIB, candidates: vec![] }
        );
        let twice = [at(0, 8 * MIB, true, 1), at(9 * MIB, 8 * MIB, true, 1)];
        assert_eq!(error(&twice), Error::GuestMemory { size: 8 * MIB, candidates: vec![8 * MIB; 2] });
        let larger = [at(0, 9 * MIB, true, 1), at(10 * MIB, 10 * MIB, true, 1)];
        assert!(matches!(error(&larger), Error::GuestMemory { .. }));
    }

    #[test]
    fn this_process_has_the_pages_that_it_touched() {
        let before = total(&parse(&std::fs::read_to_string("/proc/self/smaps").unwrap()).unwrap());
        let touched = vec![1_u8; 32 << 20];
        let after = total(&parse(&std::fs::read_to_string("/proc/self/smaps").unwrap()).unwrap());
        assert_eq!(touched[touched.len() / 2], 1);
        assert!(after >= before + (24 << 10), "{before} KiB before, {after} KiB after touching 32 MiB");
    }

    fn mappings() -> impl Strategy<Value = Vec<Mapping>> {
        let one = (1_u64..1000, 1_u64..1000, any::<bool>(), "(/[a-z. ]{0,9}[a-z])?", 0_u64..1 << 40);
        proptest::collection::vec(one, 0..20).prop_map(|pieces| {
            let mut start = 0x1000;
            pieces
                .into_iter()
                .map(|(gap, pages, writable, name, pss_kib)| {
                    start += gap << 12;
                    let mapping = Mapping { start, end: start + (pages << 12), writable, name, pss_kib };
                    start = mapping.end;
                    mapping
                })
                .collect()
        })
    }

    fn print(mappings: &[Mapping]) -> String {
        mappings
            .iter()
            .map(|m| {
                let write = if m.writable { 'w' } else { '-' };
                format!(
                    "{:x}-{:x} r{write}-p 00000000 00:00 0    {}\nRss: 7 kB\nPss:  {} kB\nVmFlags: rd\n",
                    m.start, m.end, m.name, m.pss_kib
                )
            })
            .collect()
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read_back(mappings in mappings()) {
            prop_assert_eq!(parse(&print(&mappings)).unwrap(), mappings);
        }

        #[test]
        fn any_text_is_read_or_refused(text in "([0-9a-f]{1,20}-[0-9a-f]{1,20} [rwp -]{0,6}|Pss: ?[0-9]{0,30} kB|[ -~\n]{0,40}|\n){0,12}") {
            let _ = parse(&text);
        }

        #[test]
        fn guest_memory_never_counts_and_all_else_does(mappings in mappings(), at in any::<prop::sample::Index>()) {
            prop_assume!(!mappings.is_empty());
            let mut mappings = mappings;
            let index = at.index(mappings.len());
            let guest = &mut mappings[index];
            guest.writable = true;
            let (size, pss) = (guest.size(), guest.pss_kib);
            if let Ok(beside) = beside_guest(&mappings, size) {
                prop_assert_eq!(beside + pss, total(&mappings));
            }
        }
    }
}
