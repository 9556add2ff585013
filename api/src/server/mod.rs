//! The server of one guest's control socket. Whoever can open the socket is taken for hostile: time, threads and
//! memory that a client can cost are bounded, and nothing a client does keeps the server from being stopped.

mod answer;
mod connection;
mod request;
#[cfg(test)]
mod tests;
mod wait;

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::answer::Answer;
use self::connection::{Connection, Limits};
use crate::types::Control;

/// Stack of each thread, in bytes: memory beside the guest's own counts.
pub const STACK: usize = 128 << 10;
/// Most connections at once.
pub const CONNECTIONS: usize = 16;
/// How long no connection is taken after taking one failed, for instance for want of descriptors.
const BACK_OFF: Duration = Duration::from_millis(200);

/// Serves a listening socket until it is dropped.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What all threads of a server know.
struct Shared {
    control: Arc<dyn Control>,
    /// The user who may connect besides root.
    owner: u32,
    limits: Limits,
    stopping: AtomicBool,
    /// Becomes and stays readable when the server is to stop.
    stop: EventFd,
    /// Readable when there is something new in `finished`.
    news: EventFd,
    /// Connection threads that have nothing left to do.
    finished: Mutex<Vec<ThreadId>>,
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("stopping", &self.shared.is_stopping()).finish_non_exhaustive()
    }
}

impl Server {
    /// Starts to serve `listener`, which is made non-blocking, on a thread of its own. Besides root only the user that
    /// this process acts for now may connect; the mode of the socket's file is the caller's affair, and so is
    /// removing the file.
    ///
    /// # Errors
    ///
    /// No descriptors or no thread are to be had.
    pub fn start(listener: UnixListener, control: Arc<dyn Control>) -> io::Result<Self> {
        Self::with_limits(listener, control, Limits::default())
    }

    fn with_limits(listener: UnixListener, control: Arc<dyn Control>, limits: Limits) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            control,
            // SAFETY: geteuid has no preconditions and cannot fail.
            owner: unsafe { libc::geteuid() },
            limits,
            stopping: AtomicBool::new(false),
            stop: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            news: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            finished: Mutex::default(),
        });
        let acceptor = Acceptor::new(listener, shared.clone());
        let thread =
            thread::Builder::new().name("api".into()).stack_size(STACK).spawn(move || acceptor.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Ends all connections and waits for their threads. A call of [`Control`] that is under way is waited for, and
    /// its answer still sent; a client is not waited for. Dropping does the same.
    pub fn stop(self) {}
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        // Only an overflow of the counter can fail, and then it is readable already.
        self.shared.stop.write(1).unwrap_or_default();
        if let Some(thread) = self.thread.take() {
            // A panic has been printed by its thread.
            drop(thread.join());
        }
    }
}

/// What a connection does with the bytes that come, without a socket and without waiting.
#[cfg(feature = "fuzzing")]
pub(crate) fn converse(mut bytes: &[u8], control: &dyn Control) -> Vec<u8> {
    let mut answers = Vec::new();
    loop {
        let (request, len) = match request::parse(bytes) {
            Ok(Some(found)) => found,
            Ok(None) => return answers,
            Err(answer) => {
                answers.extend(answer.encode(false, true));
                return answers;
            }
        };
        let rest = &bytes[len..];
        let Some((body, rest)) =
            usize::try_from(request.body).ok().and_then(|len| rest.split_at_checked(len))
        else {
            return answers;
        };
        answers.extend(request.perform(control, body).encode(request.is_head(), request.close));
        if request.close {
            return answers;
        }
        bytes = rest;
    }
}

/// The thread that takes connections.
struct Acceptor {
    listener: UnixListener,
    shared: Arc<Shared>,
    connections: Vec<JoinHandle<()>>,
    /// Clients that were turned away, with the time to close them: not at once, because many clients read an answer
    /// only after they could send their request.
    leaving: VecDeque<(Instant, UnixStream)>,
    /// Set after a failure: when to take connections again.
    again: Option<Instant>,
}

impl Acceptor {
    fn new(listener: UnixListener, shared: Arc<Shared>) -> Self {
        Self { listener, shared, connections: Vec::new(), leaving: VecDeque::new(), again: None }
    }

    fn run(mut self) {
        let mut failing = false;
        loop {
            let listener = if self.again.is_some() { wait::NOTHING } else { self.listener.as_raw_fd() };
            let wanted = [self.shared.stop.as_raw_fd(), self.shared.news.as_raw_fd(), listener]
                .map(|fd| (fd, libc::POLLIN));
            let deadline = self.again.into_iter().chain(self.leaving.front().map(|(end, _)| *end)).min();
            let incoming = match wait::ready(wanted, deadline) {
                Ok([true, ..]) => break,
                Ok([_, news, incoming]) => {
                    if news {
                        self.reap();
                    }
                    incoming
                }
                Err(error) => {
                    tracing::error!("the control socket is given up: waiting for clients failed: {error}");
                    break;
                }
            };
            let now = Instant::now();
            self.again = self.again.filter(|again| *again > now);
            self.leaving.retain(|(end, _)| *end > now);
            if !incoming {
                continue;
            }
            match self.listener.accept().and_then(|(stream, _)| self.admit(stream)) {
                Ok(()) => failing = false,
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    if !failing {
                        tracing::warn!("the control socket takes no connections for now: {error}");
                    }
                    failing = true;
                    self.again = Some(now + BACK_OFF);
                }
            }
        }
        for connection in self.connections {
            // A panic has been printed by its thread.
            drop(connection.join());
        }
    }

    /// Gives a new connection its thread, or turns it away.
    fn admit(&mut self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let peer = wait::peer_uid(&stream)?;
        if !may_connect(peer, self.shared.owner) {
            tracing::debug!("control: user {peer} is turned away");
            let why =
                format!("user {peer} may not control this guest; user {} and root may", self.shared.owner);
            self.turn_away(stream, &Answer::error(403, &why));
            return Ok(());
        }
        self.reap();
        if self.connections.len() >= CONNECTIONS {
            let why = format!("{CONNECTIONS} clients are connected, and no more are taken");
            self.turn_away(stream, &Answer::error(503, &why));
            return Ok(());
        }
        let shared = self.shared.clone();
        let thread = thread::Builder::new().name("api-client".into()).stack_size(STACK).spawn(move || {
            let finish = Finish(&shared);
            Connection::new(stream, finish.0).serve();
        });
        // The plain error would look like one of a connection that went away.
        let thread = thread.map_err(|error| io::Error::other(format!("no thread for a client: {error}")))?;
        self.connections.push(thread);
        Ok(())
    }

    fn turn_away(&mut self, stream: UnixStream, answer: &Answer) {
        // The answer fits into the empty buffer of a new socket; a client that has gone needs none.
        let sent =
            (&stream).write(&answer.encode(false, true)).and_then(|_| stream.shutdown(Shutdown::Write));
        if sent.is_ok() {
            if self.leaving.len() == CONNECTIONS {
                self.leaving.pop_front();
            }
            self.leaving.push_back((Instant::now() + self.shared.limits.linger, stream));
        }
    }

    /// Frees what finished connections held.
    fn reap(&mut self) {
        // Fails if there is no news, which is no matter.
        self.shared.news.read().unwrap_or_default();
        let finished =
            std::mem::take(&mut *self.shared.finished.lock().unwrap_or_else(PoisonError::into_inner));
        for id in finished {
            if let Some(index) = self.connections.iter().position(|thread| thread.thread().id() == id) {
                drop(self.connections.swap_remove(index).join());
            }
        }
    }
}

/// Reports the end of a connection's thread, however it ends.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.finished.lock().unwrap_or_else(PoisonError::into_inner).push(thread::current().id());
        self.0.news.write(1).unwrap_or_default();
    }
}

fn may_connect(peer: u32, owner: u32) -> bool {
    peer == 0 || peer == owner
}

/// Whether taking a connection failed for a reason that lies in that connection alone.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | ConnectionAborted | Interrupted)
}
