//! Numbers that look random and can be made again (Steele, Lea and Flood, "Fast splittable pseudorandom
//! number generators", OOPSLA 2014).

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Scatters `value`: the output function of SplitMix64.
pub const fn mix(value: u64) -> u64 {
    let a = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let b = (a ^ a >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    b ^ b >> 31
}

/// A sequence that its seed determines.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// The next number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        u64::try_from((u128::from(self.next()) * u128::from(limit)) >> 64).unwrap_or_default()
    }
}
