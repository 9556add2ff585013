//! The client of one guest's control socket. The monitor at the other end may have been taken over by its guest, so
//! that what it answers is bounded and checked too.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::http::{self, DiskVerb, FIELD_LIMIT, HEAD_LIMIT, Resource};
use crate::types::{
    AtPowerOff, DiskLimits, DiskStatus, ErrorBody, Job, MaxSize, Medium, PowerOffChoice, Resize, Snapshot,
    Status,
};

/// Most bytes of an answer's body.
const BODY_LIMIT: u64 = 1 << 20;
/// Most characters of a text that is shown to somebody.
const TEXT_LIMIT: usize = 4096;

/// A request that came to nothing. The message names the request and the socket.
#[derive(Debug, thiserror::Error)]
#[error("{wanted}: {}: {reason}", socket.display())]
pub struct Error {
    /// What was asked for: `connect`, or the last word of the request's path, such as `status`, `pause`, `snapshot`.
    pub wanted: &'static str,
    /// The socket.
    pub socket: PathBuf,
    /// Why it came to nothing.
    pub reason: Reason,
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// There is no socket, or nobody behind it.
    #[error("nobody listens there; the monitor is gone")]
    Gone,
    /// The connection ended before an answer.
    #[error("the monitor closed the connection without an answer; it is ending or has ended")]
    Closed,
    /// No answer within the time given to [`Client::connect`].
    #[error("no answer within {} s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// The monitor does not do that in the guest's present state (409).
    #[error("refused: {0}")]
    Refused(String),
    /// This user may not control the guest (403, or by the mode of the socket).
    #[error("not permitted; only root and the user who runs the guest may control it")]
    NotPermitted,
    /// Another error that the monitor answers.
    #[error("the monitor answers {status}: {message}")]
    Answered {
        /// HTTP status code.
        status: u16,
        /// What the monitor says about it.
        message: String,
    },
    /// What comes back is not what a monitor says.
    #[error("the answer is not understood: {0}")]
    NotUnderstood(String),
    /// The socket cannot be used.
    #[error("the connection failed: {0}")]
    Io(io::Error),
}

/// A connection to the monitor of one guest, opened anew when it has been closed between two requests.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    allowed: Duration,
    stream: Option<UnixStream>,
    /// Whether there was an answer over `stream`.
    answered: bool,
}

/// A request under way: what it is and when it must be over.
#[derive(Debug, Clone, Copy)]
struct Clock {
    end: Instant,
    allowed: Duration,
}

impl Clock {
    fn new(allowed: Duration) -> Self {
        let now = Instant::now();
        // A time that the clock cannot express is as good as a day.
        let end = now.checked_add(allowed).unwrap_or(now + Duration::from_secs(86400));
        Self { end, allowed }
    }

    fn left(self) -> Result<Option<Duration>, Reason> {
        match self.end.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(Some(left)),
            _ => Err(Reason::TimedOut(self.allowed)),
        }
    }

    fn reason(self, error: io::Error) -> Reason {
        use io::ErrorKind as Kind;
        match error.kind() {
            Kind::WouldBlock | Kind::TimedOut => Reason::TimedOut(self.allowed),
            Kind::BrokenPipe | Kind::ConnectionReset => Reason::Closed,
            _ => Reason::Io(error),
        }
    }
}

impl Client {
    /// Connects to the monitor that listens on `socket`. `deadline` bounds the connecting and then each request with
    /// its answer.
    ///
    /// # Errors
    ///
    /// [`Reason::Gone`], [`Reason::NotPermitted`], [`Reason::TimedOut`] or [`Reason::Io`].
    pub fn connect(socket: &Path, deadline: Duration) -> Result<Self, Error> {
        let mut client = Self { socket: socket.to_owned(), allowed: deadline, stream: None, answered: false };
        let stream =
            connect(socket, Clock::new(deadline)).map_err(|reason| client.error("connect", reason))?;
        client.stream = Some(stream);
        Ok(client)
    }

    /// The guest as it is now. Control characters in its texts come as U+FFFD: they are shown on terminals.
    ///
    /// # Errors
    ///
    /// Any [`Reason`], except that a status is never refused.
    pub fn status(&mut self) -> Result<Status, Error> {
        self.get(Resource::Status).map(made_printable)
    }

    /// Holds the guest's processors.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn pause(&mut self) -> Result<(), Error> {
        self.put(Resource::Pause)
    }

    /// Lets held processors go on.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn resume(&mut self) -> Result<(), Error> {
        self.put(Resource::Resume)
    }

    /// Presses the guest's power button.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn power_button(&mut self) -> Result<(), Error> {
        self.put(Resource::PowerButton)
    }

    /// Ends the guest at once.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn stop(&mut self) -> Result<(), Error> {
        self.put(Resource::Stop)
    }

    /// Freezes the image of disk `index` (counted from 0) as it is now under `name`; `description`, which may be
    /// empty, is said of it in the list. The guest goes on in a new file.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn snapshot(&mut self, index: usize, name: &str, description: &str) -> Result<(), Error> {
        let body = Snapshot { name: name.to_owned(), description: description.to_owned() };
        self.request(Resource::Disk(index, DiskVerb::Snapshot), Some(&body)).map(drop)
    }

    /// Begins to write the image on top of disk `index` into the one below.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn commit(&mut self, index: usize) -> Result<Job, Error> {
        self.begin(Resource::Disk(index, DiskVerb::Commit))
    }

    /// Begins to copy into the image on top of disk `index` what it lacks, so that it needs none below.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn stream(&mut self, index: usize) -> Result<Job, Error> {
        self.begin(Resource::Disk(index, DiskVerb::Stream))
    }

    /// Makes disk `index` larger: to `bytes`, a multiple of 512.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn resize(&mut self, index: usize, bytes: u64) -> Result<(), Error> {
        self.request(Resource::Disk(index, DiskVerb::Size), Some(&Resize { bytes })).map(drop)
    }

    /// Says how much the image that disk `index` is written to may take of its file system, in bytes.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn set_max_size(&mut self, index: usize, bytes: Option<u64>) -> Result<(), Error> {
        self.request(Resource::Disk(index, DiskVerb::MaxSize), Some(&MaxSize { bytes })).map(drop)
    }

    /// Puts the image at `path`, which is absolute, behind disk `index`; without a `format` its content says what it is.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn change_medium(&mut self, index: usize, path: &Path, format: Option<&str>) -> Result<(), Error> {
        let body = Medium { path: path.to_owned(), format: format.map(str::to_owned) };
        self.request(Resource::Disk(index, DiskVerb::Medium), Some(&body)).map(drop)
    }

    /// Lets disk `index` try again what waits since an error.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn retry(&mut self, index: usize) -> Result<(), Error> {
        self.put(Resource::Disk(index, DiskVerb::Retry))
    }

    /// Replaces the limits of disk `index`.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn set_limits(&mut self, index: usize, limits: DiskLimits) -> Result<(), Error> {
        self.request(Resource::Disk(index, DiskVerb::Limits), Some(&limits)).map(drop)
    }

    /// Says what becomes of the redo log of disk `index` when the guest powers off.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn at_power_off(&mut self, index: usize, action: AtPowerOff) -> Result<(), Error> {
        let body = PowerOffChoice { action };
        self.request(Resource::Disk(index, DiskVerb::AtPowerOff), Some(&body)).map(drop)
    }

    /// The jobs of the guest: those that go on and the latest that are over.
    ///
    /// # Errors
    ///
    /// Any [`Reason`].
    pub fn jobs(&mut self) -> Result<Vec<Job>, Error> {
        Ok(self.get::<Vec<Job>>(Resource::Jobs)?.into_iter().map(printable_job).collect())
    }

    /// The job `id`.
    ///
    /// # Errors
    ///
    /// Any [`Reason`]; [`Reason::Answered`] with 404 if there is no such job.
    pub fn job(&mut self, id: u64) -> Result<Job, Error> {
        self.get(Resource::Job(id)).map(printable_job)
    }

    /// Begins to end the job `id`; whether it was over before, its state tells.
    ///
    /// # Errors
    ///
    /// Any [`Reason`]; [`Reason::Answered`] with 404 if there is no such job.
    pub fn cancel(&mut self, id: u64) -> Result<(), Error> {
        self.put(Resource::CancelJob(id))
    }

    fn error(&self, wanted: &'static str, reason: Reason) -> Error {
        Error { wanted, socket: self.socket.clone(), reason }
    }

    fn get<T: DeserializeOwned>(&mut self, resource: Resource) -> Result<T, Error> {
        let body = self.request(resource, None::<&()>)?;
        self.understand(resource, &body)
    }

    fn put(&mut self, resource: Resource) -> Result<(), Error> {
        self.request(resource, None::<&()>).map(drop)
    }

    fn begin(&mut self, resource: Resource) -> Result<Job, Error> {
        self.get(resource).map(printable_job)
    }

    fn understand<T: DeserializeOwned>(&self, resource: Resource, body: &[u8]) -> Result<T, Error> {
        serde_json::from_slice(body)
            .map_err(|error| self.error(resource.name(), Reason::NotUnderstood(printable(&error))))
    }

    /// Asks for `resource`, with `content` if there is some; returns the body of a good answer.
    fn request(&mut self, resource: Resource, content: Option<&impl Serialize>) -> Result<Vec<u8>, Error> {
        let wanted = resource.name();
        let content = content.map(serde_json::to_string).transpose();
        // A path that is not UTF-8 is the only thing that cannot be written.
        let content = content.map_err(|error| self.error(wanted, Reason::Io(error.into())))?;
        let answer = self.exchange(resource, content).map_err(|reason| self.error(wanted, reason))?;
        let reason = match answer.status {
            200 | 202 | 204 => return Ok(answer.body),
            403 => Reason::NotPermitted,
            409 => Reason::Refused(answer.message()),
            status => Reason::Answered { status, message: answer.message() },
        };
        Err(self.error(wanted, reason))
    }

    fn exchange(&mut self, resource: Resource, content: Option<String>) -> Result<Answer, Reason> {
        let clock = Clock::new(self.allowed);
        let (method, path) = (resource.method(), resource.path());
        // One without content says so (RFC 9110, section 8.6).
        let length = match &content {
            Some(content) => {
                format!("Content-Type: application/json\r\nContent-Length: {}\r\n", content.len())
            }
            None if method == "GET" => String::new(),
            None => "Content-Length: 0\r\n".to_owned(),
        };
        let content = content.unwrap_or_default();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: vmm\r\n{length}\r\n{content}");
        if let Some(stream) = self.stream.take().filter(|_| method != "POST" || !self.answered) {
            match self.ask(stream, &request, clock) {
                // The server may have ended an idle connection before it saw this request. Asking once more does no
                // harm: all requests but POST are idempotent (RFC 9110, section 9.2.2), and that one never goes over a
                // connection that has been idle.
                Err(Reason::Closed) if self.answered => {}
                result => return result,
            }
        }
        self.answered = false;
        let stream = connect(&self.socket, clock)?;
        self.ask(stream, &request, clock)
    }

    fn ask(&mut self, mut stream: UnixStream, request: &str, clock: Clock) -> Result<Answer, Reason> {
        stream.set_write_timeout(clock.left()?).map_err(Reason::Io)?;
        // One who is turned away finds the answer there and perhaps the other direction closed.
        let sent = stream.write_all(request.as_bytes()).map_err(|error| clock.reason(error));
        let answer = match (read_answer(&mut stream, clock), sent) {
            (Ok(answer), _) => answer,
            (Err(_), Err(reason)) | (Err(reason), Ok(())) => return Err(reason),
        };
        // It is put back only after a good exchange: no answer can be taken for that of a later request.
        if !answer.close {
            self.stream = Some(stream);
            self.answered = true;
        }
        Ok(answer)
    }
}

/// An answer, read to its end.
#[derive(Debug)]
struct Answer {
    status: u16,
    body: Vec<u8>,
    close: bool,
}

impl Answer {
    fn message(&self) -> String {
        match serde_json::from_slice::<ErrorBody<String>>(&self.body) {
            Ok(body) => printable(&body.error),
            Err(_) => "no reason given".into(),
        }
    }
}

/// An answer's head.
struct Head {
    status: u16,
    /// Bytes of the head itself.
    len: usize,
    /// Bytes of the body.
    body: usize,
    close: bool,
}

fn read_answer(stream: &mut UnixStream, clock: Clock) -> Result<Answer, Reason> {
    let mut bytes = Vec::new();
    let head = loop {
        match parse(&bytes).map_err(|why| Reason::NotUnderstood(printable(&why)))? {
            // 100 Continue and the like come before the answer itself.
            Some(head) if head.status < 200 => drop(bytes.drain(..head.len)),
            Some(head) => break head,
            None => read_more(stream, &mut bytes, clock)?,
        }
    };
    bytes.drain(..head.len);
    while bytes.len() < head.body {
        read_more(stream, &mut bytes, clock)?;
    }
    // Nothing was asked that more bytes could answer, so that what follows cannot be trusted.
    let close = head.close || bytes.len() > head.body;
    bytes.truncate(head.body);
    Ok(Answer { status: head.status, body: bytes, close })
}

/// Reads the head of an answer at the beginning of `bytes`; `None` while bytes are missing.
fn parse(bytes: &[u8]) -> Result<Option<Head>, String> {
    let mut fields = [httparse::EMPTY_HEADER; FIELD_LIMIT];
    let mut head = httparse::Response::new(&mut fields);
    let len = match head.parse(bytes) {
        Ok(httparse::Status::Complete(len)) if len <= HEAD_LIMIT => len,
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_LIMIT => return Ok(None),
        Ok(_) => return Err(format!("its head has more than {HEAD_LIMIT} bytes")),
        Err(error) => return Err(format!("it is not HTTP/1.1: {error}")),
    };
    let status = head.code.unwrap_or_default();
    let fields = &*head.headers;
    if http::named(fields, "Transfer-Encoding").next().is_some() {
        return Err("it has a Transfer-Encoding".into());
    }
    let body = match (status, http::content_length(fields)?) {
        (0..200 | 204 | 304, _) => 0,
        (_, Some(length)) if length <= BODY_LIMIT => length,
        (_, Some(length)) => return Err(format!("its body has {length} bytes, more than {BODY_LIMIT}")),
        (_, None) => return Err("it does not state its length".into()),
    };
    let body = usize::try_from(body).map_err(|error| error.to_string())?;
    let close = head.version != Some(1) || http::lists(fields, "Connection", "close");
    Ok(Some(Head { status, len, body, close }))
}

fn read_more(stream: &mut UnixStream, bytes: &mut Vec<u8>, clock: Clock) -> Result<(), Reason> {
    let mut piece = [0; 4096];
    loop {
        stream.set_read_timeout(clock.left()?).map_err(Reason::Io)?;
        match stream.read(&mut piece) {
            Ok(0) => return Err(Reason::Closed),
            Ok(count) => {
                bytes.extend_from_slice(piece.get(..count).unwrap_or_default());
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(clock.reason(error)),
        }
    }
}

/// Like [`UnixStream::connect`], which may wait for ever on a monitor that takes no connections.
fn connect(socket: &Path, clock: Clock) -> Result<UnixStream, Reason> {
    // SAFETY: all zeros are a valid sockaddr_un.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::sa_family_t::try_from(libc::AF_UNIX).unwrap_or_default();
    let path = socket.as_os_str().as_bytes();
    // One byte must stay zero, and a leading zero would make it a name instead of a path (unix(7)).
    if path.is_empty() || path.contains(&0) || path.len() >= address.sun_path.len() {
        let why = format!("a socket's path has 1 to {} bytes, none of them 0", address.sun_path.len() - 1);
        return Err(Reason::Io(io::Error::new(io::ErrorKind::InvalidInput, why)));
    }
    for (to, from) in address.sun_path.iter_mut().zip(path) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: socket has no preconditions.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    if fd < 0 {
        return Err(Reason::Io(io::Error::last_os_error()));
    }
    // SAFETY: fd was just opened and belongs to nobody else.
    let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let len = libc::socklen_t::try_from(size_of_val(&address))
        .map_err(|error| Reason::Io(io::Error::other(error)))?;
    loop {
        // It bounds connecting too (socket(7), SO_SNDTIMEO).
        stream.set_write_timeout(clock.left()?).map_err(Reason::Io)?;
        // SAFETY: address is a sockaddr_un of len bytes.
        if unsafe { libc::connect(stream.as_raw_fd(), (&raw const address).cast(), len) } == 0 {
            return Ok(stream);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::ENOENT | libc::ECONNREFUSED) => return Err(Reason::Gone),
            Some(libc::EACCES | libc::EPERM) => return Err(Reason::NotPermitted),
            _ => return Err(clock.reason(error)),
        }
    }
}

fn made_printable(mut status: Status) -> Status {
    let texts = [&mut status.name, &mut status.version].into_iter().chain(&mut status.serial);
    for text in texts.chain(status.nets.iter_mut().flat_map(|net| [&mut net.tap, &mut net.mac])) {
        *text = printable(text);
    }
    status.kernel = printable(&status.kernel.display()).into();
    status.disks.iter_mut().for_each(make_disk_printable);
    status
}

fn make_disk_printable(disk: &mut DiskStatus) {
    let more = &mut disk.more;
    let texts = [
        &mut more.serial,
        &mut more.format,
        &mut more.mode,
        &mut more.engine,
        &mut more.cache,
        &mut more.on_error,
    ];
    for text in texts.into_iter().chain(&mut more.waiting) {
        *text = printable(text);
    }
    for path in [&mut disk.path].into_iter().chain(&mut more.redo).chain(&mut more.backing) {
        *path = printable(&path.display()).into();
    }
}

fn printable_job(mut job: Job) -> Job {
    job.what = printable(&job.what);
    job.error = job.error.map(|error| printable(&error));
    job
}

/// A text from the other end, fit for a terminal.
fn printable(text: &impl fmt::Display) -> String {
    let text = text.to_string();
    text.chars()
        .take(TEXT_LIMIT)
        .map(|char| if char.is_control() { char::REPLACEMENT_CHARACTER } else { char })
        .collect()
}
