//! `/dev/kvm`: present, permitted, able to do what the monitor asks of it, and how it executes guests.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
};
use kvm_ioctls::{Cap, Kvm};

use super::host::Cpu;
use super::proc;
use super::report::{Check, Severity, Virtualization};
use super::speed;

const DEVICE: &str = "/dev/kvm";
/// The only version there has ever been since KVM became stable (Linux, `Documentation/virt/kvm/api.rst`, 4.1).
const API_VERSION: i32 = 12;
/// As many as a guest may be configured to have.
const WANTED_VCPUS: usize = 64;

/// What the monitor cannot do without.
const REQUIRED: [(&str, Cap); 8] = [
    ("user-memory", Cap::UserMemory),
    ("irqchip", Cap::Irqchip),
    ("pit2", Cap::Pit2),
    ("irqfd", Cap::Irqfd),
    ("ioeventfd", Cap::Ioeventfd),
    ("immediate-exit", Cap::ImmediateExit),
    ("ext-cpuid", Cap::ExtCpuid),
    ("mp-state", Cap::MpState),
];

/// All checks about KVM, and how it executes guests.
pub(super) fn examine(cpu: &Cpu) -> (Vec<Check>, Virtualization) {
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => return unusable(not_opened(io::Error::from(error), cpu)),
    };
    let version = kvm.get_api_version();
    if version != API_VERSION {
        let advice = format!("a kernel whose KVM speaks version {API_VERSION} is needed");
        return unusable(Check::no("kvm", Severity::Required, format!("{DEVICE}, API {version}"), advice));
    }
    let mut checks = vec![
        Check::yes("kvm", Severity::Required, format!("{DEVICE}, API {version}")),
        features(|cap| kvm.check_extension(cap)),
        vcpus(kvm.get_nr_vcpus(), kvm.get_max_vcpus()),
        dirty_protect(extension(&kvm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)),
        dirty_ring(extension(&kvm, KVM_CAP_DIRTY_LOG_RING), extension(&kvm, KVM_CAP_DIRTY_LOG_RING_ACQ_REL)),
    ];
    let (virtualization, kind) = virtualization(kvm, cpu);
    checks.insert(1, virtualization);
    (checks, kind)
}

fn unusable(kvm: Check) -> (Vec<Check>, Virtualization) {
    let found = "not known without KVM";
    let virtualization = Check::no("virtualization", Severity::Required, found, "see kvm");
    (vec![kvm, virtualization], Virtualization::None)
}

/// Value of a capability: 0 where KVM has not got it or cannot say.
fn extension(kvm: &Kvm, capability: u32) -> u32 {
    u32::try_from(kvm.check_extension_raw(capability.into())).unwrap_or(0)
}

fn not_opened(error: io::Error, cpu: &Cpu) -> Check {
    let (found, advice) = match error.raw_os_error() {
        Some(libc::ENOENT) => (format!("{DEVICE} is missing"), missing(cpu)),
        Some(libc::ENODEV | libc::ENXIO) => {
            (format!("{DEVICE} is there, but nothing in the kernel answers"), missing(cpu))
        }
        Some(libc::EACCES) => (format!("{DEVICE} may not be opened by this user"), forbidden()),
        Some(libc::EPERM) => (
            format!("{DEVICE} is barred from this process"),
            format!(
                "this is a container: start it with access to {DEVICE} (docker, podman: --device {DEVICE})"
            ),
        ),
        _ => (
            format!("{DEVICE} does not open: {error}"),
            "look for messages about kvm in the kernel's log (dmesg)".to_owned(),
        ),
    };
    Check::no("kvm", Severity::Required, found, advice)
}

/// What to do where the kernel offers no KVM.
fn missing(cpu: &Cpu) -> String {
    let module = cpu.kvm_module();
    match (cpu.virtualization, cpu.guest) {
        (true, _) => {
            format!("modprobe {module} (in a container: hand {DEVICE} in); why it was not loaded is in dmesg")
        }
        (false, true) => format!(
            "this is a virtual machine that is not given virtualization: turn on nesting for it on its host, then modprobe {module}"
        ),
        (false, false) => format!(
            "turn on virtualization (VT-x, AMD-V or SVM) in the firmware's set-up, then modprobe {module}"
        ),
    }
}

/// What to do where this user may not open the device.
fn forbidden() -> String {
    let Ok(device) = fs::metadata(DEVICE) else {
        return format!("have the administrator let you open {DEVICE}");
    };
    if !device.file_type().is_char_device() {
        return format!("{DEVICE} is no device: remove it and load KVM's module again");
    }
    let groups = proc::read("/etc/group").unwrap_or_default();
    permission(device.mode(), group_name(&groups, device.gid()))
}

/// What gives a user access to a device of this mode whose group has this name.
fn permission(mode: u32, group: Option<&str>) -> String {
    match group {
        Some(group) if mode & 0o060 == 0o060 && group != "root" => {
            format!("usermod -aG {group} <user>, then log in again")
        }
        _ => format!(
            "chgrp kvm {DEVICE} && chmod 660 {DEVICE} (a udev rule makes it last), then usermod -aG kvm <user> and log in again"
        ),
    }
}

/// Name of group `gid` in the text of `/etc/group` (`name:password:gid:members`).
fn group_name(groups: &str, gid: u32) -> Option<&str> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then_some(name)
    })
}

fn virtualization(kvm: Kvm, cpu: &Cpu) -> (Check, Virtualization) {
    const NAME: &str = "virtualization";
    let speed = match speed::measure(kvm) {
        Ok(speed) => speed,
        Err(error) => {
            let advice = "look for messages about kvm in the kernel's log (dmesg), and end other hypervisors that run here";
            let check = Check::no(NAME, Severity::Required, error.to_string(), advice);
            return (check, Virtualization::None);
        }
    };
    let figures = format!("ring 0 of a guest {}, host {} instructions/s", speed.guest, speed.host);
    if speed.is_interpreted() {
        let advice = if cpu.guest {
            "turn on nesting for this virtual machine on its host"
        } else {
            "turn on virtualization in the firmware's set-up and use KVM's own module for this processor"
        };
        let found = format!("interpreted: {figures}");
        (Check::no(NAME, Severity::Optional, found, advice), Virtualization::Interpreted)
    } else {
        let check = Check::yes(NAME, Severity::Required, format!("hardware: {figures}"));
        (check, Virtualization::Hardware)
    }
}

fn features(has: impl Fn(Cap) -> bool) -> Check {
    const NAME: &str = "kvm-features";
    let (present, absent): (Vec<_>, Vec<_>) = REQUIRED.into_iter().partition(|(_, cap)| has(*cap));
    let names =
        |list: Vec<(&'static str, Cap)>| list.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    if absent.is_empty() {
        Check::yes(NAME, Severity::Required, names(present))
    } else {
        let found = format!("lacks {}", names(absent));
        Check::no(NAME, Severity::Required, found, "a Linux kernel of version 4.12 or later is needed")
    }
}

fn vcpus(recommended: usize, most: usize) -> Check {
    const NAME: &str = "vcpus";
    let found = format!("up to {most} in a guest, {recommended} recommended");
    if most >= WANTED_VCPUS {
        Check::yes(NAME, Severity::Optional, found)
    } else {
        let advice = format!("keep cpu.count at or below {most}");
        Check::no(NAME, Severity::Optional, found, advice)
    }
}

fn dirty_protect(modes: u32) -> Check {
    const NAME: &str = "dirty-protect";
    match modes {
        0 => Check::no(
            NAME,
            Severity::Optional,
            "KVM re-protects all memory at each look at the dirty log",
            "Linux 5.2 or later migrates large guests with shorter stalls",
        ),
        1 => Check::yes(NAME, Severity::Optional, "manual re-protection of dirty pages"),
        _ => Check::yes(
            NAME,
            Severity::Optional,
            "manual re-protection of dirty pages, pages may start out as dirty",
        ),
    }
}

/// `total_store_order` and `acquire_release` are the greatest ring's bytes by the two capabilities; x86 has either.
fn dirty_ring(total_store_order: u32, acquire_release: u32) -> Check {
    const NAME: &str = "dirty-ring";
    match total_store_order.max(acquire_release) {
        0 => Check::no(
            NAME,
            Severity::Optional,
            "KVM lists dirty pages only as bitmaps",
            "Linux 5.11 or later lists them as rings",
        ),
        // An entry is a struct kvm_dirty_gfn of 16 bytes (api.rst, 8.29).
        bytes => Check::yes(NAME, Severity::Optional, format!("up to {} entries a vCPU", bytes / 16)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(flags: &str) -> Cpu {
        Cpu {
            virtualization: flags.contains("vmx"),
            guest: flags.contains("hypervisor"),
            ..Default::default()
        }
    }

    fn refused(errno: i32, cpu: &Cpu) -> (String, String) {
        let check = not_opened(io::Error::from_raw_os_error(errno), cpu);
        assert!(!check.ok && check.severity == Severity::Required);
        (check.found, check.advice.unwrap())
    }

    #[test]
    fn missing_device_on_a_processor_with_virtualization_is_a_module_to_load() {
        let (found, advice) = refused(libc::ENOENT, &cpu("vmx"));
        assert_eq!(found, "/dev/kvm is missing");
        assert!(advice.starts_with("modprobe kvm_"), "{advice}");
    }

    #[test]
    fn missing_device_without_virtualization_points_to_firmware_or_nesting() {
        assert!(refused(libc::ENOENT, &cpu("")).1.contains("firmware"));
        assert!(refused(libc::ENODEV, &cpu("hypervisor")).1.contains("nesting"));
    }

    #[test]
    fn device_barred_by_a_container_is_told_from_one_barred_by_its_mode() {
        assert!(refused(libc::EPERM, &cpu("vmx")).1.contains("--device /dev/kvm"));
        assert!(refused(libc::EACCES, &cpu("vmx")).0.contains("by this user"));
    }

    #[test]
    fn other_failure_is_told_as_it_is() {
        assert!(refused(libc::EMFILE, &cpu("vmx")).0.contains("Too many open files"));
    }

    #[test]
    fn permission_comes_from_the_devices_group_if_that_helps() {
        assert_eq!(permission(0o20660, Some("virt")), "usermod -aG virt <user>, then log in again");
        assert!(permission(0o20600, Some("kvm")).starts_with("chgrp kvm /dev/kvm && chmod 660"));
        assert!(permission(0o20660, Some("root")).starts_with("chgrp"));
        assert!(permission(0o20660, None).starts_with("chgrp"));
    }

    #[test]
    fn group_is_found_by_number() {
        let text = "root:x:0:\nbroken\nkvm:x:108:alice,bob\nkvm2:x:1080:\n";
        assert_eq!(group_name(text, 108), Some("kvm"));
        assert_eq!(group_name(text, 1080), Some("kvm2"));
        assert_eq!(group_name(text, 10), None);
        assert_eq!(group_name("", 0), None);
    }

    #[test]
    fn absent_features_are_named() {
        assert!(features(|_| true).ok);
        let check = features(|cap| cap != Cap::Irqfd && cap != Cap::ImmediateExit);
        assert_eq!((check.ok, check.found.as_str()), (false, "lacks irqfd, immediate-exit"));
    }

    #[test]
    fn dirty_ring_of_either_kind_counts() {
        assert!(!dirty_ring(0, 0).ok);
        assert_eq!(dirty_ring(0, 1 << 20).found, "up to 65536 entries a vCPU");
        assert_eq!(dirty_ring(1 << 20, 0).found, "up to 65536 entries a vCPU");
    }

    #[test]
    fn few_vcpus_are_a_limit_for_the_configuration() {
        assert!(vcpus(2, 1024).ok);
        assert_eq!(vcpus(2, 16).advice.unwrap(), "keep cpu.count at or below 16");
    }
}
