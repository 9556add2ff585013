//! Disks: what lines on the serial port ask for, one after the other.

use alloc::format;
use alloc::string::String;

use super::block::{drive, flush, open, pattern};
use crate::json::Line;
use crate::virtio::block::{Disk, Kind, Request, SECTOR};
use crate::{Error, Machine, apic, interrupts, serial};

/// Longest line, in bytes.
const LINE: usize = 80;

/// Where the disk is written and read: in sectors.
#[derive(Debug, Clone, Copy)]
struct Range {
    first: u64,
    count: u64,
    each: u64,
}

/// `test=blk-serve`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let args = &machine.args;
    let vector = apic::route(serial::IRQ).ok_or("the I/O APIC has no input for the serial port")?;
    apic::take_interrupts();
    serial::interrupt_on_input();
    let size = args.number("size", 4096)?;
    let mut disk = open(machine, size)?;
    let offset = args.number("offset", 0)?;
    let span = args.number("span", disk.sectors() * SECTOR - offset)?;
    let range = Range { first: offset / SECTOR, count: span / size, each: size / SECTOR };
    Line::new("ready").number("sectors", disk.sectors()).send();
    loop {
        let text = line(vector);
        let mut words = text.split_whitespace();
        let (verb, number) = (words.next().unwrap_or_default(), words.next());
        let seed = || match number.map(str::parse::<u64>) {
            Some(Ok(seed)) => Ok(seed),
            _ => Err(format!("{text:?}: a number is wanted")),
        };
        match verb {
            "write" => write(&mut disk, range, seed()?)?,
            "read" => read(&mut disk, range, Some(seed()?))?,
            "zeroes" => read(&mut disk, range, None)?,
            "size" => {
                disk.device().take_change();
                Line::new("size").number("sectors", disk.sectors()).send();
            }
            "changed" => {
                while !disk.device().take_change() {
                    crate::cpu::relax();
                }
                Line::new("changed").number("sectors", disk.sectors()).send();
            }
            "end" => {
                Line::result("blk-serve").send();
                return Ok(());
            }
            _ => return Err(format!("{text:?}: there is no such order")),
        }
    }
}

fn line(vector: u8) -> String {
    let mut text = String::new();
    loop {
        let seen = interrupts::counter(vector).load(core::sync::atomic::Ordering::Acquire);
        while let Some(byte) = serial::get() {
            if byte == b'\n' || text.len() == LINE {
                return text;
            }
            text.push(byte.into());
        }
        interrupts::wait(vector, seen);
    }
}

fn requests(range: Range, kind: Kind) -> impl Iterator<Item = Request> {
    let len = u32::try_from(range.each * SECTOR).unwrap_or_default();
    (0..range.count).map(move |place| Request { kind, sector: range.first + place * range.each, len })
}

/// Writes the pattern of `seed` everywhere, and flushes.
fn write(disk: &mut Disk, range: Range, seed: u64) -> Result<(), Error> {
    let mut requests = requests(range, Kind::Write);
    let outcome = drive(
        disk,
        |data, _| {
            let request = requests.next()?;
            for (word, index) in data.iter_mut().zip(request.sector * (SECTOR / 8)..) {
                *word = pattern(seed, index);
            }
            Some(request)
        },
        |_, _| {},
    )?;
    let flushed = flush(disk)?;
    Line::new("written").number("errors", outcome.errors + u64::from(flushed != 0)).send();
    Ok(())
}

/// Reads everything, which is to be the pattern of a seed, or zeroes.
fn read(disk: &mut Disk, range: Range, seed: Option<u64>) -> Result<(), Error> {
    let mut requests = requests(range, Kind::Read);
    let mut mismatches = 0;
    let outcome = drive(
        disk,
        |data, _| {
            // What is not read is not to pass for what was.
            data.fill(u64::MAX);
            requests.next()
        },
        |done, data| {
            let words = crate::phys::index(u64::from(done.request.len) / 8);
            let wanted = |index| seed.map_or(0, |seed| pattern(seed, index));
            let first = done.request.sector * (SECTOR / 8);
            let is_right = |(word, index): (&u64, u64)| *word == wanted(index);
            mismatches += u64::from(!data.iter().take(words).zip(first..).all(is_right));
        },
    )?;
    Line::new("read").number("errors", outcome.errors).number("mismatches", mismatches).send();
    Ok(())
}
