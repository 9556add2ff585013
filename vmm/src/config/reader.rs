//! Walking through a TOML document, taking note of everything that is wrong on the way.

use std::collections::BTreeMap;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{Place, Problem};

/// Longest piece of a value that is repeated in a message, in characters.
const SHOWN: usize = 60;

/// What a section may hold.
#[derive(Debug, Clone, Copy)]
pub struct Keys {
    /// What is understood.
    pub known: &'static [&'static str],
    /// What belongs to the format and is not supported yet.
    pub later: &'static [&'static str],
}

/// A section of the document: the top, `[cpu]`, one `[[disk]]`.
#[derive(Debug, Clone)]
pub struct Section<'t> {
    /// `""`, `"cpu"`, `"disk.0"`.
    name: String,
    table: Option<&'t DeTable<'t>>,
}

impl Section<'_> {
    /// The full name of `key`.
    pub fn path(&self, key: &str) -> String {
        if self.name.is_empty() { key.to_owned() } else { format!("{}.{key}", self.name) }
    }
}

/// A document that is being read.
#[derive(Debug)]
pub struct Reader<'t> {
    text: &'t str,
    places: BTreeMap<String, Range<usize>>,
    problems: Vec<Problem>,
}

impl<'t> Reader<'t> {
    pub fn new(text: &'t str) -> Self {
        Self { text, places: BTreeMap::new(), problems: Vec::new() }
    }

    /// The document's own table.
    pub fn top(&mut self, table: &'t DeTable<'t>, keys: Keys) -> Section<'t> {
        let section = Section { name: String::new(), table: Some(table) };
        self.check_keys(&section, keys);
        section
    }

    /// `[key]`; an empty section if it is absent.
    pub fn section(&mut self, top: &Section<'t>, key: &str, keys: Keys) -> Section<'t> {
        let mut section = Section { name: top.path(key), table: None };
        if let Some(value) = self.value(top, key) {
            section.table = value.get_ref().as_table();
            if section.table.is_none() {
                self.refuse(top, key, format!("has to be a section, as in [{key}]"));
            }
        }
        self.check_keys(&section, keys);
        section
    }

    /// Each `[[key]]`.
    pub fn sections(&mut self, top: &Section<'t>, key: &str, keys: Keys) -> Vec<Section<'t>> {
        let Some(value) = self.value(top, key) else { return Vec::new() };
        let tables = value.get_ref().as_array();
        let Some(tables) = tables.filter(|items| items.iter().all(|item| item.get_ref().is_table())) else {
            self.refuse(top, key, format!("has to be a list of sections, each begun by [[{key}]]"));
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (index, table) in tables.iter().enumerate() {
            let name = format!("{}.{index}", top.path(key));
            self.places.insert(name.clone(), table.span());
            let section = Section { name, table: table.get_ref().as_table() };
            self.check_keys(&section, keys);
            sections.push(section);
        }
        sections
    }

    fn check_keys(&mut self, section: &Section<'t>, keys: Keys) {
        for (key, value) in section.table.into_iter().flatten() {
            let (span, key) = (key.span(), key.get_ref().as_ref());
            let message = if keys.known.contains(&key) {
                self.places.insert(section.path(key), value.span());
                continue;
            } else if keys.later.contains(&key) {
                "is not supported yet".to_owned()
            } else {
                unknown(key, keys)
            };
            let place = self.place(span.start);
            self.problems.push(Problem { place, key: section.path(key), given: None, message });
        }
    }

    fn value(&self, section: &Section<'t>, key: &str) -> Option<&'t Spanned<DeValue<'t>>> {
        section.table?.get(key)
    }

    /// A string.
    pub fn string(&mut self, section: &Section<'t>, key: &str) -> Option<&'t str> {
        let value = self.value(section, key)?;
        let string = value.get_ref().as_str();
        if string.is_none() {
            self.refuse(section, key, "has to be a string, in quotes");
        }
        string
    }

    /// `true` or `false`.
    pub fn boolean(&mut self, section: &Section<'t>, key: &str) -> Option<bool> {
        let value = self.value(section, key)?;
        let boolean = value.get_ref().as_bool();
        if boolean.is_none() {
            self.refuse(section, key, "has to be either true or false, without quotes");
        }
        boolean
    }

    /// A whole number within `range`; `what` says of what.
    pub fn number<N>(
        &mut self,
        section: &Section<'t>,
        key: &str,
        range: std::ops::RangeInclusive<N>,
        what: &str,
    ) -> Option<N>
    where
        N: TryFrom<u64> + PartialOrd + std::fmt::Display,
    {
        let value = self.value(section, key)?.get_ref();
        let number = value.as_integer().and_then(|n| u64::from_str_radix(n.as_str(), n.radix()).ok());
        let number =
            number.and_then(|number| N::try_from(number).ok()).filter(|number| range.contains(number));
        if number.is_none() {
            self.refuse(
                section,
                key,
                format!("has to be a number {what} from {} to {}", range.start(), range.end()),
            );
        }
        number
    }

    /// A string that `parse` understands.
    pub fn parsed<T>(
        &mut self,
        section: &Section<'t>,
        key: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        match parse(self.string(section, key)?) {
            Ok(value) => Some(value),
            Err(message) => {
                self.refuse(section, key, message);
                None
            }
        }
    }

    /// Whether `key` is given, rightly or wrongly.
    pub fn is_given(&self, section: &Section<'t>, key: &str) -> bool {
        self.value(section, key).is_some()
    }

    /// Notes that the value of `key` is wrong because of what `message` says.
    pub fn refuse(&mut self, section: &Section<'t>, key: &str, message: impl Into<String>) {
        let problem = self.problem(&section.path(key), message.into());
        self.problems.push(problem);
    }

    /// Notes that `key`, which has to be there, is not.
    pub fn missing(&mut self, section: &Section<'t>, key: &str, message: &str) {
        if self.value(section, key).is_none() {
            let message = format!("is missing: {message}");
            let place = self.places.get(&section.name).map_or(0, |span| span.start);
            let place = self.place(place);
            self.problems.push(Problem { place, key: section.path(key), given: None, message });
        }
    }

    /// What is wrong with the value at `path`; without a value, with its section.
    fn problem(&self, path: &str, message: String) -> Problem {
        problem(self.text, &self.places, path, message)
    }

    fn place(&self, offset: usize) -> Place {
        place(self.text, offset)
    }

    /// The places of all values, and the problems, in the order of the file.
    pub fn finish(mut self) -> (BTreeMap<String, Range<usize>>, Vec<Problem>) {
        self.problems.sort_by_key(|problem| problem.place);
        (self.places, self.problems)
    }
}

/// Position of the byte at `offset`.
pub fn place(text: &str, offset: usize) -> Place {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    Place { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1 }
}

/// A problem with the value at `path`, whose place is in `places`, or else with the section it would be in.
pub fn problem(text: &str, places: &BTreeMap<String, Range<usize>>, path: &str, message: String) -> Problem {
    let mut at = path;
    while !places.contains_key(at) && at.contains('.') {
        at = at.rsplit_once('.').map_or("", |(section, _)| section);
    }
    let span = places.get(at).cloned();
    let given = span.clone().filter(|_| at == path).and_then(|span| text.get(span)).map(shorten);
    let place = place(text, span.map_or(0, |span| span.start));
    Problem { place, key: path.to_owned(), given, message }
}

fn shorten(value: &str) -> String {
    let line = value.lines().next().unwrap_or_default();
    let mut short: String = line.chars().take(SHOWN).collect();
    if short.len() < value.len() {
        short.push('…');
    }
    short
}

fn unknown(key: &str, keys: Keys) -> String {
    let all = || keys.known.iter().chain(keys.later);
    let near = all()
        .map(|known| (strsim::osa_distance(key, known), known))
        .filter(|(distance, known)| *distance <= 1 + known.len() / 4)
        .min();
    match near {
        Some((_, near)) => format!("is not a key of this section; did you mean {near}?"),
        None => format!("is not a key of this section, which has {}", keys.known.join(", ")),
    }
}
