//! The host itself: processor, kernel, memory.

use super::proc::{self, Kib};
use super::report::{Check, Severity};

/// Memory of a guest whose configuration does not say.
const DEFAULT_GUEST_KIB: u64 = 256 << 10;

/// What `/proc/cpuinfo` says, as far as it matters here; empty where it says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cpu {
    pub vendor: String,
    pub model: String,
    pub count: usize,
    /// Hardware virtualization is there and not disabled by the firmware.
    pub virtualization: bool,
    /// The processor is itself a virtual one.
    pub guest: bool,
}

impl Cpu {
    /// The kernel module that drives virtualization on this processor.
    pub fn kvm_module(&self) -> &'static str {
        match self.vendor.as_str() {
            "GenuineIntel" | "CentaurHauls" | "  Shanghai  " => "kvm_intel",
            _ => "kvm_amd",
        }
    }
}

/// Reads it.
pub(super) fn cpu() -> Cpu {
    parse(&proc::read("/proc/cpuinfo").unwrap_or_default())
}

/// Understands the text of `/proc/cpuinfo` (one paragraph of `key : value` lines per processor).
fn parse(text: &str) -> Cpu {
    let mut cpu = Cpu::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        // Not trimmed on the right: one vendor's name ends in blanks.
        let (key, value) = (key.trim(), value.strip_prefix(' ').unwrap_or(value));
        match key {
            "processor" => cpu.count += 1,
            "vendor_id" if cpu.count == 1 => cpu.vendor = value.to_owned(),
            "model name" if cpu.count == 1 => cpu.model = value.trim().to_owned(),
            "flags" if cpu.count == 1 => {
                cpu.virtualization = value.split_whitespace().any(|flag| flag == "vmx" || flag == "svm");
                cpu.guest = value.split_whitespace().any(|flag| flag == "hypervisor");
            }
            _ => {}
        }
    }
    cpu
}

/// Which processor it is.
pub(super) fn cpu_check(cpu: &Cpu) -> Check {
    const NAME: &str = "cpu";
    if cpu.count == 0 {
        return Check::no(NAME, Severity::Optional, "/proc/cpuinfo tells of no processor", "mount /proc");
    }
    let threads = if cpu.count == 1 { "1 thread".to_owned() } else { format!("{} threads", cpu.count) };
    let guest = if cpu.guest { ", in a virtual machine" } else { "" };
    Check::yes(NAME, Severity::Optional, format!("{} ({}), {threads}{guest}", cpu.model, cpu.vendor.trim()))
}

/// Which kernel runs.
pub(super) fn kernel() -> Check {
    const NAME: &str = "kernel";
    match proc::read("/proc/sys/kernel/osrelease") {
        Ok(release) => Check::yes(NAME, Severity::Optional, format!("Linux {release}")),
        Err(error) => Check::no(NAME, Severity::Optional, error.to_string(), "mount /proc"),
    }
}

/// How much memory there is for guests.
pub(super) fn memory() -> Check {
    match proc::read("/proc/meminfo") {
        Ok(text) => memory_of(&text),
        Err(error) => Check::no("memory", Severity::Optional, error.to_string(), "mount /proc"),
    }
}

fn memory_of(meminfo: &str) -> Check {
    const NAME: &str = "memory";
    let (Some(total), Some(available)) =
        (proc::field_kib(meminfo, "MemTotal"), proc::field_kib(meminfo, "MemAvailable"))
    else {
        let found = "/proc/meminfo does not tell how much is available";
        return Check::no(NAME, Severity::Optional, found, "see `free`");
    };
    let found = format!("{} of {} available", Kib(available), Kib(total));
    if available >= DEFAULT_GUEST_KIB {
        Check::yes(NAME, Severity::Optional, found)
    } else {
        let advice = "end something, or give guests a smaller memory.size";
        Check::no(NAME, Severity::Optional, found, advice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_is_available_not_what_is_free() {
        let text = "MemTotal:       24684092 kB\nMemFree:         1774132 kB\nMemAvailable:   24196000 kB\n";
        let check = memory_of(text);
        assert_eq!((check.ok, check.found.as_str()), (true, "23.0 GiB of 23.5 GiB available"));
        assert!(!memory_of("MemTotal: 500000 kB\nMemAvailable: 100000 kB\n").ok);
        assert!(!memory_of("MemTotal: 500000 kB\n").ok);
    }

    const INTEL: &str = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t\t: 207\nmodel name\t: Intel(R) Xeon(R) Processor\n\
        flags\t\t: fpu vme vmx hypervisor lahf_lm\nvmx flags\t: vnmi ept\npower management:\n\n\
        processor\t: 1\nvendor_id\t: GenuineIntel\nflags\t\t: fpu\n";

    #[test]
    fn processors_are_counted_and_described_by_the_first() {
        let cpu = parse(INTEL);
        assert_eq!(
            cpu,
            Cpu {
                vendor: "GenuineIntel".into(),
                model: "Intel(R) Xeon(R) Processor".into(),
                count: 2,
                virtualization: true,
                guest: true,
            }
        );
        assert_eq!(cpu.kvm_module(), "kvm_intel");
        assert_eq!(
            cpu_check(&cpu).found,
            "Intel(R) Xeon(R) Processor (GenuineIntel), 2 threads, in a virtual machine"
        );
    }

    #[test]
    fn flags_count_as_whole_words() {
        let cpu = parse("processor : 0\nvendor_id : AuthenticAMD\nflags : svm_lock vmxx hypervisors\n");
        assert!(!cpu.virtualization && !cpu.guest);
        assert!(parse("processor : 0\nflags : fpu svm\n").virtualization);
        assert_eq!(cpu.kvm_module(), "kvm_amd");
    }

    #[test]
    fn vendor_that_ends_in_blanks_is_known() {
        assert_eq!(parse("processor\t: 0\nvendor_id\t:   Shanghai  \n").kvm_module(), "kvm_intel");
    }

    #[test]
    fn text_without_processors_is_a_no() {
        assert!(!cpu_check(&parse("")).ok);
        assert!(!cpu_check(&parse("garbage\n: :\n\u{0}:")).ok);
    }
}
