//! `vm.toml`: whatever it holds is a configuration or a list of what is wrong with it.
#![no_main]

use vmm_fuzz::image::file;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    match vmm::config::load(&file("vm.toml", bytes)) {
        Ok(loaded) => drop(format!("{:?}", loaded.config)),
        Err(error) => drop(error.to_string()),
    }
});
