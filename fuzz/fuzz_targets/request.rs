//! What comes over a control socket: requests and their bodies, one after the other. Two that differ only in what follows them are
//! answered alike.
#![no_main]

use api::{Control, DiskOrder, Job, JobState, Refused, State, Status};

/// A guest with two disks that does everything but what it is asked too late.
struct Guest;

impl Control for Guest {
    fn status(&self) -> Status {
        Status {
            name: "web".into(),
            state: State::Running,
            pid: 1,
            version: "0".into(),
            started: 0,
            cpus: 1,
            memory: 1,
            kernel: "k".into(),
            serial: None,
            disks: Vec::new(),
            nets: Vec::new(),
        }
    }
    fn pause(&self) -> Result<(), Refused> {
        Ok(())
    }
    fn resume(&self) -> Result<(), Refused> {
        Err(Refused("it is\r\nnot \"paused\"".to_owned()))
    }
    fn power_button(&self) -> Result<(), Refused> {
        Ok(())
    }
    fn stop(&self) -> Result<(), Refused> {
        Ok(())
    }
    fn disks(&self) -> usize {
        2
    }
    fn disk(&self, index: usize, order: DiskOrder) -> Result<Option<Job>, Refused> {
        assert!(index < 2);
        // Whatever was understood can be told.
        let told = format!("{order:?}");
        if told.len() % 2 == 0 { Err(Refused(told)) } else { Ok(self.jobs().pop()) }
    }
    fn jobs(&self) -> Vec<Job> {
        let state = JobState::Running;
        vec![Job { id: 7, what: "commit".into(), disk: 0, state, done: 1, total: 2, error: None }]
    }
    fn cancel(&self, id: u64) {
        assert_eq!(id, 7);
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let answers = api::fuzzing::answers(bytes, &Guest);
    let text = std::str::from_utf8(&answers).expect("answers are text");
    // Every line of every head is a line: nothing of a request gets into it.
    let mut rest = text;
    while !rest.is_empty() {
        let (head, after) = rest.split_once("\r\n\r\n").expect("a head ends");
        assert!(
            head.starts_with("HTTP/1.1 ") && !head.replace("\r\n", "").contains(['\r', '\n']),
            "{head:?}"
        );
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let length: usize = length.map_or(0, |length| length.parse().expect("a length is a number"));
        // What is answered to HEAD has a length, but no body.
        let body = if after.len() < length || after.starts_with("HTTP/1.1 ") { 0 } else { length };
        rest = &after[body..];
    }
    let mut longer = bytes.to_vec();
    longer.extend_from_slice(b"GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n");
    assert!(api::fuzzing::answers(&longer, &Guest).starts_with(&answers));
});
