//! Serving a disk's queue.

use std::io;

use vmm_sys_util::epoll::EventSet;

use super::request::Target;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::worker::{Poll, Work};

const KICK: u64 = 0;

#[derive(Debug)]
pub struct Server {
    pub queue: DeviceQueue,
    pub target: Target,
}

impl Work for Server {
    fn watch(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.queue.kick_fd(), EventSet::IN, KICK)
    }

    fn ready(&mut self, _token: u64, _poll: &Poll) {
        self.queue.clear_kick();
        let Self { queue, target } = self;
        queue.serve(|chain| match target.serve(chain) {
            Ok(len) => len,
            Err(error) => {
                tracing::debug!("a request to a disk has no header or no status: {error}");
                0
            }
        });
    }

    fn drain(&mut self) {
        self.target.image = None;
    }

    fn catch_up(&mut self, poll: &Poll) {
        self.target.image = Some(self.target.shared.image());
        self.ready(KICK, poll);
    }
}
