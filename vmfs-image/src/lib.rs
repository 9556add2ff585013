//! Virtual disks as files of the host: what a disk's bytes are and where they lie. Nothing here knows of guests.
//!
//! ```text
//!            Image  (trait)        what every disk can do; see image.rs for its two ways in
//!    ┌─────────┼──────────┐
//!   flat      thin     foreign     raw file or device │ our copy-on-write format │ qcow2, VMDK
//!              │
//!           backing ─▶ Image       read where thin has nothing of its own
//! ```

pub mod clone;
pub mod dedupe;
pub mod flat;
pub mod foreign;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod image;
pub mod lock;
pub mod merge;
pub mod open;
pub mod ops;
mod overlay;
pub mod redo;
pub mod snapshot;
mod steps;
#[cfg(test)]
mod test_image;
pub mod thin;
mod transfer;

pub use image::{Access, Error, Extent, Format, Identity, Image, Info, Place, Run, RunKind, Ticket};
pub use open::{Cache, OpenOptions, open, probe};
pub use overlay::names_below;
