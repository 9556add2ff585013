//! Making a vCPU thread leave the guest, without ever losing the request.
//!
//! A kick is a signal. Its handler sets `immediate_exit` in the `kvm_run` page of the thread that it
//! interrupts, so that it does not matter whether the signal arrives in the guest (the kernel returns `EINTR`)
//! or a moment before `KVM_RUN` (which then returns at once). The request itself stands in memory before the
//! signal is sent, and the vCPU clears `immediate_exit` before it looks for requests: whichever way the two
//! race, the request is seen before the guest runs on. (Linux, `Documentation/virt/kvm/api.rst`, section 5,
//! `immediate_exit`.)

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering, compiler_fence};
use std::sync::{Arc, Once};

use kvm_ioctls::VcpuFd;

thread_local! {
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    IMMEDIATE_EXIT.with(|flag| {
        let flag = flag.get();
        if !flag.is_null() {
            // SAFETY: the pointer is set by `Guard::enter` to a byte of this thread's kvm_run mapping and
            // cleared, on this same thread, before the mapping goes.
            unsafe { (*flag).store(1, Ordering::SeqCst) };
        }
    });
}

/// Installs the handler, once for the process.
///
/// # Errors
///
/// That of `sigaction`.
pub fn install_handler() -> io::Result<()> {
    static ONCE: Once = Once::new();
    let mut result = Ok(());
    // Without SA_RESTART: a vCPU thread that is blocked in a write to a stuck terminal has to come out too.
    ONCE.call_once(|| {
        result = vmm_sys_util::signal::register_signal_handler(signal(), on_kick)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()));
    });
    result
}

/// While it lives, kicks of the current thread reach its vCPU.
#[derive(Debug)]
pub struct Guard {
    flag: *const AtomicU8,
}

impl Guard {
    /// Ties the current thread to `vcpu`.
    pub fn enter(vcpu: &mut VcpuFd) -> Self {
        let flag = AtomicU8::as_ptr(
            // SAFETY: immediate_exit is a byte that nothing else but the kernel looks at, and it is only
            // accessed atomically from here on.
            unsafe { AtomicU8::from_ptr(&raw mut vcpu.get_kvm_run().immediate_exit) },
        )
        .cast_const()
        .cast();
        IMMEDIATE_EXIT.with(|cell| cell.set(flag));
        Self { flag }
    }

    /// Forgets kicks that came before this call; what they asked for is to be looked up after it.
    pub fn rearm(&self) {
        // SAFETY: see `enter`; the guard does not outlive the vCPU whose page this is.
        unsafe { (*self.flag).store(0, Ordering::SeqCst) };
        compiler_fence(Ordering::SeqCst);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|cell| cell.set(ptr::null()));
    }
}

/// The thread to kick.
///
/// It is set by the thread itself when it starts and taken back before it ends, under a lock, so that a kick
/// never goes to a thread that is no more.
#[derive(Debug, Clone, Default)]
pub struct Target(Arc<std::sync::Mutex<Option<libc::pthread_t>>>);

impl Target {
    /// Makes the current thread the target.
    pub fn set_current(&self) {
        // SAFETY: pthread_self has no preconditions.
        self.set(Some(unsafe { libc::pthread_self() }));
    }

    /// There is no thread any more.
    pub fn clear(&self) {
        self.set(None);
    }

    fn set(&self, thread: Option<libc::pthread_t>) {
        *self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = thread;
    }

    /// Sends the signal, if there is a thread.
    pub fn kick(&self) {
        let thread = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(thread) = *thread {
            // SAFETY: the thread is alive, because it would have to take the lock to be forgotten before it ends.
            unsafe { libc::pthread_kill(thread, signal()) };
        }
    }
}
