//! Control groups: which version, and which controllers in which.

use std::collections::BTreeSet;
use std::fs;

use super::proc;
use super::report::{Check, Severity};

/// What shares and limits are enforced with: name in version 2, name in version 1.
const WANTED: [(&str, &str); 3] = [("cpu", "cpu"), ("memory", "memory"), ("io", "blkio")];

/// Looks at what is mounted.
pub(super) fn check() -> Check {
    let mounts = proc::read("/proc/mounts").unwrap_or_default();
    judge(&Mounted::find(&mounts, |path| {
        fs::read_to_string(format!("{path}/cgroup.controllers")).unwrap_or_default()
    }))
}

/// Controllers that are mounted, sorted by name.
#[derive(Debug, Default, PartialEq, Eq)]
struct Mounted {
    /// Of version 2, if that is mounted.
    unified: Option<Vec<String>>,
    /// Of version 1.
    legacy: Vec<String>,
}

impl Mounted {
    /// Finds them in the text of `/proc/mounts` (`device path type options 0 0`); `controllers` gives those of a
    /// version 2 mounted at a path.
    fn find(mounts: &str, controllers: impl Fn(&str) -> String) -> Self {
        let mut found = Self::default();
        let mut legacy = BTreeSet::new();
        for line in mounts.lines() {
            let mut fields = line.split(' ').skip(1);
            match (fields.next(), fields.next(), fields.next()) {
                (Some(path), Some("cgroup2"), _) if found.unified.is_none() => {
                    let controllers = controllers(&unescape(path));
                    let mut names: Vec<_> = controllers.split_whitespace().map(str::to_owned).collect();
                    names.sort_unstable();
                    found.unified = Some(names);
                }
                (Some(_), Some("cgroup"), Some(options)) => {
                    let wanted =
                        options.split(',').filter(|name| WANTED.iter().any(|wanted| wanted.1 == *name));
                    legacy.extend(wanted.map(str::to_owned));
                }
                _ => {}
            }
        }
        found.legacy = legacy.into_iter().collect();
        found
    }

    fn has(&self, (unified, legacy): (&str, &str)) -> bool {
        self.unified.as_ref().is_some_and(|names| names.iter().any(|name| name == unified))
            || self.legacy.iter().any(|name| name == legacy)
    }
}

/// Blanks and the like in a path of `/proc/mounts` are three octal digits after a backslash (fstab(5)).
fn unescape(path: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(path.to_owned(), |path, (code, character)| path.replace(code, character))
}

fn judge(mounted: &Mounted) -> Check {
    const NAME: &str = "cgroups";
    let missing: Vec<_> =
        WANTED.into_iter().filter(|names| !mounted.has(*names)).map(|names| names.0).collect();
    let list = |names: &[String]| if names.is_empty() { "nothing".to_owned() } else { names.join(", ") };
    let found = match (&mounted.unified, mounted.legacy.is_empty()) {
        (None, true) => {
            let advice = "mount -t cgroup2 cgroup2 /sys/fs/cgroup";
            return Check::no(NAME, Severity::Optional, "no control groups are mounted", advice);
        }
        (None, false) => format!("version 1 with {}", list(&mounted.legacy)),
        (Some(unified), true) => format!("version 2 with {}", list(unified)),
        (Some(unified), false) => {
            format!("hybrid: version 1 with {}, version 2 with {}", list(&mounted.legacy), list(unified))
        }
    };
    if missing.is_empty() {
        return Check::yes(NAME, Severity::Optional, found);
    }
    let advice = format!(
        "nothing divides {} between guests: start the kernel without cgroup_disable, in a container delegate the controllers",
        missing.join(", ")
    );
    Check::no(NAME, Severity::Optional, found, advice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const V1: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0\n\
        cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
        cgroup /sys/fs/cgroup/blkio cgroup rw,blkio 0 0\n\
        cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0\n";
    const V2: &str = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";

    fn judged(mounts: &str, controllers: &str) -> (bool, String) {
        let check = judge(&Mounted::find(mounts, |_| controllers.to_owned()));
        (check.ok, check.found)
    }

    #[test]
    fn version_2_alone() {
        assert_eq!(
            judged(V2, "cpuset cpu io memory hugetlb pids rdma misc\n"),
            (true, "version 2 with cpu, cpuset, hugetlb, io, memory, misc, pids, rdma".into())
        );
    }

    #[test]
    fn version_1_alone() {
        assert_eq!(judged(V1, ""), (true, "version 1 with blkio, cpu, memory".into()));
    }

    #[test]
    fn version_2_beside_version_1_may_be_empty() {
        let mounts = format!("{V1}cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n");
        assert_eq!(
            judged(&mounts, ""),
            (true, "hybrid: version 1 with blkio, cpu, memory, version 2 with nothing".into())
        );
    }

    #[test]
    fn missing_controllers_are_named() {
        let check = judge(&Mounted::find(V2, |_| "cpu pids".to_owned()));
        assert!(!check.ok && check.advice.as_ref().unwrap().contains("memory, io"), "{check}");
    }

    #[test]
    fn hosts_without_control_groups_are_told_to_mount_them() {
        assert_eq!(judged("proc /proc proc rw 0 0\n", ""), (false, "no control groups are mounted".into()));
        assert!(!judged("", "").0);
    }

    #[test]
    fn controllers_are_looked_for_behind_the_real_path() {
        let mounts = "cgroup2 /a\\040b cgroup2 rw 0 0\n";
        Mounted::find(mounts, |path| {
            assert_eq!(path, "/a b");
            String::new()
        });
    }

    proptest! {
        #[test]
        fn any_text_is_survived(mounts in "([^\n]{0,20}|[a-z/]{0,4} [/\\\\0]{0,4} cgroup2? [a-z,]{0,9}|\n){0,12}", controllers in ".*") {
            judge(&Mounted::find(&mounts, |_| controllers.clone()));
        }
    }
}
