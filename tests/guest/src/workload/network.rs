//! Network cards: sending, counting, and the time of a round trip.

use alloc::format;

use super::{Stopwatch, ether};
use crate::histogram::Histogram;
use crate::json::Line;
use crate::virtio::net::{Card, FRAME_MAX, FRAME_MIN};
use crate::{Error, Machine, cpu};

/// Frames that are sent, or received, between two looks at other things.
const BATCH: u64 = 32;

fn open(machine: &Machine) -> Result<(Card, u64), Error> {
    let size = machine.args.number("size", FRAME_MIN)?;
    if !(FRAME_MIN..=FRAME_MAX).contains(&size) {
        return Err(format!("size={size}: {FRAME_MIN} to {FRAME_MAX} are wanted"));
    }
    Ok((Card::open(&machine.args, machine.clock)?, size))
}

/// `test=net-tx`
pub fn send(machine: &Machine) -> Result<(), Error> {
    let (args, clock) = (&machine.args, machine.clock);
    let (mut card, size) = open(machine)?;
    let peer = ether::address(args, "peer", ether::BROADCAST)?;
    let (rate, count) = (args.number("rate", 0)?, args.number("count", u64::MAX)?);
    let own = card.mac();
    Line::new("ready").text("mac", &ether::text(own)).send();
    let mut sent = 0;
    let mut full = 0_u64;
    let mut watch = Stopwatch::start(machine, (count == u64::MAX).then_some(5))?;
    while watch.goes_on(sent) && sent < count {
        let mut due = (count - sent).min(BATCH);
        if rate > 0 {
            due = due.min(
                (u128::from(clock.ns(watch.elapsed())) * u128::from(rate) / 1_000_000_000)
                    .try_into()
                    .unwrap_or(u64::MAX)
                    .saturating_sub(sent),
            );
        }
        for _ in 0..due {
            let Some(mut place) = card.place(size) else {
                full += 1;
                cpu::relax();
                break;
            };
            ether::build(place.frame(), own, peer, sent);
            card.send(place)?;
            sent += 1;
        }
        card.kick();
    }
    while !card.all_sent() {
        cpu::relax();
    }
    watch.goes_on(sent);
    let mut line = Line::result("net-tx");
    line.number("frames", sent)
        .number("bytes", sent * size)
        .number("frames_per_second", clock.rate(sent, watch.elapsed()))
        .number("full", full)
        .number("notifications", card.notifications().1);
    watch.report(&mut line);
    line.send();
    Ok(())
}

/// `test=net-rx`
pub fn receive(machine: &Machine) -> Result<(), Error> {
    let clock = machine.clock;
    let count = machine.args.number("count", u64::MAX)?;
    let (mut card, _) = open(machine)?;
    Line::new("ready").text("mac", &ether::text(card.mac())).send();
    let (mut frames, mut bytes, mut others, mut damaged) = (0, 0, 0_u64, 0_u64);
    // Frames that overtook others, and the gaps between those that did not.
    let (mut reordered, mut expected) = (0_u64, None);
    let (mut first, mut last) = (0, 0);
    let mut watch = Stopwatch::start(machine, (count == u64::MAX).then_some(5))?;
    while watch.goes_on(frames) && frames < count {
        if !card.wait() {
            continue;
        }
        for _ in 0..BATCH {
            let Some(mut place) = card.receive()? else { break };
            match ether::sequence(place.frame()) {
                Some((sequence, intact)) => {
                    last = cpu::tsc();
                    first = if frames == 0 { last } else { first };
                    frames += 1;
                    bytes += place.frame().len() as u64;
                    damaged += u64::from(!intact);
                    let next = expected.unwrap_or(sequence);
                    reordered += u64::from(sequence < next);
                    expected = Some(next.max(sequence + 1));
                }
                None => others += 1,
            }
            card.give_back(place)?;
        }
        card.kick();
    }
    let spent = last.saturating_sub(first).max(1);
    let mut line = Line::result("net-rx");
    line.number("frames", frames)
        .number("bytes", bytes)
        .number("highest", expected.unwrap_or(0))
        .number("reordered", reordered)
        .number("damaged", damaged)
        .number("others", others)
        .number("frames_per_second", clock.rate(frames.saturating_sub(1), spent))
        .number("spent_ns", clock.ns(spent))
        .number("notifications", card.notifications().0)
        .number("interrupts", card.device().interrupts());
    watch.report(&mut line);
    line.send();
    Ok(())
}

/// `test=net-ping`
pub fn ping(machine: &Machine) -> Result<(), Error> {
    let (args, clock) = (&machine.args, machine.clock);
    let (mut card, size) = open(machine)?;
    let peer = ether::address(args, "peer", ether::BROADCAST)?;
    let count = args.number("count", 1000)?;
    let patience = clock.cycles(args.number("timeout", 1000)?.saturating_mul(1_000_000));
    let own = card.mac();
    let (mut times, mut lost) = (Histogram::new(), 0_u64);
    Line::new("ready").text("mac", &ether::text(own)).send();
    for sequence in 0..count {
        let mut place = card.place(size).ok_or("the card does not send what it is given")?;
        ether::build(place.frame(), own, peer, sequence);
        let start = cpu::tsc();
        card.send(place)?;
        card.kick();
        let mut answered = false;
        while !answered && cpu::tsc() - start < patience {
            let Some(mut place) = card.receive()? else {
                card.wait();
                continue;
            };
            let to_us = place.frame().get(..6) == Some(&own);
            answered = to_us && ether::sequence(place.frame()).is_some_and(|(number, _)| number == sequence);
            card.give_back(place)?;
        }
        if answered {
            times.add(cpu::tsc() - start);
        } else {
            lost += 1;
        }
        card.kick();
    }
    let mut line = Line::result("net-ping");
    line.number("sent", count).number("lost", lost);
    times.report(&mut line, |cycles| clock.ns(cycles));
    line.send();
    Ok(())
}
