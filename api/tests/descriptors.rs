//! The server when the process has no descriptors left. Alone in its file, because it takes them from all threads.

mod common;

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use common::{serve, socket};
use tracing::field::{Field, Visit};
use tracing::span;

/// Passes on the messages that are logged as warnings or worse.
struct Warnings(Sender<String>);

impl tracing::Subscriber for Warnings {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::WARN
    }
    fn event(&self, event: &tracing::Event<'_>) {
        struct Message<'a>(&'a Sender<String>);
        impl Visit for Message<'_> {
            fn record_debug(&mut self, _: &Field, value: &dyn fmt::Debug) {
                self.0.send(format!("{value:?}")).unwrap();
            }
        }
        event.record(&mut Message(&self.0));
    }
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

fn warnings() -> Receiver<String> {
    let (sender, receiver) = channel();
    tracing::subscriber::set_global_default(Warnings(sender)).unwrap();
    receiver
}

#[test]
fn connection_that_comes_while_descriptors_are_lacking_is_served_when_there_are_some() {
    let warnings = warnings();
    let dir = tempfile::tempdir().unwrap();
    let (_guest, server) = serve(dir.path());
    let few = libc::rlimit { rlim_cur: 64, rlim_max: 64 };
    // SAFETY: few is a valid rlimit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const few) }, 0);
    let mut taken: Vec<_> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    assert!(taken.pop().is_some());
    // It takes the last descriptor; the server's end of it would need another.
    let mut stream = UnixStream::connect(socket(dir.path())).unwrap();
    stream.write_all(b"GET /v1/status HTTP/1.0\r\n\r\n").unwrap();
    let warning = warnings.recv().unwrap();
    assert!(warning.contains("takes no connections for now") && warning.contains("os error 24"), "{warning}");
    taken.clear();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    server.stop();
    // However often it failed, it was said once.
    assert_eq!(warnings.try_iter().count(), 0);
}
