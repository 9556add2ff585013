//! Merging under a guest that runs. A [`Job`] does it in steps, so that whoever drives it can limit its pace, and stop it
//! between two of them by dropping it.
//!
//! A commit cannot write down what the guest is still writing to. So the image in use is frozen and a new overlay pushed on
//! top, which takes what the guest writes meanwhile:
//!
//! ```text
//!  base ◀─ A             the guest writes to A
//!  base ◀─ A ◀─ B        switch: A is frozen, the guest writes to B
//!  base     ◀─ B         A was written to base, and is gone
//! ```
//!
//! With a redo log, that is the end: B is the new log. With a snapshot that is deleted, B is committed in the same way, and
//! what comes then, until so little is left that it can be written while the guest waits.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::renamed::Renamed;
use super::{Lower, Merger, find_lower, invalid, note_lower};
use crate::image::{Error, Format, Image, RunKind};
use crate::open::OpenOptions;
use crate::overlay::{self, refuse_marked};
use crate::redo::{merging_path, new_path, redo_path};
use crate::snapshot::{self, Deletion, Prepared};
use crate::steps::{self, failed};
use crate::thin::Thin;

/// So little is written while the guest waits, in bytes.
const LAST: u64 = 4 << 20;
/// After so many rounds it waits for whatever is left: it writes faster than can be merged.
const ROUNDS: u32 = 12;

/// What a job does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// [`Job::step`] again.
    Step,
    /// [`Job::switch`], with the disk drained.
    Switch,
    /// Nothing: it is finished.
    Done,
}

/// Work on the image of a guest that runs.
pub trait Job: Send + Debug {
    /// Does a part, about `most` bytes of data.
    ///
    /// # Errors
    ///
    /// [`Error`]; the guest goes on with the image that it has. The same can be tried again, or the job be dropped.
    fn step(&mut self, most: u64) -> Result<Next, Error>;

    /// Gives the image that takes the place of the one in use. Only when [`step`](Self::step) has asked for it, and while
    /// nothing of the disk is in flight; the one before may not be used any more when it has returned.
    ///
    /// # Errors
    ///
    /// [`Error`]; the guest goes on with the image that it has.
    fn switch(&mut self) -> Result<Arc<dyn Image>, Error>;

    /// How many bytes of how many are done. Both may grow, since the guest goes on writing.
    fn progress(&self) -> (u64, u64);
}

fn thin(image: &Arc<dyn Image>) -> Result<&Thin, Error> {
    match image.as_thin() {
        Some(thin) => Ok(thin),
        None => invalid(image.path(), "is no thin image: it lies on nothing"),
    }
}

/// What a thin image is to be opened as, to take the place of `old`, which has everything on disk by then.
fn reopened(
    old: &Arc<dyn Image>,
    path: &Path,
    backing: Option<Arc<dyn Image>>,
) -> Result<Arc<dyn Image>, Error> {
    Ok(Arc::new(thin(old)?.successor(path, backing)?))
}

/// Copies into an image in use what it reads from others.
#[derive(Debug)]
pub struct Stream {
    image: Arc<dyn Image>,
    lower: Option<Lower>,
    merger: Merger,
    stage: Next,
}

impl Stream {
    /// Begins with `image`, which the guest writes to, for everything above `lower`.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an image without backing, or if `lower` is none.
    pub fn start(image: &Arc<dyn Image>, lower: Option<&Path>) -> Result<Self, Error> {
        thin(image)?;
        let lower = find_lower(&**image, lower)?;
        Ok(Self { image: Arc::clone(image), lower, merger: Merger::new(false), stage: Next::Step })
    }
}

impl Job for Stream {
    fn step(&mut self, most: u64) -> Result<Next, Error> {
        if self.stage == Next::Step {
            let lower = self.lower.as_ref().map(|lower| &*lower.image);
            if self.merger.pull(&*self.image, lower, most)? {
                note_lower(thin(&self.image)?, self.lower.as_ref())?;
                self.stage = Next::Switch;
            }
        }
        Ok(self.stage)
    }

    fn switch(&mut self) -> Result<Arc<dyn Image>, Error> {
        // It reads the same as before, but holds on to what it does not need any more.
        let backing = self.lower.as_ref().map(|lower| Arc::clone(&lower.image));
        let path = self.image.path().to_owned();
        let image = reopened(&self.image, &path, backing)?;
        self.image = Arc::clone(&image);
        self.stage = Next::Done;
        Ok(image)
    }

    fn progress(&self) -> (u64, u64) {
        (self.merger.at(), self.image.size())
    }
}

/// What a commit ends with.
#[derive(Debug)]
enum Goal {
    /// A redo log on the base: the guest goes on with a new, small one.
    Log,
    /// The base itself, which was a snapshot and becomes the head.
    Base(Deletion),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// A new overlay has to be pushed.
    Push,
    /// What was pushed upon is written down.
    Merge,
    /// The guest's image has to be exchanged for the last time.
    Last,
    Done,
}

/// Writes down to the image below what the one in use holds.
#[derive(Debug)]
pub struct ActiveCommit {
    path: PathBuf,
    options: OpenOptions,
    goal: Goal,
    base: Arc<dyn Image>,
    /// The path of the base as overlays note it.
    named: PathBuf,
    /// The name that what is frozen has, and how the overlay on it notes it.
    frozen: (PathBuf, PathBuf),
    /// Where a new overlay is made.
    new: PathBuf,
    head: Arc<dyn Image>,
    middle: Option<Arc<dyn Image>>,
    prepared: Option<Prepared>,
    merger: Merger,
    stage: Stage,
    rounds: u32,
    /// Something was between when it began, so that what the guest was writing to is still to come.
    resumed: bool,
    done: u64,
}

impl ActiveCommit {
    /// Begins with `image`, which the guest of the disk at `path` writes to; `options` are those that the disk was opened
    /// with. If it is a redo log, it is written to the disk's image, and the guest goes on with a new one. If it lies on a
    /// snapshot of its own, that is deleted.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for an image that is neither, or where more than this one lies on what it lies on;
    /// [`Error::Locked`] if somebody else reads that; other [`Error`]s. Then nothing is changed.
    pub fn start(path: &Path, image: &Arc<dyn Image>, options: &OpenOptions) -> Result<Self, Error> {
        let path = &steps::real(path)?;
        let top = thin(image)?;
        let Some(below) = image.backing() else {
            return invalid(path, "lies on no other image, to which it could be committed");
        };
        let is_log = overlay::is_at(&**image, &redo_path(path));
        let (frozen, new) = if is_log {
            let name = merging_path(path);
            let named = PathBuf::from(name.file_name().unwrap_or_default());
            ((name, named), new_path(path))
        } else {
            snapshot::steps_of(path)
        };
        // What is merged already lies between in memory only, where it could not be exchanged.
        let below = match below.backing() {
            Some(lower) if is_gone(&**below) => lower,
            _ => below,
        };
        // What a commit that was cut off has left between, or this very image.
        let middle = overlay::is_at(&**below, &frozen.0).then(|| Arc::clone(below));
        let base = middle.as_ref().map_or(Some(below), |middle| middle.backing());
        let Some(base) = base.map(Arc::clone) else {
            return invalid(path, "lies on no other image, to which it could be committed");
        };
        let file = if is_log { redo_path(path) } else { path.clone() };
        overlay::refuse_other(&file, &**image)?;
        // What was between and is merged, or a second name of this very image.
        if middle.is_none() && top.noted_backing().is_none_or(|noted| noted.path != frozen.1) {
            steps::remove(&frozen.0)?;
        }
        let goal = if is_log {
            refuse_marked(path, "were written to")?;
            overlay::refuse_other(path, &*base)?;
            None
        } else {
            Some(Deletion::of(path, &*base)?)
        };
        // Nobody else reads it from here on.
        base.set_writable(true)?;
        let begun = match &goal {
            None => Ok(PathBuf::from(path.file_name().unwrap_or_default())),
            Some(deletion) => deletion.begin(top, &*base),
        };
        let named = begun.inspect_err(|_| give_up(&*base))?;
        let stage = if middle.is_some() { Stage::Merge } else { Stage::Push };
        let goal = goal.map_or(Goal::Log, Goal::Base);
        let mut commit = Self {
            path: file,
            options: options.clone(),
            goal,
            base,
            named,
            frozen,
            new,
            head: Arc::clone(image),
            resumed: middle.is_some(),
            middle,
            prepared: None,
            merger: Merger::new(options.format == Some(Format::Flat)),
            stage,
            rounds: 0,
            done: 0,
        };
        if stage == Stage::Push {
            commit.prepare()?;
        }
        Ok(commit)
    }

    /// Gets ready to push an overlay upon the head.
    fn prepare(&mut self) -> Result<(), Error> {
        if self.prepared.is_none() {
            // Noted before it is frozen: nothing of it changes then.
            overlay::note(thin(&self.head)?, &*self.base, &self.named, true)?;
            let (head, frozen) = (Arc::clone(&self.head), self.frozen.clone());
            self.prepared = Some(Prepared::new(&self.path, head, frozen, self.new.clone(), &self.options)?);
        }
        Ok(())
    }

    /// What was frozen is in the base: the head lies on that.
    fn drop_middle(&mut self) -> Result<(), Error> {
        overlay::settle(&*self.base)?;
        let head = thin(&self.head)?;
        overlay::note(head, &*self.base, &self.named, true)?;
        steps::remove(&self.frozen.0)?;
        self.done += self.merger.at();
        self.merger = Merger::new(self.options.format == Some(Format::Flat));
        self.rounds += 1;
        if std::mem::take(&mut self.resumed) {
            self.stage = Stage::Push;
            return Ok(());
        }
        match self.goal {
            Goal::Log => {
                self.base.set_writable(false)?;
                overlay::note(head, &*self.base, &self.named, false)?;
                self.stage = Stage::Last;
            }
            Goal::Base(_) if self.rounds >= ROUNDS || is_little(head)? => self.stage = Stage::Last,
            Goal::Base(_) => {
                // Memory still has the middle one between, which reads the same.
                self.stage = Stage::Push;
            }
        }
        Ok(())
    }

    fn last(&mut self) -> Result<Arc<dyn Image>, Error> {
        match &self.goal {
            Goal::Log => {
                let path = self.head.path().to_owned();
                reopened(&self.head, &path, Some(Arc::clone(&self.base)))
            }
            Goal::Base(deletion) => {
                self.head.flush().map_err(failed(self.head.path(), "make stable what was written to"))?;
                while !self.merger.push(&*self.head, &*self.base, u64::MAX)? {}
                overlay::settle(&*self.base)?;
                deletion.end()?;
                // Its file is gone: nothing of it may be written again.
                if let Err(error) = self.head.set_writable(false) {
                    tracing::warn!("what the disk no longer uses stays open: {error}");
                }
                match self.base.as_thin() {
                    Some(_) => reopened(&self.base, &self.path, self.base.backing().map(Arc::clone)),
                    None => Ok(Arc::new(Renamed::new(&self.base, &self.path))),
                }
            }
        }
    }
}

/// Whether the file of an image has no name any more.
fn is_gone(image: &dyn Image) -> bool {
    use std::os::unix::fs::MetadataExt;
    image.files().first().is_some_and(|file| file.metadata().is_ok_and(|about| about.nlink() == 0))
}

fn give_up(base: &dyn Image) {
    if let Err(error) = base.set_writable(false) {
        tracing::warn!("{} stays locked: {error}", base.path().display());
    }
}

/// Whether an image holds little enough to be written down while the guest waits.
fn is_little(image: &Thin) -> Result<bool, Error> {
    let (mut at, mut data) = (0, 0);
    while at < image.size() {
        let run = image.run(at, image.size() - at).map_err(failed(image.path(), "read"))?;
        data += if run.kind == RunKind::Data { run.len } else { 0 };
        if data > LAST {
            return Ok(false);
        }
        at += run.len;
    }
    Ok(true)
}

impl Job for ActiveCommit {
    fn step(&mut self, most: u64) -> Result<Next, Error> {
        match self.stage {
            Stage::Push => self.prepare()?,
            Stage::Merge => {
                let middle = self.middle.clone();
                let all = match &middle {
                    Some(middle) => self.merger.push(&**middle, &*self.base, most)?,
                    None => true,
                };
                if all {
                    self.drop_middle()?;
                    self.middle = None;
                }
            }
            Stage::Last | Stage::Done => {}
        }
        Ok(match self.stage {
            Stage::Push | Stage::Last => Next::Switch,
            Stage::Merge => Next::Step,
            Stage::Done => Next::Done,
        })
    }

    fn switch(&mut self) -> Result<Arc<dyn Image>, Error> {
        match self.stage {
            Stage::Push => {
                self.prepare()?;
                let Some(prepared) = self.prepared.take() else {
                    return invalid(&self.path, "has nothing to switch to");
                };
                let new = prepared.switch()?;
                self.middle = Some(std::mem::replace(&mut self.head, Arc::clone(&new)));
                self.stage = Stage::Merge;
                Ok(new)
            }
            Stage::Last => {
                let new = self.last()?;
                self.head = Arc::clone(&new);
                self.stage = Stage::Done;
                Ok(new)
            }
            Stage::Merge | Stage::Done => invalid(&self.path, "has nothing to switch to"),
        }
    }

    fn progress(&self) -> (u64, u64) {
        let size = self.head.size();
        (self.done + self.merger.at(), self.done + size)
    }
}

impl Drop for ActiveCommit {
    fn drop(&mut self) {
        self.prepared = None;
        if self.stage == Stage::Push && self.rounds == 0 && matches!(self.goal, Goal::Log) {
            // Nothing of the log was written down: it may still be discarded.
            give_up(&*self.base);
            let noted =
                thin(&self.head).and_then(|head| overlay::note(head, &*self.base, &self.named, false));
            if let Err(error) = noted {
                tracing::warn!("{} has to be committed: {error}", self.head.path().display());
            }
        }
        // The guest goes on reading it. Once it is the guest's own image, it stays what it is.
        let is_guests = self.stage == Stage::Done && matches!(self.goal, Goal::Base(_));
        if !is_guests && self.base.is_writable() {
            give_up(&*self.base);
        }
    }
}
