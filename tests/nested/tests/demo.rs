//! The guest to look at, in the emulated host.

use vmm_nested::build;
use vmm_nested::demo::{Demo, Place};

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn demo_guest_shows_kernel_disk_network_and_entropy() {
    let place = Place::Nested { agent: build::binary("vmm-nested", "l1-agent").unwrap() };
    let vmm = build::binary("vmm", "vmm").unwrap();
    let mut steps = 0;
    let mut progress = |_: &str| steps += 1;
    let seen = Demo::start(&vmm, &place, &mut progress).unwrap().check(&mut progress).unwrap();
    assert!(seen.kernel.contains("cloud-amd64"), "{seen:?}");
    assert!(seen.disk.contains("read back"), "{seen:?}");
    assert!(seen.network.contains(" 0% packet loss"), "{seen:?}");
    assert!(seen.entropy.contains("virtio_rng"), "{seen:?}");
    assert!(steps > 0);
}
