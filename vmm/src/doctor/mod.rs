//! What this host can do for guests, and what to do where it cannot: `vmm doctor`.
//!
//! Every check tries the thing itself where that is possible without leaving a trace (opens the device, makes
//! the system call, runs a few instructions in a tiny guest); where it has to read what the kernel says about
//! itself, reading and understanding are apart, so that the latter is tested on the texts of other hosts.

mod cgroups;
mod devices;
mod host;
mod isolation;
mod kvm;
mod memory;
mod proc;
mod report;
mod speed;

pub use report::{Check, Report, Severity, Virtualization};

/// Looks at this host. Takes some tens of milliseconds, changes nothing and never fails: what cannot be found out
/// is a "no" with the reason.
#[must_use]
pub fn examine() -> Report {
    let cpu = host::cpu();
    let (kvm, virtualization) = kvm::examine(&cpu);
    let mut checks = vec![host::cpu_check(&cpu), host::kernel(), host::memory()];
    checks.extend(kvm);
    checks.extend(memory::checks());
    checks.extend(devices::checks());
    checks.push(cgroups::check());
    checks.extend(isolation::checks());
    Report::new(checks, virtualization)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_examined_and_every_no_says_what_to_do() {
        let report = examine();
        for check in report.checks() {
            assert!(!check.found.is_empty(), "{check:?}");
            assert!(check.ok || check.advice.is_some(), "{check:?}");
        }
    }
}
