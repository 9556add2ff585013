//! Disks: reading, writing, and reading back what was written.

use alloc::format;
use alloc::string::String;

use super::Stopwatch;
use crate::histogram::Histogram;
use crate::json::Line;
use crate::random::{Random, mix};
use crate::virtio::block::{Disk, Done, ID_LEN, Kind, Request, SECTOR, features};
use crate::{Error, Machine, cpu};

const WORDS_PER_SECTOR: u64 = SECTOR / 8;

/// The request that has no place on the disk.
fn without_data(kind: Kind) -> Request {
    Request { kind, sector: 0, len: 0 }
}

/// Where requests go.
struct Places {
    first: u64,
    count: u64,
    sectors_each: u64,
    next: u64,
    order: Order,
}

/// In which order places come.
enum Order {
    Sequential,
    /// Any place at any time.
    Random(Random),
    /// Each place once, then all again.
    Once(Permutation),
}

/// The numbers below a count in an order without a pattern.
struct Permutation {
    state: u64,
    mask: u64,
    shift: u32,
    count: u64,
}

impl Permutation {
    fn new(seed: u64, count: u64) -> Self {
        let mask = count.next_power_of_two().max(2) - 1;
        Self { state: mix(seed) & mask, mask, shift: mask.count_ones().div_ceil(2), count }
    }

    fn next(&mut self) -> u64 {
        loop {
            // Its period is all numbers (Knuth, The Art of Computer Programming, volume 2, 3.2.1.2, theorem A), and the
            // exchange of the low bits, in which there is a pattern, can be undone: no number comes twice.
            self.state = self.state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1) & self.mask;
            let place = self.state ^ self.state >> self.shift;
            if place < self.count {
                return place;
            }
        }
    }
}

impl Places {
    fn new(machine: &Machine, disk: &Disk, size: u64) -> Result<Self, Error> {
        let args = &machine.args;
        let capacity = disk.sectors() * SECTOR;
        let offset = args.number("offset", 0)?;
        let span = args.number("span", capacity.saturating_sub(offset))?;
        let block = disk.block_size();
        if size == 0 || !size.is_multiple_of(block) || !offset.is_multiple_of(block) {
            return Err(format!(
                "size={size} and offset={offset} are to be multiples of the disk's {block} bytes"
            ));
        }
        if offset.checked_add(span).is_none_or(|end| end > capacity) || span < size {
            return Err(format!(
                "offset={offset} and span={span} do not fit the disk of {capacity} bytes, or size={size}"
            ));
        }
        let (count, seed) = (span / size, args.number("seed", 1)?);
        let order = match args.choice("mode", &["random", "sequential", "once"])? {
            "random" => Order::Random(Random::new(seed)),
            "once" => Order::Once(Permutation::new(seed, count)),
            _ => Order::Sequential,
        };
        Ok(Self { first: offset / SECTOR, count, sectors_each: size / SECTOR, next: 0, order })
    }

    /// Sector of the next request.
    fn next(&mut self) -> u64 {
        let place = match &mut self.order {
            Order::Random(random) => random.below(self.count),
            Order::Once(permutation) => permutation.next(),
            Order::Sequential => self.next % self.count,
        };
        self.next += 1;
        self.first + place * self.sectors_each
    }
}

/// What came of a run.
pub(super) struct Outcome {
    done: u64,
    pub(super) errors: u64,
    first_bad_status: u8,
    times: Histogram,
}

/// Keeps the disk busy with requests as `next` makes them (into the room for data it is given) until that gives none;
/// `check` looks at each that succeeded.
pub(super) fn drive(
    disk: &mut Disk,
    mut next: impl FnMut(&mut [u64], u64) -> Option<Request>,
    mut check: impl FnMut(&Done, &[u64]),
) -> Result<Outcome, Error> {
    let mut outcome = Outcome { done: 0, errors: 0, first_bad_status: 0, times: Histogram::new() };
    let (mut free, mut in_flight): (alloc::vec::Vec<u16>, u64) = ((0..disk.depth()).rev().collect(), 0);
    let mut more = true;
    loop {
        while more && let Some(slot) = free.pop() {
            match next(disk.data(slot), outcome.done) {
                Some(request) => {
                    disk.submit(slot, request, cpu::tsc())?;
                    in_flight += 1;
                }
                None => {
                    more = false;
                    free.push(slot);
                }
            }
        }
        disk.kick();
        if in_flight == 0 {
            return Ok(outcome);
        }
        disk.wait();
        let now = cpu::tsc();
        while let Some(done) = disk.take()? {
            outcome.times.add(now.saturating_sub(done.since));
            outcome.done += 1;
            in_flight -= 1;
            if done.status == 0 {
                check(&done, disk.data(done.slot));
            } else {
                outcome.errors += 1;
                outcome.first_bad_status =
                    if outcome.errors == 1 { done.status } else { outcome.first_bad_status };
            }
            free.push(done.slot);
        }
    }
}

pub(super) fn open(machine: &Machine, size: u64) -> Result<Disk, Error> {
    if !(1..=16 << 20).contains(&size) {
        return Err(format!("size={size}: 1 to 16M are wanted"));
    }
    Disk::open(&machine.args, machine.args.number("depth", 1)?, size)
}

pub(super) fn flush(disk: &mut Disk) -> Result<u8, Error> {
    disk.request(without_data(Kind::Flush))
}

/// `test=blk-read`
pub fn read(machine: &Machine) -> Result<(), Error> {
    measure(machine, Kind::Read, "blk-read")
}

/// `test=blk-write`
pub fn write(machine: &Machine) -> Result<(), Error> {
    measure(machine, Kind::Write, "blk-write")
}

fn measure(machine: &Machine, kind: Kind, name: &str) -> Result<(), Error> {
    let (args, clock) = (&machine.args, machine.clock);
    let size = args.number("size", 4096)?;
    let mut disk = open(machine, size)?;
    let mut places = Places::new(machine, &disk, size)?;
    let len = u32::try_from(size).unwrap_or_default();
    let count = args.number("count", u64::MAX)?;
    let flush_every = args.number("flush-every", 0)?;
    if flush_every > 0 && !disk.device().has(features::FLUSH) {
        return Err("the disk has no cache that could be flushed".into());
    }
    if kind == Kind::Write {
        // Nothing but zeroes is a special case to some images.
        let mut random = Random::new(args.number("seed", 1)?);
        for slot in 0..disk.depth() {
            disk.data(slot).fill_with(|| random.next());
        }
    }
    let (mut made, mut unflushed, mut flushes) = (0, 0, 0);
    let mut watch = Stopwatch::start(machine, (count == u64::MAX).then_some(5))?;
    let outcome = drive(
        &mut disk,
        |_, done| {
            let go_on = watch.goes_on(done) && made < count;
            if flush_every > 0 && unflushed == flush_every {
                (unflushed, flushes) = (0, flushes + 1);
                return Some(without_data(Kind::Flush));
            }
            (made, unflushed) = (made + u64::from(go_on), unflushed + 1);
            go_on.then(|| Request { kind, sector: places.next(), len })
        },
        |_, _| {},
    )?;
    let flushed = if args.flag("flush")? { flush(&mut disk)? } else { 0 };
    // The last requests have come after the last look at the clock.
    watch.goes_on(outcome.done);
    let mut line = Line::result(name);
    let moved = outcome.done - flushes;
    line.number("requests", outcome.done)
        .number("errors", outcome.errors + u64::from(flushed != 0))
        .number("iops", clock.rate(moved, watch.elapsed()))
        .number("bytes_per_second", clock.rate(moved * size, watch.elapsed()));
    if flush_every > 0 {
        line.number("flushes", flushes);
    }
    if outcome.errors > 0 {
        line.number("first_bad_status", outcome.first_bad_status.into());
    }
    line.number("depth", disk.depth().into())
        .number("notifications", disk.notifications())
        .number("interrupts", disk.device().interrupts());
    outcome.times.report(&mut line, |cycles| clock.ns(cycles));
    watch.report(&mut line);
    line.send();
    Ok(())
}

/// The word `index` of the disk, counted from its start, as `blk-verify` writes it.
pub(super) fn pattern(seed: u64, index: u64) -> u64 {
    mix(index.wrapping_add(mix(seed)))
}

/// `test=blk-verify`
pub fn verify(machine: &Machine) -> Result<(), Error> {
    let args = &machine.args;
    let clock = machine.clock;
    let size = args.number("size", 4096)?;
    let (count, seed) = (args.number("count", 1000)?, args.number("seed", 1)?);
    let phase = args.choice("phase", &["both", "write", "read"])?;
    let mut disk = open(machine, size)?;
    let len = u32::try_from(size).unwrap_or_default();
    let words = size / 8;
    let start = cpu::tsc();
    let (mut done, mut errors, mut flushed) = (0, 0, 0);
    if phase != "read" {
        let mut places = Places::new(machine, &disk, size)?;
        let mut left = count;
        let outcome = drive(
            &mut disk,
            |data, _| {
                left = left.checked_sub(1)?;
                let sector = places.next();
                for (word, index) in data.iter_mut().zip(sector * WORDS_PER_SECTOR..) {
                    *word = pattern(seed, index);
                }
                Some(Request { kind: Kind::Write, sector, len })
            },
            |_, _| {},
        )?;
        (done, errors) = (outcome.done, outcome.errors);
        if disk.device().has(features::FLUSH) {
            flushed = flush(&mut disk)?;
        }
    }
    let (mut mismatches, mut first) = (0, None);
    if phase != "write" {
        let mut places = Places::new(machine, &disk, size)?;
        let mut left = count;
        let outcome = drive(
            &mut disk,
            |data, _| {
                left = left.checked_sub(1)?;
                // What is not read is not to pass for what was.
                data.fill(0);
                Some(Request { kind: Kind::Read, sector: places.next(), len })
            },
            |done, data| {
                let mut expected = done.request.sector * WORDS_PER_SECTOR..;
                let is_right =
                    |word: &u64| expected.next().is_some_and(|index| *word == pattern(seed, index));
                if !data.iter().take(crate::phys::index(words)).all(is_right) {
                    mismatches += 1;
                    first.get_or_insert(done.request.sector);
                }
            },
        )?;
        (done, errors) = (done + outcome.done, errors + outcome.errors);
    }
    let mut line = Line::result("blk-verify");
    line.number("requests", done)
        .number("errors", errors + u64::from(flushed != 0))
        .number("mismatches", mismatches);
    if let Some(sector) = first {
        line.number("first_mismatch", sector);
    }
    line.number("depth", disk.depth().into())
        .number("notifications", disk.notifications())
        .number("interrupts", disk.device().interrupts())
        .number("elapsed_ns", clock.ns(cpu::tsc() - start))
        .send();
    Ok(())
}

/// `test=blk-info`
pub fn info(machine: &Machine) -> Result<(), Error> {
    let mut disk = Disk::open(&machine.args, 1, ID_LEN.into())?;
    let status = disk.request(Request { len: ID_LEN, ..without_data(Kind::GetId) })?;
    let id: alloc::vec::Vec<u8> = disk.data(0).iter().flat_map(|word| word.to_le_bytes()).collect();
    let id = id[..ID_LEN as usize].split(|byte| *byte == 0).next().unwrap_or_default();
    let mut line = Line::result("blk-info");
    line.number("sectors", disk.sectors())
        .number("bytes", disk.sectors() * SECTOR)
        .number("block_size", disk.block_size())
        .flag("readonly", disk.device().has(features::READ_ONLY));
    if status == 0 {
        line.text("serial", &String::from_utf8_lossy(id));
    }
    line.number("features", disk.device().features()).send();
    Ok(())
}
