//! A network card behind its MMIO window, with a cable that ends in the test.

mod net_guest;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};

use devices::virtio::net::{Backend, HEADER_LEN, MAX_FRAME, Offloads, Pieces};
use net_guest::{EVENT_INDEX, Guest, MAC, PLAIN};

#[derive(Debug)]
struct Cable(UnixDatagram);

impl Backend for Cable {
    fn name(&self) -> &str {
        "cable"
    }
    fn mtu(&self) -> Option<u16> {
        None
    }
    fn offloads(&self) -> Offloads {
        Offloads { csum: true, tso4: true, ..Offloads::default() }
    }
    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
    fn receive(
        &mut self,
        header: &mut [u8; HEADER_LEN],
        into: Pieces<'_>,
        overflow: &mut [u8],
    ) -> io::Result<usize> {
        let mut data = vec![0; HEADER_LEN + MAX_FRAME];
        let len = self.0.recv(&mut data)?;
        header.copy_from_slice(&data[..HEADER_LEN]);
        let frame = &data[HEADER_LEN..len];
        let rest = &frame[into.copy_from(frame)..];
        overflow[..rest.len()].copy_from_slice(rest);
        Ok(frame.len())
    }
    fn send(&mut self, header: &[u8; HEADER_LEN], frame: Pieces<'_>) -> io::Result<()> {
        let mut data = vec![0; frame.len()];
        frame.copy_to(&mut data);
        self.0.send(&[header, &data[..]].concat()).map(drop)
    }
}

fn guest() -> (Guest, UnixDatagram) {
    let (inside, outside) = UnixDatagram::pair().unwrap();
    inside.set_nonblocking(true).unwrap();
    (Guest::new(Box::new(Cable(inside))), outside)
}

fn frame(number: u32, len: usize) -> Vec<u8> {
    number.to_le_bytes().into_iter().cycle().take(len).collect()
}

#[test]
fn configuration_space_without_an_mtu_has_address_and_link() {
    let (guest, _cable) = guest();
    let mut wanted = [0; 12];
    wanted[..6].copy_from_slice(&MAC);
    (wanted[6], wanted[8]) = (1, 1);
    assert_eq!(guest.config(), wanted);
}

#[test]
fn no_frame_is_lost_or_late_while_the_machine_is_paused_and_resumed_all_the_time() {
    for unknown in [0, EVENT_INDEX] {
        let (mut guest, cable) = guest();
        guest.start(unknown);
        let (transport, stop) = (guest.transport.clone(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::SeqCst) {
                    transport.pause();
                    transport.resume();
                    std::thread::yield_now();
                }
            });
            // What the guest sends comes back to it.
            scope.spawn(|| {
                let mut data = vec![0; HEADER_LEN + MAX_FRAME];
                while let Ok(len @ 1..) = cable.recv(&mut data) {
                    cable.send(&data[..len]).unwrap();
                }
            });
            let (mut sent, mut received) = (0_u32, 0);
            while received < 3000 {
                let burst = 1 + sent % 7;
                let size = |number: u32| if number % 50 == 3 { 30_000 } else { 60 + number as usize % 1400 };
                for _ in 0..burst {
                    guest.send(PLAIN, &frame(sent, size(sent)));
                    sent += 1;
                }
                while received < sent {
                    assert!(guest.receive().1 == frame(received, size(received)), "frame {received}");
                    received += 1;
                }
            }
            stop.store(true, Ordering::SeqCst);
            cable.shutdown(std::net::Shutdown::Both).unwrap();
        });
    }
}

#[test]
fn flood_in_both_directions_reaches_the_other_end_in_order() {
    const COUNT: u32 = 5000;
    let (mut guest, cable) = guest();
    for unknown in [0, EVENT_INDEX] {
        guest.start(unknown);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..COUNT {
                    cable.send(&[&PLAIN[..], &frame(number, 1000)].concat()).unwrap();
                }
            });
            scope.spawn(|| {
                let mut data = vec![0; HEADER_LEN + MAX_FRAME];
                for number in 0..COUNT {
                    let len = cable.recv(&mut data).unwrap();
                    assert!(data[HEADER_LEN..len] == frame(number, 500), "frame {number}");
                }
            });
            for number in 0..COUNT {
                guest.send(PLAIN, &frame(number, 500));
                assert!(guest.receive().1 == frame(number, 1000), "frame {number}");
            }
            guest.flush();
        });
    }
}
