//! Physical memory and device registers by address. Everything is mapped onto itself and open to this program, and what
//! loader and devices have put there is read as plain bytes: no address can break more than this guest.

use core::arch::asm;

/// Reads a value that may lie at any address. Types with invalid bit patterns are not used with this.
pub fn read<T: Copy>(address: u64) -> T {
    // SAFETY: mapped, see above; callers use integers and arrays of them.
    unsafe { core::ptr::with_exposed_provenance::<T>(index(address)).read_unaligned() }
}

/// `len` bytes at `address`, which nobody changes.
pub fn bytes(address: u64, len: u64) -> &'static [u8] {
    // SAFETY: mapped, see above.
    unsafe { core::slice::from_raw_parts(core::ptr::with_exposed_provenance(index(address)), index(len)) }
}

/// `len` bytes at `address`, which nobody else uses for now.
pub fn bytes_mut(address: u64, len: u64) -> &'static mut [u8] {
    // SAFETY: mapped, see above; callers pass memory that they have from the heap, and use one slice of it at a time.
    unsafe {
        core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(index(address)), index(len))
    }
}

/// `len` words of 64 bits at the aligned `address`, which nobody else uses for now.
pub fn words(address: u64, len: u64) -> &'static mut [u64] {
    // SAFETY: as of bytes_mut.
    unsafe {
        core::slice::from_raw_parts_mut(core::ptr::with_exposed_provenance_mut(index(address)), index(len))
    }
}

/// Reads a number at an aligned address that a device or another processor may change.
pub fn load<T: Copy>(address: u64) -> T {
    // SAFETY: mapped, see above; callers use integers.
    unsafe { core::ptr::with_exposed_provenance::<T>(index(address)).read_volatile() }
}

/// Writes a number to an aligned address that a device or another processor may read.
pub fn store<T>(address: u64, value: T) {
    // SAFETY: mapped, see above; callers pass memory that they have from the heap.
    unsafe { core::ptr::with_exposed_provenance_mut::<T>(index(address)).write_volatile(value) }
}

/// Reads a device register.
pub fn read32(address: u64) -> u32 {
    let value;
    // SAFETY: as above. A plain mov, because a monitor has to decode it.
    unsafe { asm!("mov {:e}, [{}]", out(reg) value, in(reg) address, options(nostack, preserves_flags)) };
    value
}

/// Writes a device register; what was written to memory before is seen by the device.
pub fn write32(address: u64, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("mov [{}], {:e}", in(reg) address, in(reg) value, options(nostack, preserves_flags)) };
}

/// Reads a byte of a device's configuration.
pub fn read8(address: u64) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("mov {}, [{}]", out(reg_byte) value, in(reg) address, options(nostack, preserves_flags)) };
    value
}

/// The address of `object`.
pub fn address<T: ?Sized>(object: *const T) -> u64 {
    object.expose_provenance() as u64
}

/// A number as an index: this program runs on 64-bit processors only.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits on x86-64")]
pub const fn index(value: u64) -> usize {
    value as usize
}
