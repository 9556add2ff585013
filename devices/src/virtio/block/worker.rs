//! Serving a disk's queue.

use std::io;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::disk::Disk;
use super::request::{self, ID_LEN};
use crate::virtio::queue::DeviceQueue;
use crate::virtio::worker::{Poll, Work};

const KICK: u64 = 0;

#[derive(Debug)]
pub struct Server {
    pub queue: DeviceQueue,
    pub disk: Arc<dyn Disk>,
    pub readonly: bool,
    pub id: [u8; ID_LEN],
}

impl Work for Server {
    fn watch(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.queue.kick_fd(), EventSet::IN, KICK)
    }

    fn ready(&mut self, _token: u64, _poll: &Poll) {
        self.queue.clear_kick();
        let Self { queue, disk, readonly, id } = self;
        queue.serve(|chain| match request::serve(chain, &**disk, *readonly, id) {
            Ok(len) => len,
            Err(error) => {
                tracing::debug!("a request to a disk has no header or no status: {error}");
                0
            }
        });
    }

    fn catch_up(&mut self, poll: &Poll) {
        self.ready(KICK, poll);
    }
}
