//! A guest that is not there.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use api::server::Server;
use api::{Control, DiskStatus, NetStatus, Refused, State, Status};

/// Pauses and resumes as a guest does, and keeps in mind what else it was asked for.
#[derive(Debug)]
pub struct Guest {
    pub state: Mutex<State>,
    pub asked: Mutex<Vec<&'static str>>,
}

impl Guest {
    fn turn(&self, from: State, to: State) -> Result<(), Refused> {
        let mut state = self.state.lock().unwrap();
        if *state != from {
            return Err(Refused(format!("the guest is {state}, not {from}")));
        }
        *state = to;
        Ok(())
    }

    fn note(&self, what: &'static str) -> Result<(), Refused> {
        self.asked.lock().unwrap().push(what);
        Ok(())
    }
}

impl Control for Guest {
    fn status(&self) -> Status {
        Status {
            name: "web".into(),
            state: *self.state.lock().unwrap(),
            pid: std::process::id(),
            version: "0.1.0".into(),
            started: 1_760_000_000,
            cpus: 2,
            memory: 512 << 20,
            kernel: "/boot/vmlinuz".into(),
            serial: None,
            disks: vec![DiskStatus { path: "/srv/web.img".into(), readonly: true, bytes: 1 << 30 }],
            nets: vec![NetStatus { tap: "tap0".into(), mac: "52:54:00:12:34:56".into() }],
        }
    }
    fn pause(&self) -> Result<(), Refused> {
        self.turn(State::Running, State::Paused)
    }
    fn resume(&self) -> Result<(), Refused> {
        self.turn(State::Paused, State::Running)
    }
    fn power_button(&self) -> Result<(), Refused> {
        self.note("power-button")
    }
    fn stop(&self) -> Result<(), Refused> {
        self.note("stop")
    }
}

/// A path for a socket in `dir`.
pub fn socket(dir: &Path) -> PathBuf {
    dir.join("control")
}

/// Serves a new guest on [`socket`].
pub fn serve(dir: &Path) -> (Arc<Guest>, Server) {
    let guest = Arc::new(Guest { state: Mutex::new(State::Running), asked: Mutex::default() });
    let listener = UnixListener::bind(socket(dir)).unwrap();
    (guest.clone(), Server::start(listener, guest).unwrap())
}
