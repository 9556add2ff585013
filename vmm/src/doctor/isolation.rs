//! What the host offers to shut a guest's monitor in: namespaces, system call filters, Landlock.

use std::io;
use std::ptr;

use super::proc;
use super::report::{Check, Severity};

/// Kinds of namespaces that need privileges, or a user namespace in which to have them.
const PRIVILEGED: [(&str, libc::c_int); 4] = [
    ("mount", libc::CLONE_NEWNS),
    ("pid", libc::CLONE_NEWPID),
    ("net", libc::CLONE_NEWNET),
    ("ipc", libc::CLONE_NEWIPC),
];

/// All checks of this kind.
pub(super) fn checks() -> Vec<Check> {
    vec![namespaces(try_in_child, &Limits::read()), seccomp(kills_processes()), landlock(landlock_version())]
}

/// Settings of the host that deny user namespaces.
#[derive(Debug, Default)]
struct Limits {
    /// `user.max_user_namespaces`
    most: Option<u64>,
    /// `kernel.unprivileged_userns_clone` of Debian's and other kernels
    unprivileged: Option<u64>,
    /// `kernel.apparmor_restrict_unprivileged_userns` of Ubuntu's kernels
    restricted: Option<u64>,
}

impl Limits {
    fn read() -> Self {
        Self {
            most: proc::number("/proc/sys/user/max_user_namespaces"),
            unprivileged: proc::number("/proc/sys/kernel/unprivileged_userns_clone"),
            restricted: proc::number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        }
    }

    fn advice(&self, error: &io::Error) -> &'static str {
        match error.raw_os_error() {
            Some(libc::EINVAL) => "a kernel with CONFIG_NAMESPACES and all its kinds is needed",
            _ if self.most == Some(0) => "sysctl user.max_user_namespaces=10000",
            Some(libc::ENOSPC | libc::EUSERS) => {
                "raise the limits on namespaces (sysctl user.max_*_namespaces)"
            }
            _ if self.unprivileged == Some(0) => {
                "as root, or after sysctl kernel.unprivileged_userns_clone=1"
            }
            _ if self.restricted == Some(1) => {
                "as root, or after sysctl kernel.apparmor_restrict_unprivileged_userns=0"
            }
            _ => "as root; in a container its system call filter has to allow namespaces",
        }
    }
}

/// `create` makes a process with the given namespaces of its own.
fn namespaces(create: impl Fn(libc::c_int) -> io::Result<()>, limits: &Limits) -> Check {
    const NAME: &str = "namespaces";
    let kinds = PRIVILEGED.map(|kind| kind.0).join(", ");
    let all = PRIVILEGED.iter().fold(0, |flags, kind| flags | kind.1);
    let Err(error) = create(libc::CLONE_NEWUSER | all) else {
        return Check::yes(NAME, Severity::Optional, format!("user, {kinds}"));
    };
    if create(all).is_ok() {
        return Check::yes(NAME, Severity::Optional, format!("{kinds} by privilege, no user namespaces"));
    }
    // The kernel only says that one of them failed.
    let failing: Vec<_> = match create(libc::CLONE_NEWUSER) {
        Err(_) => vec!["user"],
        Ok(()) => PRIVILEGED
            .iter()
            .filter(|kind| create(libc::CLONE_NEWUSER | kind.1).is_err())
            .map(|kind| kind.0)
            .collect(),
    };
    let found = format!("no {} namespaces: {error}", failing.join(", "));
    Check::no(NAME, Severity::Optional, found, limits.advice(&error))
}

/// Makes a process that ends at once.
fn try_in_child(namespaces: libc::c_int) -> io::Result<()> {
    let flags = libc::c_long::from(namespaces | libc::SIGCHLD);
    // unshare(2) would change this process, and does not make user namespaces in one with threads.
    // SAFETY: without CLONE_VM, and without a stack, this is a fork. The child, which has only this thread of a process
    // that may have others, does nothing but end.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0_usize, 0_usize, 0_usize, 0_usize) };
    if child == 0 {
        // SAFETY: ends the child.
        unsafe { libc::_exit(0) };
    }
    let Ok(child @ 1..) = libc::pid_t::try_from(child) else { return Err(io::Error::last_os_error()) };
    // SAFETY: child is a child of this process, and its status is not asked for.
    while unsafe { libc::waitpid(child, ptr::null_mut(), 0) } < 0 {
        if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
            break;
        }
    }
    Ok(())
}

/// Whether a filter can end the process that makes a forbidden call.
fn kills_processes() -> io::Result<()> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the action is read only.
    let answer =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn seccomp(available: io::Result<()>) -> Check {
    const NAME: &str = "seccomp";
    match available {
        Ok(()) => Check::yes(NAME, Severity::Optional, "system calls can be filtered"),
        Err(error) => Check::no(
            NAME,
            Severity::Optional,
            format!("system calls cannot be filtered: {error}"),
            "a kernel with CONFIG_SECCOMP_FILTER, of version 4.14 or later, is needed",
        ),
    }
}

/// Version of Landlock's interface.
fn landlock_version() -> io::Result<libc::c_long> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1; // linux/landlock.h
    let nothing: *const libc::c_void = ptr::null();
    // SAFETY: with this flag the kernel only answers, and wants neither rules nor their size.
    let answer = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, nothing, 0_usize, LANDLOCK_CREATE_RULESET_VERSION)
    };
    if answer > 0 { Ok(answer) } else { Err(io::Error::last_os_error()) }
}

fn landlock(version: io::Result<libc::c_long>) -> Check {
    const NAME: &str = "landlock";
    match version {
        Ok(version) => Check::yes(NAME, Severity::Optional, format!("interface version {version}")),
        Err(error) => Check::no(
            NAME,
            Severity::Optional,
            format!("not to be had: {error}"),
            match error.raw_os_error() {
                Some(libc::EOPNOTSUPP) => "start the kernel with landlock among its lsm=…",
                Some(libc::ENOSYS) => {
                    "a kernel with CONFIG_SECURITY_LANDLOCK, of version 5.13 or later, is needed"
                }
                _ => "in a container its system call filter has to allow it",
            },
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed<T>(errno: i32) -> io::Result<T> {
        Err(io::Error::from_raw_os_error(errno))
    }

    /// A host that denies namespaces of these kinds.
    fn denying(kinds: libc::c_int, errno: i32) -> impl Fn(libc::c_int) -> io::Result<()> {
        move |asked| if asked & kinds == 0 { Ok(()) } else { failed(errno) }
    }

    #[test]
    fn all_namespaces_are_listed() {
        let check = namespaces(denying(0, 0), &Limits::default());
        assert_eq!((check.ok, check.found.as_str()), (true, "user, mount, pid, net, ipc"));
    }

    #[test]
    fn root_does_without_user_namespaces() {
        let check = namespaces(denying(libc::CLONE_NEWUSER, libc::ENOSPC), &Limits::default());
        assert!(check.ok && check.found.ends_with("no user namespaces"), "{check}");
    }

    #[test]
    fn kinds_that_fail_are_named() {
        let denied = libc::CLONE_NEWNET | libc::CLONE_NEWPID;
        let check = namespaces(denying(denied, libc::EINVAL), &Limits::default());
        assert!(!check.ok && check.found.starts_with("no pid, net namespaces: "), "{check}");
    }

    #[test]
    fn user_who_may_have_no_namespaces_is_told_which_setting_denies_them() {
        // Without privilege all others need a user namespace.
        let nothing = denying(!0, libc::EPERM);
        let advice = |limits| namespaces(&nothing, &limits).advice.unwrap();
        assert!(
            advice(Limits { unprivileged: Some(0), ..Default::default() })
                .contains("unprivileged_userns_clone")
        );
        assert!(advice(Limits { restricted: Some(1), ..Default::default() }).contains("apparmor"));
        assert!(advice(Limits { most: Some(0), ..Default::default() }).contains("max_user_namespaces"));
        assert!(
            advice(Limits { unprivileged: Some(1), restricted: Some(0), most: Some(9) })
                .contains("container")
        );
    }

    #[test]
    fn trying_namespaces_changes_nothing_here() {
        let here = |kind| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        let kinds = ["user", "mnt", "pid", "net", "ipc"];
        let before = kinds.map(here);
        namespaces(try_in_child, &Limits::read());
        assert_eq!(kinds.map(here), before);
    }

    #[test]
    fn child_that_cannot_be_made_is_an_error() {
        // CLONE_FS does not go with a mount namespace of one's own (clone(2)).
        let error = try_in_child(libc::CLONE_NEWNS | libc::CLONE_FS).unwrap_err();
        assert!(matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EPERM)), "{error}");
    }

    #[test]
    fn landlock_that_was_not_started_is_told_from_one_that_is_not_there() {
        assert!(landlock(failed(libc::EOPNOTSUPP)).advice.unwrap().contains("lsm="));
        assert!(landlock(failed(libc::ENOSYS)).advice.unwrap().contains("CONFIG_SECURITY_LANDLOCK"));
        assert_eq!(landlock(Ok(6)).found, "interface version 6");
    }
}
