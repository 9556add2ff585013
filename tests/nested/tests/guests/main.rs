//! Debian's kernel as guest of the monitor on real KVM. All tests share one emulated host, one after the other; those
//! that leave it running also share one guest.

mod disks;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use vmm_nested::guest::{BOOT_DEADLINE, COMMAND_DEADLINE};
use vmm_nested::{Console, Guest, L1, Options, Status, build, image};

/// For what takes the emulated host some time.
const LONG: Duration = Duration::from_secs(120);

/// A guest with one of everything. `vda` is its root, `vdb` a second disk, `vdc` one that cannot be written.
const FULL: &str = r#"
name = "full"
[boot]
kernel = "/data/vmlinuz"
initrd = "/data/initrd.img"
cmdline = "console=ttyS0 quiet root=/dev/vda rw guest.address=10.77.0.2/24"
[cpu]
count = 2
[memory]
size = "512M"
[[disk]]
path = "root.ext4"
[[disk]]
path = "second.ext4"
[[disk]]
path = "/data/root.ext4"
readonly = true
[[net]]
tap = "tap0"
host_address = "10.77.0.1/24"
"#;

/// A guest that needs no disk.
const SMALL: &str = r#"
name = "small"
[boot]
kernel = "/data/KERNEL"
initrd = "/data/initrd.img"
cmdline = "console=ttyS0 quiet"
"#;

/// The emulated host and the guest that tests share.
struct Host {
    l1: L1,
    full: Option<Guest>,
}

impl Host {
    fn boot() -> Self {
        let agent = build::binary("vmm-nested", "l1-agent").unwrap();
        let vmm = build::binary("vmm", "vmm").unwrap();
        let l1 = L1::boot(&Options::new("guests", &agent, Some(&vmm))).unwrap();
        Self { l1, full: None }
    }

    /// Runs a command in the host that has to succeed.
    fn check(&self, command: &str) -> String {
        self.l1.check(command, LONG).unwrap()
    }

    /// The shared guest, booted if it does not run.
    fn full(&mut self) -> (&L1, &mut Guest) {
        let Self { l1, full } = self;
        let guest = full.get_or_insert_with(|| {
            l1.check("cp /data/root.ext4 root.ext4 && cp /data/root.ext4 second.ext4", LONG).unwrap();
            Guest::start(l1, FULL).unwrap()
        });
        (l1, guest)
    }

    /// The shared guest, for a test that ends it.
    fn take_full(&mut self) -> Guest {
        self.full();
        self.full.take().unwrap()
    }

    fn small(&self, kernel: &str) -> Guest {
        Guest::start(&self.l1, &SMALL.replace("KERNEL", kernel)).unwrap()
    }

    fn guests(&self) -> String {
        self.check("vmm ps")
    }

    /// Nothing of guest `name` is left on the host.
    fn assert_gone(&self, name: &str) {
        assert!(!self.guests().contains(name), "{}", self.guests());
        assert_eq!(self.check(&format!("ls -d /run/vmm/{name} 2>/dev/null || echo gone")), "gone");
    }
}

/// How often a scenario is tried, each time but the first in a new emulated host.
///
/// QEMU's emulation of SVM is not beyond doubt (see [`L1`]): now and then a guest or the emulated host stands still in it.
/// What fails every time has failed.
const TRIES: usize = 3;

/// Runs `test` in the emulated host.
fn on_host(test: impl Fn(&mut Host)) {
    static HOST: Mutex<Option<Host>> = Mutex::new(None);
    let mut shared = HOST.lock().unwrap_or_else(PoisonError::into_inner);
    for attempt in 1.. {
        let mut host = shared.take().unwrap_or_else(Host::boot);
        let result = catch_unwind(AssertUnwindSafe(|| test(&mut host)));
        match result {
            Ok(()) => {
                *shared = Some(host);
                return;
            }
            Err(_) if attempt < TRIES => {
                // Past the capture of the test's output, which nobody sees of a test that passes in the end.
                let told = format!(
                    "\nattempt {attempt} of {TRIES} has failed; the next is in a new emulated host\n"
                );
                std::io::stderr().write_all(told.as_bytes()).unwrap_or_default();
            }
            Err(panic) => {
                drop(shared);
                resume_unwind(panic);
            }
        }
    }
}

fn ok(guest: &mut Guest, command: &str) -> String {
    guest.check(command, LONG).unwrap()
}

/// Time in user space, in ticks, of each of the guest's two processors.
fn user_ticks(guest: &mut Guest) -> Vec<u64> {
    let lines = ok(guest, "grep '^cpu[01] ' /proc/stat");
    lines.lines().map(|line| line.split_whitespace().nth(1).unwrap().parse().unwrap()).collect()
}

fn ended(console: &mut Console) -> Status {
    console.exit_status(LONG).unwrap()
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn doctor_finds_hardware_virtualization() {
    on_host(|host| {
        let report = host.check("vmm doctor");
        let line = report.lines().find(|line| line.contains("virtualization")).unwrap();
        assert!(line.starts_with("yes") && line.contains("hardware"), "{report}");
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn bzimage_boots_to_user_space_on_its_disk() {
    on_host(|host| {
        let (l1, guest) = host.full();
        let greeting = guest.greeting().to_owned();
        for part in [l1.release(), "2 processors", "root /dev/vda"] {
            assert!(greeting.contains(part), "{part:?} in {greeting:?}");
        }
        assert_eq!(ok(guest, "uname -r"), l1.release());
        // What the kernel calls it is how the monitor looks to it.
        assert!(ok(guest, "dmesg").contains("Hypervisor detected: KVM"));
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn elf_kernel_boots_to_user_space_and_power_off_ends_it_with_status_0() {
    on_host(|host| {
        let mut guest = host.small("vmlinux");
        assert!(guest.greeting().contains(host.l1.release()), "{}", guest.greeting());
        assert!(guest.greeting().contains("1 processors"), "{}", guest.greeting());
        guest.console().send("poweroff -f\n");
        assert_eq!(ended(guest.console()), Status::Code(0));
        host.assert_gone("small");
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn reset_ends_the_monitor_with_status_0() {
    on_host(|host| {
        let mut guest = host.small("vmlinuz");
        guest.console().send("reboot -f\n");
        assert_eq!(ended(guest.console()), Status::Code(0));
        host.assert_gone("small");
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn files_written_to_a_disk_are_read_back_and_found_by_the_host() {
    on_host(|host| {
        let (l1, guest) = host.full();
        ok(guest, "mount /dev/vdb /mnt");
        ok(guest, "head -c 8000001 /dev/urandom >/tmp/file && cp /tmp/file /mnt/file && sync");
        let sum = ok(guest, "sha256sum </tmp/file");
        ok(guest, "umount /mnt && mount /dev/vdb /mnt && echo 3 >/proc/sys/vm/drop_caches");
        assert_eq!(ok(guest, "sha256sum </mnt/file"), sum);
        ok(guest, "umount /mnt");

        let check = |command: &str| l1.check(command, LONG).unwrap();
        check("mkdir -p seen && mount -o loop,ro second.ext4 seen");
        assert_eq!(check("sha256sum <seen/file"), sum);
        check("umount seen");
        let copy = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(copy.path(), l1.read_file("/tmp/second.ext4").unwrap()).unwrap();
        image::check(copy.path()).unwrap();
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn read_only_disk_is_read_and_refuses_to_be_written() {
    on_host(|host| {
        let (l1, guest) = host.full();
        let sum = "head -c 4194304 FILE | sha256sum";
        let expected = l1.check(&sum.replace("FILE", "/data/root.ext4"), LONG).unwrap();
        assert_eq!(ok(guest, &sum.replace("FILE", "/dev/vdc")), expected);
        assert_eq!(ok(guest, "cat /sys/block/vdc/ro"), "1");
        let (status, output) =
            guest.run("dd if=/dev/zero of=/dev/vdc bs=4096 count=1 conv=fsync", LONG).unwrap();
        assert_ne!(status, 0, "{output}");
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn entropy_device_is_in_use_and_never_says_the_same() {
    on_host(|host| {
        let (_, guest) = host.full();
        assert!(ok(guest, "cat /sys/class/misc/hw_random/rng_current").starts_with("virtio_rng"));
        let mut read = || {
            ok(guest, "dd if=/dev/hwrng bs=1024 count=4 iflag=fullblock 2>/dev/null | xxd -p | tr -d '\\n'")
        };
        let (first, second) = (read(), read());
        assert_eq!(first.len(), 2 * 4096);
        assert_ne!(first, second);
        assert!(!first.contains(&"0".repeat(64)), "{first}");
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn guest_and_host_reach_each_other_through_a_tap() {
    on_host(|host| {
        let (l1, guest) = host.full();
        assert!(ok(guest, "ping -c 3 -s 1400 10.77.0.1").contains(" 0% packet loss"));
        let pinged = l1.check("ping -c 3 -s 1400 10.77.0.2", LONG).unwrap();
        assert!(pinged.contains(" 0% packet loss"), "{pinged}");

        // A listener may not listen yet when it is first called.
        let send = |to: &str| {
            format!("n=0; until nc {to} 5001 </tmp/sent || [ $n = 50 ]; do n=$((n+1)); usleep 200000; done")
        };
        let make = "head -c 4000001 /dev/urandom >/tmp/sent && sha256sum </tmp/sent";
        // Its input stays open: busybox' nc leaves its peer alone with the rest when that ends.
        let receive = "rm -f /tmp/open; mkfifo /tmp/open; timeout 60 nc -l -p 5001 <>/tmp/open | sha256sum";

        let sum = ok(guest, make);
        let mut listener = l1.spawn(receive).unwrap();
        ok(guest, &send("10.77.0.1"));
        listener.wait_for(&sum, LONG).unwrap();
        assert_eq!(ended(&mut listener), Status::Code(0));

        let sum = l1.check(make, LONG).unwrap();
        ok(guest, &format!("{{ {receive}; }} >/tmp/received &"));
        l1.check(&send("10.77.0.2"), LONG).unwrap();
        assert_eq!(ok(guest, "wait; cat /tmp/received"), sum);
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn two_vcpus_both_work() {
    on_host(|host| {
        let (_, guest) = host.full();
        assert_eq!(ok(guest, "nproc"), "2");
        assert_eq!(ok(guest, "cat /sys/devices/system/cpu/online"), "0-1");
        let before = user_ticks(guest);
        let work =
            |mask: u8| format!("taskset {mask} sh -c 'n=0; while [ $n -lt 100000 ]; do n=$((n+1)); done' &");
        ok(guest, &format!("{} {} wait", work(1), work(2)));
        let after = user_ticks(guest);
        for cpu in [0, 1] {
            assert!(after[cpu] > before[cpu], "processor {cpu}: {before:?} {after:?}");
        }
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn paused_guest_stands_still_and_goes_on_when_resumed() {
    on_host(|host| {
        let (l1, guest) = host.full();
        let check = |command: &str| l1.check(command, LONG).unwrap();
        check("vmm pause full");
        assert!(check("vmm ps").contains("paused"));
        // Something to do, which a guest that runs would do while the host sleeps.
        guest.begin("echo still here");
        let ticks = || {
            let threads = "/proc/$(cat /run/vmm/full/pid)/task/*/stat";
            check(&format!("sleep 2; grep '(vcpu' {threads} | awk '{{print $14, $15}}'"))
        };
        let (first, second) = (ticks(), ticks());
        assert_eq!(first.lines().count(), 2, "{first}");
        assert_eq!(first, second, "ticks that the threads of the processors have run");
        check("vmm resume full");
        assert_eq!(guest.finish(COMMAND_DEADLINE).unwrap(), (0, "still here".to_owned()));
        assert!(check("vmm ps").contains("running"));
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn power_button_makes_the_guest_power_off_in_order() {
    on_host(|host| {
        let mut guest = host.take_full();
        ok(&mut guest, "rm -f /etc/down");
        host.check("vmm stop full");
        assert_eq!(ended(guest.console()), Status::Code(0));
        guest.console().wait_for("power button", COMMAND_DEADLINE).unwrap();
        guest.console().wait_for("goes down in order", COMMAND_DEADLINE).unwrap();
        host.assert_gone("full");
        host.check("mkdir -p seen && mount -o loop,ro,noload root.ext4 seen");
        host.check("test -s seen/etc/down");
        host.check("umount seen");
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn killed_monitor_is_cleaned_up_after_by_the_next_of_its_name() {
    on_host(|host| {
        host.l1.write_file("/tmp/vm.toml", SMALL.replace("KERNEL", "vmlinuz").as_bytes()).unwrap();
        let mut killed = host.l1.spawn("exec vmm --config /tmp/vm.toml").unwrap();
        host.check("n=0; until vmm ps | grep -q '^small .*running' || [ $n = 100 ]; do n=$((n+1)); usleep 200000; done");
        host.check("kill -9 $(cat /run/vmm/small/pid)");
        assert_eq!(ended(&mut killed), Status::Signal(9));
        let mut next = host.small("vmlinuz");
        host.check("vmm stop --now small");
        assert_eq!(ended(next.console()), Status::Code(0));
        host.assert_gone("small");
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn second_monitor_of_a_name_is_refused_and_told_who_holds_it() {
    on_host(|host| {
        let (l1, guest) = host.full();
        l1.write_file("/tmp/again.toml", FULL.as_bytes()).unwrap();
        let second = l1.run("vmm --config /tmp/again.toml </dev/null", BOOT_DEADLINE).unwrap();
        assert_eq!(second.status, Status::Code(1), "{second:?}");
        let pid = l1.check("cat /run/vmm/full/pid", LONG).unwrap();
        let stderr = String::from_utf8_lossy(&second.stderr).into_owned();
        assert!(stderr.contains(&pid) && stderr.contains("full"), "{stderr}");
        assert_eq!(ok(guest, "echo undisturbed"), "undisturbed");
    });
}

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn processor_model_is_what_the_guest_sees() {
    on_host(|host| {
        let config = SMALL.replace("KERNEL", "vmlinuz") + "[cpu]\nmodel = \"x86-64-v2\"\n";
        let mut guest = Guest::start(&host.l1, &config).unwrap();
        let flags = ok(&mut guest, "grep -m1 ^flags /proc/cpuinfo");
        let has = |flag: &str| flags.split_whitespace().any(|found| found == flag);
        assert!(["sse4_2", "popcnt", "cx16", "hypervisor"].into_iter().all(has), "{flags}");
        assert!(!["avx", "avx2", "bmi1", "aes", "sha_ni"].into_iter().any(has), "{flags}");
        host.check("vmm stop --now small");
        assert_eq!(ended(guest.console()), Status::Code(0));

        // What the emulated host has not got is refused, with what is missing.
        let refused = SMALL.replace("KERNEL", "vmlinuz") + "[cpu]\nmodel = \"x86-64-v3\"\n";
        host.l1.write_file("/tmp/v3.toml", refused.as_bytes()).unwrap();
        let output = host.l1.run("vmm --config /tmp/v3.toml </dev/null", BOOT_DEADLINE).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status, Status::Code(2), "{said}");
        assert!(said.contains("cpu.model = \"x86-64-v3\"") && said.contains("avx"), "{said}");
    });
}
