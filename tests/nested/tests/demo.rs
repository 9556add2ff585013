//! The guest to look at, in the emulated host.

use vmm_nested::build;
use vmm_nested::demo::{Demo, Place};

#[test]
#[ignore = "needs qemu-system-x86_64 and Debian's packages"]
fn demo_guest_boots_from_a_clone_and_shows_kernel_disk_network_and_entropy() {
    let place = Place::Nested { agent: build::binary("vmm-nested", "l1-agent").unwrap() };
    let vmm = build::binary("vmm", "vmm").unwrap();
    let mut steps = 0;
    let mut progress = |_: &str| steps += 1;
    let demo = Demo::start(&vmm, &place, &mut progress).unwrap();
    let cloning: Vec<_> = demo.cloning().iter().map(|step| step.output.clone()).collect();
    assert_eq!(cloning, ["template.img: thin, 64M", "demo.img: thin, 64M on template.img"]);
    let seen = demo.check(&mut progress).unwrap();
    assert!(seen.kernel.contains("cloud-amd64"), "{seen:?}");
    assert!(seen.disk.contains("read back"), "{seen:?}");
    assert!(seen.network.contains(" 0% packet loss"), "{seen:?}");
    assert!(seen.clone.starts_with("template.img is what it was; demo.img has "), "{seen:?}");
    assert!(seen.entropy.contains("virtio_rng"), "{seen:?}");
    assert!(steps > 0);
}
