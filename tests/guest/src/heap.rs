//! Memory for the program itself: a heap that only grows (but for what was allocated last), and large areas for
//! workloads. It lies in the RAM behind the image; RAM above 4 GiB is mapped when it is first asked for.

use alloc::format;
use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::boot::{Loader, RAM};
use crate::{Error, cpu, phys};

const LOW_END: u64 = 1 << 32;
const PAGE: u64 = 4096;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// The page tables have one top-level entry.
const MAPPABLE: u64 = 512 * GIB;
/// Assumed where the loader gives no memory map.
const SMALL_MACHINE: u64 = 16 << 20;
/// Flags of page table entries: present, writable, user, accessed, dirty; and a large page.
const TABLE_FLAGS: u64 = 0x27;
const PAGE_FLAGS: u64 = 0x67 | 0x80;

unsafe extern "C" {
    static image_end: u8;
    static pdpt: UnsafeCell<[u64; 512]>;
}

/// Free memory: `next..end`, and what lies above 4 GiB.
#[derive(Debug)]
struct Free {
    next: u64,
    end: u64,
    high: u64,
    high_end: u64,
    mapped: u64,
}

struct Heap {
    busy: AtomicBool,
    free: UnsafeCell<Free>,
}

// SAFETY: `free` is only touched by `with`, which `busy` admits to one processor at a time.
unsafe impl Sync for Heap {}

#[global_allocator]
static HEAP: Heap = Heap {
    busy: AtomicBool::new(false),
    free: UnsafeCell::new(Free { next: 0, end: 0, high: 0, high_end: 0, mapped: LOW_END }),
};

impl Heap {
    fn with<T>(&self, action: impl FnOnce(&mut Free) -> T) -> T {
        while self.busy.swap(true, Ordering::Acquire) {
            cpu::relax();
        }
        // SAFETY: nobody else is in here; handlers do not allocate.
        let result = action(unsafe { &mut *self.free.get() });
        self.busy.store(false, Ordering::Release);
        result
    }
}

impl Free {
    fn take(&mut self, len: u64, align: u64) -> Option<u64> {
        let start = self.next.next_multiple_of(align);
        let end = start.checked_add(len).filter(|end| *end <= self.end)?;
        self.next = end;
        Some(start)
    }

    fn take_high(&mut self, len: u64) -> Option<u64> {
        let start = self.high.next_multiple_of(LARGE_PAGE);
        let end = start.checked_add(len).filter(|end| *end <= self.high_end)?;
        while self.mapped < end {
            self.map_gib()?;
        }
        self.high = end;
        Some(start)
    }

    /// Maps the next GiB onto itself.
    fn map_gib(&mut self) -> Option<()> {
        let large = cpu::id(0x8000_0001, 0)[3] >> 26 & 1 == 1;
        let entry = if large {
            self.mapped | PAGE_FLAGS
        } else {
            let directory = self.take(PAGE, PAGE)?;
            for page in 0..512 {
                let entry = core::ptr::with_exposed_provenance_mut::<u64>(phys::index(directory + page * 8));
                // SAFETY: the page is free memory that was just taken.
                unsafe { entry.write_volatile((self.mapped + page * LARGE_PAGE) | PAGE_FLAGS) };
            }
            directory | TABLE_FLAGS
        };
        let index = phys::index(self.mapped / GIB);
        // SAFETY: only this function changes the table, one processor at a time, and the index is below 512
        // since `high_end` is at most MAPPABLE. Absent entries are not cached, so nothing needs flushing.
        unsafe { pdpt.get().cast::<u64>().add(index).write_volatile(entry) };
        self.mapped += GIB;
        Some(())
    }
}

// SAFETY: areas handed out are RAM that nothing else uses and do not overlap: `next` only moves over them, and back
// over the last one when it is given back.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let area = self.with(|free| free.take(layout.size() as u64, layout.align() as u64));
        area.map_or(null_mut(), |start| core::ptr::with_exposed_provenance_mut(phys::index(start)))
    }

    unsafe fn dealloc(&self, area: *mut u8, layout: Layout) {
        let start = phys::address(area);
        self.with(|free| {
            if free.next == start + layout.size() as u64 {
                free.next = start;
            }
        });
    }
}

/// Takes over the RAM behind the image.
pub fn init(loader: Loader) {
    let image = phys::address(&raw const image_end).next_multiple_of(PAGE);
    let (initrd, initrd_len) = loader.initrd();
    let below_initrd = |start: u64, end: u64| match initrd {
        _ if initrd_len > 0 && start <= initrd && initrd < end => initrd,
        _ => end,
    };
    HEAP.with(|free| {
        (free.next, free.end) = (image, SMALL_MACHINE);
        for range in loader.ranges().filter(|range| range.kind == RAM) {
            if range.start <= image && image < range.end {
                free.end = below_initrd(image, range.end.min(LOW_END));
            }
            if range.end > LOW_END && range.end - range.start.max(LOW_END) > free.high_end - free.high {
                free.high = range.start.max(LOW_END);
                free.high_end = below_initrd(free.high, range.end.min(MAPPABLE));
            }
        }
    });
}

/// `len` bytes of RAM for a workload, aligned to 2 MiB where they are that long, as they were left by
/// whoever used them before.
///
/// # Errors
///
/// There is not so much left.
pub fn area(len: u64) -> Result<u64, Error> {
    HEAP.with(|free| {
        let align = if len >= LARGE_PAGE { LARGE_PAGE } else { PAGE };
        free.take(len, align)
            .or_else(|| free.take_high(len))
            .ok_or((free.end - free.next, free.high_end - free.high))
    })
    .map_err(|(low, high)| format!("{len} bytes of memory are not free: {low} are below 4 GiB, {high} above"))
}

/// A zeroed area that is never given back.
///
/// # Errors
///
/// As of [`area`].
pub fn zeroed(len: u64) -> Result<u64, Error> {
    let start = area(len)?;
    // SAFETY: the area is free RAM.
    unsafe {
        core::ptr::with_exposed_provenance_mut::<u8>(phys::index(start)).write_bytes(0, phys::index(len))
    };
    Ok(start)
}
