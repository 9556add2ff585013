//! Images that `qemu-img` makes are read, and those that we write are what it takes for sound.

mod check;
mod hostile;
mod model;
mod qemu;
mod refuse;
