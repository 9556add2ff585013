//! The fuzzer's bytes as numbers and choices. Where they end, everything is zero.

/// See the module.
#[derive(Debug, Clone)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Up to `len` bytes.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (some, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        some
    }

    /// A number of `width` bytes, up to 8.
    pub fn number(&mut self, width: usize) -> u64 {
        let bytes = self.bytes(width);
        bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// A number below `end`, which is at most 65,536.
    pub fn below(&mut self, end: u64) -> u64 {
        let width = if end > 256 { 2 } else { 1 };
        self.number(width) % end
    }

    /// One of `choices`, of which there are some.
    pub fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        let index = self.below(choices.len() as u64);
        choices[usize::try_from(index).unwrap_or(0)]
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == n - 1
    }

    /// A number that may be of interest to a parser: near one of `near`, near a power of two, small, or any.
    pub fn interesting(&mut self, near: &[u64]) -> u64 {
        match self.below(8) {
            0 => self.number(8),
            1 | 2 if !near.is_empty() => self.one_of(near),
            3 if !near.is_empty() => self.one_of(near).wrapping_add(self.number(1)).wrapping_sub(128),
            4 => 1 << self.below(64),
            5 => (1 << self.below(64)) - 1,
            6 => u64::MAX - self.number(1),
            _ => self.number(1),
        }
    }
}
