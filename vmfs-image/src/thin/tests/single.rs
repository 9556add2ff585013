//! What has its own test.

use std::fs::File;
use std::io;
use std::sync::Mutex;

use super::*;
use crate::image::Error;
use crate::thin::memory::Memory;
use crate::thin::storage::Storage;

#[test]
fn what_was_written_is_there_after_opening_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    let thin = make(&path, 1 << 30);
    write(&thin, 12345 * 512, &[7; 1024]);
    assert!(write_located(&thin, 5 * SUB, &[9; 8192], true));
    drop(thin);
    let thin = Thin::open(&path, &OpenOptions::default(), None).unwrap();
    assert_eq!(read(&thin, 12345 * 512, 1024), [7; 1024]);
    assert_eq!(read(&thin, 12345 * 512 - 512, 512), [0; 512]);
    assert_eq!(read(&thin, 5 * SUB, 8192), [9; 8192]);
}

/// Storage that fails on order, and is otherwise memory.
#[derive(Debug, Clone, Default)]
struct Failing {
    memory: Memory,
    /// What fails from now on: writes from this offset on, all of them below it, syncs.
    fails: Arc<Mutex<Fails>>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Fails {
    tree: bool,
    superblock: bool,
    sync: bool,
    length: bool,
}

impl Failing {
    fn new(create: &Create) -> Self {
        let mut bytes = create.encode().unwrap();
        bytes.resize(1 << create.cluster_bits, 0);
        Self { memory: Memory::new(&bytes), fails: Arc::default() }
    }

    fn set(&self, change: impl FnOnce(&mut Fails)) {
        change(&mut self.fails.lock().unwrap());
    }

    fn check(&self, fails: impl FnOnce(&Fails) -> bool) -> io::Result<()> {
        if fails(&self.fails.lock().unwrap()) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn open(&self) -> Result<Thin, Error> {
        Thin::open_on(Box::new(self.clone()), Path::new("memory"), true, None)
    }

    /// What a process finds that opens the image as it is now.
    fn after_crash(&self) -> Thin {
        let copy = Memory::new(&self.memory.to_vec());
        Thin::open_on(Box::new(copy), Path::new("memory"), true, None).unwrap()
    }
}

impl Storage for Failing {
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        self.memory.read_at(into, offset)
    }

    fn write_at(&self, from: &[u8], offset: u64) -> io::Result<()> {
        self.check(|fails| if offset < CLUSTER { fails.superblock } else { fails.tree })?;
        self.memory.write_at(from, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.check(|fails| fails.sync)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.memory.punch(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check(|fails| fails.length)?;
        self.memory.set_len(len)
    }

    fn len(&self) -> io::Result<u64> {
        self.memory.len()
    }

    fn file(&self) -> Option<&Arc<File>> {
        None
    }
}

#[test]
fn commit_that_fails_at_any_step_leaves_the_old_state_and_succeeds_later() {
    let steps: [fn(&mut Fails); 3] = [|f| f.tree = true, |f| f.superblock = true, |f| f.sync = true];
    for fail in steps {
        let storage = Failing::new(&Create::new(1 << 30));
        let thin = storage.open().unwrap();
        write(&thin, 0, &[1; 8192]);
        thin.flush().unwrap();
        // Space below that the failing commits may not use: what is noted on disk stays readable.
        for round in 2..6 {
            write(&thin, u64::from(round) << 26, &[round; 4096]);
            thin.discard(u64::from(round - 1) << 26, 4096).unwrap();
            storage.set(fail);
            assert_eq!(thin.flush().unwrap_err().kind(), io::ErrorKind::StorageFull);
            assert_eq!(thin.flush_is_sync_of(), None);
            assert_eq!(read(&storage.after_crash(), 0, 8192), [1; 8192]);
            if round == 4 {
                storage.set(|fails| *fails = Fails::default());
                thin.flush().unwrap();
                assert_eq!(read(&storage.after_crash(), 4 << 26, 4096), [4; 4096]);
            }
            storage.set(|fails| *fails = Fails::default());
        }
        thin.flush().unwrap();
        let again = storage.after_crash();
        assert_eq!(read(&again, 5 << 26, 4096), [5; 4096]);
        assert_eq!(read(&again, 4 << 26, 4096), [0; 4096]);
        assert_eq!(again.state().mapped, 2);
    }
}

#[test]
fn write_that_fails_leaves_what_was_there() {
    let storage = Failing::new(&Create::new(1 << 30));
    let thin = storage.open().unwrap();
    storage.set(|fails| fails.length = true);
    assert!(!write_located(&thin, 0, &[1; 4096], true));
    assert_eq!(try_write(&thin, 0, &[1; 4096]).unwrap_err().kind(), io::ErrorKind::StorageFull);
    storage.set(|fails| *fails = Fails { tree: true, ..Fails::default() });
    assert_eq!(try_write(&thin, 0, &[1; 4096]).unwrap_err().kind(), io::ErrorKind::StorageFull);
    assert_eq!(read(&thin, 0, 4096), [0; 4096]);
    storage.set(|fails| *fails = Fails::default());
    write(&thin, 0, &[1; 4096]);
    assert_eq!(read(&thin, 0, 8192), [[1; 4096], [0; 4096]].concat());
}
