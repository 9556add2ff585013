//! Time: the time stamp counter, and how fast it runs.

use core::sync::atomic::{Ordering, fence};

use crate::cpu::{self, in8, out8};
use crate::phys;

const NS_PER_S: u64 = 1_000_000_000;

/// How the frequency was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// CPUID, leaf 15H or the hypervisors' timing leaf.
    Cpuid,
    /// The scale that KVM publishes with its clock.
    KvmClock,
    /// Measured with the interval timer.
    Pit,
    /// Not at all: a cycle counts as a nanosecond.
    Unknown,
}

/// The time stamp counter as a clock.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    khz: u64,
    source: Source,
}

impl Clock {
    /// Finds the counter's frequency.
    pub fn find() -> Self {
        None.or_else(|| from_cpuid().map(|khz| (khz, Source::Cpuid)))
            .or_else(|| from_kvm_clock().map(|khz| (khz, Source::KvmClock)))
            .or_else(|| from_pit().map(|khz| (khz, Source::Pit)))
            .map_or(Self { khz: 1_000_000, source: Source::Unknown }, |(khz, source)| Self { khz, source })
    }

    /// Frequency in kHz, as far as known.
    pub fn khz(self) -> u64 {
        self.khz
    }

    /// How it was found, as reports name it.
    pub fn source(self) -> &'static str {
        match self.source {
            Source::Cpuid => "cpuid",
            Source::KvmClock => "kvm-clock",
            Source::Pit => "pit",
            Source::Unknown => "unknown",
        }
    }

    /// Nanoseconds that `cycles` take.
    pub fn ns(self, cycles: u64) -> u64 {
        scale(cycles, 1_000_000, self.khz)
    }

    /// Cycles of `ns` nanoseconds.
    pub fn cycles(self, ns: u64) -> u64 {
        scale(ns, self.khz, 1_000_000)
    }

    /// Cycles of `seconds`.
    pub fn seconds(self, seconds: u64) -> u64 {
        self.cycles(seconds.saturating_mul(NS_PER_S))
    }

    /// `count` things in `cycles`, as things a second.
    pub fn rate(self, count: u64, cycles: u64) -> u64 {
        scale(count, NS_PER_S, self.ns(cycles).max(1))
    }
}

/// `value * by / divisor` without overflow on the way.
fn scale(value: u64, by: u64, divisor: u64) -> u64 {
    u64::try_from(u128::from(value) * u128::from(by) / u128::from(divisor)).unwrap_or(u64::MAX)
}

fn from_cpuid() -> Option<u64> {
    let hypervisor = cpu::id(1, 0)[2] >> 31 == 1;
    if hypervisor && cpu::id(0x4000_0000, 0)[0] >= 0x4000_0010 {
        let khz = cpu::id(0x4000_0010, 0)[0];
        if khz != 0 {
            return Some(khz.into());
        }
    }
    if cpu::id(0, 0)[0] < 0x15 {
        return None;
    }
    let [denominator, numerator, hertz, _] = cpu::id(0x15, 0);
    let known = denominator != 0 && numerator != 0 && hertz != 0;
    known.then(|| u64::from(hertz) * u64::from(numerator) / u64::from(denominator) / 1000)
}

/// `struct pvclock_vcpu_time_info` (Linux, `Documentation/virt/kvm/x86/msr.rst`, `MSR_KVM_SYSTEM_TIME_NEW`).
#[repr(C, align(32))]
struct TimeInfo(core::cell::UnsafeCell<[u32; 8]>);

// SAFETY: written by the hypervisor only, and read through volatile accesses.
unsafe impl Sync for TimeInfo {}

static TIME_INFO: TimeInfo = TimeInfo(core::cell::UnsafeCell::new([0; 8]));

fn from_kvm_clock() -> Option<u64> {
    const SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;
    let [_, ebx, ecx, edx] = cpu::id(0x4000_0000, 0);
    let hypervisor = cpu::id(1, 0)[2] >> 31 == 1;
    let kvm = hypervisor && [ebx, ecx, edx] == [*b"KVMK", *b"VMKV", *b"M\0\0\0"].map(u32::from_le_bytes);
    if !kvm || cpu::id(0x4000_0001, 0)[0] >> 3 & 1 == 0 {
        return None;
    }
    let info = phys::address(TIME_INFO.0.get());
    cpu::write_msr(SYSTEM_TIME_NEW, info | 1);
    fence(Ordering::SeqCst);
    let scale: u32 = phys::read(info + 24);
    let shift: i8 = phys::read(info + 28);
    cpu::write_msr(SYSTEM_TIME_NEW, 0);
    // ns = (cycles << shift) * scale >> 32, so kHz = (10^6 << 32) / scale >> shift.
    let khz = (1_000_000_u64 << 32).checked_div(scale.into())?;
    Some(if shift < 0 { khz << shift.unsigned_abs() } else { khz >> shift.unsigned_abs() })
}

/// Counts cycles during 10 ms of the interval timer's channel 2.
fn from_pit() -> Option<u64> {
    const CONTROL: u16 = 0x43;
    const CHANNEL2: u16 = 0x42;
    const GATE: u16 = 0x61;
    const OUTPUT: u8 = 1 << 5;
    const COUNT: u16 = 11932; // of 1.193182 MHz
    const PATIENCE: u64 = 1 << 32;
    /// Faster and slower than any processor.
    const PLAUSIBLE: core::ops::Range<u64> = 100_000..20_000_000;
    let speaker = in8(GATE);
    out8(GATE, speaker & !3 | 1);
    out8(CONTROL, 0xb0); // channel 2, both bytes, mode 0
    let [low, high] = COUNT.to_le_bytes();
    out8(CHANNEL2, low);
    out8(CHANNEL2, high);
    let start = cpu::tsc();
    while in8(GATE) & OUTPUT == 0 {
        if cpu::tsc() - start > PATIENCE {
            return None;
        }
    }
    let khz = (cpu::tsc() - start) / 10;
    PLAUSIBLE.contains(&khz).then_some(khz)
}
