//! A guest that is not there.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use api::server::Server;
use api::{
    Control, Counters, DiskDetails, DiskOrder, DiskStatus, Job, JobState, NetStatus, Refused, State, Status,
};

/// Pauses and resumes as a guest does, and keeps in mind what else it was asked for.
#[derive(Debug)]
pub struct Guest {
    pub state: Mutex<State>,
    pub asked: Mutex<Vec<&'static str>>,
    pub orders: Mutex<Vec<(usize, DiskOrder)>>,
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
            disks: vec![disk()],
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
    fn disks(&self) -> usize {
        1
    }
    fn disk(&self, index: usize, order: DiskOrder) -> Result<Option<Job>, Refused> {
        self.orders.lock().unwrap().push((index, order.clone()));
        match order {
            DiskOrder::Commit | DiskOrder::Stream => Ok(self.jobs().pop()),
            DiskOrder::Retry => Err(Refused("nothing of disk 0 waits".into())),
            _ => Ok(None),
        }
    }
    fn jobs(&self) -> Vec<Job> {
        let error = Some("no\u{1b}space".into());
        vec![Job { id: 3, what: "stream".into(), disk: 0, state: JobState::Failed, done: 5, total: 9, error }]
    }
    fn cancel(&self, id: u64) {
        assert_eq!(id, 3);
        self.note("cancel").unwrap();
    }
}

fn disk() -> DiskStatus {
    let more = DiskDetails {
        serial: "disk0".into(),
        format: "thin".into(),
        mode: "undoable".into(),
        redo: Some("/srv/web.img.redo".into()),
        backing: vec!["/srv/template.img".into()],
        allocated: Some(1 << 20),
        queues: 2,
        waiting: Some("the image is at its max_size".into()),
        counters: Counters { reads: 5, ..Counters::default() },
        ..DiskDetails::default()
    };
    DiskStatus { path: "/srv/web.img".into(), readonly: true, bytes: 1 << 30, more }
}

/// A path for a socket in `dir`.
pub fn socket(dir: &Path) -> PathBuf {
    dir.join("control")
}

/// Serves a new guest on [`socket`].
pub fn serve(dir: &Path) -> (Arc<Guest>, Server) {
    let guest = Arc::new(Guest {
        state: Mutex::new(State::Running),
        asked: Mutex::default(),
        orders: Mutex::default(),
    });
    let listener = UnixListener::bind(socket(dir)).unwrap();
    (guest.clone(), Server::start(listener, guest).unwrap())
}
