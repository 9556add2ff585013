//! Benchmarks of vmm beside its peers: the same guest, the same machine, runs interleaved, in one invocation.
//!
//! One module per benchmark ([`start`], [`disk`]); what they share stands beside them:
//!
//! * [`systems`]: how each monitor is found and told to run a guest;
//! * [`process`]: a monitor while it runs: its output against the clock, its end;
//! * [`cpu`]: the processor time that it takes beside the guest's;
//! * [`smaps`]: what it takes of the host's memory;
//! * [`quiet`]: waiting for an idle host before a run;
//! * [`stats`] and [`report`]: from samples to a table or JSON lines.

pub mod cpu;
pub mod disk;
pub mod process;
pub mod quiet;
pub mod report;
pub mod smaps;
pub mod start;
pub mod stats;
pub mod systems;
