//! What a guest is: the checked configuration and how it is read from `vm.toml`.
//!
//! [`load`] reports everything that is wrong with a file at once, each with its place. What only shows when files are
//! opened or the kernel is looked at is reported through [`Loaded::problem`] in the same form.

pub mod address;
pub mod disk;
mod error;
pub mod model;
mod reader;
mod schema;
mod size;
mod time;

pub use error::{Error, Place, Problem};
pub use schema::{Loaded, load};
pub use size::{parse as parse_size, show as show_size};
pub use time::parse as parse_time;

#[cfg(test)]
mod tests;
