//! The check of thin images, and what it repairs: after that nothing is left to be repaired.
#![no_main]

use vmfs_image::fuzzing::{Memory, check_memory};
use vmm_fuzz::input::Input;
use vmm_fuzz::thin::image;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let bytes = image(&mut Input(input));
    let memory = Memory::new(&bytes);
    let Ok(before) = check_memory(&memory, false) else { return };
    let repaired = check_memory(&memory, true).expect("what can be checked can be repaired");
    if repaired.repaired.is_some() {
        let after = check_memory(&memory, false).expect("what was repaired can be checked");
        assert_eq!(after.errors, Vec::<String>::new());
        assert!(after.leaked <= 4096 && after.beyond == 0, "{after:?}");
        assert_eq!((after.clusters, after.data, after.zeroes), (before.clusters, before.data, before.zeroes));
    } else {
        assert!(memory.to_vec() == bytes, "it was changed without a word");
    }
});
