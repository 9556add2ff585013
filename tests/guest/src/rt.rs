//! What the compiler and the core library expect of a run-time library.

use core::arch::asm;
use core::panic::PanicInfo;

use crate::{json, power};

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    json::Line::new("error").display("message", info).send();
    power::end(power::End::default())
}

/// Copies `n` bytes upwards.
///
/// # Safety
///
/// As of C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
    to
}

/// Copies `n` bytes between areas that may overlap.
///
/// # Safety
///
/// As of C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    if to.addr().wrapping_sub(from.addr()) >= n {
        // SAFETY: the caller's promise; upwards nothing is overwritten before it is read.
        return unsafe { memcpy(to, from, n) };
    }
    // SAFETY: the caller's promise; n is not 0 here. Downwards, from the last byte.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") n => _, inout("rdi") to.add(n).sub(1) => _,
             inout("rsi") from.add(n).sub(1) => _, options(nostack));
    }
    to
}

/// Fills `n` bytes.
///
/// # Safety
///
/// As of C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("rep stosb", inout("rcx") n => _, inout("rdi") to => _, in("eax") byte,
             options(nostack, preserves_flags));
    }
    to
}

/// Compares `n` bytes.
///
/// # Safety
///
/// As of C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    for i in 0..n {
        // SAFETY: the caller's promise. Volatile, or the compiler would make this loop a call of itself.
        let (a, b) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

/// Whether `n` bytes differ.
///
/// # Safety
///
/// As of `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, n) }
}

/// Named by landing pads of the prebuilt `alloc`; nothing unwinds here, so nothing comes here.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    power::power_off()
}
