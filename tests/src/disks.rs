//! Disks of test guests: made, written and read by the guest on demand, looked at from outside.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::guest::{DEADLINE, Guest, Setup, vmm_binary};

/// Bytes of the range that a serving guest writes and reads, unless its command line says otherwise.
pub const SPAN: u64 = 4 << 20;
/// What makes a guest serve that range of its first disk.
pub const SERVE: &str = "test=blk-serve span=4M size=16K depth=4";

/// What a guest writes to the first `len` bytes of a disk when it is asked for the pattern of `seed`.
#[must_use]
pub fn pattern(seed: u64, len: u64) -> Vec<u8> {
    let mix = |value: u64| {
        let a = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let b = (a ^ a >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        b ^ b >> 31
    };
    (0..len / 8).flat_map(|index| mix(index.wrapping_add(mix(seed))).to_le_bytes()).collect()
}

/// Makes an image of `size` bytes at `path`, which holds zeroes.
///
/// # Panics
///
/// It cannot be made.
pub fn make(path: &Path, format: &str, size: u64) {
    match format {
        "flat" => File::create_new(path).unwrap().set_len(size).unwrap(),
        _ => drop(image(&["create", at(path), "--size", &format!("{}K", size >> 10), "--format", format])),
    }
}

/// `path` as an argument.
///
/// # Panics
///
/// It is not UTF-8.
#[must_use]
pub fn at(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs `vmm image` where no guest of the host is known, and gives what it prints.
///
/// # Panics
///
/// It fails.
pub fn image(args: &[&str]) -> String {
    let output = try_image(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// As [`image`], whatever comes of it.
///
/// # Panics
///
/// It cannot be run.
#[must_use]
pub fn try_image(args: &[&str]) -> Output {
    let mut command = Command::new(vmm_binary().unwrap());
    command.env("VMM_RUN_DIR", "/nonexistent").arg("image").args(args).output().unwrap()
}

/// What an image that nobody writes to reads as, its redo log left out.
///
/// # Panics
///
/// It cannot be read.
#[must_use]
pub fn contents(path: &Path) -> Vec<u8> {
    let copy = path.with_extension("copy");
    image(&["convert", at(path), at(&copy), "--format", "flat", "--force"]);
    let bytes = fs::read(&copy).unwrap();
    fs::remove_file(copy).unwrap();
    bytes
}

/// A guest that does with its disk what it is told.
#[derive(Debug)]
pub struct Serving(pub Guest);

impl Serving {
    /// Starts it; its command line is [`SERVE`] or alike.
    ///
    /// # Panics
    ///
    /// It does not start.
    #[must_use]
    pub fn start(setup: Setup) -> Self {
        let mut guest = setup.start().unwrap();
        guest.wait_event("ready").unwrap();
        Self(guest)
    }

    fn ask(&mut self, order: &str, answer: &str) -> Value {
        self.tell(order);
        self.0.wait_event(answer).unwrap()
    }

    /// Tells it what to do, without waiting for the answer.
    ///
    /// # Panics
    ///
    /// The monitor does not take it.
    pub fn tell(&mut self, order: &str) {
        self.0.send(format!("{order}\n").as_bytes()).unwrap();
    }

    /// Has it write the pattern of `seed`, and flush.
    ///
    /// # Panics
    ///
    /// The guest is told of an error.
    pub fn write(&mut self, seed: u64) {
        let written = self.ask(&format!("write {seed}"), "written");
        assert_eq!(written["errors"], 0, "{written}");
    }

    /// Has it write, and gives how many requests failed.
    ///
    /// # Panics
    ///
    /// It does not answer.
    pub fn try_write(&mut self, seed: u64) -> u64 {
        self.ask(&format!("write {seed}"), "written")["errors"].as_u64().unwrap()
    }

    /// Has it read, and be sure that it reads the pattern of `seed`, or zeroes.
    ///
    /// # Panics
    ///
    /// It reads something else.
    pub fn reads(&mut self, seed: Option<u64>) {
        let order = seed.map_or("zeroes".to_owned(), |seed| format!("read {seed}"));
        let read = self.ask(&order, "read");
        assert_eq!((&read["errors"], &read["mismatches"]), (&0.into(), &0.into()), "{order}: {read}");
    }

    /// How large the disk is for the guest, in bytes. Changes of the configuration so far are no news any more.
    ///
    /// # Panics
    ///
    /// It does not answer.
    pub fn size(&mut self) -> u64 {
        self.ask("size", "size")["sectors"].as_u64().unwrap() * 512
    }

    /// How large it is after the change of the configuration that is to come.
    ///
    /// # Panics
    ///
    /// The guest is not told of a change.
    pub fn size_after_change(&mut self) -> u64 {
        self.ask("changed", "changed")["sectors"].as_u64().unwrap() * 512
    }

    /// Has it power off, and gives the monitor's exit status.
    ///
    /// # Panics
    ///
    /// It does not end.
    pub fn end(&mut self) -> i32 {
        self.0.send(b"end\n").unwrap();
        self.0.exit_status().unwrap().code().unwrap()
    }

    /// What `vmm show` tells of its disk `index`.
    ///
    /// # Panics
    ///
    /// The monitor does not answer.
    #[must_use]
    pub fn disk(&self, index: usize) -> Value {
        let status: Value = serde_json::from_str(&self.ok(&["show", self.0.name(), "--json"])).unwrap();
        status["disks"][index].clone()
    }

    /// Runs another command of the monitor and gives what it prints.
    ///
    /// # Panics
    ///
    /// It fails.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.0.vmm(args).unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same for one that has to fail with status 1: what it says.
    ///
    /// # Panics
    ///
    /// It succeeds.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.0.vmm(args).unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {said}");
        said
    }

    /// Asks its control socket; gives status and body.
    ///
    /// # Panics
    ///
    /// There is no answer.
    #[must_use]
    pub fn api(&self, method: &str, path: &str, body: &str) -> (u16, Value) {
        request(&self.socket(), method, path, body)
    }

    /// Its control socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.0.run_dir().join(self.0.name()).join("api.sock")
    }

    /// As [`api`](Self::api), for what has to be refused with `status`: what the error says.
    ///
    /// # Panics
    ///
    /// Another answer comes.
    pub fn refused(&self, method: &str, path: &str, body: &str, status: u16) -> String {
        let (given, answer) = self.api(method, path, body);
        assert_eq!(given, status, "{method} {path} {body}: {answer}");
        answer["error"].as_str().unwrap().to_owned()
    }

    /// Begins a job; gives its number.
    ///
    /// # Panics
    ///
    /// It does not begin.
    #[must_use]
    pub fn begin(&self, disk: usize, what: &str) -> u64 {
        let (status, job) = self.api("POST", &format!("disks/{disk}/{what}"), "");
        assert_eq!(status, 202, "{job}");
        assert_eq!(
            (&job["what"], &job["disk"], &job["state"]),
            (&what.into(), &disk.into(), &"running".into())
        );
        job["id"].as_u64().unwrap()
    }

    /// The job `id`.
    ///
    /// # Panics
    ///
    /// There is none.
    #[must_use]
    pub fn job(&self, id: u64) -> Value {
        let (status, job) = self.api("GET", &format!("jobs/{id}"), "");
        assert_eq!(status, 200, "{job}");
        job
    }

    /// Waits until the job `id` is over, and gives it.
    ///
    /// # Panics
    ///
    /// That takes too long.
    #[must_use]
    pub fn wait_job(&self, id: u64) -> Value {
        let until = Instant::now() + DEADLINE;
        loop {
            let job = self.job(id);
            if job["state"] != "running" {
                return job;
            }
            assert!(Instant::now() < until, "{job}\n{}", self.0.transcript());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Asks the control socket of a guest; gives status and body. Status 0 is a monitor that has ended.
///
/// # Panics
///
/// The answer is none of HTTP.
#[must_use]
pub fn request(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
    loop {
        match request_once(socket, method, path, body) {
            // So many clients come and go that those before have not gone yet.
            (503, _) => std::thread::sleep(Duration::from_millis(5)),
            answer => return answer,
        }
    }
}

fn request_once(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
    let Ok(mut stream) = UnixStream::connect(socket) else { return (0, Value::Null) };
    let len = body.len();
    let request = format!(
        "{method} /v1/{path} HTTP/1.1\r\nHost: vmm\r\nConnection: close\r\nContent-Length: {len}\r\n\r\n{body}"
    );
    let mut answer = String::new();
    let asked = stream.write_all(request.as_bytes()).and_then(|()| stream.read_to_string(&mut answer));
    if asked.is_err() || answer.is_empty() {
        return (0, Value::Null);
    }
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or_default())
}

/// A configuration of one disk at `disk.img`, with further keys.
#[must_use]
pub fn disk(keys: &str) -> String {
    format!("[[disk]]\npath = \"disk.img\"\n{keys}\n")
}

/// A guest with the command line `cmdline` that has `disk.img` of `size` bytes as its disk; and the image.
///
/// # Panics
///
/// It cannot be made.
#[must_use]
pub fn with_disk(cmdline: &str, format: &str, size: u64, keys: &str) -> (Setup, PathBuf) {
    let setup = Setup::new(cmdline).unwrap().with(&disk(keys));
    let path = setup.dir().join("disk.img");
    make(&path, format, size);
    (setup, path)
}
