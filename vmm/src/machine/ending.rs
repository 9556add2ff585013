//! How a guest's run ends: the first reason counts, and the main thread hears of it.

use std::io;
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vcpu::diagnosis::Diagnosis;

/// Why a guest runs no more.
#[derive(Debug)]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// It was stopped from outside: by a command or a signal.
    Stopped,
    /// A vCPU could not go on.
    Crashed(Box<Diagnosis>),
}

/// Where the threads of a machine report the end.
#[derive(Debug)]
pub struct Ending {
    reported: Mutex<Reported>,
    event: EventFd,
}

#[derive(Debug)]
enum Reported {
    Nothing,
    Outcome(Outcome),
    /// The outcome was taken.
    Taken,
}

impl Ending {
    /// Nothing has ended yet.
    ///
    /// # Errors
    ///
    /// No event descriptor is to be had.
    pub fn new() -> io::Result<Self> {
        Ok(Self { reported: Mutex::new(Reported::Nothing), event: EventFd::new(EFD_NONBLOCK)? })
    }

    /// Readable once there is an outcome.
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// The guest is at its end because of `outcome`, unless it was already.
    pub fn report(&self, outcome: Outcome) {
        let mut reported = self.lock();
        if matches!(*reported, Reported::Nothing) {
            *reported = Reported::Outcome(outcome);
        }
        drop(reported);
        // The counter of an eventfd overflows after 2^64 - 2 reports; no other write can fail.
        self.event.write(1).unwrap_or_default();
    }

    /// Whether there is an outcome, or was one.
    #[must_use]
    pub fn is_reported(&self) -> bool {
        !matches!(*self.lock(), Reported::Nothing)
    }

    /// Takes the outcome.
    #[must_use]
    pub fn take(&self) -> Option<Outcome> {
        let mut reported = self.lock();
        if matches!(*reported, Reported::Nothing) {
            return None;
        }
        match std::mem::replace(&mut *reported, Reported::Taken) {
            Reported::Outcome(outcome) => Some(outcome),
            Reported::Nothing | Reported::Taken => None,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Reported> {
        self.reported.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_of_two_reports_is_the_outcome() {
        let ending = Ending::new().unwrap();
        assert!(!ending.is_reported() && ending.event().read().is_err());
        ending.report(Outcome::Reset);
        ending.report(Outcome::PowerOff);
        assert!(ending.is_reported());
        assert_eq!(ending.event().read().unwrap(), 2);
        assert!(matches!(ending.take(), Some(Outcome::Reset)));
        ending.report(Outcome::PowerOff);
        assert!(ending.is_reported() && ending.take().is_none());
    }
}
