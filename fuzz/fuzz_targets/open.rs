//! Any bytes, opened as whatever they look like: probing, and the first steps of every format.
#![no_main]

use vmm_fuzz::image::open_and_use;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| open_and_use("any", bytes, None));
