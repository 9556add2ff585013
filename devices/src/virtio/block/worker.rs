//! Serving a disk's queue.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vmfs_image::{Cache, Image};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::calls::{Call, Returns};
use super::mover::{Mover, Progress};
use super::options::OnError;
use super::polling::Polling;
use super::request::{ID_LEN, Request, Shape, Status};
use super::ring::MOMENT;
use super::shared::Shared;
use super::slot::Slot;
use crate::GuestRam;
use crate::virtio::queue::DeviceQueue;
use crate::virtio::worker::{Poll, Work};

const KICK: u64 = 0;
const RING: u64 = 1;
const RETURNS: u64 = 2;
const TIMER: u64 = 3;

/// Most requests taken before those that are done are looked for.
const BATCH: usize = 32;
/// No more are taken with those that have so many bytes together: a pause waits for what was taken.
const BATCH_BYTES: usize = 8 << 20;
/// A call that takes longer has waited for storage, ...
const LONG: Duration = Duration::from_micros(500);
/// ... and for so long others are made elsewhere.
const PENANCE: Duration = Duration::from_millis(100);
/// After so long, others on this thread, a pause among them, get their turn.
const TIME: Duration = Duration::from_millis(10);

/// What serves a queue, on its thread.
#[derive(Debug)]
pub struct Server {
    queue: DeviceQueue,
    shared: Arc<Shared>,
    /// The driver knows no flush, so that what it has written must be stable when it is told so (section 5.2.6.2).
    write_through: bool,
    id: [u8; ID_LEN],
    /// `None` while the thread is held, so that it keeps no image from being closed.
    image: Option<Arc<dyn Image>>,
    mover: Option<Mover>,
    slots: Vec<Slot>,
    unused: Vec<u16>,
    /// Slots that chains were put into just now.
    popped: Vec<u16>,
    /// Slots that wait because of an error.
    stopped: Vec<u16>,
    retries: u64,
    /// A limit is reached, or all slots are in use: nothing is taken.
    full: bool,
    calls: usize,
    /// Until when calls are not made on this thread, since one took long.
    slow_until: Option<Instant>,
    returns: Arc<Returns>,
    timer: TimerFd,
    polling: Polling,
    /// What all slots point into.
    memory: Arc<GuestRam>,
}

impl Server {
    /// Serves `queue` with the disk that is `shared`.
    ///
    /// # Errors
    ///
    /// No descriptors are to be had.
    pub fn new(
        queue: DeviceQueue,
        shared: Arc<Shared>,
        write_through: bool,
        id: [u8; ID_LEN],
    ) -> io::Result<Self> {
        let alone = std::thread::available_parallelism().is_ok_and(|count| count.get() == 1);
        let memory = queue.memory();
        let retries = shared.retries.load(Ordering::Acquire);
        Ok(Self {
            queue,
            // With a single processor, whoever looks for work keeps others from making some.
            polling: Polling::new(if alone { Duration::ZERO } else { shared.options.poll }),
            shared,
            write_through,
            id,
            image: None,
            mover: None,
            slots: Vec::new(),
            unused: Vec::new(),
            popped: Vec::new(),
            stopped: Vec::new(),
            retries,
            full: false,
            calls: 0,
            slow_until: None,
            returns: Arc::new(Returns::new()?),
            timer: timer()?,
            memory,
        })
    }

    /// Guest memory, for what stays with this value.
    fn memory(&self) -> &'static GuestRam {
        // SAFETY: only slots and calls keep what is borrowed from it. This value, and every call, holds on to the memory
        // for as long as it has these.
        unsafe { &*Arc::as_ptr(&self.memory) }
    }

    /// Serves until there is nothing to do.
    fn serve(&mut self) {
        let began = Instant::now();
        self.polling.wakes(began);
        self.queue.suppress_kicks();
        while began.elapsed() < TIME {
            if self.turn() || self.look() {
                continue;
            }
            // What is not to be taken need not be told of either.
            if self.is_held() || !self.queue.allow_kicks() {
                self.polling.sleeps(Instant::now());
                return;
            }
            self.queue.suppress_kicks();
        }
        self.queue.come_back();
    }

    fn is_held(&self) -> bool {
        self.full || !self.stopped.is_empty()
    }

    /// Does what there is to do; false if there was nothing.
    fn turn(&mut self) -> bool {
        let mut moved = self.reap();
        moved |= self.take();
        if let Some(mover) = &mut self.mover
            && mover.in_flight() > 0
        {
            if !mover.submit() {
                self.come_back_after(MOMENT);
            }
            moved |= self.reap();
        }
        if moved {
            self.queue.notify();
        }
        moved
    }

    /// Has this thread woken after some time, whatever happens.
    fn come_back_after(&mut self, time: Duration) {
        if let Err(error) = self.timer.reset(time, None) {
            tracing::error!("a disk cannot set its timer: {error}");
        }
    }

    /// Looks for something to do for a while.
    fn look(&mut self) -> bool {
        let window = self.polling.window();
        if window.is_zero() {
            return false;
        }
        let began = Instant::now();
        while began.elapsed() < window {
            for _ in 0..32 {
                if !self.is_held() && self.queue.has_more()
                    || self.mover.as_mut().is_some_and(Mover::has_done)
                    || self.returns.has_some()
                {
                    return true;
                }
                std::hint::spin_loop();
            }
        }
        false
    }

    /// Takes requests that the driver has made available.
    fn take(&mut self) -> bool {
        self.full = false;
        if !self.stopped.is_empty() {
            return false;
        }
        let mut left = BATCH;
        while left > 0 && self.stopped.is_empty() && !self.full {
            // With limits, each may be the last.
            let limited = self.shared.limiter.is_active();
            if limited && let Some(wait) = self.shared.limiter.wait(Instant::now()) {
                self.full = true;
                self.come_back_after(wait);
                break;
            }
            let taken = self.pop(if limited { 1 } else { left });
            left -= taken;
            // With one of many at a time there may be more; else there are none, or enough for now.
            if taken == 0 || !limited {
                break;
            }
        }
        left < BATCH
    }

    /// Takes up to `most` chains, and begins their requests. Gives how many there were.
    fn pop(&mut self, most: usize) -> usize {
        let memory = self.memory();
        let room = self.mover.as_ref().map_or(usize::MAX, Mover::room);
        let (mut bad, mut bytes) = (None, 0_usize);
        let (slots, unused, popped) = (&mut self.slots, &mut self.unused, &mut self.popped);
        let size = usize::from(self.queue.size());
        // A driver can make the same chain available again before it has it back.
        let most = most.min(room).min(unused.len() + size.saturating_sub(slots.len()));
        self.full = most == 0;
        if self.full {
            return 0;
        }
        self.queue.pop_each(memory, |chain| {
            let head = chain.head_index();
            let index = unused.pop().or_else(|| {
                slots.push(Slot::default());
                u16::try_from(slots.len() - 1).ok()
            });
            let Some(slot) = index.and_then(|index| slots.get_mut(usize::from(index))) else {
                return ControlFlow::Break(());
            };
            popped.extend(index);
            if let Err(error) = slot.chain.refill(memory, chain) {
                bad = Some((head, error));
                return ControlFlow::Break(());
            }
            bytes = bytes.saturating_add(slot.chain.readable.len()).saturating_add(slot.chain.writable.len());
            if popped.len() < most && bytes < BATCH_BYTES {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
        let mut popped = std::mem::take(&mut self.popped);
        let count = popped.len();
        if let Some((head, error)) = bad {
            self.queue.refuse(head, &error);
            self.unused.extend(popped.pop());
        }
        popped.drain(..).for_each(|index| self.take_in(index));
        self.popped = popped;
        count
    }

    /// Begins the request in a slot that a chain was put into.
    fn take_in(&mut self, index: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return };
        let (image, readonly) = (&self.image, self.shared.options.readonly);
        let shape = || Shape { size: image.as_ref().map_or(0, |image| image.size()), readonly };
        match Request::take(&mut slot.chain, shape) {
            Ok((request, status)) => {
                (slot.request, slot.status) = (request, Some(status));
                let moves = matches!(slot.request, Request::Read(_) | Request::Write(_));
                if moves && self.shared.limiter.is_active() {
                    self.shared.limiter.charge(slot.len(), Instant::now());
                }
                self.begin_in_turn(index);
            }
            Err(error) => {
                tracing::debug!("a request to a disk has no header or no status: {error}");
                self.queue.push(slot.chain.head, 0);
                self.unused.push(index);
            }
        }
    }

    /// Begins the request in a slot, unless others wait because of an error.
    fn begin_in_turn(&mut self, index: u16) {
        if self.stopped.is_empty() {
            self.begin(index);
        } else {
            self.stopped.push(index);
        }
    }

    /// Begins the request in a slot.
    fn begin(&mut self, index: u16) {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return };
        slot.settles = false;
        match (&slot.request, &mut self.mover) {
            (Request::Refused(status), _) => {
                let status = *status;
                self.answer(index, status);
            }
            (Request::Identify, _) => {
                // A driver with less room gets the beginning.
                let len = slot.chain.writable.len().min(ID_LEN);
                let written = slot.chain.writable.write(&self.id[..len]);
                let status = if written.is_ok() { Status::Ok } else { Status::IoError };
                let more = u32::try_from(len).unwrap_or_default();
                self.answer_with(index, status, more);
            }
            (Request::Flush, _) => self.flush(index),
            (Request::Read(_) | Request::Write(_), Some(mover)) => {
                let progress = mover.start(index, slot);
                self.went_on(index, progress);
            }
            _ => self.call(index),
        }
    }

    /// What a slot's transfer has come to.
    fn went_on(&mut self, index: u16, progress: Progress) {
        match progress {
            Progress::Pending => {}
            Progress::Call => self.call(index),
            Progress::Done(Err(error)) => self.failed(index, &error),
            Progress::Done(Ok(())) => {
                let Some(slot) = self.slots.get_mut(usize::from(index)) else { return };
                let is_written = matches!(slot.request, Request::Write(_)) && !slot.settles;
                if is_written && self.write_through {
                    slot.settles = true;
                    self.flush(index);
                } else {
                    self.answer(index, Status::Ok);
                }
            }
        }
    }

    /// Makes what was written stable, for the request in a slot.
    fn flush(&mut self, index: u16) {
        let call = Call { request: Request::Flush, data: Vec::new(), then_flush: false };
        // Where storage is quick, another thread would take longer to be woken than it would keep this one.
        if self.shared.options.cache == Cache::Unsafe || self.may_wait(Instant::now()) {
            return self.make(index, call, true);
        }
        let file = self.image.as_ref().and_then(|image| image.flush_is_sync_of());
        let slot = self.slots.get_mut(usize::from(index));
        let progress = match (file, &mut self.mover, slot) {
            (Some(file), Some(mover), Some(slot)) => mover.sync(index, slot, file),
            _ => Progress::Call,
        };
        if let Progress::Call = progress {
            self.make(index, call, false);
        }
    }

    /// Whether a call may be made on this thread: nothing else is under way, and those before did not take long.
    fn may_wait(&self, now: Instant) -> bool {
        let is_idle = self.calls == 0 && self.mover.as_ref().is_none_or(|mover| mover.in_flight() == 0);
        is_idle && self.slow_until.is_none_or(|until| until <= now) && !self.queue.has_more()
    }

    /// Does the request in a slot by a call that may wait for storage.
    fn call(&mut self, index: u16) {
        let Some(slot) = self.slots.get(usize::from(index)) else { return };
        let call = Call {
            request: slot.request.clone(),
            data: slot.data().to_vec(),
            then_flush: self.write_through,
        };
        let is_quick = matches!(call.request, Request::Read(_) | Request::Write(_)) && !self.write_through;
        self.make(index, call, is_quick);
    }

    /// Makes a call: here if nobody is kept waiting by that for long, or there are no others to do it.
    fn make(&mut self, index: u16, call: Call, is_quick: bool) {
        let Some(image) = self.image.clone() else { return self.answer(index, Status::IoError) };
        let began = Instant::now();
        if self.mover.is_none() || is_quick && self.may_wait(began) {
            let result = call.carry_out(&*image);
            drop(image);
            // Those behind it need not wait for the storage one after the other.
            self.slow_until = (began.elapsed() > LONG).then(|| began + PENANCE);
            self.returned(index, result);
            return;
        }
        self.calls += 1;
        let (returns, memory) = (self.returns.clone(), self.memory.clone());
        self.shared.pool.run(Box::new(move || returns.carry_out(index, call, image, memory)));
    }

    fn returned(&mut self, index: u16, result: io::Result<()>) {
        match result {
            Ok(()) => self.answer(index, Status::Ok),
            Err(error) => self.failed(index, &error),
        }
    }

    /// Looks for what is done.
    fn reap(&mut self) -> bool {
        let mut moved = false;
        if let Some(mover) = &mut self.mover
            && mover.in_flight() > 0
        {
            let mut done = Vec::new();
            mover.reap(&mut self.slots, |index, progress| done.push((index, progress)));
            moved = !done.is_empty();
            done.into_iter().for_each(|(index, progress)| self.went_on(index, progress));
        }
        if self.calls > 0 {
            let returned = self.returns.take();
            moved |= !returned.is_empty();
            self.calls -= returned.len().min(self.calls);
            returned.into_iter().for_each(|(index, result)| self.returned(index, result));
        }
        moved
    }

    /// The request in a slot has failed: the guest is told, or it waits.
    fn failed(&mut self, index: u16, error: &io::Error) {
        let (Some(slot), Some(image)) = (self.slots.get(usize::from(index)), &self.image) else { return };
        let disk = image.path().display();
        let (doing, sector) = (slot.request.doing(), slot.request.sector());
        let why = format!("{doing} disk {disk} at sector {sector} failed: {error}");
        // It can succeed once there is room, and a guest that is told of an error may lose data for good.
        let is_full = matches!(error.kind(), io::ErrorKind::QuotaExceeded | io::ErrorKind::StorageFull);
        // Nothing that somebody could mend: the guest has asked for what it may not do.
        let is_refusal =
            matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidInput);
        // What the kernel could not write is gone: it says so once, and succeeds when it is asked again. An image that is
        // full has said so beforehand.
        let is_lost =
            matches!(slot.request, Request::Flush) && !(is_full && image.flush_is_sync_of().is_none());
        let waits = is_full || self.shared.options.on_error == OnError::Pause && !is_refusal;
        if waits && !is_lost {
            self.stopped.push(index);
            self.shared.stop(self.queue.index(), why);
            return;
        }
        self.shared.failures.log(|dropped| tracing::warn!("{why}{dropped}"));
        self.answer(index, Status::IoError);
    }

    fn answer(&mut self, index: u16, status: Status) {
        self.answer_with(index, status, 0);
    }

    /// Gives a request back, with `more` bytes written beside data and status.
    fn answer_with(&mut self, index: u16, status: Status, more: u32) {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else { return };
        self.shared.counting(self.queue.index()).count(&slot.request, slot.len(), status);
        let written = slot.answer(status).saturating_add(more);
        self.queue.push(slot.chain.head, written);
        self.unused.push(index);
    }

    /// Tries requests again that wait because of an error, if somebody wants that.
    fn retry(&mut self) {
        let retries = self.shared.retries.load(Ordering::Acquire);
        if std::mem::replace(&mut self.retries, retries) == retries || self.stopped.is_empty() {
            return;
        }
        self.shared.go_on(self.queue.index());
        for index in std::mem::take(&mut self.stopped) {
            self.begin_in_turn(index);
        }
    }

    /// Has a ring made where one is wanted.
    fn make_mover(&mut self, poll: &Poll) {
        if self.mover.is_some() || self.shared.is_plain() {
            return;
        }
        let made = Mover::new().and_then(|mover| {
            poll.add(mover.fd(), EventSet::IN, RING)?;
            Ok(mover)
        });
        match made {
            Ok(mover) => self.mover = Some(mover),
            Err(error) => self.shared.fall_back(&error),
        }
    }
}

/// A timer that is not waited for but by way of a poll.
fn timer() -> io::Result<TimerFd> {
    // SAFETY: the call takes integers.
    let fd = unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is a timer's, and nobody else has it.
    Ok(unsafe { TimerFd::from_raw_fd(fd) })
}

impl Work for Server {
    fn watch(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(self.queue.kick_fd(), EventSet::IN, KICK)?;
        poll.add(self.returns.fd(), EventSet::IN, RETURNS)?;
        poll.add(self.timer.as_raw_fd(), EventSet::IN, TIMER)
    }

    fn ready(&mut self, token: u64, _poll: &Poll) {
        match token {
            KICK => self.queue.clear_kick(),
            // Nothing to read means that it was set anew since.
            TIMER => self.timer.wait().map_or((), |_| ()),
            _ => {}
        }
        self.serve();
    }

    fn drain(&mut self) {
        loop {
            self.reap();
            match &mut self.mover {
                Some(mover) if mover.in_flight() > 0 => mover.wait(),
                _ if self.calls > 0 => self.returns.wait(),
                _ => break,
            }
        }
        self.queue.notify();
        if let Some(mover) = &mut self.mover {
            mover.set_image(None);
        }
        self.image = None;
    }

    fn catch_up(&mut self, poll: &Poll) {
        self.make_mover(poll);
        let image = self.shared.image();
        if let Some(mover) = &mut self.mover {
            mover.set_image(Some(image.clone()));
        }
        self.image = Some(image);
        self.queue.clear_kick();
        self.retry();
        self.serve();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.go_on(self.queue.index());
    }
}
