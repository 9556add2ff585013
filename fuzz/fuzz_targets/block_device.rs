//! A disk device with a driver that keeps to the rules mostly: requests of all kinds, and now and then headers, chains and rings that no
//! driver may make.
#![no_main]

use vmm_fuzz::block::drive;
use vmm_fuzz::input::Input;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| drive(&mut Input(bytes)));
