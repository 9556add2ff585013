//! What is measured.

use crate::systems::Format;

/// What one kind of load asks of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Its name in reports.
    pub name: &'static str,
    /// Name of the processor time that each of its requests costs.
    pub cpu_name: &'static str,
    /// Whether it writes.
    pub writes: bool,
    /// Whether places are random.
    pub random: bool,
    /// Bytes a request.
    pub size: u32,
    /// Requests at a time.
    pub depth: u16,
    /// Whether each write is followed by a flush, which is waited for.
    pub flush: bool,
    /// What of the image is in the host's page cache at first.
    pub cache: Cache,
}

/// How the page cache of the host holds an image. It makes a difference: a file system may handle a page of a large piece
/// at the price of all of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cache {
    /// All of it, in pieces of so many bytes: as requests of that size have left it.
    Pieces(u32),
    /// All of it, in the large pieces that the kernel makes when a file is read from its start to its end.
    ReadAhead,
    /// Nothing, and the page cache is passed by.
    Nothing,
}

const BASE: Case = Case {
    name: "",
    cpu_name: "",
    writes: false,
    random: true,
    size: 4096,
    depth: 1,
    flush: false,
    cache: Cache::Pieces(4096),
};

/// All cases in the order of reports.
pub const ALL: [Case; 10] = [
    Case { name: "rand-read-4k-d1", cpu_name: "rand-read-4k-d1-cpu", ..BASE },
    Case { name: "rand-read-4k-d32", cpu_name: "rand-read-4k-d32-cpu", depth: 32, ..BASE },
    Case { name: "rand-write-4k-d1", cpu_name: "rand-write-4k-d1-cpu", writes: true, ..BASE },
    Case { name: "rand-write-4k-d32", cpu_name: "rand-write-4k-d32-cpu", writes: true, depth: 32, ..BASE },
    Case { name: "seq-read-128k", cpu_name: "seq-read-128k-cpu", ..SEQUENTIAL },
    Case { name: "seq-write-128k", cpu_name: "seq-write-128k-cpu", writes: true, ..SEQUENTIAL },
    Case { name: "write-flush-4k", cpu_name: "write-flush-4k-cpu", writes: true, flush: true, ..BASE },
    Case {
        name: "rand-write-4k-d32-large",
        cpu_name: "rand-write-4k-d32-large-cpu",
        writes: true,
        depth: 32,
        cache: Cache::ReadAhead,
        ..BASE
    },
    Case {
        name: "rand-read-4k-d32-direct",
        cpu_name: "rand-read-4k-d32-direct-cpu",
        depth: 32,
        cache: Cache::Nothing,
        ..BASE
    },
    Case {
        name: "rand-write-4k-d32-direct",
        cpu_name: "rand-write-4k-d32-direct-cpu",
        writes: true,
        depth: 32,
        cache: Cache::Nothing,
        ..BASE
    },
];

const SEQUENTIAL: Case =
    Case { random: false, size: 128 << 10, depth: 8, cache: Cache::Pieces(128 << 10), ..BASE };

/// What was in the image before a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// All of the disk has been written.
    Allocated,
    /// Nothing has been written.
    Fresh,
    /// Nothing has been written to it, but all of its backing file.
    Backed,
}

/// An image as the guest finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Image {
    /// Its kind.
    pub format: Format,
    /// What it holds.
    pub state: State,
}

impl Image {
    /// Whether `case` says something about such an image: an empty one is not read, and the state of the page cache
    /// makes a difference only to what is in it.
    #[must_use]
    pub fn suits(self, case: &Case) -> bool {
        match self.state {
            State::Allocated => true,
            State::Fresh => case.writes && matches!(case.cache, Cache::Pieces(_)),
            State::Backed => matches!(case.cache, Cache::Pieces(_)),
        }
    }
}

impl Case {
    /// Whether the page cache is passed by.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.cache == Cache::Nothing
    }

    /// Unit of its figures.
    #[must_use]
    pub fn unit(&self) -> &'static str {
        if self.random { "IOPS" } else { "MB/s" }
    }

    /// `iops` requests a second in [`unit`](Self::unit)s.
    #[must_use]
    pub fn figure(&self, iops: f64) -> f64 {
        if self.random { iops } else { iops * f64::from(self.size) / 1e6 }
    }

    /// Orders for the test guest: to do this for `seconds`, on a disk of `disk_size` bytes. Where space is yet to be
    /// found, each place is written once.
    #[must_use]
    pub fn cmdline(&self, state: State, seconds: u32, disk_size: u64) -> String {
        let test = if self.writes { "blk-write" } else { "blk-read" };
        let once = self.writes && state != State::Allocated;
        let mode = match (self.random, once) {
            (true, true) => "once",
            (true, false) => "random",
            (false, _) => "sequential",
        };
        let mut text = format!(
            "test={test} mode={mode} size={} depth={} seconds={seconds} then=idle",
            self.size, self.depth
        );
        if once {
            text += &format!(" count={}", disk_size / u64::from(self.size));
        }
        if self.flush {
            text += " flush-every=1";
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_and_those_of_the_times_follow() {
        for (at, case) in ALL.iter().enumerate() {
            assert_eq!(case.cpu_name, format!("{}-cpu", case.name));
            assert!(ALL[..at].iter().all(|other| other.name != case.name));
        }
    }

    #[test]
    fn orders_say_what_the_case_does() {
        let case = |name| ALL.iter().find(|case| case.name == name).unwrap();
        let flush = case("write-flush-4k").cmdline(State::Allocated, 2, 1 << 20);
        assert_eq!(flush, "test=blk-write mode=random size=4096 depth=1 seconds=2 then=idle flush-every=1");
        let fresh = case("rand-write-4k-d32").cmdline(State::Fresh, 1, 1 << 20);
        assert_eq!(fresh, "test=blk-write mode=once size=4096 depth=32 seconds=1 then=idle count=256");
        let read = case("seq-read-128k").cmdline(State::Backed, 1, 1 << 20);
        assert_eq!(read, "test=blk-read mode=sequential size=131072 depth=8 seconds=1 then=idle");
    }

    #[test]
    fn throughput_is_counted_in_megabytes() {
        assert!((ALL[0].figure(1000.0) - 1000.0).abs() < 1e-9);
        assert!((ALL[4].figure(1000.0) - 131.072).abs() < 1e-9);
    }

    #[test]
    fn empty_images_are_only_written() {
        let fresh = Image { format: Format::Qcow2, state: State::Fresh };
        let suited: Vec<_> = ALL.iter().filter(|case| fresh.suits(case)).map(|case| case.name).collect();
        assert_eq!(suited, ["rand-write-4k-d1", "rand-write-4k-d32", "seq-write-128k", "write-flush-4k"]);
    }
}
