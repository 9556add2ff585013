//! Kinds of guest memory the host offers, and what it can do with them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

use super::proc;
use super::report::{Check, Severity};

const THP: &str = "/sys/kernel/mm/transparent_hugepage/enabled";
const THP_SHARED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const HUGE_TOTAL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const HUGE_FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
const KSM: &str = "/sys/kernel/mm/ksm/run";
const KSM_MERGED: &str = "/sys/kernel/mm/ksm/pages_sharing";

/// All checks of this kind.
pub(super) fn checks() -> Vec<Check> {
    vec![
        transparent(proc::read(THP).ok().as_deref(), proc::read(THP_SHARED).ok().as_deref()),
        reserved(proc::number(HUGE_TOTAL), proc::number(HUGE_FREE)),
        merging(proc::number(KSM), proc::number(KSM_MERGED)),
        userfaultfd(),
    ]
}

/// Huge pages that the kernel makes by itself, for private memory and for memfds.
fn transparent(private: Option<&str>, shared: Option<&str>) -> Check {
    const NAME: &str = "thp";
    let shared = shared.and_then(proc::chosen).unwrap_or("never");
    match private.and_then(proc::chosen) {
        Some(when @ ("always" | "madvise")) => Check::yes(
            NAME,
            Severity::Optional,
            format!("transparent huge pages: {when}; for memfd: {shared}"),
        ),
        Some(when) => Check::no(
            NAME,
            Severity::Optional,
            format!("transparent huge pages: {when}"),
            format!("echo madvise > {THP}"),
        ),
        None => Check::no(
            NAME,
            Severity::Optional,
            "the kernel has no transparent huge pages",
            "a kernel with CONFIG_TRANSPARENT_HUGEPAGE makes guests faster",
        ),
    }
}

/// Huge pages set aside by the administrator.
fn reserved(total: Option<u64>, free: Option<u64>) -> Check {
    const NAME: &str = "hugepages";
    const ADVICE: &str = "for memory.backing = \"hugetlbfs\": sysctl vm.nr_hugepages=<MiB of guests / 2>";
    match (total, free.unwrap_or(0)) {
        (None, _) => Check::no(
            NAME,
            Severity::Optional,
            "the kernel has no huge pages of 2 MiB",
            "a kernel with CONFIG_HUGETLBFS, on a processor with 2 MiB pages, has them",
        ),
        (Some(0), _) => Check::no(NAME, Severity::Optional, "none reserved", ADVICE),
        (Some(total), 0) => Check::no(
            NAME,
            Severity::Optional,
            format!("all {total} reserved pages of 2 MiB are in use"),
            ADVICE,
        ),
        (Some(total), free) => Check::yes(
            NAME,
            Severity::Optional,
            format!("{free} of {total} reserved pages of 2 MiB are free"),
        ),
    }
}

/// Kernel same-page merging.
fn merging(run: Option<u64>, merged: Option<u64>) -> Check {
    const NAME: &str = "ksm";
    match run {
        Some(1) => Check::yes(
            NAME,
            Severity::Optional,
            format!("equal pages are merged, {} MiB saved now", merged.unwrap_or(0) >> 8),
        ),
        Some(_) => {
            Check::no(NAME, Severity::Optional, "equal pages are not merged", format!("echo 1 > {KSM}"))
        }
        None => Check::no(
            NAME,
            Severity::Optional,
            "the kernel does not merge equal pages",
            "a kernel with CONFIG_KSM saves memory between similar guests",
        ),
    }
}

/// Memory that a guest gets while it runs already (post-copy migration, snapshots read on demand). The faults to be
/// handled are met by KVM in the kernel, which is the part of it that needs permission.
fn userfaultfd() -> Check {
    const NAME: &str = "userfaultfd";
    match open_userfaultfd() {
        Ok((fd, how)) => match features(&fd) {
            Ok(features) => Check::yes(NAME, Severity::Optional, format!("{how}, for {}", kinds(features))),
            Err(error) => Check::no(
                NAME,
                Severity::Optional,
                format!("{how}, but it does not answer: {error}"),
                "a kernel with CONFIG_USERFAULTFD, of version 4.11 or later, is needed",
            ),
        },
        Err(error) => Check::no(
            NAME,
            Severity::Optional,
            format!("not to be had: {error}"),
            match error.raw_os_error() {
                Some(libc::ENOSYS) => "a kernel with CONFIG_USERFAULTFD is needed",
                _ => "sysctl vm.unprivileged_userfaultfd=1, or access to /dev/userfaultfd, or CAP_SYS_PTRACE",
            },
        ),
    }
}

fn open_userfaultfd() -> io::Result<(File, &'static str)> {
    // _IO(0xAA, 0x00) (linux/userfaultfd.h)
    const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: takes flags by value.
    let by_call = owned(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) });
    by_call.map(|fd| (fd, "by system call")).or_else(|error| {
        let Ok(device) = OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") else {
            return Err(error);
        };
        // SAFETY: takes flags by value.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        Ok((owned(fd.into())?, "by /dev/userfaultfd"))
    })
}

/// What the kernel can handle, as bits.
fn features(fd: &File) -> io::Result<u64> {
    // _IOWR(0xAA, 0x3F, struct uffdio_api), and the version it is to be asked for (linux/userfaultfd.h)
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f;
    const UFFD_API: u64 = 0xaa;
    // struct uffdio_api: api, features, ioctls
    let mut api = [UFFD_API, 0, 0];
    // SAFETY: api has the size and alignment of the structure that the request's number encodes.
    if unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(api[1])
}

/// Kinds of memory for which missing pages can be handled.
fn kinds(features: u64) -> String {
    // UFFD_FEATURE_MISSING_SHMEM and UFFD_FEATURE_MISSING_HUGETLBFS (linux/userfaultfd.h)
    let kinds = [("memfd", 1 << 5), ("hugetlbfs", 1 << 4)];
    let more = kinds.iter().filter(|(_, bit)| features & bit != 0).map(|(kind, _)| *kind);
    std::iter::once("anonymous").chain(more).collect::<Vec<_>>().join(", ")
}

fn owned(fd: libc::c_long) -> io::Result<File> {
    match RawFd::try_from(fd) {
        // SAFETY: the caller got fd from a call that opens a descriptor for it.
        Ok(fd) if fd >= 0 => Ok(unsafe { File::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(check: &Check) -> (bool, &str) {
        (check.ok, &check.found)
    }

    #[test]
    fn transparent_huge_pages_may_be_asked_for_or_always_be_there() {
        assert_eq!(
            says(&transparent(Some("always [madvise] never"), Some("always within_size [advise] never"))),
            (true, "transparent huge pages: madvise; for memfd: advise")
        );
        assert!(transparent(Some("[always] madvise never"), None).ok);
    }

    #[test]
    fn transparent_huge_pages_switched_off_are_switched_on_by_the_advice() {
        let check = transparent(Some("always madvise [never]"), Some("[never]"));
        assert_eq!(says(&check), (false, "transparent huge pages: never"));
        assert_eq!(check.advice.unwrap(), "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled");
        assert!(!transparent(None, None).ok);
        assert!(!transparent(Some(""), None).ok);
    }

    #[test]
    fn reserved_pages_count_only_while_some_are_free() {
        assert_eq!(
            says(&reserved(Some(512), Some(100))),
            (true, "100 of 512 reserved pages of 2 MiB are free")
        );
        assert_eq!(
            says(&reserved(Some(512), Some(0))),
            (false, "all 512 reserved pages of 2 MiB are in use")
        );
        assert_eq!(says(&reserved(Some(0), Some(0))), (false, "none reserved"));
        assert!(!reserved(None, None).ok);
    }

    #[test]
    fn merging_is_on_only_when_it_runs() {
        assert_eq!(says(&merging(Some(1), Some(512))), (true, "equal pages are merged, 2 MiB saved now"));
        assert!(!merging(Some(0), Some(0)).ok);
        assert!(!merging(Some(2), Some(7)).ok, "2 is separating what was merged");
        assert!(!merging(None, None).ok);
    }

    #[test]
    fn userfaultfd_features_name_the_kinds_of_memory() {
        assert_eq!(kinds(0), "anonymous");
        assert_eq!(kinds(0x30), "anonymous, memfd, hugetlbfs");
        assert_eq!(kinds(0x20), "anonymous, memfd");
    }
}
