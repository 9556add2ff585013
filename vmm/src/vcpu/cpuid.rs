//! What a guest reads with `CPUID`: the host's features as KVM offers them, the guest's own topology, and the
//! mask of the configured processor model.
//!
//! Leaves and bits: Intel SDM volume 2A, `CPUID`; AMD APM volume 3, appendix E; `Documentation/virt/kvm/x86/cpuid.rst`.

use std::arch::x86_64::{__cpuid, CpuidResult};

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::config::model::CpuModel;

/// A model that the host cannot give.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Features of the level are absent on the host.
    #[error("this host has not got what the processor model {model} needs: {}", missing.join(", "))]
    Missing {
        /// The model, as configured.
        model: &'static str,
        /// Names of the absent features.
        missing: Vec<&'static str>,
    },
    /// The table is full.
    #[error("the host's CPUID table has no room left for the guest's topology leaves")]
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

use Register::{Eax, Ebx, Ecx, Edx};

/// A feature of an x86-64 level: function, index, register, bit, name.
type Feature = (u32, u32, Register, u32, &'static str);

/// x86-64-v2 over the baseline that every 64-bit processor has (x86-64 psABI, table 3.1).
const V2: &[Feature] = &[
    (1, 0, Ecx, 0, "sse3"),
    (1, 0, Ecx, 9, "ssse3"),
    (1, 0, Ecx, 13, "cx16"),
    (1, 0, Ecx, 19, "sse4.1"),
    (1, 0, Ecx, 20, "sse4.2"),
    (1, 0, Ecx, 23, "popcnt"),
    (0x8000_0001, 0, Ecx, 0, "lahf"),
];

/// x86-64-v3 over v2 (x86-64 psABI, table 3.1; OSXSAVE there is XSAVE here, since the guest's system sets it).
const V3: &[Feature] = &[
    (1, 0, Ecx, 12, "fma"),
    (1, 0, Ecx, 22, "movbe"),
    (1, 0, Ecx, 26, "xsave"),
    (1, 0, Ecx, 28, "avx"),
    (1, 0, Ecx, 29, "f16c"),
    (7, 0, Ebx, 3, "bmi1"),
    (7, 0, Ebx, 5, "avx2"),
    (7, 0, Ebx, 8, "bmi2"),
    (0x8000_0001, 0, Ecx, 5, "lzcnt"),
];

/// What a level leaves of a register, beside the level's own features: the baseline, and what serves the
/// operating system rather than programs (paging, interrupts, clocks, protection, mitigations).
const KEPT: &[(u32, u32, Register, u32)] = &[
    // pcid, x2apic, tsc-deadline, osxsave (follows CR4), hypervisor
    (1, 0, Ecx, 1 << 17 | 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
    // All of it is older than x86-64, but for ds, acpi, ss, ht, tm, pbe, which KVM decides about.
    (1, 0, Edx, u32::MAX),
    // eax counts subleaves; the masks of those are below
    (7, 0, Eax, u32::MAX),
    // fsgsbase, tsc_adjust, smep, erms, invpcid, smap
    (7, 0, Ebx, 1 << 0 | 1 << 1 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 20),
    // umip, rdpid
    (7, 0, Ecx, 1 << 2 | 1 << 22),
    // fsrm, md_clear, ibrs/ibpb, stibp, flush_l1d, arch_capabilities, ssbd
    (7, 0, Edx, 1 << 4 | 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31),
    (7, 1, Eax, 0),
    (7, 1, Ebx, 0),
    (7, 1, Ecx, 0),
    (7, 1, Edx, 0),
    (7, 2, Edx, 0),
    // cmp_legacy, svm, cr8_legacy, topoext
    (0x8000_0001, 0, Ecx, 1 << 1 | 1 << 2 | 1 << 4 | 1 << 22),
    // The copy of leaf 1, syscall, nx, fxsr_opt, 1 GiB pages, rdtscp, long mode; not 3DNow! and its kin.
    (0x8000_0001, 0, Edx, 0x2fff_ffff & !(1 << 22)),
];

/// The leaves of `supported` (from `KVM_GET_SUPPORTED_CPUID`) as a guest of `count` processors sees them,
/// for every processor alike; [`for_vcpu`] adds what differs.
///
/// # Errors
///
/// [`Error`] if the host lacks a feature of `model`.
pub fn common(
    mut supported: CpuId,
    model: CpuModel,
    count: u8,
    tsc_khz: Option<u32>,
) -> Result<CpuId, Error> {
    apply_model(&mut supported, model)?;
    let cores = u32::from(count);
    for entry in supported.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ecx |= 1 << 24 | 1 << 31; // tsc-deadline through the in-kernel APIC; hypervisor present
                entry.ebx = entry.ebx & 0xff00_ffff | cores << 16;
                entry.edx = set(entry.edx, 28, cores > 1);
            }
            // Cache parameters: what is shared by cores of the host is shared by all of the guest's.
            4 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { apic_ids(cores) - 1 } else { 0 };
                entry.eax = entry.eax & 0x0000_3fff | sharing << 14 | (apic_ids(cores) - 1).min(0x3f) << 26;
            }
            0x8000_001d => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { cores - 1 } else { 0 };
                entry.eax = entry.eax & 0xfc00_3fff | sharing << 14;
            }
            // Power management, performance counters and processor trace are not given to guests.
            6 => entry.eax &= 1 << 2,
            0x0a => clear(entry),
            0x8000_0001 => entry.ecx = set(entry.ecx, 1, cores > 1),
            // Core count, and the width of the core's part of the APIC ID.
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | core_bits(cores) << 12 | (cores - 1),
            _ => {}
        }
    }
    topology_leaves(supported, cores, tsc_khz)
}

/// Gives processor `id` its own APIC ID in every leaf that holds one.
pub fn for_vcpu(cpuid: &mut CpuId, id: u8) {
    let id = u32::from(id);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            0x0b | 0x1f => entry.edx = id,
            0x8000_001e => {
                entry.eax = id;
                entry.ebx = id & 0xff; // one thread a core
                entry.ecx = 0; // one node
            }
            _ => {}
        }
    }
}

fn set(value: u32, bit: u32, on: bool) -> u32 {
    value & !(1 << bit) | u32::from(on) << bit
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// Number of APIC IDs that `cores` processors span: the next power of two.
fn apic_ids(cores: u32) -> u32 {
    cores.next_power_of_two()
}

fn core_bits(cores: u32) -> u32 {
    apic_ids(cores).trailing_zeros()
}

fn topology_leaves(table: CpuId, cores: u32, tsc_khz: Option<u32>) -> Result<CpuId, Error> {
    let mut entries: Vec<kvm_cpuid_entry2> = table
        .as_slice()
        .iter()
        .filter(|e| !matches!(e.function, 0x0b | 0x1f | 0x8000_0026))
        .copied()
        .collect();
    let has = |entries: &[kvm_cpuid_entry2], function| entries.iter().any(|e| e.function == function);
    // Extended topology (SDM: leaf 0BH): one thread a core, all cores in one package. Both vendors have it.
    let highest = entries.iter().filter(|e| e.function == 0).map(|e| e.eax).max().unwrap_or(0);
    if highest >= 0x0b {
        let leaf = |index, eax, ebx, ecx| kvm_cpuid_entry2 {
            function: 0x0b,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            ..Default::default()
        };
        entries.push(leaf(0, 0, 1, 1 << 8));
        entries.push(leaf(1, core_bits(cores), cores, 2 << 8 | 1));
        entries.push(leaf(2, 0, 0, 2));
        // 1FH would have to be kept consistent with 0BH and says nothing more for this topology.
        for entry in entries.iter_mut().filter(|e| e.function == 0) {
            entry.eax = entry.eax.min(0x1e);
        }
    }
    // Frequencies of the TSC and of the APIC timer in kHz (the timing leaf that several hypervisors share).
    if let Some(khz) = tsc_khz {
        for entry in entries.iter_mut().filter(|e| e.function == 0x4000_0000) {
            entry.eax = entry.eax.max(0x4000_0010);
        }
        if has(&entries, 0x4000_0000) && !has(&entries, 0x4000_0010) {
            entries.push(kvm_cpuid_entry2 {
                function: 0x4000_0010,
                eax: khz,
                ebx: 1_000_000,
                ..Default::default()
            });
        }
    }
    name_leaves(&mut entries);
    CpuId::from_entries(&entries).map_err(|_| Error::Full)
}

/// The processor's name (SDM: leaves 80000002H to 80000004H), which some KVMs leave out, taken from the host.
fn name_leaves(entries: &mut Vec<kvm_cpuid_entry2>) {
    const NAME: std::ops::RangeInclusive<u32> = 0x8000_0002..=0x8000_0004;
    let highest = entries.iter().find(|e| e.function == 0x8000_0000).map_or(0, |e| e.eax);
    let is_name = |e: &kvm_cpuid_entry2| NAME.contains(&e.function);
    let is_there = |e: &kvm_cpuid_entry2| is_name(e) && (e.eax | e.ebx | e.ecx | e.edx) != 0;
    if highest < *NAME.end() || entries.iter().any(is_there) {
        return;
    }
    entries.retain(|entry| !is_name(entry));
    entries.extend(NAME.map(|function| {
        let CpuidResult { eax, ebx, ecx, edx } = __cpuid(function);
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }));
}

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Eax => &mut entry.eax,
        Ebx => &mut entry.ebx,
        Ecx => &mut entry.ecx,
        Edx => &mut entry.edx,
    }
}

fn apply_model(table: &mut CpuId, model: CpuModel) -> Result<(), Error> {
    let (name, features) = match model {
        CpuModel::Host => return Ok(()),
        CpuModel::X86_64V2 => ("x86-64-v2", V2.to_vec()),
        CpuModel::X86_64V3 => ("x86-64-v3", [V2, V3].concat()),
    };
    let offered = |table: &mut CpuId, (function, index, reg, bit, _): Feature| {
        let mut entries = table.as_mut_slice().iter_mut();
        entries.any(|e| e.function == function && e.index == index && *register(e, reg) >> bit & 1 == 1)
    };
    let missing: Vec<_> = features.iter().filter(|f| !offered(table, **f)).map(|f| f.4).collect();
    if !missing.is_empty() {
        return Err(Error::Missing { model: name, missing });
    }
    for entry in table.as_mut_slice() {
        for &(function, index, reg, kept) in KEPT {
            if (entry.function, entry.index) == (function, index) {
                let level = features.iter().filter(|f| (f.0, f.1, f.2) == (function, index, reg));
                *register(entry, reg) &= level.fold(kept, |mask, f| mask | 1 << f.3);
            }
        }
        match (entry.function, model) {
            // Extended state: x87, SSE and AVX, no compaction or supervisor state beyond what the level uses.
            (0x0d, CpuModel::X86_64V2) => clear(entry),
            (0x0d, _) => limit_xsave(entry),
            // Leaves of extensions above any level: SGX, processor trace, key locker, AMX tiles, AVX10.
            (0x12 | 0x14 | 0x19 | 0x1d | 0x1e | 0x24, _) => clear(entry),
            // clzero, xsaveerptr, rdpru, wbnoinvd stay with the host model; mitigations are kept.
            (0x8000_0008, _) => entry.ebx &= 1 << 12 | 1 << 14 | 1 << 15 | 1 << 24 | 1 << 26,
            _ => {}
        }
    }
    Ok(())
}

/// Size in bytes of the XSAVE area for x87, SSE and AVX: 512 legacy, 64 header, 256 upper halves.
const XSAVE_AVX_BYTES: u32 = 512 + 64 + 256;

fn limit_xsave(entry: &mut kvm_cpuid_entry2) {
    match entry.index {
        0 => {
            entry.eax &= 0b111;
            entry.edx = 0;
            entry.ebx = entry.ebx.min(XSAVE_AVX_BYTES);
            entry.ecx = entry.ecx.min(XSAVE_AVX_BYTES);
        }
        1 => {
            entry.eax &= 1; // xsaveopt
            (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0);
        }
        2 => {}
        _ => clear(entry),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn everything() -> CpuId {
        let all = [u32::MAX; 4];
        CpuId::from_entries(&[
            entry(0, 0, [0x20, 0, 0, 0]),
            entry(1, 0, all),
            entry(4, 0, all),
            entry(7, 0, all),
            entry(7, 1, all),
            entry(0x0b, 0, all),
            entry(0x0d, 0, all),
            entry(0x1f, 0, all),
            entry(0x4000_0000, 0, [0x4000_0001, 1, 2, 3]),
            entry(0x8000_0001, 0, all),
            entry(0x8000_0008, 0, all),
            entry(0x8000_001e, 0, all),
        ])
        .unwrap()
    }

    fn find(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *table.as_slice().iter().find(|e| (e.function, e.index) == (function, index)).unwrap()
    }

    #[test]
    fn topology_of_six_cores_spans_eight_apic_ids_in_one_package() {
        let mut table = common(everything(), CpuModel::Host, 6, None).unwrap();
        for_vcpu(&mut table, 5);
        let one = find(&table, 1, 0);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.edx >> 28 & 1), (5, 6, 1));
        let (threads, cores, end) = (find(&table, 0x0b, 0), find(&table, 0x0b, 1), find(&table, 0x0b, 2));
        assert_eq!((threads.eax, threads.ebx, threads.ecx, threads.edx), (0, 1, 0x100, 5));
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (3, 6, 0x201, 5));
        assert_eq!((end.eax, end.ebx), (0, 0));
        assert_eq!(find(&table, 0x8000_0008, 0).ecx & 0xf0ff, 3 << 12 | 5);
        assert!(table.as_slice().iter().all(|e| e.function != 0x1f));
    }

    #[test]
    fn one_core_is_not_marked_as_hyper_threaded() {
        let table = common(everything(), CpuModel::Host, 1, None).unwrap();
        assert_eq!(find(&table, 1, 0).edx >> 28 & 1, 0);
        assert_eq!(find(&table, 0x8000_0001, 0).ecx >> 1 & 1, 0);
    }

    #[test]
    fn level_v2_hides_avx_and_level_v3_shows_it_without_avx512() {
        let v2 = common(everything(), CpuModel::X86_64V2, 1, None).unwrap();
        assert_eq!(find(&v2, 1, 0).ecx >> 28 & 1, 0);
        assert_eq!(find(&v2, 7, 0).ebx >> 5 & 1, 0);
        assert_eq!(find(&v2, 1, 0).ecx >> 20 & 1, 1, "sse4.2 belongs to v2");
        let v3 = common(everything(), CpuModel::X86_64V3, 1, None).unwrap();
        assert_eq!(find(&v3, 1, 0).ecx >> 28 & 1, 1);
        assert_eq!(find(&v3, 7, 0).ebx >> 5 & 1, 1);
        assert_eq!(find(&v3, 7, 0).ebx >> 16 & 1, 0, "avx512f is above v3");
        assert_eq!(find(&v3, 0x0d, 0).eax, 0b111);
        assert_eq!(find(&v3, 7, 1).eax, 0);
    }

    #[test]
    fn model_above_the_host_names_every_missing_feature() {
        let host = CpuId::from_entries(&[
            entry(1, 0, [0, 0, !(1 << 12), 0]),
            entry(7, 0, [0, !(1 << 5), 0, 0]),
            entry(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
        ])
        .unwrap();
        let error = common(host, CpuModel::X86_64V3, 1, None).unwrap_err().to_string();
        assert!(error.ends_with("x86-64-v3 needs: fma, avx2"), "{error}");
    }

    #[test]
    fn timing_leaf_gives_the_tsc_frequency() {
        let table = common(everything(), CpuModel::Host, 1, Some(2_445_000)).unwrap();
        assert_eq!(find(&table, 0x4000_0000, 0).eax, 0x4000_0010);
        assert_eq!(find(&table, 0x4000_0010, 0).eax, 2_445_000);
    }

    #[test]
    fn name_that_kvm_leaves_out_is_the_hosts_and_one_that_it_gives_stays() {
        let with = |name: [u32; 4]| {
            let mut entries = vec![entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0])];
            entries.extend((2..=4).map(|leaf| entry(0x8000_0000 + leaf, 0, name)));
            name_leaves(&mut entries);
            assert_eq!(entries.len(), 4);
            entries
        };
        let given = with([1, 2, 3, 4]);
        assert!(given[1..].iter().all(|e| (e.eax, e.edx) == (1, 4)));
        let host = __cpuid(0x8000_0002);
        assert_eq!((with([0; 4])[1].eax, with([0; 4])[1].edx), (host.eax, host.edx));
    }
}
