//! For the fuzz targets in `fuzz/`: a connection without a socket.

use crate::server::converse;
use crate::types::Control;

/// What a client that sends `bytes` and then waits is answered.
#[must_use]
pub fn answers(bytes: &[u8], control: &dyn Control) -> Vec<u8> {
    converse(bytes, control)
}
