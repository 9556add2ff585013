//! What there is to choose about a disk.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use vmfs_image::Cache;

/// How a disk is shown to its guest, and served.
#[derive(Debug, Clone)]
pub struct BlockOptions {
    /// Serial number; its first 20 bytes are told to the guest.
    pub serial: String,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// Number of queues, each served by a thread of its own: from 1 to [`MAX_QUEUES`]; others are taken as the nearer of
    /// the two.
    pub queues: u16,
    /// For how long at most a thread looks for more requests before it sleeps, if that pays. Not at all on a host with a
    /// single processor.
    pub poll: Duration,
    /// How the image was opened.
    pub cache: Cache,
    /// What becomes of a request that fails.
    pub on_error: OnError,
    /// How much the guest may ask for.
    pub limits: Limits,
    /// Who is told when requests begin to wait.
    pub events: Arc<dyn BlockEvents>,
    /// By what means data are moved.
    pub engine: Engine,
}

impl Default for BlockOptions {
    fn default() -> Self {
        Self {
            serial: String::new(),
            readonly: false,
            queues: 1,
            poll: Duration::from_micros(50),
            cache: Cache::default(),
            on_error: OnError::default(),
            limits: Limits::default(),
            events: Arc::new(Nobody),
            engine: Engine::default(),
        }
    }
}

/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 16;

/// What becomes of a request that fails.
///
/// A request that fails because the image may not grow any further, or its file system is full, waits in either case:
/// it can succeed later, and a guest that is told of an error may lose data for good. A flush that fails because data could
/// not be written is told in either case: those are lost, and it would succeed without them later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnError {
    /// The guest is told.
    #[default]
    Report,
    /// The request waits until it is tried again.
    Pause,
}

impl OnError {
    /// The name it has in `vm.toml`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Report => "report",
            Self::Pause => "pause",
        }
    }
}

/// By what means data are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Engine {
    /// The fastest that this host allows.
    #[default]
    Auto,
    /// Plain system calls, one request at a time.
    Plain,
}

/// How much the guest may ask for. Only requests that move data count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Requests a second, at least 1.
    pub iops: Option<u64>,
    /// Bytes a second, at least 1.
    pub bytes_per_second: Option<u64>,
    /// For how long an allowance that is not used is kept: so much can be asked for at once after a rest.
    pub burst: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { iops: None, bytes_per_second: None, burst: Duration::from_millis(100) }
    }
}

/// Who is told of what happens to a disk.
pub trait BlockEvents: Send + Sync + Debug {
    /// Requests begin to wait, because of `why`. Called once, on a thread of the disk, until they no longer wait.
    fn stopped(&self, why: &str);
}

/// Hears nothing.
#[derive(Debug)]
struct Nobody;

impl BlockEvents for Nobody {
    fn stopped(&self, _why: &str) {}
}
