//! `vmm image` on the disk of a guest that runs.

use std::fs::File;

use serde_json::Value;
use vmm_tests::guest::Setup;

#[test]
#[ignore = "needs /dev/kvm"]
fn disk_of_a_running_guest_is_shown_and_refused_with_the_guest_and_what_to_do() {
    let setup = Setup::new("test=serial-echo").unwrap().with("[[disk]]\npath = \"disk.img\"\n");
    let disk = setup.dir().join("disk.img");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let mut guest = setup.start().unwrap();
    guest.wait_event("hello").unwrap();
    let (disk, copy) = (disk.to_str().unwrap(), guest.dir().join("copy.img"));
    let copy = copy.to_str().unwrap();

    let info = guest.vmm(&["image", "info", disk, "--json"]).unwrap();
    let info: Value = serde_json::from_slice(&info.stdout).unwrap();
    let holder = info["in_use_by"].as_str().unwrap_or_default();
    assert!(holder.contains(guest.name()) && holder.contains(&guest.pid().to_string()), "{info}");
    assert_eq!(info["size"], 1 << 20);

    for (args, status) in [
        (["copy", disk, copy].as_slice(), 1),
        (&["clone", disk, copy], 1),
        (&["copy", disk, disk, "--into"], 1),
        (&["create", disk, "--size", "1M", "--force"], 1),
        (&["compare", disk, disk], 2),
        (&["map", disk], 1),
    ] {
        let output = guest.vmm(&[&["image"], args].concat()).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        assert!(said.contains(&format!("process {}", guest.pid())), "{args:?}: {said}");
        assert!(said.contains(&format!("`vmm stop {}`", guest.name())), "{args:?}: {said}");
    }
    assert!(!std::path::Path::new(copy).exists());

    for args in [["disk", "retry", guest.name(), "7"], ["disk", "retry", "nobody", "0"]] {
        let output = guest.vmm(&args).unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        assert!(said.contains(if args[3] == "7" { "7" } else { "nobody" }), "{args:?}: {said}");
    }
}
