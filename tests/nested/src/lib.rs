//! Stock Linux guests on real KVM inside an emulated host.
//!
//! Three machines stand inside each other, counted from the outside:
//!
//! | | is | made of |
//! | --- | --- | --- |
//! | L0 | this machine | QEMU, which emulates processors with AMD SVM ([`L1`]) |
//! | L1 | the emulated host | Debian's kernel with KVM, busybox, the monitor, an agent |
//! | L2 | the guest | Debian's kernel, untouched; busybox on an ext4 disk ([`Artefacts`]) |
//!
//! So the monitor meets a kernel as people use it on a machine without hardware virtualization. Everything comes
//! from Debian's packages ([`Packages`]). Speed in there says nothing.

pub mod artefacts;
pub mod build;
pub mod console;
pub mod cpio;
pub mod demo;
mod error;
pub mod guest;
pub mod image;
pub mod job;
pub mod kernel;
pub mod l1;
pub mod modules;
pub mod packages;
pub mod program;
pub mod protocol;
pub mod pty;
pub mod template;
pub mod tree;

pub use artefacts::Artefacts;
pub use console::Console;
pub use demo::Demo;
pub use error::{Error, Result};
pub use guest::Guest;
pub use l1::{L1, Options, Output};
pub use packages::{Packages, ensure_packages};
pub use protocol::Status;
