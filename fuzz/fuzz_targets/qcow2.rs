//! qcow2 images that are mostly sound.
#![no_main]

use vmfs_image::Format;
use vmm_fuzz::image::open_and_use;
use vmm_fuzz::input::Input;
use vmm_fuzz::qcow2::from_input;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    open_and_use("disk.qcow2", &from_input(&mut Input(bytes)), Some(Format::Qcow2));
});
