//! Serving requests for entropy.

use std::io;

use vmm_sys_util::epoll::EventSet;

use crate::virtio::chain::Chain;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::worker::{Poll, Work};

const KICK: u64 = 0;
/// Most bytes given for one request. A driver asks again for more; the host is not kept busy by one guest.
const MAX_BYTES: usize = 4096;

#[derive(Debug)]
pub struct Server {
    queue: DeviceQueue,
}

impl Server {
    pub fn new(queue: DeviceQueue) -> Self {
        Self { queue }
    }
}

impl Work for Server {
    fn watch(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.queue.kick_fd(), EventSet::IN, KICK)
    }

    fn ready(&mut self, _token: u64, _poll: &Poll) {
        self.queue.clear_kick();
        self.queue.serve(fill);
    }

    fn catch_up(&mut self, poll: &Poll) {
        self.ready(KICK, poll);
    }
}

/// Fills a chain with random bytes and says how many.
fn fill(mut chain: Chain<'_>) -> u32 {
    let mut bytes = [0; MAX_BYTES];
    let bytes = &mut bytes[..chain.writable.len().min(MAX_BYTES)];
    if let Err(error) = random(bytes) {
        tracing::warn!("the host gives no random numbers: {error}");
        return 0;
    }
    match chain.writable.write(bytes) {
        Ok(()) => u32::try_from(bytes.len()).unwrap_or_default(),
        Err(_) => 0,
    }
}

fn random(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // SAFETY: the pointer and length are those of a buffer of our own.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => bytes = &mut bytes[got..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use proptest::prelude::*;
    use virtio_queue::desc::split::Descriptor;

    use crate::virtio::device::VirtioDevice;
    use crate::virtio::rng::Rng;
    use crate::virtio::test_driver::{Buffer, Driver, MEMORY, SIZE};

    #[test]
    fn request_is_filled_with_bytes_that_differ_each_time() {
        let mut driver = Driver::new(Box::new(Rng::default()));
        let first = driver.transfer(0, &[Buffer::Write(64)]);
        let second = driver.transfer(0, &[Buffer::Write(64)]);
        assert_eq!((first.len, second.len), (64, 64));
        assert_ne!(first.written, second.written);
    }

    #[test]
    fn request_larger_than_the_limit_is_answered_in_part() {
        let mut driver = Driver::new(Box::new(Rng::default()));
        assert_eq!(driver.transfer(0, &[Buffer::Write(10_000)]).len, 4096);
    }

    #[test]
    fn request_without_room_is_given_back_empty() {
        let mut driver = Driver::new(Box::new(Rng::default()));
        assert_eq!(driver.transfer(0, &[Buffer::Read(vec![1; 8])]).len, 0);
        assert_eq!(driver.transfer(0, &[Buffer::Write(8)]).len, 8);
    }

    #[test]
    fn queue_is_of_the_entropy_device_type() {
        assert_eq!(Rng::default().device_id(), 4);
    }

    #[test]
    fn requests_made_during_a_pause_are_answered_after_it() {
        let mut driver = Driver::new(Box::new(Rng::default()));
        driver.device.pause();
        driver.chain(0, &[Buffer::Write(8)]);
        driver.offer(0, 0);
        driver.kick(0);
        assert!(driver.wait_used(0, Duration::from_millis(20)).is_none());
        driver.device.resume();
        assert_eq!(driver.wait_used(0, Duration::from_secs(20)), Some((0, 8)));
    }

    #[test]
    fn device_can_be_reset_while_paused_and_twice() {
        let mut driver = Driver::new(Box::new(Rng::default()));
        driver.device.pause();
        driver.device.reset();
        driver.device.reset();
        driver.device.pause();
        driver.device.resume();
    }

    fn descriptor() -> impl Strategy<Value = Descriptor> {
        let address = prop_oneof![8 => 0x10_0000..MEMORY as u64, 1 => any::<u64>()];
        let len = prop_oneof![6 => 0_u32..6000, 1 => any::<u32>()];
        (address, len, 0_u16..8, 0..SIZE + 2).prop_map(|(a, l, f, n)| Descriptor::new(a, l, f, n))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn hostile_chains_are_answered_within_the_limit_and_the_device_goes_on(
            chains in prop::collection::vec((prop::collection::vec(descriptor(), 1..6), 0..SIZE), 1..12)
        ) {
            let mut driver = Driver::new(Box::new(Rng::default()));
            for (descriptors, head) in chains {
                for (index, descriptor) in (0_u16..).zip(descriptors) {
                    driver.descriptor(0, index, descriptor);
                }
                driver.offer(0, head);
                driver.kick(0);
                let used = driver.wait_used(0, Duration::from_secs(20));
                prop_assert!(used.is_some_and(|(id, len)| id == u32::from(head) && len <= 4096));
            }
            let used = driver.transfer(0, &[Buffer::Write(8)]);
            prop_assert_eq!((used.head, used.len), (0, 8));
            prop_assert!(!driver.interrupts.needs_reset.load(Ordering::SeqCst));
        }
    }
}
