//! A frame costs the card's thread no allocation.

mod net_guest;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use devices::virtio::net::{Backend, HEADER_LEN, Offloads, Pieces};
use net_guest::{Guest, PLAIN};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

thread_local! {
    static IS_GUEST: Cell<bool> = const { Cell::new(false) };
}

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

/// Counts what threads other than the guest's allocate.
struct Counting;

// SAFETY: all is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if !IS_GUEST.try_with(Cell::get).unwrap_or(true) {
            ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        }
        // SAFETY: as for the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as for the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const FRAME: [u8; 9000] = [0x5a; 9000];

/// A back end that makes frames and swallows them.
#[derive(Debug)]
struct Mill {
    event: EventFd,
    waiting: Arc<AtomicUsize>,
}

impl Backend for Mill {
    fn name(&self) -> &str {
        "mill"
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
        self.event.as_raw_fd()
    }
    fn receive(
        &mut self,
        header: &mut [u8; HEADER_LEN],
        into: Pieces<'_>,
        _: &mut [u8],
    ) -> io::Result<usize> {
        let left = self.waiting.load(Ordering::SeqCst).checked_sub(1).ok_or(io::ErrorKind::WouldBlock)?;
        self.waiting.store(left, Ordering::SeqCst);
        *header = PLAIN;
        Ok(into.copy_from(&FRAME))
    }
    fn send(&mut self, _: &[u8; HEADER_LEN], frame: Pieces<'_>) -> io::Result<()> {
        assert_eq!(frame.len(), 60);
        Ok(())
    }
}

#[test]
fn frames_in_both_directions_cost_no_allocation() {
    IS_GUEST.set(true);
    let (event, waiting) = (EventFd::new(EFD_NONBLOCK).unwrap(), Arc::<AtomicUsize>::default());
    let outside = event.try_clone().unwrap();
    let mut guest = Guest::new(Box::new(Mill { event, waiting: waiting.clone() }));
    guest.start(0);
    let mut turns = |count| {
        for _ in 0..count {
            waiting.store(5, Ordering::SeqCst);
            outside.write(1).unwrap();
            (0..5).for_each(|_| guest.send(PLAIN, &FRAME[..60]));
            (0..5).for_each(|_| assert!(guest.receive().1 == FRAME));
            guest.flush();
        }
    };
    turns(1);
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    assert!(before > 0, "allocations are counted");
    turns(100);
    assert_eq!(ALLOCATIONS.load(Ordering::SeqCst), before);
}
