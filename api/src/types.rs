//! What monitor and client tell each other.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer};

/// A guest as it is now. Readers ignore fields they do not know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The guest's name.
    pub name: String,
    /// What it is doing.
    pub state: State,
    /// Process id of its monitor.
    pub pid: u32,
    /// Version of its monitor.
    pub version: String,
    /// When the monitor started: seconds since 1970-01-01 00:00 UTC.
    pub started: u64,
    /// Number of its processors.
    pub cpus: u8,
    /// Its memory in bytes.
    pub memory: u64,
    /// The kernel it was booted from.
    #[serde(serialize_with = "lossy")]
    pub kernel: PathBuf,
    /// Path of the pseudo-terminal or file of its serial console, if it has one.
    pub serial: Option<String>,
    /// Its disks, in the order of its configuration.
    pub disks: Vec<DiskStatus>,
    /// Its network cards, in the order of its configuration.
    pub nets: Vec<NetStatus>,
}

/// One disk of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The file or block device behind it.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// Whether the guest can only read it.
    pub readonly: bool,
    /// Its size in bytes.
    pub bytes: u64,
}

/// One network card of a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetStatus {
    /// Name of the tap on the host.
    pub tap: String,
    /// The guest's address, as `52:54:00:12:34:56`.
    pub mac: String,
}

/// What a guest is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It is being built; no instruction has run.
    Starting,
    /// Its processors run.
    Running,
    /// Its processors are held.
    Paused,
    /// It is being taken down.
    Stopping,
}

impl State {
    /// The name it has in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
        }
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// What a monitor lets be done to its guest. The calls come from any number of threads at once, each with a stack of
/// [`STACK`](crate::server::STACK) bytes, and must come back without the help of the thread that stops the server,
/// because that one waits for them.
pub trait Control: Send + Sync + 'static {
    /// The guest as it is now.
    fn status(&self) -> Status;

    /// Holds the processors; they stand still when this returns.
    ///
    /// # Errors
    ///
    /// The guest is in no state to be paused.
    fn pause(&self) -> Result<(), Refused>;

    /// Lets held processors go on.
    ///
    /// # Errors
    ///
    /// The guest is in no state to go on.
    fn resume(&self) -> Result<(), Refused>;

    /// Presses the power button; what comes of it is up to the guest.
    ///
    /// # Errors
    ///
    /// The guest cannot notice it now.
    fn power_button(&self) -> Result<(), Refused>;

    /// Ends the guest at once, as pulling the plug does. Returns when that is under way, so that the one who asked
    /// can still be answered.
    ///
    /// # Errors
    ///
    /// It is ending already.
    fn stop(&self) -> Result<(), Refused>;
}

/// Why a monitor does not do what it was asked to: a sentence for the one who asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

/// The body of every answer that is an error.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ErrorBody<T> {
    pub error: T,
}

/// JSON knows text only: bytes of a path that are not UTF-8 become U+FFFD.
fn lossy<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}
