//! The results for people.

use std::fmt::Write as _;

use super::cases::{Case, State};
use super::{Contender, LIMIT, clone, is_ours, summary};

/// What our flat images are compared with others of ours by.
const FLAT: &str = "vmm-flat";

/// One table a case: median, extremes, the median as a multiple of the best peer's with an image in the same state, of
/// our own flat image's and of the host's limit, and the median processor time a request in µs.
pub fn all(contenders: &[Contender], cases: &[Case]) -> String {
    let mut text = String::new();
    for (number, case) in cases.iter().enumerate() {
        let title = format!("disk {} ({})", case.name, case.unit());
        let _ = writeln!(
            text,
            "{title:<36}{:>10}{:>10}{:>10}{:>8}{:>8}{:>8}{:>10}",
            "median", "min", "max", "x peer", "x flat", "x fio", "cpu us"
        );
        let median = |contender: &Contender| {
            let outcome = &contender.results[number];
            outcome.failed.is_none().then(|| summary(&outcome.iops).ok()).flatten().map(|found| found.median)
        };
        let named = |name| contenders.iter().find(|contender| contender.name == name).and_then(median);
        let peer = |state: State| {
            let peers = contenders.iter().filter(|contender| {
                !is_ours(contender.name) && contender.name != LIMIT && contender.image.state == state
            });
            peers.filter_map(median).reduce(f64::max)
        };
        for contender in contenders.iter().filter(|contender| contender.image.suits(case)) {
            let (name, outcome) = (contender.name, &contender.results[number]);
            let found = outcome.failed.clone().map_or_else(|| summary(&outcome.iops), Err);
            let _ = match found {
                Err(why) => writeln!(text, "{name:<36}skipped: {why}"),
                Ok(found) => {
                    let ratio = |base: Option<f64>| {
                        base.filter(|base| *base > 0.0)
                            .map_or("-".to_owned(), |base| format!("{:.2}", found.median / base))
                    };
                    let [median, min, max] = [found.median, found.min, found.max].map(|n| case.figure(n));
                    let cpu = summary(&outcome.cpu_us).map_or(0.0, |cpu| cpu.median);
                    writeln!(
                        text,
                        "{name:<36}{median:>10.0}{min:>10.0}{max:>10.0}{:>8}{:>8}{:>8}{cpu:>10.2}",
                        ratio(peer(contender.image.state)),
                        ratio(named(FLAT)),
                        ratio(named(LIMIT)),
                    )
                }
            };
        }
        text.push('\n');
    }
    text
}

/// One table of clones: median, extremes, and the median as a multiple of the best peer's; less is better.
pub fn clones(ways: &[clone::Way]) -> String {
    let mut text = String::new();
    if ways.is_empty() {
        return text;
    }
    let title = format!("disk {} ({})", clone::CASE, clone::UNIT);
    let _ = writeln!(text, "{title:<36}{:>10}{:>10}{:>10}{:>8}", "median", "min", "max", "x peer");
    let peers = ways.iter().filter(|way| !is_ours(way.name));
    let peer = peers.filter_map(|way| way.summary().ok()).map(|found| found.median).reduce(f64::min);
    for way in ways {
        let _ = match way.summary() {
            Err(why) => writeln!(text, "{:<36}skipped: {why}", way.name),
            Ok(found) => {
                let ratio = peer.map_or("-".to_owned(), |peer| format!("{:.2}", found.median / peer));
                let (median, min, max) = (found.median, found.min, found.max);
                writeln!(text, "{:<36}{median:>10.1}{min:>10.1}{max:>10.1}{ratio:>8}", way.name)
            }
        };
    }
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::cases::{ALL, Image};
    use crate::disk::{Outcome, Runner};
    use crate::systems::Format;

    fn contender(name: &'static str, state: State, iops: &[f64]) -> Contender {
        let failed = iops.is_empty().then(|| "not found".to_owned());
        Contender {
            name,
            image: Image { format: Format::Raw, state },
            runner: Runner::Nobody(String::new()),
            results: vec![Outcome { iops: iops.to_vec(), cpu_us: vec![1.5; iops.len()], failed }],
        }
    }

    #[test]
    fn ratios_are_to_the_best_peer_of_the_same_state_to_flat_and_to_the_limit() {
        let contenders = [
            contender("vmm-flat", State::Allocated, &[300.0, 200.0, 400.0]),
            contender("firecracker", State::Allocated, &[150.0]),
            contender("qemu-raw", State::Allocated, &[100.0]),
            contender("vmm-thin-backed", State::Backed, &[150.0]),
            contender("qemu-qcow2-backed", State::Backed, &[]),
            contender(LIMIT, State::Allocated, &[600.0]),
        ];
        let text = all(&contenders, &ALL[..1]);
        let row = |nth: usize| text.lines().nth(nth).unwrap().split_ascii_whitespace().collect::<Vec<_>>();
        assert_eq!(row(1), ["vmm-flat", "300", "200", "400", "2.00", "1.00", "0.50", "1.50"]);
        assert_eq!(row(2)[4..6], ["1.00", "0.50"]);
        assert_eq!(row(4), ["vmm-thin-backed", "150", "150", "150", "-", "0.50", "0.25", "1.50"]);
        assert_eq!(row(5), ["qemu-qcow2-backed", "skipped:", "not", "found"]);
    }

    #[test]
    fn clones_are_compared_with_the_fastest_of_a_peer() {
        let way = |name, times: &[f64], failed: Option<&str>| clone::Way {
            name,
            times: times.to_vec(),
            failed: failed.map(str::to_owned),
        };
        let ways = [
            way("vmm-thin", &[9.0, 3.0, 4.0], None),
            way("qemu-raw", &[8.0], None),
            way("qemu-qcow2", &[], Some("no qemu-img")),
        ];
        let text = clones(&ways);
        let row = |nth: usize| text.lines().nth(nth).unwrap().split_ascii_whitespace().collect::<Vec<_>>();
        assert_eq!(row(1), ["vmm-thin", "4.0", "3.0", "9.0", "0.50"]);
        assert_eq!(row(2).last(), Some(&"1.00"));
        assert_eq!(row(3), ["qemu-qcow2", "skipped:", "no", "qemu-img"]);
        assert_eq!(clones(&[]), "");
    }
}
