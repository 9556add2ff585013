//! VMDK descriptors. `base` is a file that they may name.
#![no_main]

use vmfs_image::Format;
use vmm_fuzz::image::open_and_use;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // Text without the first line is rarely worth the fuzzer's time.
    let text = if bytes.starts_with(b"# Disk") || bytes.starts_with(b"KDMV") {
        bytes.to_owned()
    } else {
        let mut text = b"# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\n".to_vec();
        text.extend_from_slice(bytes);
        text
    };
    open_and_use("disk.vmdk", &text, Some(Format::Vmdk));
});
