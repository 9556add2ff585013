//! Our copy-on-write format: `docs/image-format.md` describes its bytes.
#![allow(dead_code, reason = "structures come before what uses them")]

pub mod check;
#[cfg(test)]
mod check_tests;
#[cfg(any(test, feature = "fuzzing"))]
pub mod forge;
mod layout;
#[cfg(any(test, feature = "fuzzing"))]
pub mod memory;
mod storage;

pub use layout::Backing;
