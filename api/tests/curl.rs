//! The commands of `docs/api.md`, as a user types them.

mod common;

use std::path::Path;
use std::process::Command;

use common::{serve, socket};

/// Exit status 0 or not, and what `curl` prints with the status code of the answer after it.
fn curl(dir: &Path, arguments: &[&str]) -> (bool, String) {
    let output = Command::new("curl")
        .args([
            "--silent",
            "--show-error",
            "--max-time",
            "60",
            "--write-out",
            "%{http_code}",
            "--unix-socket",
        ])
        .arg(socket(dir))
        .args(arguments)
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap())
}

#[test]
#[ignore = "needs curl"]
fn commands_of_the_documentation_work() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, _server) = serve(dir.path());
    let curl = |arguments: &[&str]| curl(dir.path(), arguments);
    let (_, status) = curl(&["http://vmm/v1/status"]);
    assert!(status.contains(r#""state":"running""#) && status.ends_with("}\n200"), "{status}");
    let done = (true, "204".to_owned());
    assert_eq!(curl(&["-X", "PUT", "http://vmm/v1/pause"]), done);
    let (ok, refused) = curl(&["-X", "PUT", "--fail-with-body", "http://vmm/v1/pause"]);
    assert_eq!((ok, refused.as_str()), (false, "{\"error\":\"the guest is paused, not running\"}\n409"));
    assert_eq!(curl(&["-X", "PUT", "-d", "", "http://vmm/v1/resume"]), done);
    assert_eq!(curl(&["-X", "PUT", "http://vmm/v1/power-button"]), done);
    assert_eq!(curl(&["-X", "PUT", "http://vmm/v1/stop"]), done);
    assert_eq!(*guest.asked.lock().unwrap(), ["power-button", "stop"]);
    assert_eq!(curl(&["-d", r#"{"name":"before-upgrade"}"#, "http://vmm/v1/disks/0/snapshot"]), done);
    let (_, job) = curl(&["-X", "POST", "http://vmm/v1/disks/0/commit"]);
    assert!(job.starts_with(r#"{"id":3,"#) && job.ends_with("}\n202"), "{job}");
    let (_, job) = curl(&["http://vmm/v1/jobs/3"]);
    assert!(job.starts_with(r#"{"id":3,"#) && job.ends_with("}\n200"), "{job}");
    assert_eq!(curl(&["-X", "PUT", "http://vmm/v1/jobs/3/cancel"]), done);
    for (verb, body) in [
        ("size", r#"{"bytes":2147483648}"#),
        ("medium", r#"{"path":"/srv/tools.img","format":"flat"}"#),
        ("limits", r#"{"iops":500,"bandwidth":104857600,"burst":1000}"#),
        ("at-power-off", r#"{"action":"commit"}"#),
    ] {
        assert_eq!(curl(&["-X", "PUT", "-d", body, &format!("http://vmm/v1/disks/0/{verb}")]), done);
    }
}

#[test]
#[ignore = "needs curl"]
fn unusual_requests_of_curl_are_answered() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, _server) = serve(dir.path());
    let curl = |arguments: &[&str]| curl(dir.path(), arguments).1;
    assert!(curl(&["--http1.0", "http://vmm/v1/status"]).ends_with("200"));
    assert!(curl(&["--head", "http://vmm/v1/status"]).ends_with("200"));
    // Two requests over one connection.
    let both = curl(&["http://vmm/v1/status", "http://vmm/v1/status", "-w", "%{num_connects};"]);
    assert!(both.contains("}\n1;{") && both.ends_with("}\n0;"), "{both}");
    let body = dir.path().join("body");
    std::fs::write(&body, vec![b'x'; 4000]).unwrap();
    let upload = ["-T", body.to_str().unwrap(), "http://vmm/v1/stop"];
    assert!(curl(&upload).ends_with("400"));
    assert!(curl(&[&upload[..], &["-H", "Expect: 100-continue"]].concat()).ends_with("400"));
    assert!(curl(&[&upload[..], &["-H", "Transfer-Encoding: chunked"]].concat()).ends_with("501"));
    // More than the socket takes at once.
    std::fs::write(&body, vec![b'x'; 900_000]).unwrap();
    assert!(curl(&[&upload[..], &["-H", "Expect:"]].concat()).ends_with("413"));
    assert!(guest.asked.lock().unwrap().is_empty());
}
