//! A tap: an interface of the host whose cable ends in a file (Documentation/networking/tuntap.rst of the kernel).

use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use super::Error;
use super::backend::{Backend, MAX_PIECES, Offloads, Pieces, gather};
use super::header::HEADER_LEN;
use super::interface::{Interface, c_name};

const DRIVER: &str = "/dev/net/tun";

/// Each what kernels of some age know besides what follows: segmentation of UDP came with 6.2, its fragmentation went and
/// came back, the rest is as old as the header.
const STEPS: [Offloads; 4] = {
    let all = Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true };
    let no_uso = Offloads { uso: false, ..all };
    let no_ufo = Offloads { ufo: false, ..no_uso };
    [all, no_uso, no_ufo, Offloads { tso4: false, tso6: false, ecn: false, ..no_ufo }]
};

/// An open tap.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    mtu: Option<u16>,
    offloads: Offloads,
    /// Of the call being made; kept so that a frame costs no allocation.
    iovecs: Iovecs,
}

/// Iovecs between two calls, when they are no longer used.
struct Iovecs(Vec<libc::iovec>);

// SAFETY: the pointers are used only by the call for which they are put together.
unsafe impl Send for Iovecs {}

impl std::fmt::Debug for Iovecs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Iovecs").finish_non_exhaustive()
    }
}

impl Tap {
    /// Opens tap `name`, making it if there is none, and brings it up. A tap made here is gone with the process.
    ///
    /// The host's end is given `address` and the length of its network's prefix, where that is wished.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub fn open(name: &str, address: Option<(Ipv4Addr, u8)>) -> Result<Self, Error> {
        let name = name.to_owned();
        let allowed = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
        let len_fits = (1..libc::IFNAMSIZ).contains(&name.len());
        if !len_fits || !name.bytes().all(allowed) || name == "." || name == ".." {
            return Err(Error::Name { name });
        }
        if let Some((_, prefix)) = address.filter(|(_, prefix)| !(1..=32).contains(prefix)) {
            return Err(Error::Prefix { name, prefix });
        }
        let file =
            OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(DRIVER).map_err(
                |source| match source.raw_os_error() {
                    Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                        Error::NoDriver { name: name.clone(), source }
                    }
                    _ => failure(&name, "open /dev/net/tun on behalf", source),
                },
            )?;
        let interface =
            Interface::new(&name).map_err(|source| failure(&name, "look at the state", source))?;
        attach(&file, &name).map_err(|source| refusal(&name, &interface, source))?;

        let set_up = |what| {
            let name = &name;
            move |source| failure(name, what, source)
        };
        let len = libc::c_int::try_from(HEADER_LEN).unwrap_or_default();
        // SAFETY: the ioctl reads an int.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) })
            .map_err(set_up("set the header size"))?;
        let offloads = STEPS.into_iter().find(|step| set_offloads(&file, *step).is_ok()).unwrap_or_default();
        // Until a driver comes that can do more.
        set_offloads(&file, Offloads::default()).map_err(set_up("set the offloads"))?;
        if let Some((address, prefix)) = address {
            interface.set_address(address, prefix).map_err(set_up("set the host's address"))?;
        }
        interface.bring_up().map_err(set_up("bring up the host's end"))?;
        let mtu = interface.mtu().map_err(set_up("read the MTU"))?;
        let iovecs = Iovecs(Vec::with_capacity(MAX_PIECES + 2));
        Ok(Self { file, name, mtu: Some(mtu), offloads, iovecs })
    }

    /// Calls `call` until it is not interrupted.
    fn transfer(
        &self,
        call: unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let iovecs = &self.iovecs.0;
        let count = libc::c_int::try_from(iovecs.len()).map_err(io::Error::other)?;
        loop {
            // SAFETY: the pieces are those of the caller: its header, guest memory, and its buffer, all of them borrowed
            // for the call. That a guest may change its memory meanwhile is as with memory that hardware reads or writes.
            let done = unsafe { call(self.file.as_raw_fd(), iovecs.as_ptr(), count) };
            match usize::try_from(done) {
                Ok(done) => return Ok(done),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Connects `file` with interface `name`, which is made unless it exists.
fn attach(file: &File, name: &str) -> io::Result<()> {
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    // SAFETY: ifreq is plain data, for which zeroes are good.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    request.ifr_name = c_name(name);
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap_or_default();
    // SAFETY: the ioctl reads and fills an ifreq.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// Says which incomplete frames the file's reader can take.
fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
    let Offloads { csum, tso4, tso6, ecn, ufo, uso } = offloads;
    let flags = [
        (csum, libc::TUN_F_CSUM),
        (tso4, libc::TUN_F_TSO4),
        (tso6, libc::TUN_F_TSO6),
        (ecn, libc::TUN_F_TSO_ECN),
        (ufo, libc::TUN_F_UFO),
        // The kernel takes both or none.
        (uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    let flags = flags.into_iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, flag)| all | flag);
    // SAFETY: the ioctl takes an integer.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}

/// What it means that `what` of tap `name` has failed.
fn failure(name: &str, what: &'static str, source: io::Error) -> Error {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => Error::Permission { name, what, source },
        _ => Error::SetUp { name, what, source },
    }
}

/// What it means that the file cannot be connected with interface `name`.
fn refusal(name: &str, interface: &Interface, source: io::Error) -> Error {
    let owned = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => Error::Busy { name: owned, holder: holder(name) },
        Some(libc::EINVAL) if interface.mtu().is_ok() => {
            let (driver, kind) = interface.driver().unwrap_or_default();
            match (driver.as_str(), kind.as_str()) {
                ("tun", "tap") => Error::MultiQueue { name: owned },
                ("tun", _) => {
                    Error::Kind { name: owned, kind: "a tun, which carries no Ethernet frames".into() }
                }
                ("", _) => Error::Kind { name: owned, kind: "another kind of interface".into() },
                (driver, _) => {
                    Error::Kind { name: owned, kind: format!("an interface of driver \"{driver}\"") }
                }
            }
        }
        _ => failure(name, "take hold", source),
    }
}

/// Looks through the descriptors of all processes for one of tap `name`, as `/proc/PID/fdinfo/FD` shows it. A tap of that
/// name in another network namespace looks the same.
fn holder(name: &str) -> String {
    let wanted = format!("iff:\t{name}");
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
        let holds = descriptors
            .filter_map(|fd| std::fs::read_to_string(fd.path()).ok())
            .any(|info| info.lines().any(|line| line == wanted));
        if holds {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            return format!("process {pid} ({})", name.trim());
        }
    }
    "another process".to_owned()
}

impl Backend for Tap {
    fn name(&self) -> &str {
        &self.name
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, accepted: Offloads) -> io::Result<()> {
        let cap = |step: Offloads| {
            let step = Offloads {
                csum: accepted.csum && step.csum,
                tso4: accepted.tso4 && step.tso4,
                tso6: accepted.tso6 && step.tso6,
                ecn: accepted.ecn && step.ecn,
                ufo: accepted.ufo && step.ufo,
                uso: accepted.uso && step.uso,
            };
            step.consistent()
        };
        for step in STEPS {
            if set_offloads(&self.file, cap(step)).is_ok() {
                return Ok(());
            }
        }
        set_offloads(&self.file, Offloads::default())
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn receive(
        &mut self,
        header: &mut [u8; HEADER_LEN],
        into: Pieces<'_>,
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        let first = libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: header.len() };
        let last = libc::iovec { iov_base: overflow.as_mut_ptr().cast(), iov_len: overflow.len() };
        gather(&mut self.iovecs.0, first, into, Some(last));
        let len = self.transfer(libc::readv)?;
        len.checked_sub(HEADER_LEN).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn send(&mut self, header: &[u8; HEADER_LEN], frame: Pieces<'_>) -> io::Result<()> {
        let first = libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() };
        gather(&mut self.iovecs.0, first, frame, None);
        self.transfer(libc::writev).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_that_no_interface_can_have_is_refused_and_shown() {
        for name in ["", "sixteen-letters!", "a/b", "a b", "tap%d", "a:1", ".", "..", "täp0", "tap\n"] {
            let error = Tap::open(name, None).unwrap_err();
            assert!(matches!(error, Error::Name { .. }), "{name}: {error}");
            assert!(error.to_string().contains(&format!("{name:?}")), "{error}");
        }
    }

    #[test]
    fn prefix_that_no_network_has_is_refused() {
        for prefix in [0, 33, 255] {
            let error = Tap::open("tap-test", Some((Ipv4Addr::LOCALHOST, prefix))).unwrap_err();
            assert!(matches!(error, Error::Prefix { prefix: p, .. } if p == prefix), "{error}");
        }
    }
}
