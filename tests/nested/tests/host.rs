//! The emulated host itself, without a guest.

use std::time::Duration;

use vmm_nested::{Console, L1, Options, Status, build};

const DEADLINE: Duration = Duration::from_secs(60);

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn host_boots_runs_commands_keeps_files_and_has_kvm() {
    let agent = build::binary("vmm-nested", "l1-agent").unwrap();
    let l1 = L1::boot(&Options::new("host", &agent, None)).unwrap();

    assert_eq!(l1.check("uname -r", DEADLINE).unwrap(), l1.release());
    assert_eq!(l1.check("test -c /dev/kvm && grep -c svm /proc/cpuinfo", DEADLINE).unwrap(), "2");

    let output = l1.run("echo out; echo err >&2; exit 7", DEADLINE).unwrap();
    assert_eq!(
        (output.stdout, output.stderr, output.status),
        (b"out\n".into(), b"err\n".into(), Status::Code(7))
    );

    let content: Vec<u8> =
        (0..1_000_003_u32).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    l1.write_file("/tmp/some/where/file", &content).unwrap();
    assert!(l1.read_file("/tmp/some/where/file").unwrap() == content);

    let mut console: Console = l1.spawn("stty -echo; read line; echo \"got $line\"; tty; sleep 600").unwrap();
    console.send("typed\n");
    console.wait_for("got typed", DEADLINE).unwrap();
    console.wait_for("/dev/pts/", DEADLINE).unwrap();
    console.signal(15);
    assert_eq!(console.exit_status(DEADLINE).unwrap(), Status::Signal(15));
}
