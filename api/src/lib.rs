//! Control of one guest by HTTP/1.1 over a Unix socket: what is said, a small server for the monitor and a client for
//! everybody else. `docs/api.md` describes the resources for those who come with `curl`.
//!
//! ```text
//!   client::Client ──┐
//!   curl, … ─────────┴─ Unix socket ── server::Server ── dyn Control (the monitor)
//!                                       accept thread, one thread a connection while it lasts
//! ```

pub mod client;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod http;
pub mod server;
mod types;

pub use types::{
    AtPowerOff, Control, Counters, DiskDetails, DiskLimits, DiskOrder, DiskStatus, Job, JobState, MaxSize,
    Medium, NetStatus, PowerOffChoice, Refused, Resize, Snapshot, State, Status,
};
