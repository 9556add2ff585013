//! Lines of JSON on COM1, written as they are made: nothing is kept, so that nothing is lost.

use core::fmt::{self, Write};

use crate::serial;

/// A line that is being written.
#[derive(Debug)]
#[must_use]
pub struct Line(());

impl Line {
    /// Begins an object with the member `event`.
    pub fn new(event: &str) -> Self {
        serial::put(b'{');
        raw("\"event\":");
        quoted(event);
        Self(())
    }

    /// Begins the result of the workload `test`.
    pub fn result(test: &str) -> Self {
        let mut line = Self::new("result");
        line.text("test", test);
        line
    }

    fn key(&mut self, key: &str) {
        raw(",");
        quoted(key);
        raw(":");
    }

    /// Adds a number.
    pub fn number(&mut self, key: &str, value: u64) -> &mut Self {
        self.key(key);
        decimal(value);
        self
    }

    /// Adds a truth value.
    pub fn flag(&mut self, key: &str, value: bool) -> &mut Self {
        self.key(key);
        raw(if value { "true" } else { "false" });
        self
    }

    /// Adds a string.
    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.key(key);
        quoted(value);
        self
    }

    /// Adds a string in the words of `value`.
    pub fn display(&mut self, key: &str, value: &dyn fmt::Display) -> &mut Self {
        self.key(key);
        raw("\"");
        // Escaped never fails, and a Display that does has said what it could.
        write!(Escaped, "{value}").unwrap_or_default();
        raw("\"");
        self
    }

    /// Adds an array of numbers.
    pub fn numbers(&mut self, key: &str, values: impl IntoIterator<Item = u64>) -> &mut Self {
        self.array(key, values, decimal)
    }

    /// Adds an array of strings.
    pub fn texts<'a>(&mut self, key: &str, values: impl IntoIterator<Item = &'a str>) -> &mut Self {
        self.array(key, values, quoted)
    }

    fn array<T>(&mut self, key: &str, values: impl IntoIterator<Item = T>, put: impl Fn(T)) -> &mut Self {
        self.key(key);
        raw("[");
        for (value, index) in values.into_iter().zip(0_u64..) {
            if index > 0 {
                raw(",");
            }
            put(value);
        }
        raw("]");
        self
    }

    /// Ends the line.
    pub fn send(&mut self) {
        raw("}\n");
    }
}

fn raw(text: &str) {
    text.bytes().for_each(serial::put);
}

fn decimal(value: u64) {
    if value >= 10 {
        decimal(value / 10);
    }
    serial::put(b'0' + u8::try_from(value % 10).unwrap_or_default());
}

fn quoted(text: &str) {
    raw("\"");
    escaped(text);
    raw("\"");
}

fn escaped(text: &str) {
    for byte in text.bytes() {
        match byte {
            b'"' | b'\\' => {
                serial::put(b'\\');
                serial::put(byte);
            }
            0..0x20 => {
                raw("\\u00");
                for digit in [byte >> 4, byte & 15] {
                    serial::put(b"0123456789abcdef"[usize::from(digit)]);
                }
            }
            _ => serial::put(byte),
        }
    }
}

struct Escaped;

impl Write for Escaped {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        escaped(text);
        Ok(())
    }
}
