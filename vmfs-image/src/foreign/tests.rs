//! Images that `qemu-img` makes are read, and those that we write are what it takes for sound.

mod crash;
mod hostile;
mod model;
mod on_top;
mod qemu;
mod refuse;

use std::cell::RefCell;

/// What is done to a file.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Sync,
}

thread_local! {
    static STEPS: RefCell<Option<Vec<Step>>> = const { RefCell::new(None) };
}

/// Is told each step of this thread.
pub(super) fn record(step: impl FnOnce() -> Step) {
    STEPS.with_borrow_mut(|steps| {
        if let Some(steps) = steps {
            steps.push(step());
        }
    });
}

/// Whether steps are kept from now on; gives those that were.
fn recording(on: bool) -> Vec<Step> {
    STEPS.with_borrow_mut(|steps| std::mem::replace(steps, on.then(Vec::new))).unwrap_or_default()
}
