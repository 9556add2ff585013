//! What a guest is: the checked configuration and how it is read from `vm.toml`.

pub mod model;
