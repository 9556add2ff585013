//! Answers, and how they look on the wire.

use std::fmt::Write;

use serde::Serialize;

use crate::types::ErrorBody;

/// What a client is told to go on sending its body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    status: u16,
    /// The methods that would be right.
    allow: Option<&'static str>,
    body: Option<String>,
}

impl Answer {
    /// 204: it is done and there is nothing to say.
    pub fn done() -> Self {
        Self { status: 204, allow: None, body: None }
    }

    /// 200 with `value`.
    pub fn json(value: &impl Serialize) -> Self {
        Self::with(200, value)
    }

    /// 202 with `value`: it goes on.
    pub fn accepted(value: &impl Serialize) -> Self {
        Self::with(202, value)
    }

    fn with(status: u16, value: &impl Serialize) -> Self {
        match serde_json::to_string(value) {
            Ok(body) => Self { status, allow: None, body: Some(body) },
            Err(error) => Self::error(500, &format!("the answer cannot be written as JSON: {error}")),
        }
    }

    /// An error that says why.
    pub fn error(status: u16, why: &str) -> Self {
        let body = serde_json::to_string(&ErrorBody { error: why }).ok();
        Self { status, allow: None, body }
    }

    /// 405: only the methods `allow` are possible here.
    pub fn wrong_method(allow: &'static str) -> Self {
        Self { allow: Some(allow), ..Self::error(405, &format!("this resource takes {allow} only")) }
    }

    /// Its status code.
    pub fn status(&self) -> u16 {
        self.status
    }

    /// The bytes to send: without the body if a HEAD is answered, and with the announcement that the connection ends
    /// if it does.
    pub fn encode(&self, to_head: bool, close: bool) -> Vec<u8> {
        let mut text = format!("HTTP/1.1 {} {}\r\n", self.status, reason(self.status));
        // Writing to a String cannot fail.
        if let Some(allow) = self.allow {
            let _ = write!(text, "Allow: {allow}\r\n");
        }
        if self.status == 503 {
            text.push_str("Retry-After: 1\r\n");
        }
        if close {
            text.push_str("Connection: close\r\n");
        }
        if let Some(body) = &self.body {
            // With the line feed that a terminal likes.
            let _ = write!(text, "Content-Type: application/json\r\nContent-Length: {}\r\n", body.len() + 1);
        }
        text.push_str("\r\n");
        if let Some(body) = self.body.as_ref().filter(|_| !to_head) {
            text.push_str(body);
            text.push('\n');
        }
        text.into_bytes()
    }
}

/// The words of RFC 9110 (section 15) and RFC 6585.
fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        202 => "Accepted",
        204 => "No Content",
        400 => "Bad Request",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        417 => "Expectation Failed",
        431 => "Request Header Fields Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}
