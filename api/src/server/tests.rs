//! The server as clients see it, good and bad ones.

use std::io::Read;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::SocketAddr;
use std::sync::atomic::AtomicU32;
use std::sync::mpsc::{Receiver, Sender, channel};

use proptest::prelude::*;

use super::*;
use crate::types::{
    AtPowerOff, DiskLimits, DiskOrder, DiskStatus, Job, JobState, MaxSize, Medium, NetStatus, PowerOffChoice,
    Refused, Resize, Snapshot, State, Status,
};

const STATUS: &[u8] = b"GET /v1/status HTTP/1.1\r\nHost: vmm\r\n\r\n";
/// Long enough that a test which waits for it hangs.
const NEVER: Limits = {
    let hour = Duration::from_secs(3600);
    Limits { idle: hour, request: hour, linger: hour }
};

#[derive(Debug, Default)]
struct Fake {
    calls: Mutex<Vec<&'static str>>,
    orders: Mutex<Vec<(usize, DiskOrder)>>,
    refuse: AtomicBool,
    /// Told of a stop, and what the stop then waits for.
    stop: Mutex<Option<(Sender<()>, Receiver<()>)>>,
}

impl Fake {
    fn call(&self, name: &'static str) -> Result<(), Refused> {
        self.calls.lock().unwrap().push(name);
        match self.refuse.load(Ordering::SeqCst) {
            true => Err(Refused(format!("no \"{name}\" today"))),
            false => Ok(()),
        }
    }

    fn take_calls(&self) -> Vec<&'static str> {
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

impl Control for Fake {
    fn status(&self) -> Status {
        self.calls.lock().unwrap().push("status");
        assert!(!self.refuse.load(Ordering::SeqCst), "told to panic");
        let disk = DiskStatus {
            path: "/srv/web.img".into(),
            readonly: false,
            bytes: 1 << 30,
            more: Default::default(),
        };
        Status {
            name: "web".into(),
            state: State::Running,
            pid: 4711,
            version: "0.1.0".into(),
            started: 1_760_000_000,
            cpus: 2,
            memory: 512 << 20,
            kernel: "/boot/vmlinuz".into(),
            serial: Some("/dev/pts/7".into()),
            disks: vec![disk; 64],
            nets: vec![NetStatus { tap: "tap0".into(), mac: "52:54:00:12:34:56".into() }],
        }
    }
    fn pause(&self) -> Result<(), Refused> {
        self.call("pause")
    }
    fn resume(&self) -> Result<(), Refused> {
        self.call("resume")
    }
    fn power_button(&self) -> Result<(), Refused> {
        self.call("power-button")
    }
    fn stop(&self) -> Result<(), Refused> {
        if let Some((entered, go)) = self.stop.lock().unwrap().take() {
            entered.send(()).unwrap();
            go.recv().unwrap();
        }
        self.call("stop")
    }
    fn disks(&self) -> usize {
        2
    }
    fn disk(&self, index: usize, order: DiskOrder) -> Result<Option<Job>, Refused> {
        self.orders.lock().unwrap().push((index, order.clone()));
        self.call("disk")?;
        Ok(matches!(order, DiskOrder::Commit | DiskOrder::Stream).then(|| self.jobs().remove(0)))
    }
    fn jobs(&self) -> Vec<Job> {
        let job =
            |id, state| Job { id, what: "commit".into(), disk: 0, state, done: 1, total: 2, error: None };
        vec![job(7, JobState::Running), job(8, JobState::Done)]
    }
    fn cancel(&self, id: u64) {
        assert_eq!(id, 7);
        self.call("cancel").unwrap();
    }
}

struct Host {
    server: Server,
    fake: Arc<Fake>,
    address: SocketAddr,
}

impl Host {
    fn new(limits: Limits) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // A name without a file, so that another user finds it too.
        let name = format!("vmm-api-test-{}-{number}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let fake = Arc::<Fake>::default();
        let listener = UnixListener::bind_addr(&address).unwrap();
        let server = Server::with_limits(listener, fake.clone(), limits).unwrap();
        Self { server, fake, address }
    }

    fn connect(&self) -> UnixStream {
        UnixStream::connect_addr(&self.address).unwrap()
    }

    /// Sends `bytes` and nothing more; returns all that comes back.
    fn talk(&self, bytes: &[u8]) -> Vec<Reply> {
        let mut stream = self.connect();
        // The server may end the connection before it has read everything.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        replies(&read_all(stream), bytes)
    }

    fn one(&self, request: &str) -> Reply {
        let mut replies = self.talk(request.as_bytes());
        assert_eq!(replies.len(), 1, "{replies:?}");
        replies.remove(0)
    }
}

fn read_all(mut stream: UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        // Everything before it has arrived; the server left bytes unread.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        result => drop(result.unwrap()),
    }
    bytes
}

#[derive(Debug, PartialEq, Eq)]
struct Reply {
    status: u16,
    fields: Vec<(String, String)>,
    body: String,
}

impl Reply {
    fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    fn error(&self) -> String {
        let body: serde_json::Value = serde_json::from_str(&self.body).unwrap();
        body["error"].as_str().unwrap().to_owned()
    }

    fn closes(&self) -> bool {
        self.field("Connection") == Some("close")
    }
}

/// Takes `bytes` apart; panics unless they are whole, well-formed answers to `request`, which holds a HEAD only if
/// all of its requests are one.
fn replies(mut bytes: &[u8], request: &[u8]) -> Vec<Reply> {
    let to_head = request.starts_with(b"HEAD ");
    let mut replies = Vec::<Reply>::new();
    while !bytes.is_empty() {
        assert!(!replies.last().is_some_and(Reply::closes), "something follows the last answer");
        let mut fields = [httparse::EMPTY_HEADER; 16];
        let mut head = httparse::Response::new(&mut fields);
        let len = head.parse(bytes).unwrap().unwrap();
        let status = head.code.unwrap();
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let fields: Vec<_> =
            head.headers.iter().map(|field| (field.name.to_owned(), text(field.value))).collect();
        let mut reply = Reply { status, fields, body: String::new() };
        bytes = &bytes[len..];
        if matches!(status, 100 | 204) {
            assert_eq!(reply.field("Content-Length"), None);
        } else {
            let len: usize = reply.field("Content-Length").unwrap().parse().unwrap();
            assert_eq!(reply.field("Content-Type"), Some("application/json"));
            if !to_head {
                reply.body = text(&bytes[..len]);
                bytes = &bytes[len..];
                assert!(matches!(status, 200 | 202) || !reply.error().is_empty());
            }
        }
        replies.push(reply);
    }
    replies
}

fn statuses(replies: &[Reply]) -> Vec<u16> {
    replies.iter().map(|reply| reply.status).collect()
}

fn put(path: &str, more: &str) -> String {
    format!("PUT {path} HTTP/1.1\r\nHost: vmm\r\n{more}\r\n")
}

#[test]
fn status_is_answered_as_json_with_its_length() {
    let host = Host::new(NEVER);
    let reply = host.one(str::from_utf8(STATUS).unwrap());
    assert_eq!(reply.status, 200);
    assert_eq!(serde_json::from_str::<Status>(&reply.body).unwrap(), host.fake.status());
    assert!(reply.body.contains(r#""state":"running""#) && reply.body.ends_with("}\n"));
    assert!(!reply.closes());
}

#[test]
fn every_action_reaches_the_guest_once_and_is_answered_without_a_body() {
    let host = Host::new(NEVER);
    for name in ["pause", "resume", "power-button", "stop"] {
        let reply = host.one(&put(&format!("/v1/{name}"), ""));
        assert_eq!((reply.status, reply.body.as_str()), (204, ""));
        assert_eq!(host.fake.take_calls(), [name]);
    }
}

#[test]
fn refusal_by_the_guest_is_a_conflict_that_says_why() {
    let host = Host::new(NEVER);
    host.fake.refuse.store(true, Ordering::SeqCst);
    let reply = host.one(&put("/v1/pause", ""));
    assert_eq!((reply.status, reply.error().as_str()), (409, "no \"pause\" today"));
}

#[test]
fn unknown_path_is_not_found_and_the_known_ones_are_listed() {
    let host = Host::new(NEVER);
    for path in ["/", "/v1", "/v1/status/", "/v2/status", "/v1/Pause", "/v1/pause?now", "*", "http://x"] {
        let reply = host.one(&put(path, ""));
        assert_eq!(reply.status, 404, "{path}");
        for known in crate::http::Resource::ALL {
            assert!(reply.error().contains(known.pattern()));
        }
    }
    assert!(host.fake.take_calls().is_empty());
}

#[test]
fn wrong_method_is_told_the_right_one() {
    let host = Host::new(NEVER);
    for (method, path, allow) in [
        ("PUT", "/v1/status", "GET, HEAD"),
        ("GET", "/v1/pause", "PUT"),
        ("BREW", "/v1/stop", "PUT"),
        ("POST", "/v1/disks/0/retry", "PUT"),
        ("PUT", "/v1/disks/0/snapshot", "POST"),
        ("POST", "/v1/jobs/7", "GET, HEAD"),
        ("GET", "/v1/jobs/7/cancel", "PUT"),
    ] {
        let reply = host.one(&format!("{method} {path} HTTP/1.1\r\nHost: vmm\r\n\r\n"));
        assert_eq!((reply.status, reply.field("Allow")), (405, Some(allow)));
    }
    assert!(host.fake.take_calls().is_empty());
}

#[test]
fn head_is_answered_like_get_without_the_body() {
    let host = Host::new(NEVER);
    let got = host.one("GET /v1/status HTTP/1.1\r\nHost: vmm\r\n\r\n");
    let head = host.one("HEAD /v1/status HTTP/1.1\r\nHost: vmm\r\n\r\n");
    assert_eq!(got.fields, head.fields);
    // Also where the request is at fault.
    assert_eq!(host.one("HEAD /v1/status HTTP/1.1\r\n\r\n").status, 400);
    assert_eq!(host.one("HEAD /v1/stop HTTP/1.1\r\nHost: vmm\r\n\r\n").status, 405);
}

#[test]
fn address_with_scheme_and_host_is_understood() {
    let host = Host::new(NEVER);
    assert_eq!(host.one(&put("HTTP://any.where:80/v1/pause", "")).status, 204);
}

#[test]
fn requests_sent_ahead_are_answered_in_order() {
    let host = Host::new(NEVER);
    let all = [put("/v1/pause", ""), put("/nowhere", ""), put("/v1/resume", "")].concat();
    assert_eq!(statuses(&host.talk(all.as_bytes())), [204, 404, 204]);
    assert_eq!(host.fake.take_calls(), ["pause", "resume"]);
}

#[test]
fn last_request_of_a_connection_is_the_last_that_is_performed() {
    let host = Host::new(NEVER);
    let last = ["PUT /v1/pause HTTP/1.0\r\n\r\n".to_owned(), put("/v1/pause", "Connection: x, Close\r\n")];
    for last in last {
        let replies = host.talk((last + &put("/v1/resume", "")).as_bytes());
        assert_eq!(statuses(&replies), [204]);
        assert!(replies[0].closes());
        assert_eq!(host.fake.take_calls(), ["pause"]);
    }
}

#[test]
fn body_is_refused_and_the_connection_stays_usable() {
    let host = Host::new(NEVER);
    let body = |len: usize| put("/v1/pause", &format!("Content-Length: {len}\r\n")) + &"x".repeat(len);
    let all = [body(0), body(1), body(65536), body(0)].concat();
    assert_eq!(statuses(&host.talk(all.as_bytes())), [204, 400, 400, 204]);
    assert_eq!(host.fake.take_calls(), ["pause", "pause"]);
    let replies = host.talk(&[body(65537).as_bytes(), STATUS].concat());
    assert_eq!(statuses(&replies), [413]);
    assert!(replies[0].closes());
}

fn order(method: &str, path: &str, body: &str) -> String {
    let len = body.len();
    format!("{method} {path} HTTP/1.1\r\nHost: vmm\r\nContent-Length: {len}\r\n\r\n{body}")
}

#[test]
fn orders_to_disks_arrive_with_their_content_and_long_ones_are_answered_by_a_job() {
    let host = Host::new(NEVER);
    let medium = Medium { path: "/srv/b.img".into(), format: Some("flat".into()) };
    let limits = DiskLimits { iops: Some(500), ..DiskLimits::default() };
    let cases = [
        (
            "POST",
            "snapshot",
            r#"{"name":"before"}"#,
            DiskOrder::Snapshot(Snapshot { name: "before".into(), description: String::new() }),
        ),
        ("POST", "commit", "", DiskOrder::Commit),
        ("POST", "stream", "", DiskOrder::Stream),
        ("PUT", "size", r#"{"bytes":2097152}"#, DiskOrder::Resize(Resize { bytes: 2 << 20 })),
        ("PUT", "max-size", r#"{"bytes":65536}"#, DiskOrder::MaxSize(MaxSize { bytes: Some(1 << 16) })),
        ("PUT", "max-size", r#"{"bytes":null}"#, DiskOrder::MaxSize(MaxSize { bytes: None })),
        ("PUT", "medium", r#"{"path":"/srv/b.img","format":"flat"}"#, DiskOrder::Medium(medium)),
        ("PUT", "retry", "", DiskOrder::Retry),
        ("PUT", "limits", r#" {"iops":500} "#, DiskOrder::Limits(limits)),
        (
            "PUT",
            "at-power-off",
            r#"{"action":"discard"}"#,
            DiskOrder::AtPowerOff(PowerOffChoice { action: AtPowerOff::Discard }),
        ),
    ];
    for (method, verb, body, wanted) in cases {
        let reply = host.one(&order(method, &format!("/v1/disks/1/{verb}"), body));
        let is_long = matches!(wanted, DiskOrder::Commit | DiskOrder::Stream);
        assert_eq!(reply.status, if is_long { 202 } else { 204 }, "{verb}: {reply:?}");
        assert!(!is_long || serde_json::from_str::<Job>(&reply.body).unwrap().id == 7);
        assert_eq!(host.fake.orders.lock().unwrap().pop(), Some((1, wanted)));
    }
}

#[test]
fn order_with_a_wrong_body_or_to_no_disk_is_refused_and_not_passed_on() {
    let host = Host::new(NEVER);
    for (method, path, body, status) in [
        ("POST", "/v1/disks/2/commit", "", 404),
        ("POST", "/v1/disks/0/commit", "{}", 400),
        ("POST", "/v1/disks/0/snapshot", "", 400),
        ("POST", "/v1/disks/0/snapshot", "{}", 400),
        ("POST", "/v1/disks/0/snapshot", r#"{"name":"a","nmae":"b"}"#, 400),
        ("PUT", "/v1/disks/0/size", r#"{"bytes":-1}"#, 400),
        ("PUT", "/v1/disks/0/size", r#"{"bytes":1}x"#, 400),
        ("PUT", "/v1/disks/0/limits", r#"{"iop":1}"#, 400),
        ("PUT", "/v1/disks/0/at-power-off", r#"{"action":"burn"}"#, 400),
        ("PUT", "/v1/disks/0/medium", "\u{0}", 400),
    ] {
        let reply = host.one(&order(method, path, body));
        assert_eq!(reply.status, status, "{path} {body}");
    }
    assert!(host.fake.take_calls().is_empty());
    host.fake.refuse.store(true, Ordering::SeqCst);
    let reply = host.one(&put("/v1/disks/0/retry", ""));
    assert_eq!((reply.status, reply.error().as_str()), (409, "no \"disk\" today"));
}

#[test]
fn jobs_are_listed_found_and_cancelled_by_their_number() {
    let host = Host::new(NEVER);
    let get = |path: &str| host.one(&format!("GET {path} HTTP/1.1\r\nHost: vmm\r\n\r\n"));
    assert_eq!(serde_json::from_str::<Vec<Job>>(&get("/v1/jobs").body).unwrap().len(), 2);
    assert_eq!(serde_json::from_str::<Job>(&get("/v1/jobs/8").body).unwrap().state, JobState::Done);
    assert_eq!(get("/v1/jobs/9").status, 404);
    assert_eq!(host.one(&put("/v1/jobs/9/cancel", "")).status, 404);
    assert_eq!(host.one(&put("/v1/jobs/7/cancel", "")).status, 204);
    assert_eq!(host.fake.take_calls(), ["cancel"]);
}

#[test]
fn length_that_cannot_be_known_for_sure_ends_the_connection() {
    let host = Host::new(NEVER);
    let cases = [
        ("Content-Length: x\r\n", 400),
        ("Content-Length: 0\r\nContent-Length: 5\r\n", 400),
        ("Content-Length: 99999999999999999999999\r\n", 413),
        ("Transfer-Encoding: chunked\r\n", 501),
        ("Transfer-Encoding: chunked\r\nContent-Length: 0\r\n", 400),
    ];
    for (fields, status) in cases {
        let reply = host.one(&(put("/v1/pause", fields) + &put("/v1/pause", "")));
        assert_eq!(reply.status, status, "{fields}");
        assert!(reply.closes());
    }
    assert!(host.fake.take_calls().is_empty());
}

#[test]
fn client_that_waits_for_leave_to_send_a_body_gets_it() {
    let host = Host::new(NEVER);
    let mut stream = host.connect();
    stream.write_all(put("/v1/pause", "Expect: 100-Continue\r\nContent-Length: 3\r\n").as_bytes()).unwrap();
    let mut leave = [0; 25];
    stream.read_exact(&mut leave).unwrap();
    assert_eq!(&leave, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"abc").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(statuses(&replies(&read_all(stream), b"")), [400]);
    assert_eq!(host.one(&put("/v1/pause", "Expect: 100-continue\r\nContent-Length: 0\r\n")).status, 204);
    let old = "PUT /v1/pause HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc";
    assert_eq!(host.one(old).status, 400);
    assert_eq!(host.one(&put("/v1/pause", "Expect: a miracle\r\n")).status, 417);
}

#[test]
fn head_of_64_fields_and_16_kib_is_served_and_one_more_is_not() {
    let host = Host::new(NEVER);
    let fields = |count: usize| put("/v1/pause", &"a: b\r\n".repeat(count - 1));
    assert_eq!(host.one(&fields(64)).status, 204);
    assert_eq!(host.one(&fields(65)).status, 431);
    let sized = |len: usize| {
        let empty = put("/v1/pause", "a: \r\n").len();
        put("/v1/pause", &format!("a: {}\r\n", "b".repeat(len - empty)))
    };
    assert_eq!(sized(16384).len(), 16384);
    assert_eq!(host.one(&sized(16384)).status, 204);
    assert!(request::parse(sized(16385).as_bytes()).is_err());
    let reply = host.one(&sized(16385));
    assert_eq!(reply.status, 431);
    assert!(reply.closes());
}

#[test]
fn what_is_no_request_is_told_so_and_ends_the_connection() {
    let host = Host::new(NEVER);
    for wrong in [
        "hello\r\n\r\n",
        "GET /v1/status\r\n\r\n",
        "GET /v1/status HTTP/2.0\r\n\r\n",
        "GET  /v1/status HTTP/1.1\r\n\r\n",
        "GET /v1/status HTTP/1.1\r\nHost : a\r\n\r\n",
        "GET /v1/status HTTP/1.1\r\nHost: a\r\n b\r\n\r\n",
        "GET /v1/status HTTP/1.1\r\n\r\n",
        "GET /v1/status HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
        "\u{16}\u{3}\u{1}",
    ] {
        let reply = host.one(wrong);
        assert_eq!(reply.status, 400, "{wrong:?}");
        assert!(reply.closes());
    }
}

#[test]
fn seventeenth_connection_is_turned_away_until_one_ends() {
    let host = Host::new(NEVER);
    let mut streams: Vec<_> = (0..CONNECTIONS).map(|_| host.connect()).collect();
    // Its request is not read, and it gets the answer nevertheless.
    assert_eq!(statuses(&host.talk(STATUS)), [503]);
    assert!(host.fake.take_calls().is_empty());
    for stream in &mut streams {
        stream.write_all(STATUS).unwrap();
        assert_ne!(stream.read(&mut [0; 1]).unwrap(), 0);
    }
    let last = streams.pop().unwrap();
    last.shutdown(Shutdown::Write).unwrap();
    // The end of the connection is the end of its thread's work; that it makes room may take a moment longer.
    assert!(!read_all(last).is_empty());
    while statuses(&host.talk(STATUS)) != [200] {}
}

#[test]
fn crowd_of_refused_clients_does_not_pile_up() {
    let host = Host::new(NEVER);
    let _streams: Vec<_> = (0..CONNECTIONS).map(|_| host.connect()).collect();
    let mut crowd: Vec<_> = (0..3 * CONNECTIONS).map(|_| host.connect()).collect();
    for stream in &crowd {
        assert_eq!(statuses(&replies(&read_all(stream.try_clone().unwrap()), b"")), [503]);
    }
    // The first are closed to make room for the last, which can still finish their requests.
    assert!(crowd[0].write_all(STATUS).is_err());
    crowd.last_mut().unwrap().write_all(STATUS).unwrap();
}

#[test]
fn silent_client_is_dropped_and_one_that_stalls_is_told_so() {
    let tiny = Duration::from_millis(30);
    let host = Host::new(Limits { idle: tiny, ..NEVER });
    assert_eq!(read_all(host.connect()), b"");
    let mut stream = host.connect();
    stream.write_all(STATUS).unwrap();
    assert_eq!(statuses(&replies(&read_all(stream), b"")), [200]);

    let host = Host::new(Limits { request: tiny, linger: tiny, ..NEVER });
    for begun in [&STATUS[..20], b"\r\n", put("/v1/pause", "Content-Length: 9\r\n").as_bytes()] {
        let mut stream = host.connect();
        stream.write_all(begun).unwrap();
        let replies = replies(&read_all(stream), b"");
        assert_eq!(statuses(&replies), [408]);
        assert!(replies[0].closes());
    }
    assert!(host.fake.take_calls().is_empty());
}

#[test]
fn client_that_never_closes_is_closed() {
    let host = Host::new(Limits { linger: Duration::from_millis(30), ..NEVER });
    let mut stream = host.connect();
    stream.write_all(b"nonsense\r\n\r\n").unwrap();
    assert_eq!(statuses(&replies(&read_all(stream.try_clone().unwrap()), b"")), [400]);
    // Sending works until the server has closed its end.
    while stream.write_all(&[0; 1024]).is_ok() {}
}

#[test]
fn client_that_is_refused_early_can_still_send_its_body() {
    let host = Host::new(NEVER);
    let mut stream = host.connect();
    stream.write_all(put("/v1/pause", "Content-Length: 100000\r\n").as_bytes()).unwrap();
    assert_eq!(statuses(&replies(&read_all(stream.try_clone().unwrap()), b"")), [413]);
    stream.write_all(&[0; 100_000]).unwrap();
}

#[test]
fn stop_waits_for_no_client() {
    let host = Host::new(NEVER);
    let silent = host.connect();
    let mut begun = host.connect();
    begun.write_all(&STATUS[..20]).unwrap();
    let mut lingering = host.connect();
    lingering.write_all(b"nonsense\r\n\r\n").unwrap();
    assert_ne!(lingering.read(&mut [0; 1]).unwrap(), 0);
    // One that asks and asks and never reads: both directions are full when its writing would block.
    let deaf = host.connect();
    deaf.set_nonblocking(true).unwrap();
    loop {
        // The server has stopped reading once some time brings no room.
        let room = wait::ready([(deaf.as_raw_fd(), libc::POLLOUT)], Some(Instant::now() + BACK_OFF));
        if room.unwrap() == [false] {
            break;
        }
        assert_ne!((&deaf).write(STATUS).unwrap(), 0);
    }
    host.server.stop();
    // No thread is left that could know of the guest.
    assert_eq!(Arc::strong_count(&host.fake), 1);
    assert_eq!(read_all(silent), b"");
    assert_eq!(read_all(begun), b"");
}

#[test]
fn stop_of_the_guest_is_answered_though_the_server_ends_meanwhile() {
    let host = Host::new(NEVER);
    let ((entered, at_entry), (go, at_go)) = (channel(), channel());
    *host.fake.stop.lock().unwrap() = Some((entered, at_go));
    let mut stream = host.connect();
    // What is sent ahead of the answer is not begun any more.
    stream.write_all((put("/v1/stop", "") + &put("/v1/pause", "")).as_bytes()).unwrap();
    at_entry.recv().unwrap();
    let shared = host.server.shared.clone();
    let (stopped, at_stopped) = channel();
    let stopper = thread::spawn(move || {
        host.server.stop();
        stopped.send(()).unwrap();
    });
    while !shared.is_stopping() {
        thread::yield_now();
    }
    // It waits for the call, however long that takes.
    assert!(at_stopped.recv_timeout(BACK_OFF).is_err());
    go.send(()).unwrap();
    assert_eq!(statuses(&replies(&read_all(stream), b"")), [204]);
    stopper.join().unwrap();
    assert_eq!(host.fake.take_calls(), ["stop"]);
}

#[test]
fn panic_while_serving_costs_that_connection_only() {
    let host = Host::new(NEVER);
    host.fake.refuse.store(true, Ordering::SeqCst);
    for _ in 0..2 * CONNECTIONS {
        assert!(host.talk(STATUS).iter().all(|reply| reply.status == 503));
    }
    host.fake.refuse.store(false, Ordering::SeqCst);
    while statuses(&host.talk(STATUS)) != [200] {}
}

#[test]
fn listener_that_is_broken_does_not_keep_the_server_from_stopping() {
    let address = SocketAddr::from_abstract_name(format!("vmm-api-broken-{}", std::process::id())).unwrap();
    let listener = UnixListener::bind_addr(&address).unwrap();
    let other = UnixStream::from(std::os::fd::OwnedFd::from(listener.try_clone().unwrap()));
    let server = Server::start(listener, Arc::<Fake>::default()).unwrap();
    other.shutdown(Shutdown::Both).unwrap();
    server.stop();
}

#[test]
fn only_root_and_the_owner_may_connect() {
    assert!(may_connect(0, 1000) && may_connect(1000, 1000) && may_connect(0, 0));
    assert!(!may_connect(1001, 1000) && !may_connect(1000, 0) && !may_connect(u32::MAX, 1000));
}

#[test]
#[ignore = "needs root"]
fn other_user_is_turned_away_and_nothing_is_done_for_them() {
    let host = Host::new(NEVER);
    let address = host.address.clone();
    let stranger = thread::spawn(move || {
        // SAFETY: plain numbers; the bare system call changes this thread alone.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, 54321, 54321, 54321) };
        assert_eq!(changed, 0, "{}", io::Error::last_os_error());
        let mut stream = UnixStream::connect_addr(&address).unwrap();
        stream.write_all(put("/v1/stop", "").as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        replies(&read_all(stream), b"")
    });
    let replies = stranger.join().unwrap();
    assert_eq!(statuses(&replies), [403]);
    assert!(replies[0].error().contains("54321"));
    assert!(host.fake.take_calls().is_empty());
}

/// Something like a connection's worth of requests: good pieces in any order, and any bytes among them.
fn conversation() -> impl Strategy<Value = Vec<u8>> {
    const PIECES: &[&str] = &[
        "GET ",
        "PUT ",
        "POST ",
        "/v1/status",
        "/v1/stop",
        "/v1/pause HTTP/1.1\r\n",
        " HTTP/1.1\r\n",
        " HTTP/1.0\r\n",
        "\r\n",
        "\n",
        "Host: a\r\n",
        "Content-Length: 5\r\n",
        "Content-Length: ",
        "Expect: 100-continue\r\n",
        "Transfer-Encoding: chunked\r\n",
        "Connection: close\r\n",
        "hello",
        "GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n",
        "PUT /v1/pause HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
        "PUT /v1/resume HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc",
        "PUT /v1/stop HTTP/1.1\r\nHost: a\r\n\r\n",
    ];
    let good = proptest::sample::select(PIECES).prop_map(|piece| piece.as_bytes().to_vec());
    let wild = proptest::collection::vec(any::<u8>(), 0..20);
    let long = (any::<u8>(), 1..40_000usize).prop_map(|(byte, count)| vec![byte; count]);
    let piece = prop_oneof![20 => good, 2 => wild, 1 => long];
    proptest::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

/// Writes the pieces of `bytes` between the `cuts`, each only after the one before has been read.
fn write_cut(stream: &mut UnixStream, bytes: &[u8], cuts: &[prop::sample::Index]) {
    let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    cuts.extend([0, bytes.len()]);
    cuts.sort_unstable();
    for piece in cuts.windows(2) {
        if stream.write_all(&bytes[piece[0]..piece[1]]).is_err() {
            return;
        }
        let mut unread: libc::c_int = 1;
        while unread > 0 {
            // SAFETY: SIOCOUTQ (TIOCOUTQ) writes one int.
            let asked = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut unread) };
            assert_eq!(asked, 0);
            thread::yield_now();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_bytes_are_answered_well_or_not_at_all(bytes in conversation()) {
        let host = Host::new(NEVER);
        host.talk(&bytes);
        host.server.stop();
    }

    #[test]
    fn requests_in_any_pieces_get_the_same_answers(
        bytes in conversation(),
        cuts in proptest::collection::vec(any::<prop::sample::Index>(), 0..10),
    ) {
        let host = Host::new(NEVER);
        let whole = host.talk(&bytes);
        let calls = host.fake.take_calls();
        let mut stream = host.connect();
        write_cut(&mut stream, &bytes, &cuts);
        let _ = stream.shutdown(Shutdown::Write);
        prop_assert_eq!(whole, replies(&read_all(stream), &bytes));
        prop_assert_eq!(calls, host.fake.take_calls());
    }

    #[test]
    fn head_is_the_same_whatever_follows_and_missing_until_it_is_whole(
        head in conversation(),
        rest in conversation(),
    ) {
        match request::parse(&head) {
            Ok(Some((request, len))) => {
                prop_assert!(len <= head.len());
                let longer = [&head[..], &rest].concat();
                prop_assert_eq!(request::parse(&longer), Ok(Some((request, len))));
                for end in 0..len {
                    prop_assert_eq!(request::parse(&head[..end]), Ok(None));
                }
            }
            Ok(None) => prop_assert!(head.len() < crate::http::HEAD_LIMIT),
            Err(answer) => {
                let longer = [&head[..], &rest].concat();
                prop_assert_eq!(request::parse(&longer), Err(answer));
            }
        }
    }
}
