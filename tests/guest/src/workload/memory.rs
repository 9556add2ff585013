//! Memory: touched, dirtied at a given rate, and checked at the end.

use super::Stopwatch;
use crate::json::Line;
use crate::random::mix;
use crate::{Error, Machine, cpu, heap, phys};

const PAGE: u64 = 4096;

/// What the page `number` holds in its first word after `writes` writes; its last word holds the complement, written
/// by the first write.
fn content(number: u64, writes: u64) -> u64 {
    mix(number).wrapping_add(writes)
}

fn last_word(page: u64) -> u64 {
    page + PAGE - 8
}

/// `test=memory`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let args = &machine.args;
    let clock = machine.clock;
    let size = args.number("size", 64 << 20)?.next_multiple_of(PAGE).max(PAGE);
    let pages = size / PAGE;
    let area = (args.number("area", size)? / PAGE).clamp(1, pages);
    let rate = args.number("rate", 0)?;
    let start = heap::area(size)?;
    let begun = cpu::tsc();
    for number in 0..pages {
        let page = start + number * PAGE;
        phys::store(page, content(number, 0));
        phys::store(last_word(page), !content(number, 0));
    }
    let touched = cpu::tsc();
    Line::new("ready").number("touch_ns", clock.ns(touched - begun)).send();
    // Page `writes % area` is written next.
    let mut writes = 0;
    let mut watch = Stopwatch::start(machine, Some(5))?;
    while watch.goes_on(writes) {
        // The rate is that of whole pages, of what dirty tracking sees; MB/s are bytes per 1000 ns.
        if rate > 0 && writes * PAGE >= clock.ns(watch.elapsed()).saturating_mul(rate) / 1000 {
            cpu::relax();
            continue;
        }
        let number = writes % area;
        phys::store(start + number * PAGE, content(number, writes / area + 1));
        writes += 1;
    }
    let expected = |number| match number < area {
        true => content(number, writes / area + u64::from(number < writes % area)),
        false => content(number, 0),
    };
    let is_wrong = |number: &u64| {
        let page = start + number * PAGE;
        phys::load::<u64>(page) != expected(*number)
            || phys::load::<u64>(last_word(page)) != !content(*number, 0)
    };
    let wrong = (0..pages).filter(is_wrong).count() as u64;
    let mut line = Line::result("memory");
    line.number("size", size)
        .number("touch_ns", clock.ns(touched - begun))
        .number("area", area * PAGE)
        .number("writes", writes)
        .number("bytes_per_second", clock.rate(writes * PAGE, watch.elapsed()))
        .number("mismatches", wrong);
    watch.report(&mut line);
    line.send();
    Ok(())
}
