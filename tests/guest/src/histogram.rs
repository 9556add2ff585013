//! Distribution of times, exact to three per cent.

use alloc::boxed::Box;
use alloc::vec;

use crate::json::Line;
use crate::phys;

const SUB_BITS: u32 = 5;
const SUB: u64 = 1 << SUB_BITS;

/// Counts of values by size.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[u32]>,
    count: u64,
    sum: u64,
    min: u64,
    max: u64,
}

impl Histogram {
    /// Empty.
    pub fn new() -> Self {
        let buckets = vec![0; phys::index(SUB * (65 - u64::from(SUB_BITS)))].into_boxed_slice();
        Self { buckets, count: 0, sum: 0, min: u64::MAX, max: 0 }
    }

    /// Takes a value in.
    pub fn add(&mut self, value: u64) {
        self.buckets[bucket(value)] += 1;
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    /// Smallest value of the bucket below or in which `permille` of the values lie.
    fn quantile(&self, permille: u64) -> u64 {
        let wanted = (self.count * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        let position = self.buckets.iter().position(|count| {
            seen += u64::from(*count);
            seen >= wanted
        });
        position.map_or(0, |bucket| lowest(bucket as u64).clamp(self.min, self.max))
    }

    /// Adds the distribution to `line`, each value by way of `unit`.
    pub fn report(&self, line: &mut Line, unit: impl Fn(u64) -> u64) {
        line.number("samples", self.count);
        if let Some(mean) = self.sum.checked_div(self.count) {
            line.number("min_ns", unit(self.min))
                .number("mean_ns", unit(mean))
                .number("p50_ns", unit(self.quantile(500)))
                .number("p90_ns", unit(self.quantile(900)))
                .number("p99_ns", unit(self.quantile(990)))
                .number("p999_ns", unit(self.quantile(999)))
                .number("max_ns", unit(self.max));
        }
    }
}

fn bucket(value: u64) -> usize {
    let bits = 64 - value.leading_zeros();
    let shift = bits.saturating_sub(SUB_BITS + 1);
    phys::index(u64::from(shift) * SUB + (value >> shift))
}

fn lowest(bucket: u64) -> u64 {
    if bucket < 2 * SUB {
        return bucket;
    }
    let shift = bucket / SUB - 1;
    (bucket - shift * SUB) << shift
}
