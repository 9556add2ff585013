//! Network cards: answering others, be they test guests or hosts that use `ping`.

use alloc::format;

use super::{Stopwatch, ether};
use crate::json::Line;
use crate::virtio::net::Card;
use crate::{Error, Machine, cpu};

/// Place of fields in an ARP message for IPv4 over Ethernet (RFC 826), counted from the frame's start.
mod arp {
    pub const HEAD: core::ops::Range<usize> = 14..20;
    pub const OPERATION: core::ops::Range<usize> = 20..22;
    pub const SENDER: core::ops::Range<usize> = 22..32;
    pub const TARGET: core::ops::Range<usize> = 32..42;
    pub const TARGET_IP: core::ops::Range<usize> = 38..42;
    pub const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
    pub const REQUEST: [u8; 2] = [0, 1];
    pub const REPLY: [u8; 2] = [0, 2];
}

/// Place of fields in an IPv4 packet (RFC 791) without options that carries ICMP (RFC 792).
mod icmp {
    pub const VERSION: usize = 14;
    pub const PROTOCOL: usize = 23;
    pub const SOURCE: core::ops::Range<usize> = 26..30;
    pub const TARGET: core::ops::Range<usize> = 30..34;
    pub const TYPE: usize = 34;
    pub const CHECKSUM: core::ops::Range<usize> = 36..38;
    pub const VERSION_4_NO_OPTIONS: u8 = 0x45;
    pub const ICMP: u8 = 1;
    pub const ECHO: u8 = 8;
    pub const ECHO_REPLY: u8 = 0;
}

/// Makes the answer to `frame` out of it; false if there is none.
fn answer(frame: &mut [u8], own: [u8; 6], ip: Option<[u8; 4]>) -> bool {
    let answered = match (ether::kind(frame), ip) {
        // What is for everybody is answered, what is for another is not.
        (Some(ether::EXPERIMENT), _) => frame[..6] == own || frame[..6] == ether::BROADCAST,
        (Some(ether::ARP), Some(ip)) => answer_arp(frame, own, ip),
        (Some(ether::IPV4), Some(ip)) => answer_ping(frame, ip),
        _ => false,
    };
    if answered {
        ether::turn_round(frame, own);
    }
    answered
}

fn answer_arp(frame: &mut [u8], own: [u8; 6], ip: [u8; 4]) -> bool {
    let asked = frame.len() >= arp::TARGET.end
        && frame[arp::HEAD] == arp::ETHERNET_IPV4
        && frame[arp::OPERATION] == arp::REQUEST
        && frame[arp::TARGET_IP] == ip;
    if asked {
        frame[arp::OPERATION].copy_from_slice(&arp::REPLY);
        frame.copy_within(arp::SENDER, arp::TARGET.start);
        frame[arp::SENDER][..6].copy_from_slice(&own);
        frame[arp::SENDER][6..].copy_from_slice(&ip);
    }
    asked
}

fn answer_ping(frame: &mut [u8], ip: [u8; 4]) -> bool {
    let asked = frame.len() >= icmp::CHECKSUM.end
        && frame[icmp::VERSION] == icmp::VERSION_4_NO_OPTIONS
        && frame[icmp::PROTOCOL] == icmp::ICMP
        && frame[icmp::TARGET] == ip
        && frame[icmp::TYPE] == icmp::ECHO;
    if asked {
        // Swapping the addresses leaves the header's checksum as it is; the message's changes with its type (RFC 1624).
        frame.copy_within(icmp::SOURCE, icmp::TARGET.start);
        frame[icmp::SOURCE].copy_from_slice(&ip);
        frame[icmp::TYPE] = icmp::ECHO_REPLY;
        let sum = u16::from_be_bytes([frame[icmp::CHECKSUM.start], frame[icmp::CHECKSUM.start + 1]]);
        let (sum, carry) = sum.overflowing_add(u16::from(icmp::ECHO) << 8);
        frame[icmp::CHECKSUM].copy_from_slice(&(sum + u16::from(carry)).to_be_bytes());
    }
    asked
}

fn ip(machine: &Machine) -> Result<Option<[u8; 4]>, Error> {
    let Some(text) = machine.args.all("ip").next() else { return Ok(None) };
    let address: core::net::Ipv4Addr =
        text.parse().map_err(|_| format!("ip={text}: an IPv4 address is wanted"))?;
    Ok(Some(address.octets()))
}

/// `test=net-echo`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let count = machine.args.number("count", u64::MAX)?;
    let ip = ip(machine)?;
    let mut card = Card::open(&machine.args, machine.clock)?;
    let own = card.mac();
    Line::new("ready").text("mac", &ether::text(own)).send();
    let (mut answered, mut others, mut dropped) = (0, 0_u64, 0_u64);
    let mut watch = Stopwatch::start(machine, None)?;
    while watch.goes_on(answered) && answered < count {
        if !card.wait() {
            continue;
        }
        while let Some(mut place) = card.receive()? {
            let frame = place.frame();
            if !answer(frame, own, ip) {
                others += 1;
            } else if let Some(mut reply) = card.place(frame.len() as u64) {
                reply.frame().copy_from_slice(frame);
                card.send(reply)?;
                answered += 1;
            } else {
                dropped += 1;
            }
            card.give_back(place)?;
        }
        card.kick();
    }
    while !card.all_sent() {
        cpu::relax();
    }
    let mut line = Line::result("net-echo");
    line.number("answered", answered).number("others", others).number("dropped", dropped);
    line.number("interrupts", card.device().interrupts());
    watch.report(&mut line);
    line.send();
    Ok(())
}
