//! For the fuzz targets in `fuzz/`: images in memory, and images made by hand.

pub use crate::thin::check::Report;
pub use crate::thin::forge;
pub use crate::thin::memory::{Bytes, Memory};

/// Checks what is in memory; repairs it as well.
///
/// # Errors
///
/// Why it cannot be checked.
pub fn check_memory(memory: &Memory, repair: bool) -> Result<Report, String> {
    crate::thin::check::check_storage(memory, repair).map_err(|failure| format!("{failure:?}"))
}
