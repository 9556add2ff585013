//! Images in files, and what is done with them.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::OnceLock;

use vm_memory::VolatileSlice;
use vmfs_image::{Format, Image, OpenOptions};

/// A directory in memory that is this process's own. Backing files would be looked for in it.
pub fn directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let path = PathBuf::from(format!("/dev/shm/vmm-fuzz-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("/dev/shm can be written to");
        fs::write(path.join("base"), vec![0xba; 40_960]).expect("/dev/shm has space");
        path
    })
}

/// A file of this name with these bytes.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory().join(name);
    fs::write(&path, bytes).expect("/dev/shm has space");
    path
}

/// Opens bytes as an image in each way, and uses what opens.
pub fn open_and_use(name: &str, bytes: &[u8], format: Option<Format>) {
    let path = file(name, bytes);
    for writable in [false, true] {
        let options = OpenOptions { writable, format, ..OpenOptions::default() };
        match vmfs_image::open(&path, &options) {
            Ok(image) => use_it(image.as_ref(), writable),
            Err(error) => drop(error.to_string()),
        }
    }
}

/// Reads an image here and there, and writes to it if it is writable.
pub fn use_it(image: &dyn Image, writable: bool) {
    let size = image.size();
    assert!(size % 512 == 0 && size <= 1 << 50, "{size} is no size of a disk");
    let _ = (image.info(), image.identity(), image.block_size());
    let mut bytes = vec![0; 64 << 10];
    let places = [0, 512, 32 << 10, size / 2, size.saturating_sub(64 << 10), size.saturating_sub(512)];
    for (index, place) in places.into_iter().enumerate() {
        let offset = place / 512 * 512;
        let len = (size - offset.min(size)).min(if index % 2 == 0 { 4096 } else { 64 << 10 });
        let len = usize::try_from(len).expect("a small number");
        if len == 0 {
            continue;
        }
        let _ = read(image, offset, &mut bytes[..len]);
        let mut done = offset;
        for _ in 0..64 {
            match image.run(done, size - done) {
                Ok(run) => {
                    assert!(run.len >= 512 && run.len <= size - done, "{run:?} at {done:#x} of {size:#x}");
                    done += run.len;
                }
                Err(_) => break,
            }
            if done == size {
                break;
            }
        }
        if writable && index % 2 == 0 {
            let mut data = vec![0x57; len.min(1536)];
            // Places of a damaged image may overlap: that what was written reads so is not to be asked of it.
            let _ = image.write_at(offset, &[VolatileSlice::from(&mut data[..])]);
        }
    }
    if writable {
        let _ = image.flush();
        let _ = image.write_zeroes(0, size.min(8192), true);
        let _ = image.discard(0, size.min(1 << 20));
        let _ = image.flush();
    }
}

fn read(image: &dyn Image, offset: u64, into: &mut [u8]) -> io::Result<()> {
    image.read_at(offset, &[VolatileSlice::from(into)])
}
