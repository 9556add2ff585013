//! Our copy-on-write format: `docs/image-format.md` describes its bytes.
#![allow(dead_code, reason = "structures come before what uses them")]

mod layout;
mod storage;

pub use layout::Backing;
