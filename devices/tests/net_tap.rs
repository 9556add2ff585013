//! A network card on a tap of the kernel. Every test has a network namespace of its own.

mod net_guest;

use std::io;
use std::mem;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use devices::virtio::net::{Backend, Error, HEADER_LEN, Offloads, Tap};
use net_guest::{EVENT_INDEX, Guest, MAC, PLAIN};

/// For experiments (IEEE 802): no protocol of the host answers it.
const EXPERIMENT: u16 = 0x88b5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO: u64 = GUEST_TSO4 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 54 | 1 << 55;

fn check(result: i32) -> i32 {
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}

/// Moves this thread, and those it starts from now on, to a network without interfaces.
fn enter_new_network() {
    // SAFETY: unshare takes flags.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) });
    // The kernel has things to say by itself on interfaces with IPv6.
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap_or_default();
}

fn socket(domain: i32, kind: i32, protocol: i32) -> OwnedFd {
    // SAFETY: socket takes integers.
    let fd = check(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) });
    // SAFETY: the descriptor is new.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: zeroes are a good ifreq.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = libc::c_char::from_ne_bytes([byte]);
    }
    request
}

/// An ioctl on interface `name`.
fn interface(name: &str, code: libc::Ioctl, set: impl FnOnce(&mut libc::ifreq)) -> libc::ifreq {
    let mut request = request(name);
    set(&mut request);
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    // SAFETY: the calls used here read or fill an ifreq.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), code, &raw mut request) });
    request
}

fn index(name: &str) -> i32 {
    let request = interface(name, libc::SIOCGIFINDEX, |_| ());
    // SAFETY: the call has filled this member.
    unsafe { request.ifr_ifru.ifru_ifindex }
}

fn address(name: &str, code: libc::Ioctl) -> Ipv4Addr {
    let request = interface(name, code, |_| ());
    // SAFETY: the call has filled this member.
    let data = unsafe { request.ifr_ifru.ifru_addr.sa_data };
    let [_, _, a, b, c, d, ..] = data.map(|byte| byte.to_ne_bytes()[0]);
    Ipv4Addr::new(a, b, c, d)
}

fn flags(name: &str) -> i32 {
    let request = interface(name, libc::SIOCGIFFLAGS, |_| ());
    // SAFETY: the call has filled this member.
    unsafe { request.ifr_ifru.ifru_flags }.into()
}

/// A tun or tap that stays as long as the file is open, or for good.
fn make(name: &str, flags: i32, persistent: bool) -> std::fs::File {
    let tun = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = request(name);
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap();
    // SAFETY: the call reads and fills an ifreq.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) });
    if persistent {
        // SAFETY: the call takes an integer.
        check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1_u64) });
    }
    tun
}

/// The host's end of a tap: a packet socket that takes and gives frames with the first 10 bytes of a virtio header.
struct Host(OwnedFd);

impl Host {
    fn new(tap: &str) -> Self {
        let protocol = i32::from(u16::try_from(libc::ETH_P_ALL).unwrap().to_be());
        let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, protocol);
        let set = |option: i32| {
            let (value, len) = (1_i32, libc::socklen_t::try_from(size_of::<i32>()).unwrap());
            let value = (&raw const value).cast();
            // SAFETY: the options are ints.
            check(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, value, len) });
        };
        set(15); // PACKET_VNET_HDR
        set(23); // PACKET_IGNORE_OUTGOING
        // SAFETY: zeroes are a good sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
        address.sll_protocol = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
        address.sll_ifindex = index(tap);
        let len = libc::socklen_t::try_from(size_of::<libc::sockaddr_ll>()).unwrap();
        // SAFETY: a sockaddr_ll of its size.
        check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) });
        let wait = libc::timeval { tv_sec: 20, tv_usec: 0 };
        let len = libc::socklen_t::try_from(size_of::<libc::timeval>()).unwrap();
        let (level, option) = (libc::SOL_SOCKET, libc::SO_RCVTIMEO);
        // SAFETY: the option is a timeval.
        check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const wait).cast(), len) });
        Self(socket)
    }

    fn send(&self, header: [u8; HEADER_LEN], frame: &[u8]) {
        let data = [&header[..10], frame].concat();
        // SAFETY: the buffer is our own.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), data.as_ptr().cast(), data.len(), 0) };
        assert_eq!(usize::try_from(sent).ok(), Some(data.len()), "{}", io::Error::last_os_error());
    }

    fn receive(&self, ethertype: u16) -> ([u8; 10], Vec<u8>) {
        loop {
            let mut data = vec![0; 70_000];
            // SAFETY: the buffer is our own.
            let len = unsafe { libc::recv(self.0.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), 0) };
            data.truncate(usize::try_from(len).expect("a frame for the host"));
            let frame = data.split_off(10);
            if frame[12..14] == ethertype.to_be_bytes() {
                return (data.try_into().unwrap(), frame);
            }
        }
    }
}

fn frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &MAC, &ethertype.to_be_bytes(), payload].concat()
}

fn numbered(number: u16) -> Vec<u8> {
    frame(EXPERIMENT, &number.to_be_bytes().repeat(20 + usize::from(number % 700)))
}

/// The sum that IP, TCP and UDP have in their headers (RFC 1071), over what is given.
fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap()
}

/// A TCP packet of `len` bytes of data in a frame, with no TCP checksum but the sum of its pseudo-header, and the header
/// that asks for segments of 1448 bytes.
fn tcp(len: u16) -> ([u8; HEADER_LEN], Vec<u8>) {
    let total = len + 40;
    let mut ip = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 9, 8, 2, 10, 9, 8, 1];
    ip[2..4].copy_from_slice(&total.to_be_bytes());
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut segment = vec![0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
    let pseudo = checksum(&[&ip[12..20], &[0, 6], &(len + 20).to_be_bytes()]);
    segment[16..18].copy_from_slice(&(!pseudo).to_be_bytes());
    segment.extend((0..len).map(|i| i.to_le_bytes()[0] ^ i.to_be_bytes()[0]));
    ([1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0], frame(0x800, &[ip, segment].concat()))
}

/// Whether the TCP checksum of a frame is right.
fn tcp_is_summed(frame: &[u8]) -> bool {
    let segment = &frame[34..];
    let len = u16::try_from(segment.len()).unwrap().to_be_bytes();
    checksum(&[&frame[26..34], &[0, 6], &len, segment]) == 0
}

#[test]
#[ignore = "needs root and tun"]
fn frames_go_both_ways_between_guest_and_host() {
    enter_new_network();
    let mut guest = Guest::new(Box::new(Tap::open("tap0", None).unwrap()));
    assert_eq!(guest.config()[10..], 1500_u16.to_le_bytes());
    let host = Host::new("tap0");
    for unknown in [0, EVENT_INDEX] {
        guest.start(unknown);
        for number in 0..500 {
            guest.send(PLAIN, &numbered(number));
            host.send(PLAIN, &numbered(number));
            assert_eq!(host.receive(EXPERIMENT).1, numbered(number));
            assert_eq!(guest.receive_protocol(EXPERIMENT).1, numbered(number));
        }
    }
}

#[test]
#[ignore = "needs root and tun"]
fn burst_of_frames_waits_in_the_tap_for_a_guest_that_is_paused() {
    enter_new_network();
    let mut guest = Guest::new(Box::new(Tap::open("tap0", None).unwrap()));
    guest.start(0);
    let host = Host::new("tap0");
    guest.transport.pause();
    for number in 0..300 {
        host.send(PLAIN, &numbered(number));
    }
    guest.transport.resume();
    for number in 0..300 {
        assert_eq!(guest.receive_protocol(EXPERIMENT).1, numbered(number));
    }
}

#[test]
#[ignore = "needs root and tun"]
fn large_tcp_packet_passes_whole_in_both_directions() {
    enter_new_network();
    let mut guest = Guest::new(Box::new(Tap::open("tap0", None).unwrap()));
    guest.start(0);
    let host = Host::new("tap0");
    let (header, packet) = tcp(62_000);
    guest.send(header, &packet);
    let (seen, frame) = host.receive(0x800);
    assert_eq!((seen[0], seen[1], &seen[4..10]), (1, 1, &header[4..10]));
    assert!(frame == packet);

    host.send(header, &packet);
    let (seen, frame) = guest.receive_protocol(0x800);
    assert_eq!((seen[0], seen[1], &seen[4..10]), (1, 1, &header[4..10]));
    assert!(frame == packet);
}

#[test]
#[ignore = "needs root and tun"]
fn guest_without_offloads_gets_segments_with_their_checksums() {
    enter_new_network();
    let mut guest = Guest::new(Box::new(Tap::open("tap0", None).unwrap()));
    let host = Host::new("tap0");
    let (header, packet) = tcp(10_000);
    for unknown in [GUEST_TSO | GUEST_CSUM, GUEST_TSO] {
        guest.start(unknown);
        host.send(header, &packet);
        let mut data = Vec::new();
        while data.len() < 10_000 {
            let (seen, frame) = guest.receive_protocol(0x800);
            assert_eq!(seen[1], 0, "no segmentation is asked for");
            if unknown & GUEST_CSUM != 0 {
                assert_eq!(seen[0], 0);
                assert!(tcp_is_summed(&frame));
            }
            assert!(frame.len() <= 1514);
            data.extend_from_slice(&frame[54..]);
        }
        assert!(data == packet[54..]);
    }
}

#[test]
#[ignore = "needs root and tun"]
fn host_answers_for_the_address_its_end_was_given() {
    enter_new_network();
    let host_address = Ipv4Addr::new(10, 9, 8, 1);
    let mut guest = Guest::new(Box::new(Tap::open("tap0", Some((host_address, 24))).unwrap()));
    assert_eq!(address("tap0", libc::SIOCGIFADDR), host_address);
    assert_eq!(address("tap0", libc::SIOCGIFNETMASK), Ipv4Addr::new(255, 255, 255, 0));
    guest.start(0);
    // Who has 10.9.8.1? Tell 10.9.8.2 (RFC 826).
    let mut question = vec![0, 1, 8, 0, 6, 4, 0, 1];
    question.extend_from_slice(&MAC);
    question.extend_from_slice(&[10, 9, 8, 2, 0, 0, 0, 0, 0, 0, 10, 9, 8, 1]);
    guest.send(PLAIN, &frame(0x806, &question));
    let answer = guest.receive_protocol(0x806).1;
    assert_eq!((&answer[..6], answer[21], &answer[28..32]), (&MAC[..], 2, &[10, 9, 8, 1][..]));
}

#[test]
#[ignore = "needs root and tun"]
fn address_that_is_there_already_is_left_and_another_is_replaced() {
    enter_new_network();
    drop(make("tap7", libc::IFF_TAP | libc::IFF_NO_PI, true));
    for (last, prefix) in [(1, 30), (1, 30), (5, 30), (5, 8), (5, 32)] {
        let wanted = Ipv4Addr::new(10, 1, 2, last);
        drop(Tap::open("tap7", Some((wanted, prefix))).unwrap());
        let mask = Ipv4Addr::from_bits(u32::MAX << (32 - prefix));
        assert_eq!(address("tap7", libc::SIOCGIFADDR), wanted);
        assert_eq!(address("tap7", libc::SIOCGIFNETMASK), mask);
    }
}

#[test]
#[ignore = "needs root and tun"]
fn persistent_tap_is_used_as_it_is_and_one_made_here_goes_away() {
    enter_new_network();
    drop(make("keep0", libc::IFF_TAP | libc::IFF_NO_PI, true));
    let mtu = |name: &str| interface(name, libc::SIOCSIFMTU, |request| request.ifr_ifru.ifru_mtu = 9000);
    mtu("keep0");
    let before = index("keep0");
    let tap = Tap::open("keep0", None).unwrap();
    assert_eq!(tap.mtu(), Some(9000));
    assert!(flags("keep0") & libc::IFF_UP != 0);
    drop(tap);
    assert_eq!(index("keep0"), before);
    drop(Tap::open("gone0", None).unwrap());
    assert!(!std::path::Path::new("/proc/sys/net/ipv4/conf/gone0").exists());
}

#[test]
#[ignore = "needs root and tun"]
fn kernel_of_today_knows_all_offloads() {
    enter_new_network();
    let mut tap = Tap::open("tap0", None).unwrap();
    let all = Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true };
    // UDP segmentation came with Linux 6.2.
    assert_eq!(Offloads { uso: true, ..tap.offloads() }, all);
    tap.set_offloads(tap.offloads()).unwrap();
    tap.set_offloads(Offloads { tso4: true, ..Offloads::default() }).unwrap();
}

#[test]
#[ignore = "needs root and tun"]
fn tap_that_is_open_is_busy_and_its_holder_is_named() {
    enter_new_network();
    // A name that no other test uses: /proc shows taps of all namespaces.
    let _first = Tap::open("busy-tap-9", None).unwrap();
    let error = Tap::open("busy-tap-9", None).unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
    let holder = format!("process {} ", std::process::id());
    assert!(error.to_string().contains(&holder), "{error}");
}

#[test]
#[ignore = "needs root and tun"]
fn interface_of_another_kind_is_refused_and_named() {
    enter_new_network();
    let _tun = make("tun0", libc::IFF_TUN | libc::IFF_NO_PI, false);
    let _queues = make("queues0", libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE, false);
    for name in ["lo", "tun0"] {
        let error = Tap::open(name, None).unwrap_err();
        assert!(matches!(error, Error::Kind { .. }), "{error}");
        assert!(error.to_string().contains(name), "{error}");
    }
    let error = Tap::open("queues0", None).unwrap_err();
    assert!(matches!(error, Error::MultiQueue { .. }), "{error}");
}

#[test]
#[ignore = "needs root and tun"]
fn user_without_permission_is_told_what_is_missing() {
    enter_new_network();
    // SAFETY: takes integers; unlike setresuid(2) of the C library, changes this thread alone.
    let changed = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
    assert_eq!(changed, 0);
    let error = Tap::open("tap0", None).unwrap_err();
    assert!(matches!(error, Error::Permission { .. }), "{error}");
    assert!(error.to_string().contains("CAP_NET_ADMIN"), "{error}");
}

#[test]
#[ignore = "needs root and tun"]
fn missing_driver_is_said_to_be_missing() {
    // SAFETY: unshare takes flags.
    check(unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) });
    let mount = |kind: &std::ffi::CStr, to: &std::ffi::CStr, flags| {
        // SAFETY: the strings end in zeroes; there are no options.
        check(unsafe { libc::mount(kind.as_ptr(), to.as_ptr(), kind.as_ptr(), flags, std::ptr::null()) });
    };
    mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE);
    mount(c"tmpfs", c"/dev/net", 0);
    let error = Tap::open("tap0", None).unwrap_err();
    assert!(matches!(error, Error::NoDriver { .. }), "{error}");
    // A file without a driver behind it.
    let node = c"/dev/net/tun";
    // SAFETY: the string ends in a zero. 10, 250 is a device number that nothing has registered.
    check(unsafe { libc::mknod(node.as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(10, 254)) });
    let error = Tap::open("tap0", None).unwrap_err();
    assert!(matches!(error, Error::NoDriver { .. }), "{error}");
}

/// Deletes an interface (rtnetlink(7)).
fn delete(name: &str) {
    let mut message = Vec::new();
    message.extend_from_slice(&32_u32.to_ne_bytes());
    message.extend_from_slice(&libc::RTM_DELLINK.to_ne_bytes());
    message.extend_from_slice(&u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_ACK).unwrap().to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence, port
    message.extend_from_slice(&[0; 4]); // family, type
    message.extend_from_slice(&index(name).to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // flags, mask
    let socket = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    let mut answer = [0_u8; 64];
    // SAFETY: the buffers are our own.
    unsafe {
        let sent = libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0);
        assert_eq!(sent, 32);
        assert!(libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) >= 20);
    }
    assert_eq!(answer[16..20], [0; 4], "the answer is an error");
}

#[test]
#[ignore = "needs root and tun"]
fn deleted_tap_takes_the_guests_frames_as_a_cable_that_is_cut() {
    enter_new_network();
    let mut guest = Guest::new(Box::new(Tap::open("tap0", None).unwrap()));
    guest.start(0);
    guest.send(PLAIN, &numbered(1));
    guest.flush();
    delete("tap0");
    for number in 0..100 {
        guest.send(PLAIN, &numbered(number));
    }
    guest.flush();
    let counters = guest.counters.clone();
    assert_eq!(counters.tx_errors.load(Ordering::SeqCst), 100);
    // The thread has been told of the end, and is not told over and over.
    std::thread::sleep(std::time::Duration::from_millis(50));
    let errors = counters.rx_errors.load(Ordering::SeqCst);
    assert!(errors < 10, "{errors}");
    // Neither a pause nor a reset minds.
    guest.transport.pause();
    guest.transport.resume();
    guest.start(0);
    guest.send(PLAIN, &numbered(1));
    guest.flush();
    assert_eq!(counters.tx_errors.load(Ordering::SeqCst), 101);
}

#[test]
#[ignore = "needs root and tun"]
fn interface_that_is_down_for_a_while_costs_the_frames_of_that_time() {
    enter_new_network();
    let mut guest = Guest::new(Box::new(Tap::open("tap0", None).unwrap()));
    guest.start(0);
    let host = Host::new("tap0");
    let up = i16::try_from(libc::IFF_UP).unwrap();
    let set = |flags| {
        interface("tap0", libc::SIOCSIFFLAGS, |request| request.ifr_ifru.ifru_flags = flags);
    };
    set(0);
    guest.send(PLAIN, &numbered(1));
    guest.flush();
    assert_eq!(guest.counters.tx_errors.load(Ordering::SeqCst), 1);
    set(up);
    // The packet socket has learned of it, too, by an error that it reports once.
    drop(host);
    let host = Host::new("tap0");
    guest.send(PLAIN, &numbered(2));
    assert_eq!(host.receive(EXPERIMENT).1, numbered(2));
    host.send(PLAIN, &numbered(3));
    assert_eq!(guest.receive_protocol(EXPERIMENT).1, numbered(3));
}

#[test]
#[ignore = "needs root and tun"]
fn descriptor_of_a_tap_does_not_block_and_is_not_inherited() {
    enter_new_network();
    let tap = Tap::open("tap0", None).unwrap();
    // SAFETY: F_GETFL and F_GETFD take and give integers.
    let (status, descriptor) =
        unsafe { (libc::fcntl(tap.fd(), libc::F_GETFL), libc::fcntl(tap.fd(), libc::F_GETFD)) };
    assert!(status & libc::O_NONBLOCK != 0 && descriptor & libc::FD_CLOEXEC != 0);
}
