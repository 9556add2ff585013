//! Reading a request's head (RFC 9112), and doing what it asks for.

use super::answer::Answer;
use crate::http::{self, DiskVerb, FIELD_LIMIT, HEAD_LIMIT, Resource};
use crate::types::{Control, DiskOrder, Refused, WantedLimits};

/// Most bytes of a body. One that the resource does not take is read all the same, so that the connection stays usable.
pub const BODY_LIMIT: u64 = 64 << 10;

/// A request whose head was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    method: Method,
    resource: Option<Resource>,
    /// Bytes of body that follow, at most [`BODY_LIMIT`].
    pub body: u64,
    /// The client waits for leave to send the body.
    pub expects_continue: bool,
    /// The client sends nothing after this request.
    pub close: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Method {
    Get,
    Head,
    Put,
    Post,
    Other,
}

/// Reads the head at the beginning of `bytes`: the request and how long its head is, or `None` while bytes are missing.
/// What is found does not depend on how many bytes beyond the head are there.
///
/// # Errors
///
/// The answer to what is no request, or none that can be served. Where the next request begins is unknown then.
pub fn parse(bytes: &[u8]) -> Result<Option<(Request, usize)>, Answer> {
    let mut fields = [httparse::EMPTY_HEADER; FIELD_LIMIT];
    let mut head = httparse::Request::new(&mut fields);
    let len = match head.parse(&bytes[..bytes.len().min(HEAD_LIMIT)]) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_LIMIT => return Ok(None),
        Ok(httparse::Status::Partial) => {
            let why = format!("request line and header fields have more than {HEAD_LIMIT} bytes");
            return Err(Answer::error(431, &why));
        }
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Answer::error(431, &format!("there are more than {FIELD_LIMIT} header fields")));
        }
        Err(error) => return Err(Answer::error(400, &format!("this is not an HTTP/1.1 request: {error}"))),
    };
    let (Some(method), Some(target), Some(minor)) = (head.method, head.path, head.version) else {
        return Err(Answer::error(400, "this is not an HTTP/1.1 request: its first line is incomplete"));
    };
    let fields = &*head.headers;
    let http_1_0 = minor == 0;
    check_host(fields, http_1_0)?;
    let request = Request {
        method: match method {
            "GET" => Method::Get,
            "HEAD" => Method::Head,
            "PUT" => Method::Put,
            "POST" => Method::Post,
            _ => Method::Other,
        },
        resource: Resource::at(path(target)),
        body: body_length(fields)?,
        expects_continue: !http_1_0 && expects_continue(fields)?,
        close: http_1_0 || http::lists(fields, "Connection", "close"),
    };
    Ok(Some((request, len)))
}

/// The path in a request target: proxies send `http://host/path` (RFC 9112, section 3.2.2).
fn path(target: &str) -> &str {
    let scheme = "http://";
    match target.split_at_checked(scheme.len()) {
        Some((start, rest)) if start.eq_ignore_ascii_case(scheme) => {
            rest.find('/').map_or("/", |slash| &rest[slash..])
        }
        _ => target,
    }
}

/// RFC 9112, section 3.2.
fn check_host(fields: &[httparse::Header<'_>], http_1_0: bool) -> Result<(), Answer> {
    match http::named(fields, "Host").count() {
        1 => Ok(()),
        0 if http_1_0 => Ok(()),
        0 => Err(Answer::error(400, "the Host field is missing; any value will do")),
        _ => Err(Answer::error(400, "there is more than one Host field")),
    }
}

fn body_length(fields: &[httparse::Header<'_>]) -> Result<u64, Answer> {
    let length = http::content_length(fields).map_err(|why| Answer::error(400, why))?;
    if http::named(fields, "Transfer-Encoding").next().is_some() {
        // Two statements about one length are how requests are smuggled (RFC 9112, section 6.1).
        return Err(match length {
            Some(_) => Answer::error(400, "there are both Content-Length and Transfer-Encoding"),
            None => Answer::error(501, "Transfer-Encoding is not supported; send a Content-Length"),
        });
    }
    match length.unwrap_or(0) {
        length if length > BODY_LIMIT => {
            Err(Answer::error(413, &format!("a body may have {BODY_LIMIT} bytes, not {length}")))
        }
        length => Ok(length),
    }
}

/// RFC 9110, section 10.1.1.
fn expects_continue(fields: &[httparse::Header<'_>]) -> Result<bool, Answer> {
    let mut values = http::named(fields, "Expect").map(<[u8]>::trim_ascii);
    match values.next() {
        None => Ok(false),
        Some(value) if value.eq_ignore_ascii_case(b"100-continue") && values.next().is_none() => Ok(true),
        Some(_) => Err(Answer::error(417, "the only expectation that can be met is 100-continue")),
    }
}

impl Request {
    /// Whether the answer goes without its body.
    pub fn is_head(&self) -> bool {
        self.method == Method::Head
    }

    /// Does what is asked for; `body` is what came with it.
    pub fn perform(&self, control: &dyn Control, body: &[u8]) -> Answer {
        let Some(resource) = self.resource else { return not_found() };
        match (resource.method(), self.method) {
            ("GET", Method::Get | Method::Head) | ("PUT", Method::Put) | ("POST", Method::Post) => {}
            ("GET", _) => return Answer::wrong_method("GET, HEAD"),
            (right, _) => return Answer::wrong_method(right),
        }
        if self.body > 0 && !resource.takes_body() {
            // Not ignored: whoever sends one expects it to mean something.
            return Answer::error(400, "this resource takes no body");
        }
        tracing::debug!("control: {} is asked for", resource.name());
        let done = match resource {
            Resource::Status => return Answer::json(&control.status()),
            Resource::Jobs => return Answer::json(&control.jobs()),
            Resource::Job(id) | Resource::CancelJob(id) => return job(control, id, resource),
            Resource::Disk(index, verb) => return disk(control, index, verb, body),
            Resource::Pause => control.pause(),
            Resource::Resume => control.resume(),
            Resource::PowerButton => control.power_button(),
            Resource::Stop => control.stop(),
        };
        match done {
            Ok(()) => Answer::done(),
            Err(Refused(why)) => Answer::error(409, &why),
        }
    }
}

fn job(control: &dyn Control, id: u64, resource: Resource) -> Answer {
    let Some(job) = control.jobs().into_iter().find(|job| job.id == id) else {
        return Answer::error(
            404,
            &format!("there is no job {id}, or it was over long ago; GET /v1/jobs lists those there are"),
        );
    };
    if matches!(resource, Resource::CancelJob(_)) {
        control.cancel(id);
        return Answer::done();
    }
    Answer::json(&job)
}

fn disk(control: &dyn Control, index: usize, verb: DiskVerb, body: &[u8]) -> Answer {
    let count = control.disks();
    if index >= count {
        let why = format!(
            "there is no disk {index}; the guest has {count}, counted from 0 in the order of its configuration"
        );
        return Answer::error(404, &why);
    }
    let order = match order(verb, body) {
        Ok(order) => order,
        Err(error) => {
            return Answer::error(400, &format!("the body is not the JSON that is wanted here: {error}"));
        }
    };
    match control.disk(index, order) {
        Ok(None) => Answer::done(),
        Ok(Some(job)) => Answer::accepted(&job),
        Err(Refused(why)) => Answer::error(409, &why),
    }
}

fn order(verb: DiskVerb, body: &[u8]) -> serde_json::Result<DiskOrder> {
    Ok(match verb {
        DiskVerb::Snapshot => DiskOrder::Snapshot(serde_json::from_slice(body)?),
        DiskVerb::Commit => DiskOrder::Commit,
        DiskVerb::Stream => DiskOrder::Stream,
        DiskVerb::Size => DiskOrder::Resize(serde_json::from_slice(body)?),
        DiskVerb::MaxSize => DiskOrder::MaxSize(serde_json::from_slice(body)?),
        DiskVerb::Medium => DiskOrder::Medium(serde_json::from_slice(body)?),
        DiskVerb::Retry => DiskOrder::Retry,
        DiskVerb::Limits => DiskOrder::Limits(serde_json::from_slice::<WantedLimits>(body)?.into()),
        DiskVerb::AtPowerOff => DiskOrder::AtPowerOff(serde_json::from_slice(body)?),
    })
}

fn not_found() -> Answer {
    let known = Resource::ALL.map(|resource| format!("{} {}", resource.method(), resource.pattern()));
    Answer::error(404, &format!("there is no such resource; there are {}", known.join(", ")))
}
