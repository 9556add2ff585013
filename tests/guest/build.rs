//! Links the guest with its own layout and without anything of the host's.

use std::env;

fn main() {
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    assert!(
        flags.contains("relocation-model=static"),
        "the guest is built from within its own directory, where cargo reads .cargo/config.toml, \
         and with RUSTFLAGS unset: (cd tests/guest && cargo build --release)"
    );
    let here = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=src/ring0.s");
    for arg in ["-nostartfiles", "-nostdlib", &format!("-Wl,-T,{here}/link.ld"), "-Wl,--build-id=none"] {
        println!("cargo:rustc-link-arg-bins={arg}");
    }
}
