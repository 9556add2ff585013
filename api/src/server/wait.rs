//! Waiting for descriptors, and asking who is at the other end of one.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// What `poll` ignores.
pub const NOTHING: RawFd = -1;

/// Waits until one of `wanted`, descriptors with the events they are watched for, is ready or has failed, and says
/// which; none if `deadline` came first.
pub fn ready<const N: usize>(
    wanted: [(RawFd, libc::c_short); N],
    deadline: Option<Instant>,
) -> io::Result<[bool; N]> {
    let mut fds = wanted.map(|(fd, events)| libc::pollfd { fd, events, revents: 0 });
    let count = libc::nfds_t::try_from(N).map_err(io::Error::other)?;
    loop {
        let timeout = deadline.map_or(-1, |deadline| {
            // Rounded up, so that the deadline has passed when poll says so.
            let left = deadline.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
            libc::c_int::try_from(left).unwrap_or(libc::c_int::MAX)
        });
        // SAFETY: fds is an array of count pollfd structures that outlives the call.
        if unsafe { libc::poll(fds.as_mut_ptr(), count, timeout) } >= 0 {
            return Ok(fds.map(|fd| fd.revents != 0));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// The user who connected `stream` (unix(7), `SO_PEERCRED`).
pub fn peer_uid(stream: &UnixStream) -> io::Result<u32> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = libc::socklen_t::try_from(size_of_val(&peer)).map_err(io::Error::other)?;
    let fd = stream.as_raw_fd();
    // SAFETY: peer has len bytes, and any bytes are a valid ucred.
    let asked = unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut len)
    };
    if asked == 0 { Ok(peer.uid) } else { Err(io::Error::last_os_error()) }
}
