//! A network interface of the host, as netdevice(7) shows it.

use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `ETHTOOL_GDRVINFO` (linux/ethtool.h).
const ETHTOOL_GDRVINFO: u32 = 3;

/// `struct ethtool_drvinfo` (linux/ethtool.h).
#[repr(C)]
#[derive(Debug)]
struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    version: [u8; 32],
    fw_version: [u8; 32],
    bus_info: [u8; 32],
    erom_version: [u8; 32],
    reserved: [u8; 12],
    numbers: [u32; 5],
}

/// An interface, by name, in the network namespace of the thread that made this.
#[derive(Debug)]
pub struct Interface {
    name: [libc::c_char; libc::IFNAMSIZ],
    socket: OwnedFd,
}

impl Interface {
    /// The interface called `name`, of which the kernel looks at the first 15 bytes; it need not exist.
    ///
    /// # Errors
    ///
    /// There are no sockets to be had.
    pub fn new(name: &str) -> io::Result<Self> {
        // SAFETY: socket takes integers.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { name: c_name(name), socket })
    }

    fn request(&self) -> libc::ifreq {
        // SAFETY: ifreq is plain data, for which zeroes are good.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        request.ifr_name = self.name;
        request
    }

    fn call(&self, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: every code used here reads or fills an ifreq; what one points to, if anything, the caller keeps.
        match unsafe { libc::ioctl(self.socket.as_raw_fd(), code, &raw mut *request) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Driver and, with taps and tuns, which of the two it is.
    ///
    /// # Errors
    ///
    /// There is no such interface, or it does not say.
    pub fn driver(&self) -> io::Result<(String, String)> {
        // SAFETY: DriverInfo is plain data, for which zeroes are good.
        let mut info: DriverInfo = unsafe { mem::zeroed() };
        info.cmd = ETHTOOL_GDRVINFO;
        let mut request = self.request();
        request.ifr_ifru.ifru_data = (&raw mut info).cast();
        self.call(libc::SIOCETHTOOL, &mut request)?;
        let text = |bytes: &[u8]| {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            String::from_utf8_lossy(&bytes[..end]).into_owned()
        };
        Ok((text(&info.driver), text(&info.bus_info)))
    }

    /// Largest packet in bytes.
    ///
    /// # Errors
    ///
    /// There is no such interface.
    pub fn mtu(&self) -> io::Result<u16> {
        let mut request = self.request();
        self.call(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: the call has filled this member.
        let mtu = unsafe { request.ifr_ifru.ifru_mtu };
        // More than the protocol can say is as good as no limit.
        Ok(u16::try_from(mtu.max(0)).unwrap_or(u16::MAX))
    }

    /// Makes the interface work, unless it does already.
    ///
    /// # Errors
    ///
    /// There is no such interface, or no permission.
    pub fn bring_up(&self) -> io::Result<()> {
        let mut request = self.request();
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        let up = libc::c_short::try_from(libc::IFF_UP).unwrap_or_default();
        // SAFETY: the call has filled this member.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        if flags & up != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags | up;
        self.call(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Gives the interface an address in a network of `prefix` bits, 1 to 32, unless it has it already.
    ///
    /// # Errors
    ///
    /// There is no such interface, or no permission.
    pub fn set_address(&self, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mask = u32::MAX.checked_shl(32_u32.saturating_sub(prefix.into())).unwrap_or(0);
        let mask = Ipv4Addr::from_bits(mask);
        let has = |code, wanted| self.address(code).is_ok_and(|found| found == wanted);
        if has(libc::SIOCGIFADDR, address) && has(libc::SIOCGIFNETMASK, mask) {
            return Ok(());
        }
        for (code, address) in [(libc::SIOCSIFADDR, address), (libc::SIOCSIFNETMASK, mask)] {
            let mut request = self.request();
            let mut data = [0; 14];
            data[2..6].copy_from_slice(&address.octets());
            // A sockaddr_in: port (2 bytes), address (4 bytes, most significant first), padding.
            request.ifr_ifru.ifru_addr = libc::sockaddr {
                sa_family: libc::sa_family_t::try_from(libc::AF_INET).unwrap_or_default(),
                sa_data: data.map(|byte: u8| libc::c_char::from_ne_bytes([byte])),
            };
            self.call(code, &mut request)?;
        }
        Ok(())
    }

    fn address(&self, code: libc::Ioctl) -> io::Result<Ipv4Addr> {
        let mut request = self.request();
        self.call(code, &mut request)?;
        // SAFETY: the call has filled this member.
        let data = unsafe { request.ifr_ifru.ifru_addr.sa_data };
        let [_, _, a, b, c, d, ..] = data.map(|byte| byte.to_ne_bytes()[0]);
        Ok(Ipv4Addr::new(a, b, c, d))
    }
}

/// A name as the kernel takes it: its first 15 bytes and zeroes.
pub fn c_name(name: &str) -> [libc::c_char; libc::IFNAMSIZ] {
    let mut bytes = [0; libc::IFNAMSIZ];
    for (place, byte) in bytes[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    bytes
}
