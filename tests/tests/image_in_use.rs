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

#[test]
#[ignore = "needs /dev/kvm"]
fn snapshot_and_limit_of_a_running_guests_disk_are_told_as_they_were_ordered() {
    let setup = Setup::new("test=serial-echo").unwrap().with("[[disk]]\npath = \"disk.img\"\n");
    let disk = setup.dir().join("disk.img");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let mut guest = setup.start().unwrap();
    guest.wait_event("hello").unwrap();
    let disk = disk.to_str().unwrap();
    let top = guest.dir().join("disk.img.snapshots/one");
    let create = ["image", "snapshot", "create", disk, "one", "--description", "as it was"];
    assert!(guest.vmm(&create).unwrap().status.success());
    let resized = guest.vmm(&["image", "resize", disk, "--max-size", "8M", "--json"]).unwrap();
    let resized: Value = serde_json::from_slice(&resized.stdout).unwrap();
    assert_eq!((&resized["max_size"], &resized["cluster_size"]), (&(8 << 20).into(), &(64 << 10).into()));
    let chain = guest.vmm(&["image", "info", disk, "--chain", "--json"]).unwrap();
    let chain: Value = serde_json::from_slice(&chain.stdout).unwrap();
    assert_eq!(chain[1]["path"], top.to_str().unwrap(), "{chain}");
    let listed = guest.vmm(&["image", "snapshot", "ls", disk, "--json"]).unwrap();
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed["snapshots"][0]["description"], "as it was", "{listed}");
    let smaller = guest.vmm(&["image", "resize", disk, "512K"]).unwrap();
    let said = String::from_utf8_lossy(&smaller.stderr).into_owned();
    assert!(said.starts_with(&format!("vmm: {disk}, disk 0 of guest {}: ", guest.name())), "{said}");
}
