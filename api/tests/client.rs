//! The client beside the real server, and beside monitors that have gone mad.

mod common;

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use api::client::{Client, Error, Reason};
use api::{AtPowerOff, DiskLimits, DiskOrder, MaxSize, Medium, PowerOffChoice, Resize, Snapshot, State};
use common::{serve, socket};
use proptest::prelude::*;

const LONG: Duration = Duration::from_secs(3600);
const SHORT: Duration = Duration::from_millis(50);

/// Takes one connection for each of `answers` and says it there, once something was asked, whatever that was.
fn canned(dir: &Path, answers: Vec<Vec<u8>>) -> JoinHandle<()> {
    let listener = UnixListener::bind(socket(dir)).unwrap();
    thread::spawn(move || {
        for answer in answers {
            let (mut stream, _) = listener.accept().unwrap();
            if stream.read(&mut [0; 1024]).unwrap() > 0 {
                // The client may have read enough and gone.
                let _ = stream.write_all(&answer);
            }
        }
    })
}

/// What the client makes of `answer` when it asks for a pause.
fn pause(answer: &[u8]) -> Result<(), Error> {
    let dir = tempfile::tempdir().unwrap();
    let monitor = canned(dir.path(), vec![answer.to_vec()]);
    let result = Client::connect(&socket(dir.path()), LONG).unwrap().pause();
    monitor.join().unwrap();
    result
}

fn with_body(status: u16, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status} X\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

#[test]
fn every_request_reaches_the_guest_over_one_connection() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, _server) = serve(dir.path());
    let mut client = Client::connect(&socket(dir.path()), LONG).unwrap();
    assert_eq!(client.status().unwrap(), api::Control::status(&*guest));
    client.pause().unwrap();
    assert_eq!(client.status().unwrap().state, State::Paused);
    client.resume().unwrap();
    assert_eq!(client.status().unwrap().state, State::Running);
    client.power_button().unwrap();
    client.stop().unwrap();
    assert_eq!(*guest.asked.lock().unwrap(), ["power-button", "stop"]);
}

#[test]
fn orders_to_disks_arrive_as_they_were_given() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, _server) = serve(dir.path());
    let mut client = Client::connect(&socket(dir.path()), LONG).unwrap();
    let limits = DiskLimits { iops: None, bandwidth: Some(1 << 20), burst: Some(500) };
    client.snapshot(0, "before \"it\"", "").unwrap();
    client.snapshot(0, "after", "it\nwas").unwrap();
    client.change_medium(0, Path::new("/srv/b.img"), Some("flat")).unwrap();
    client.resize(0, 2 << 30).unwrap();
    client.set_max_size(0, None).unwrap();
    client.set_limits(0, limits).unwrap();
    client.at_power_off(0, AtPowerOff::Commit).unwrap();
    let medium = Medium { path: "/srv/b.img".into(), format: Some("flat".into()) };
    let orders = [
        DiskOrder::Snapshot(Snapshot { name: "before \"it\"".into(), description: String::new() }),
        DiskOrder::Snapshot(Snapshot { name: "after".into(), description: "it\nwas".into() }),
        DiskOrder::Medium(medium),
        DiskOrder::Resize(Resize { bytes: 2 << 30 }),
        DiskOrder::MaxSize(MaxSize { bytes: None }),
        DiskOrder::Limits(limits),
        DiskOrder::AtPowerOff(PowerOffChoice { action: AtPowerOff::Commit }),
    ];
    assert_eq!(*guest.orders.lock().unwrap(), orders.map(|order| (0, order)));
    let error = client.retry(0).unwrap_err();
    assert!(matches!(&error.reason, Reason::Refused(why) if why == "nothing of disk 0 waits"), "{error}");
    let error = client.commit(1).unwrap_err();
    assert!(matches!(&error.reason, Reason::Answered { status: 404, .. }), "{error}");
}

#[test]
fn jobs_are_begun_watched_and_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    let (guest, _server) = serve(dir.path());
    let mut client = Client::connect(&socket(dir.path()), LONG).unwrap();
    let job = client.stream(0).unwrap();
    assert_eq!(job.error.as_deref(), Some("no\u{fffd}space"), "it is fit for a terminal");
    assert_eq!(client.job(job.id).unwrap(), job);
    assert_eq!(client.jobs().unwrap(), [job]);
    client.cancel(3).unwrap();
    assert_eq!(*guest.asked.lock().unwrap(), ["cancel"]);
    assert!(matches!(client.job(4).unwrap_err().reason, Reason::Answered { status: 404, .. }));
}

#[test]
fn what_may_be_done_once_only_never_goes_over_a_connection_that_may_have_ended() {
    let dir = tempfile::tempdir().unwrap();
    // One answer on each connection; a second request over the first would find nobody.
    let done = b"HTTP/1.1 204 X\r\n\r\n".to_vec();
    let monitor = canned(dir.path(), vec![done.clone(), done]);
    let mut client = Client::connect(&socket(dir.path()), LONG).unwrap();
    client.pause().unwrap();
    client.snapshot(0, "a", "").unwrap();
    monitor.join().unwrap();
    // One that is closed before the answer may have been heard: it is not asked again.
    let dir = tempfile::tempdir().unwrap();
    let monitor = canned(dir.path(), vec![Vec::new()]);
    let mut client = Client::connect(&socket(dir.path()), LONG).unwrap();
    assert!(matches!(client.snapshot(0, "a", "").unwrap_err().reason, Reason::Closed));
    monitor.join().unwrap();
}

#[test]
fn status_of_a_monitor_that_tells_less_of_its_disks_is_understood() {
    let old = r#"{"path":"/a","readonly":false,"bytes":512}"#;
    let disk: api::DiskStatus = serde_json::from_str(old).unwrap();
    assert_eq!((disk.bytes, disk.more), (512, api::DiskDetails::default()));
}

#[test]
fn refusal_is_told_in_the_words_of_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let (_guest, _server) = serve(dir.path());
    let mut client = Client::connect(&socket(dir.path()), LONG).unwrap();
    let error = client.resume().unwrap_err();
    assert!(matches!(&error.reason, Reason::Refused(why) if why == "the guest is running, not paused"));
    let text = error.to_string();
    assert!(text.starts_with("resume: ") && text.contains(socket(dir.path()).to_str().unwrap()), "{text}");
    // And the connection goes on.
    client.pause().unwrap();
}

#[test]
fn monitor_that_is_gone_is_told_from_all_else() {
    let dir = tempfile::tempdir().unwrap();
    let path = socket(dir.path());
    let gone = |result: Result<Client, Error>| {
        let error = result.unwrap_err();
        assert!(matches!(error.reason, Reason::Gone), "{error}");
        assert!(error.to_string().contains("nobody listens"));
    };
    gone(Client::connect(&path, LONG));
    drop(UnixListener::bind(&path).unwrap());
    gone(Client::connect(&path, LONG));
}

#[test]
fn server_that_stopped_meanwhile_is_gone_or_has_closed() {
    let dir = tempfile::tempdir().unwrap();
    let (_guest, server) = serve(dir.path());
    let mut client = Client::connect(&socket(dir.path()), LONG).unwrap();
    client.status().unwrap();
    server.stop();
    assert!(matches!(client.status().unwrap_err().reason, Reason::Gone));
}

#[test]
fn connection_closed_between_two_requests_is_opened_anew() {
    let dir = tempfile::tempdir().unwrap();
    let done = b"HTTP/1.1 204 X\r\n\r\n".to_vec();
    let last = b"HTTP/1.1 204 X\r\nConnection: close\r\n\r\n".to_vec();
    let monitor = canned(dir.path(), vec![done.clone(), last, done]);
    let mut client = Client::connect(&socket(dir.path()), LONG).unwrap();
    for _ in 0..3 {
        client.pause().unwrap();
    }
    monitor.join().unwrap();
}

#[test]
fn connection_on_which_more_came_than_was_asked_for_is_not_used_again() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(socket(dir.path())).unwrap();
    let monitor = thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        assert_ne!(first.read(&mut [0; 1024]).unwrap(), 0);
        first.write_all(b"HTTP/1.1 204 X\r\n\r\nHTTP/1.1").unwrap();
        // The client has closed it already, not only when it needed another.
        assert_eq!(first.read(&mut [0; 1024]).unwrap(), 0);
        listener
    });
    let mut client = Client::connect(&socket(dir.path()), LONG).unwrap();
    client.pause().unwrap();
    drop(monitor.join().unwrap());
    assert!(matches!(client.pause().unwrap_err().reason, Reason::Gone));
}

#[test]
fn monitor_that_does_not_answer_is_given_up_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let _listener = UnixListener::bind(socket(dir.path())).unwrap();
    let mut client = Client::connect(&socket(dir.path()), SHORT).unwrap();
    let error = client.status().unwrap_err();
    assert!(matches!(error.reason, Reason::TimedOut(allowed) if allowed == SHORT));
    assert!(error.to_string().ends_with("no answer within 0.05 s"), "{error}");
}

#[test]
fn monitor_that_takes_no_connections_is_given_up_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(socket(dir.path())).unwrap();
    // SAFETY: listen changes nothing but the length of the queue.
    assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
    let _first = UnixStream::connect(socket(dir.path())).unwrap();
    let error = Client::connect(&socket(dir.path()), SHORT).unwrap_err();
    assert!(matches!(error.reason, Reason::TimedOut(_)), "{error}");
    let error = Client::connect(&socket(dir.path()), Duration::ZERO).unwrap_err();
    assert!(matches!(error.reason, Reason::TimedOut(_)), "{error}");
}

#[test]
fn monitor_that_dribbles_is_given_up_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(socket(dir.path())).unwrap();
    let monitor = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        while stream.write_all(b"HTTP/1.1 100 X\r\n\r\n").is_ok() {}
    });
    let error = Client::connect(&socket(dir.path()), SHORT).unwrap().pause().unwrap_err();
    assert!(matches!(error.reason, Reason::TimedOut(_)), "{error}");
    monitor.join().unwrap();
}

#[test]
fn path_that_cannot_be_a_socket_is_refused_with_the_limit() {
    for path in ["", &"x".repeat(108), "a\0b"] {
        let error = Client::connect(Path::new(path), LONG).unwrap_err();
        assert!(error.to_string().contains("1 to 107 bytes"), "{error}");
    }
}

#[test]
#[ignore = "needs root"]
fn socket_of_somebody_else_is_not_permitted() {
    let dir = tempfile::tempdir().unwrap();
    let path = socket(dir.path());
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let (guest, _server) = serve(dir.path());
    for mode in [0o600, 0o666] {
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        let path = path.clone();
        let stranger = thread::spawn(move || {
            // SAFETY: plain numbers; the bare system call changes this thread alone.
            assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 54321, 54321, 54321) }, 0);
            Client::connect(&path, LONG).and_then(|mut client| client.stop())
        });
        let error = stranger.join().unwrap().unwrap_err();
        assert!(matches!(error.reason, Reason::NotPermitted), "{error}");
    }
    assert!(guest.asked.lock().unwrap().is_empty());
}

#[test]
fn interim_answers_are_passed_over() {
    pause(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 X\r\nA: b\r\n\r\nHTTP/1.1 204 X\r\n\r\n").unwrap();
}

#[test]
fn other_errors_are_told_with_their_number_and_message() {
    let told = |answer: &[u8]| pause(answer).unwrap_err();
    let error = told(&with_body(503, r#"{"error":"too many","more":1}"#));
    assert!(matches!(&error.reason, Reason::Answered { status: 503, message } if message == "too many"));
    let error = told(&with_body(500, "<html>"));
    assert!(
        matches!(&error.reason, Reason::Answered { status: 500, message } if message == "no reason given")
    );
    assert!(matches!(told(&with_body(403, "{}")).reason, Reason::NotPermitted));
    assert!(matches!(told(b"").reason, Reason::Closed));
    assert!(matches!(told(b"HTTP/1.1 200 X\r\nContent-Length: 5\r\n\r\nabc").reason, Reason::Closed));
}

#[test]
fn answer_that_no_monitor_gives_is_not_understood() {
    let long = format!("HTTP/1.1 200 X\r\nA: {}", "b".repeat(17000));
    let whole = format!("{long}\r\nContent-Length: 0\r\n\r\n");
    let many = format!("HTTP/1.1 200 X\r\n{}\r\n", "a: b\r\n".repeat(65));
    for wrong in [
        "SSH-2.0-OpenSSH_9.2\r\n",
        "HTTP/1.1 200 X\r\n\r\n",
        "HTTP/1.1 200 X\r\nContent-Length: -1\r\n\r\n",
        "HTTP/1.1 200 X\r\nContent-Length: 1048577\r\n\r\n",
        "HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        &long,
        &whole,
        &many,
    ] {
        let error = pause(wrong.as_bytes()).unwrap_err();
        assert!(matches!(error.reason, Reason::NotUnderstood(_)), "{error}");
    }
}

#[test]
fn control_characters_from_the_monitor_do_not_reach_a_terminal() {
    let error = pause(&with_body(409, r#"{"error":"\u001b[2Jboo"}"#)).unwrap_err();
    assert!(error.to_string().ends_with("refused: \u{fffd}[2Jboo"), "{error:?}");

    let dir = tempfile::tempdir().unwrap();
    let esc = r"\u001b";
    let body = format!(
        r#"{{"name":"{esc}","state":"paused","pid":1,"version":"{esc}","started":0,"cpus":1,"memory":1,"kernel":"{esc}",
           "serial":"{esc}","disks":[{{"path":"{esc}","readonly":true,"bytes":0}}],"nets":[{{"tap":"{esc}","mac":"{esc}"}}]}}"#
    );
    let monitor = canned(dir.path(), vec![with_body(200, &body)]);
    let status = Client::connect(&socket(dir.path()), LONG).unwrap().status().unwrap();
    assert!(!format!("{status:?}").contains("u{1b}"), "{status:?}");
    assert_eq!(status.nets[0].mac, "\u{fffd}");
    monitor.join().unwrap();
}

#[test]
fn fields_of_a_later_version_are_ignored_and_missing_ones_named() {
    let ask = |body: &str| {
        let dir = tempfile::tempdir().unwrap();
        let monitor = canned(dir.path(), vec![with_body(200, body)]);
        let status = Client::connect(&socket(dir.path()), LONG).unwrap().status();
        monitor.join().unwrap();
        status
    };
    let body = r#"{"name":"web","state":"running","pid":1,"version":"9","started":0,"cpus":1,"memory":1,"kernel":"k",
        "disks":[],"nets":[],"colour":"red"}"#;
    assert_eq!(ask(body).unwrap().serial, None);
    let error = ask(&body.replace("\"pid\":1,", "")).unwrap_err();
    assert!(error.to_string().contains("missing field `pid`"), "{error}");
}

proptest! {
    #[test]
    fn any_answer_ends_in_a_result(
        start in proptest::sample::select(&["", "HTTP/1.1 200 X\r\n", "HTTP/1.1 409 X\r\nContent-Length: 9\r\n\r\n"][..]),
        rest in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let answer = [start.as_bytes(), &rest].concat();
        if let Ok(()) = pause(&answer) {
            prop_assert!(answer.starts_with(b"HTTP/1."));
        }
    }
}
