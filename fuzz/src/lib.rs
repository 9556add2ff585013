//! What fuzz targets share: input taken apart, files to open, and what is done with an image that opens.

pub mod image;
pub mod input;
pub mod qcow2;
pub mod thin;
