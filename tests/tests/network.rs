//! A guest's network card on a tap, seen from the host's end. Each test has a network namespace of its own, which the
//! monitor that it starts inherits.

use std::fs;
use std::io;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use vmm_tests::guest::{Guest, Setup};

const DEADLINE: Duration = Duration::from_secs(60);
const NET: &str = "[[net]]\ntap = \"tap0\"\nhost_address = \"10.9.0.1/24\"\n";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 2);

/// Runs `test` on a thread in a new network namespace.
fn in_namespace(test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let run = || {
            // SAFETY: unshare takes flags; it moves this thread alone.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", io::Error::last_os_error());
            test();
        };
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

fn start(cmdline: &str) -> Guest {
    let mut guest = Setup::new(cmdline).unwrap().with(NET).start().unwrap();
    guest.wait_event("ready").unwrap();
    guest
}

/// A field of the tap's line in `/proc/net/dev`, which is that of the thread's namespace.
fn statistics(field: usize) -> u64 {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find(|line| line.trim_start().starts_with("tap0:")).expect("there is no tap0");
    line.split_once(':').unwrap().1.split_whitespace().nth(field).unwrap().parse().unwrap()
}

const RX_PACKETS: usize = 1;

/// Sends pings of `size` bytes to the guest until one comes back.
fn ping(size: usize) {
    // SAFETY: socket takes numbers.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::IPPROTO_ICMP) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: fd was just opened and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: an all-zero sockaddr_in is a valid value.
    let mut to: libc::sockaddr_in = unsafe { mem::zeroed() };
    to.sin_family = libc::sa_family_t::try_from(libc::AF_INET).unwrap();
    to.sin_addr.s_addr = u32::from_ne_bytes(GUEST.octets());
    let until = Instant::now() + DEADLINE;
    for sequence in 0_u8.. {
        assert!(Instant::now() < until, "no ping came back");
        let mut packet = vec![8, 0, 0, 0, 0x12, 0x34, 0, sequence];
        packet.resize(8 + size, 0xa5);
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        let len = libc::socklen_t::try_from(mem::size_of_val(&to)).unwrap();
        // SAFETY: packet and address are valid for the lengths given.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const to).cast(),
                len,
            )
        };
        assert_eq!(sent, isize::try_from(packet.len()).unwrap(), "{}", io::Error::last_os_error());
        let again = Instant::now() + Duration::from_secs(1);
        while let Some(left) = again.checked_duration_since(Instant::now()) {
            let mut polled = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: polled is one entry.
            if unsafe { libc::poll(&raw mut polled, 1, i32::try_from(left.as_millis()).unwrap()) } != 1 {
                break;
            }
            let mut answer = vec![0; 70_000];
            // SAFETY: the buffer is valid for its length.
            let got = unsafe { libc::recv(socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
            let answer = &answer[20..usize::try_from(got).unwrap()];
            if answer[0] == 0 && answer[8..] == packet[8..] {
                return;
            }
        }
    }
}

/// The Internet checksum (RFC 1071).
fn checksum(bytes: &[u8]) -> u16 {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let mut sum: u32 = bytes.chunks(2).map(word).sum();
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    u16::try_from(!sum & 0xffff).unwrap()
}

#[test]
#[ignore = "needs root, /dev/kvm, tun and network namespaces"]
fn guest_answers_pings_of_any_size_through_its_tap() {
    in_namespace(|| {
        let mut guest = start("test=net-echo ip=10.9.0.2");
        for size in [0, 56, 1400] {
            ping(size);
        }
        guest.vmm(&["stop", guest.name(), "--now"]).unwrap();
        assert_eq!(guest.exit_status().unwrap().code(), Some(0), "{}", guest.transcript());
        let gone = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        assert!(!gone.contains("tap0"), "the tap that the monitor made is still there: {gone}");
    });
}

#[test]
#[ignore = "needs root, /dev/kvm, tun and network namespaces"]
fn guest_answers_after_pauses() {
    in_namespace(|| {
        let guest = start("test=net-echo ip=10.9.0.2");
        for _ in 0..10 {
            assert!(guest.vmm(&["pause", guest.name()]).unwrap().status.success());
            // Frames for a guest that stands still wait in the tap.
            UdpSocket::bind("10.9.0.1:0").unwrap().send_to(b"x", "10.9.0.255:9").unwrap_or_default();
            assert!(guest.vmm(&["resume", guest.name()]).unwrap().status.success());
            ping(56);
        }
    });
}

#[test]
#[ignore = "needs root, /dev/kvm, tun and network namespaces"]
fn every_frame_that_the_guest_sends_reaches_the_tap() {
    in_namespace(|| {
        let setup = Setup::new("test=net-tx count=5000 then=idle").unwrap();
        let mut guest = setup.with(NET).start().unwrap();
        guest.wait_event("result").unwrap();
        let until = Instant::now() + DEADLINE;
        while statistics(RX_PACKETS) < 5000 {
            assert!(Instant::now() < until, "{} frames came", statistics(RX_PACKETS));
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(statistics(RX_PACKETS), 5000);
        let status: serde_json::Value =
            serde_json::from_slice(&guest.vmm(&["show", guest.name(), "--json"]).unwrap().stdout).unwrap();
        assert_eq!(status["nets"][0]["tap"], "tap0");
        assert!(status["nets"][0]["mac"].as_str().unwrap().starts_with("52:54:"), "{status}");
    });
}

#[test]
#[ignore = "needs root, /dev/kvm, tun and network namespaces"]
fn tap_in_use_and_interface_of_another_kind_are_refused_at_their_key() {
    in_namespace(|| {
        let setup = Setup::new("test=net-echo ip=10.9.0.2").unwrap();
        let second = setup.beside("test=poweroff").unwrap().with(NET);
        let loopback = setup.beside("test=poweroff").unwrap().with("[[net]]\ntap = \"lo\"\n");
        let mut first = setup.with(NET).start().unwrap();
        first.wait_event("ready").unwrap();
        let mut second = second.start().unwrap();
        assert_eq!(second.exit_status().unwrap().code(), Some(2));
        assert!(second.log().contains("net.0.tap = \"tap0\": tap tap0 is in use"), "{}", second.log());
        let mut loopback = loopback.start().unwrap();
        assert_eq!(loopback.exit_status().unwrap().code(), Some(2));
        assert!(loopback.log().contains("lo is not a tap"), "{}", loopback.log());
        ping(56);
    });
}
