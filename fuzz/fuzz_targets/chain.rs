//! Images on images, with their snapshots and redo logs, wrong in a few places: backings that are missing, changed, themselves, or
//! each other's.
#![no_main]

use vmm_fuzz::chain::open_all;
use vmm_fuzz::input::Input;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| open_all(&mut Input(bytes)));
