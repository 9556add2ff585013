//! Entropy.

use alloc::collections::BTreeSet;

use crate::json::Line;
use crate::virtio::rng::Rng;
use crate::{Error, Machine, cpu};

/// `test=rng`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let args = &machine.args;
    let wanted = args.number("bytes", 4096)?;
    let size = u32::try_from(args.number("size", 64)?.clamp(1, 1 << 20)).unwrap_or(1);
    let mut rng = Rng::open(args, size, args.choice("wait", &["poll", "irq"])? == "irq")?;
    let (mut bytes, mut ones, mut requests, mut empty) = (0, 0, 0, 0);
    // The first words of all answers: none may come twice.
    let mut words = BTreeSet::new();
    let start = cpu::tsc();
    while bytes < wanted && empty < 100 {
        let answer = rng.read()?;
        requests += 1;
        bytes += answer.len() as u64;
        ones += answer.iter().map(|byte| u64::from(byte.count_ones())).sum::<u64>();
        if let Some(word) = answer.first_chunk() {
            words.insert(u64::from_le_bytes(*word));
        }
        empty += u64::from(answer.is_empty());
    }
    let elapsed = cpu::tsc() - start;
    Line::result("rng")
        .number("bytes", bytes)
        .number("requests", requests)
        .number("empty_answers", empty)
        .number("ones_permille", ones * 1000 / (8 * bytes).max(1))
        .number("distinct", words.len() as u64)
        .number("bytes_per_second", machine.clock.rate(bytes, elapsed))
        .send();
    Ok(())
}
