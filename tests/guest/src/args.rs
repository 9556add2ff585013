//! The command line: words `key=value`, of which the monitor may have added some.

use alloc::borrow::ToOwned;
use alloc::format;
use alloc::string::String;

use crate::Error;

/// The words of a command line.
#[derive(Debug)]
pub struct Args(String);

impl Args {
    /// Takes a command line.
    pub fn new(cmdline: &str) -> Self {
        Self(cmdline.to_owned())
    }

    /// The workload that is asked for.
    pub fn test(&self) -> &str {
        self.text("test", "hello")
    }

    /// Values of every `key=value`.
    pub fn all<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> {
        self.0
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .filter(move |w| w.0 == key)
            .map(|w| w.1)
    }

    /// The first value of `key`, or `default`.
    pub fn text<'a>(&'a self, key: &'a str, default: &'a str) -> &'a str {
        self.all(key).next().unwrap_or(default)
    }

    /// A number, or `default`.
    ///
    /// # Errors
    ///
    /// The value is no number.
    pub fn number(&self, key: &str, default: u64) -> Result<u64, Error> {
        let Some(text) = self.all(key).next() else { return Ok(default) };
        number(text).ok_or_else(|| format!("{key}={text}: a number is wanted, as 123, 0x7b or 4M"))
    }

    /// Whether `key=1` is given.
    ///
    /// # Errors
    ///
    /// It is neither 0 nor 1.
    pub fn flag(&self, key: &str) -> Result<bool, Error> {
        match self.text(key, "0") {
            "0" => Ok(false),
            "1" => Ok(true),
            other => Err(format!("{key}={other}: 0 or 1 is wanted")),
        }
    }

    /// One of the words `among`; the first by default.
    ///
    /// # Errors
    ///
    /// It is another word.
    pub fn choice<'a>(&self, key: &str, among: &[&'a str]) -> Result<&'a str, Error> {
        let text = self.all(key).next().unwrap_or(among[0]);
        among
            .iter()
            .find(|word| **word == text)
            .copied()
            .ok_or_else(|| format!("{key}={text}: one of {among:?} is wanted"))
    }
}

/// A decimal or hexadecimal number with an optional K, M or G (powers of 1024).
pub fn number(text: &str) -> Option<u64> {
    let (digits, shift) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 10),
        b'M' | b'm' => (&text[..text.len() - 1], 20),
        b'G' | b'g' => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let value = match digits.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => digits.parse(),
    };
    value.ok()?.checked_mul(1 << shift)
}
