//! What fuzz targets share: input taken apart, files to open, and what is done with an image that opens.

pub mod block;
pub mod chain;
pub mod image;
pub mod input;
pub mod qcow2;
pub mod thin;
pub mod thin_io;
