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
    /// Everything else. What a monitor does not tell is empty.
    #[serde(flatten)]
    pub more: DiskDetails,
}

/// What there is to say of a disk beside its size.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskDetails {
    /// Serial number that the guest sees.
    pub serial: String,
    /// Format of the file: `flat`, `thin`, `qcow2`, `vmdk`.
    pub format: String,
    /// What becomes of what the guest writes: `persistent`, `nonpersistent`, `undoable`, `append`.
    pub mode: String,
    /// The redo log that takes what the guest writes, if there is one and it has a name.
    #[serde(serialize_with = "lossy_option")]
    pub redo: Option<PathBuf>,
    /// The images below the one at `path`, from the next to the last.
    #[serde(serialize_with = "lossy_list")]
    pub backing: Vec<PathBuf>,
    /// What the image that is written to takes of its file system, in bytes.
    pub allocated: Option<u64>,
    /// The most that it may take, in bytes.
    pub max_size: Option<u64>,
    /// Number of queues.
    pub queues: u16,
    /// What moves the data: `io_uring` or `plain`.
    pub engine: String,
    /// `writeback`, `none`, `unsafe`.
    pub cache: String,
    /// `report`, `pause`.
    pub on_error: String,
    /// What it may do at most.
    pub limits: DiskLimits,
    /// What it has done.
    pub counters: Counters,
    /// Why its requests wait for `retry`, if they do.
    pub waiting: Option<String>,
    /// What becomes of the redo log when the guest powers off, where there is a choice.
    pub at_power_off: Option<AtPowerOff>,
}

/// The most that a disk does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DiskLimits {
    /// Requests a second, at least 1; none: as many as can be.
    pub iops: Option<u64>,
    /// Bytes a second, at least 4096; none: as many as can be.
    pub bandwidth: Option<u64>,
    /// How much of an unused allowance is kept for later, as milliseconds of the two limits, 1 to 60000; none: 100.
    pub burst: Option<u64>,
}

/// [`DiskLimits`] as they are asked for: a word that is not understood may be one that was to limit something.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct WantedLimits {
    iops: Option<u64>,
    bandwidth: Option<u64>,
    burst: Option<u64>,
}

impl From<WantedLimits> for DiskLimits {
    fn from(wanted: WantedLimits) -> Self {
        let WantedLimits { iops, bandwidth, burst } = wanted;
        Self { iops, bandwidth, burst }
    }
}

/// What a disk has done since its guest was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counters {
    /// Requests to read.
    pub reads: u64,
    /// Requests to write.
    pub writes: u64,
    /// Requests to flush.
    pub flushes: u64,
    /// Requests to discard or to write zeroes.
    pub discards: u64,
    /// Bytes read.
    pub bytes_read: u64,
    /// Bytes written.
    pub bytes_written: u64,
    /// Requests that failed.
    pub errors: u64,
}

/// What becomes of a redo log when its guest powers off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AtPowerOff {
    /// Whoever sits at the monitor's terminal is asked; without a terminal it is kept.
    Ask,
    /// It is written into the image.
    Commit,
    /// It is thrown away.
    Discard,
    /// It stays, and the guest finds it again.
    Keep,
}

impl AtPowerOff {
    /// The name it has in JSON, in `vm.toml` and on the command line.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ask => "ask",
            Self::Commit => "commit",
            Self::Discard => "discard",
            Self::Keep => "keep",
        }
    }
}

impl std::fmt::Display for AtPowerOff {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for AtPowerOff {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        [Self::Ask, Self::Commit, Self::Discard, Self::Keep]
            .into_iter()
            .find(|choice| choice.as_str() == text)
            .ok_or_else(|| "has to be one of \"ask\", \"commit\", \"discard\", \"keep\"".to_owned())
    }
}

/// What can be done with a disk of a running guest. The body of the request is the variant's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DiskOrder {
    /// Freezes the image as it is under a name; the guest goes on in a new file on top.
    Snapshot(Snapshot),
    /// Writes the image on top into the one below, and lets the guest go on there. A job.
    Commit,
    /// Copies what is below into the image on top, which then needs nothing below. A job.
    Stream,
    /// Makes the disk larger.
    Resize(Resize),
    /// Says how much the image that is written to may take, and tries again what waits.
    MaxSize(MaxSize),
    /// Puts another image behind the disk.
    Medium(Medium),
    /// Tries again what waits since an error.
    Retry,
    /// Replaces the limits; what is left out is unlimited.
    Limits(DiskLimits),
    /// Says what becomes of the redo log at power-off.
    AtPowerOff(PowerOffChoice),
}

/// Content of [`DiskOrder::Snapshot`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Name of the snapshot.
    pub name: String,
    /// What is said of it in the list; up to 4096 bytes are kept.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
}

/// Content of [`DiskOrder::Resize`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Resize {
    /// The new size in bytes: a multiple of 512, more than the old one.
    pub bytes: u64,
}

/// Content of [`DiskOrder::MaxSize`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaxSize {
    /// The most that it may take of its file system in bytes; null: as much as there is.
    pub bytes: Option<u64>,
}

/// Content of [`DiskOrder::Medium`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Medium {
    /// The new image: an absolute path.
    pub path: PathBuf,
    /// Its format; none: as its content says.
    #[serde(default)]
    pub format: Option<String>,
}

/// Content of [`DiskOrder::AtPowerOff`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PowerOffChoice {
    /// What to do.
    pub action: AtPowerOff,
}

/// Work of some length that goes on while the guest runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Its number, from 1 on; a monitor never uses one twice.
    pub id: u64,
    /// What is done: `commit`, `stream`.
    pub what: String,
    /// Index of the disk that it is done with.
    pub disk: usize,
    /// How it stands.
    pub state: JobState,
    /// Bytes done.
    pub done: u64,
    /// Bytes to be done; it may grow while the guest writes.
    pub total: u64,
    /// Why it failed.
    #[serde(default)]
    pub error: Option<String>,
}

/// How a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// It goes on.
    Running,
    /// It is done, and in effect.
    Done,
    /// It was given up; what it should have changed is as it was.
    Failed,
    /// It was cancelled; what it should have changed is as it was.
    Cancelled,
}

impl JobState {
    /// The name it has in JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl std::fmt::Display for JobState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
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

    /// How many disks it has. This never changes.
    fn disks(&self) -> usize;

    /// Does `order` with the disk `index`, which is less than [`disks`](Self::disks). What takes long goes on in a job.
    ///
    /// # Errors
    ///
    /// It cannot be done, or not now.
    fn disk(&self, index: usize, order: DiskOrder) -> Result<Option<Job>, Refused>;

    /// The jobs that go on, and the latest of those that are over, by number.
    fn jobs(&self) -> Vec<Job>;

    /// Begins to end the job `id`. One that is over stays as it is; one that cannot be given up any more goes on.
    fn cancel(&self, id: u64);
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

fn lossy_option<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_ref().map(|path| path.display().to_string()).serialize(serializer)
}

fn lossy_list<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.display().to_string()))
}
