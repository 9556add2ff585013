//! What the processor says of itself (Intel SDM volume 2A, AMD APM volume 3: `CPUID`).

use alloc::string::String;

use crate::cpu::id;
use crate::json::Line;
use crate::{Error, Machine};

/// Register of a leaf that features are listed in: leaf, subleaf, register (eax to edx: 0 to 3).
type Place = (u32, u32, usize);

const FEATURES: &[(Place, u32, &str)] = &[
    ((1, 0, 2), 0, "sse3"),
    ((1, 0, 2), 9, "ssse3"),
    ((1, 0, 2), 12, "fma"),
    ((1, 0, 2), 13, "cx16"),
    ((1, 0, 2), 17, "pcid"),
    ((1, 0, 2), 19, "sse4_1"),
    ((1, 0, 2), 20, "sse4_2"),
    ((1, 0, 2), 21, "x2apic"),
    ((1, 0, 2), 22, "movbe"),
    ((1, 0, 2), 23, "popcnt"),
    ((1, 0, 2), 24, "tsc_deadline"),
    ((1, 0, 2), 26, "xsave"),
    ((1, 0, 2), 27, "osxsave"),
    ((1, 0, 2), 28, "avx"),
    ((1, 0, 2), 29, "f16c"),
    ((1, 0, 2), 30, "rdrand"),
    ((1, 0, 2), 31, "hypervisor"),
    ((1, 0, 3), 28, "ht"),
    ((7, 0, 1), 3, "bmi1"),
    ((7, 0, 1), 5, "avx2"),
    ((7, 0, 1), 7, "smep"),
    ((7, 0, 1), 8, "bmi2"),
    ((7, 0, 1), 16, "avx512f"),
    ((7, 0, 1), 18, "rdseed"),
    ((7, 0, 1), 20, "smap"),
    ((0x8000_0001, 0, 2), 0, "lahf_lm"),
    ((0x8000_0001, 0, 2), 2, "svm"),
    ((0x8000_0001, 0, 2), 5, "lzcnt"),
    ((0x8000_0001, 0, 3), 20, "nx"),
    ((0x8000_0001, 0, 3), 26, "pdpe1gb"),
    ((0x8000_0001, 0, 3), 27, "rdtscp"),
    ((0x8000_0001, 0, 3), 29, "lm"),
    ((0x8000_0007, 0, 3), 8, "invariant_tsc"),
];

fn text(words: &[u32]) -> String {
    let bytes: alloc::vec::Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).into()
}

/// `test=cpuid`
pub fn run(machine: &Machine) -> Result<(), Error> {
    let [highest, b, c, d] = id(0, 0);
    let [version, own, features, _] = id(1, 0);
    let highest_extended = id(0x8000_0000, 0)[0];
    let mut line = Line::result("cpuid");
    line.text("vendor", &text(&[b, d, c])).number("max_leaf", highest.into());
    line.number("max_extended_leaf", highest_extended.into()).number("version", version.into());
    if highest_extended >= 0x8000_0004 {
        let name = [0x8000_0002, 0x8000_0003, 0x8000_0004].map(|leaf| id(leaf, 0)).concat();
        line.text("name", &text(&name));
    }
    if features >> 31 == 1 {
        let [highest, b, c, d] = id(0x4000_0000, 0);
        line.text("hypervisor", &text(&[b, c, d])).number("max_hypervisor_leaf", highest.into());
    }
    line.number("apic_id", (own >> 24).into()).number("logical_in_package", (own >> 16 & 0xff).into());
    if highest >= 0x0b {
        let levels = [0, 1].map(|level| id(0x0b, level));
        line.numbers("topology_shift", levels.map(|level| u64::from(level[0] & 0x1f)));
        line.numbers("topology_count", levels.map(|level| u64::from(level[1] & 0xffff)));
        line.numbers("topology_kind", levels.map(|level| u64::from(level[2] >> 8 & 0xff)));
        line.number("x2apic_id", levels[0][3].into());
    }
    let has = |place: Place, bit| {
        let top = if place.0 < 0x8000_0000 { highest } else { highest_extended };
        place.0 <= top && id(place.0, place.1)[place.2] >> bit & 1 == 1
    };
    line.texts(
        "features",
        FEATURES.iter().filter(|feature| has(feature.0, feature.1)).map(|feature| feature.2),
    );
    line.number("tsc_khz", machine.clock.khz()).text("clock", machine.clock.source()).send();
    Ok(())
}
