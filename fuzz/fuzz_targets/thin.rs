//! Thin images that are sound or nearly so, in use: what was written is read back from those that are sound, and from the others
//! comes an error or something, but no panic, no endless loop and no heap of memory.
#![no_main]

use vmm_fuzz::input::Input;
use vmm_fuzz::thin_io::use_image;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| use_image(&mut Input(bytes)));
