//! The other processors.
