//! Where a guest's serial console meets people: the terminal that the monitor was started on, or a
//! pseudo-terminal of its own.

mod escape;
mod pty;
mod raw;
mod restore;
#[cfg(test)]
mod tests;

pub use escape::{Action, Escape, HELP};
pub use pty::{Output, Pty};
pub use raw::RawMode;
