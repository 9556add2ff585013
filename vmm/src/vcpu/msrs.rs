//! Model-specific registers a processor starts with.
//!
//! KVM resets a vCPU as hardware does; what firmware would have changed before an operating system sees the
//! processor is set here (Intel SDM volume 4; the state that Linux' boot protocol and PVH leave open).

use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const IA32_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs enabled, memory write-back unless a page says otherwise.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Sets the start values on `vcpu`, leaving out what this KVM refuses. A refusal is reported once for the
/// process: the guest's system can do without any of these.
pub fn set_initial(vcpu: &VcpuFd) {
    static REPORTED: AtomicBool = AtomicBool::new(false);
    let wanted = [
        kvm_msr_entry { index: IA32_MISC_ENABLE, data: MISC_ENABLE_FAST_STRING, ..Default::default() },
        kvm_msr_entry { index: IA32_MTRR_DEF_TYPE, data: MTRR_ENABLED_WRITE_BACK, ..Default::default() },
    ];
    // KVM_SET_MSRS stops at the first register it refuses and says how many it has set.
    let mut rest = &wanted[..];
    while !rest.is_empty() {
        let Ok(msrs) = Msrs::from_entries(rest) else { return };
        let done = vcpu.set_msrs(&msrs).unwrap_or(0);
        rest = rest.get(done..).unwrap_or_default();
        if let Some((refused, others)) = rest.split_first() {
            if !REPORTED.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "this KVM refuses to set MSR {:#x}; the guest starts with its reset value",
                    refused.index
                );
            }
            rest = others;
        }
    }
}
