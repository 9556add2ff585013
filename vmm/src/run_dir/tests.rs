//! Claims of names, and what is seen of them from outside.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::*;

fn root() -> (tempfile::TempDir, Root) {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::new(dir.path().join("run"));
    (dir, root)
}

#[test]
fn second_claim_of_a_name_is_refused_and_told_who_has_it() {
    let (_dir, root) = root();
    let claim = root.claim("web").unwrap();
    let refused = root.claim("web").unwrap_err();
    assert!(
        matches!(&refused, Error::Held { pid: Some(pid), .. } if *pid == std::process::id()),
        "{refused}"
    );
    assert!(refused.to_string().contains("web"), "{refused}");
    root.claim("db").unwrap();
    drop(claim);
    root.claim("web").unwrap();
}

#[test]
fn nothing_is_left_when_a_claim_ends() {
    let (_dir, root) = root();
    let claim = root.claim("web").unwrap();
    let _listener = claim.listen().unwrap();
    drop(claim);
    assert_eq!(fs::read_dir(&root.0).unwrap().count(), 0);
}

#[test]
fn what_a_dead_monitor_left_is_not_listed_and_is_taken_over() {
    let (_dir, root) = root();
    let dir = root.0.join("web");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("lock"), "").unwrap();
    fs::write(dir.join("pid"), "999999999\n").unwrap();
    drop(UnixListener::bind(dir.join("api.sock")).unwrap());
    assert!(root.list().unwrap().is_empty());
    assert!(matches!(root.find("web"), Err(Error::Unknown { .. })));
    let claim = root.claim("web").unwrap();
    claim.listen().unwrap();
    assert_eq!(root.find("web").unwrap().pid(), Some(std::process::id()));
}

#[test]
fn guests_are_listed_by_name_and_without_a_directory_there_are_none() {
    let (_dir, root) = root();
    assert!(root.list().unwrap().is_empty());
    let _claims = ["b", "c", "a"].map(|name| root.claim(name).unwrap());
    let names: Vec<_> = root.list().unwrap().iter().map(|guest| guest.name().to_owned()).collect();
    assert_eq!(names, ["a", "b", "c"]);
}

#[test]
fn names_that_lead_out_of_the_directory_are_unknown() {
    let (dir, root) = root();
    let other = Root::new(dir.path().to_owned());
    let _claim = other.claim("outside").unwrap();
    for name in ["../outside", "..", ".", "", "/"] {
        assert!(matches!(root.find(name), Err(Error::Unknown { .. })), "{name}");
    }
}

#[test]
fn lock_that_is_a_symbolic_link_is_not_followed() {
    let (dir, root) = root();
    let victim = dir.path().join("victim");
    fs::create_dir_all(root.0.join("web")).unwrap();
    std::os::unix::fs::symlink(&victim, root.0.join("web/lock")).unwrap();
    assert!(matches!(root.claim("web"), Err(Error::Io { what: "open", .. })));
    assert!(!victim.exists());
}

#[test]
fn name_whose_place_is_taken_by_a_link_or_a_file_is_refused_instead_of_tried_for_ever() {
    let (_dir, root) = root();
    fs::create_dir_all(&root.0).unwrap();
    std::os::unix::fs::symlink("/nonexistent", root.0.join("link")).unwrap();
    fs::write(root.0.join("file"), "").unwrap();
    for name in ["link", "file"] {
        assert!(matches!(root.claim(name), Err(Error::Io { what: "make the directory", .. })), "{name}");
    }
}

#[test]
fn socket_path_that_is_too_long_is_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let root = Root::new(dir.path().join("x".repeat(100)));
    let refused = root.claim("web").unwrap().listen().unwrap_err();
    assert!(refused.to_string().contains(VARIABLE), "{refused}");
}

#[test]
fn of_many_that_claim_and_release_at_once_one_has_the_name_at_a_time() {
    let (_dir, root) = root();
    let (inside, claims) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    match root.claim("web") {
                        Ok(claim) => {
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            claims.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(claim);
                        }
                        Err(Error::Held { .. }) => thread::yield_now(),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
    });
    assert!(claims.load(Ordering::SeqCst) > 0);
}
