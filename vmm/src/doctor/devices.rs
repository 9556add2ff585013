//! What the host offers to devices: asynchronous input and output, network interfaces.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use super::proc;
use super::report::{Check, Severity};

const TUN: &str = "/dev/net/tun";
const VHOST_NET: &str = "/dev/vhost-net";

/// All checks of this kind.
pub(super) fn checks() -> Vec<Check> {
    let status = proc::read("/proc/self/status").unwrap_or_default();
    vec![
        io_uring(set_up_io_uring(), proc::number("/proc/sys/kernel/io_uring_disabled")),
        tun(open(TUN).and_then(|tun| features(&tun)), may_administer_networks(&status)),
        vhost_net(open(VHOST_NET).map(drop)),
    ]
}

fn open(path: &str) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn set_up_io_uring() -> io::Result<()> {
    // struct io_uring_params: 120 bytes, all zero for a ring with nothing special (io_uring_setup(2)).
    let mut parameters = [0_u32; 30];
    // SAFETY: the structure is writable and as long as the kernel expects.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1_u32, parameters.as_mut_ptr()) };
    match RawFd::try_from(fd) {
        Ok(fd) if fd >= 0 => {
            // SAFETY: fd was just opened and belongs to nobody else.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            Ok(())
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// `disabled` is `kernel.io_uring_disabled`: 0 for all, 1 for a group and the privileged, 2 for nobody.
fn io_uring(tried: io::Result<()>, disabled: Option<u64>) -> Check {
    const NAME: &str = "io-uring";
    let Err(error) = tried else {
        return Check::yes(NAME, Severity::Optional, "rings can be set up");
    };
    let advice = match (error.raw_os_error(), disabled) {
        (Some(libc::ENOSYS), _) => "a kernel with CONFIG_IO_URING, of version 5.1 or later, is needed",
        (Some(libc::ENOMEM), _) => "raise the limit on locked memory (ulimit -l)",
        (Some(libc::EPERM), Some(1)) => {
            "sysctl kernel.io_uring_disabled=0, or join the group of kernel.io_uring_group"
        }
        (Some(libc::EPERM), Some(2)) => "sysctl kernel.io_uring_disabled=0",
        (Some(libc::EPERM), _) => "this is a container whose system call filter has to allow io_uring",
        _ => "see the limits of this process (ulimit -a)",
    };
    Check::no(NAME, Severity::Optional, format!("not to be had: {error}"), advice)
}

/// What the driver can do, as bits.
fn features(tun: &File) -> io::Result<u32> {
    // _IOR('T', 207, unsigned int) (linux/if_tun.h)
    const TUNGETFEATURES: libc::Ioctl = 0x8004_54cf;
    let mut features = 0_u32;
    // SAFETY: the request writes one unsigned int.
    if unsafe { libc::ioctl(tun.as_raw_fd(), TUNGETFEATURES, &raw mut features) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(features)
}

fn tun(features: io::Result<u32>, administrator: bool) -> Check {
    const NAME: &str = "tun";
    let error = match features {
        Ok(features) if has(features, libc::IFF_VNET_HDR) => {
            let taps = if administrator {
                "taps can be created"
            } else {
                "taps have to be created by root (ip tuntap add <name> mode tap user <user>)"
            };
            return Check::yes(NAME, Severity::Optional, format!("{TUN}, {taps}"));
        }
        Ok(_) => {
            let found = format!("{TUN} knows no offloads");
            return Check::no(NAME, Severity::Optional, found, "Linux 2.6.27 or later is needed");
        }
        Err(error) => error,
    };
    Check::no(
        NAME,
        Severity::Optional,
        format!("{TUN} does not open: {error}"),
        device_advice(&error, TUN, "tun"),
    )
}

fn has(features: u32, flag: libc::c_int) -> bool {
    u32::try_from(flag).is_ok_and(|flag| features & flag != 0)
}

fn vhost_net(opened: io::Result<()>) -> Check {
    const NAME: &str = "vhost-net";
    match opened {
        Ok(()) => Check::yes(NAME, Severity::Optional, VHOST_NET),
        Err(error) => Check::no(
            NAME,
            Severity::Optional,
            format!("{VHOST_NET} does not open: {error}"),
            device_advice(&error, VHOST_NET, "vhost_net"),
        ),
    }
}

fn device_advice(error: &io::Error, path: &str, module: &str) -> String {
    match error.raw_os_error() {
        Some(libc::EACCES) => format!("have root give this user access to {path}"),
        Some(libc::EPERM) => {
            format!("this is a container: start it with access to {path} (docker, podman: --device {path})")
        }
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            format!("modprobe {module} (in a container: hand {path} in)")
        }
        _ => "see the limits of this process (ulimit -a)".to_owned(),
    }
}

/// Whether the text of `/proc/self/status` shows CAP_NET_ADMIN as effective.
fn may_administer_networks(status: &str) -> bool {
    const CAP_NET_ADMIN: u32 = 12; // linux/capability.h
    proc::field(status, "CapEff")
        .and_then(|mask| u64::from_str_radix(mask, 16).ok())
        .is_some_and(|mask| mask & (1 << CAP_NET_ADMIN) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed<T>(errno: i32) -> io::Result<T> {
        Err(io::Error::from_raw_os_error(errno))
    }

    #[test]
    fn io_uring_that_is_switched_off_is_told_from_one_that_is_filtered() {
        let advice = |errno, disabled| io_uring(failed(errno), disabled).advice.unwrap();
        assert!(advice(libc::EPERM, Some(1)).contains("io_uring_group"));
        assert_eq!(advice(libc::EPERM, Some(2)), "sysctl kernel.io_uring_disabled=0");
        assert!(advice(libc::EPERM, Some(0)).contains("filter"));
        assert!(advice(libc::EPERM, None).contains("filter"));
        assert!(advice(libc::ENOSYS, None).contains("CONFIG_IO_URING"));
        assert!(io_uring(Ok(()), Some(2)).ok, "what works is not switched off");
    }

    #[test]
    fn tun_without_the_right_to_create_taps_says_how_to_get_one() {
        assert!(tun(Ok(0x5300), true).found.ends_with("taps can be created"));
        let check = tun(Ok(0x5300), false);
        assert!(check.ok && check.found.contains("ip tuntap add"), "{check}");
        assert!(!tun(Ok(0x1003), true).ok, "no IFF_VNET_HDR");
    }

    #[test]
    fn device_that_does_not_open_is_advised_on_by_the_reason() {
        let advice = |errno| vhost_net(failed(errno)).advice.unwrap();
        assert!(advice(libc::ENOENT).starts_with("modprobe vhost_net"));
        assert!(advice(libc::EPERM).contains("--device /dev/vhost-net"));
        assert!(advice(libc::EACCES).contains("access to /dev/vhost-net"));
        assert!(tun(failed(libc::ENODEV), true).advice.unwrap().starts_with("modprobe tun"));
    }

    #[test]
    fn right_to_administer_networks_is_bit_12_of_the_effective_set() {
        assert!(may_administer_networks("CapPrm:\t0\nCapEff:\t0000000000001000\n"));
        assert!(!may_administer_networks("CapPrm:\t0000000000001000\nCapEff:\t0000000000000fff\n"));
        assert!(!may_administer_networks("CapEff:\tx\n"));
        assert!(!may_administer_networks(""));
    }
}
