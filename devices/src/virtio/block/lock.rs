//! Locks on disk files: open-file-description locks on the whole file (fcntl(2), `F_OFD_SETLK`), shared for readers,
//! exclusive for the writer. The kernel drops them with the last descriptor, however the process ends.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// Takes the lock, or says who has it.
pub fn acquire(file: &File, exclusive: bool) -> io::Result<Result<(), String>> {
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let request = libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: libc::c_short::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: request is a valid flock structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const request) } == 0 {
        return Ok(Ok(()));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(Err(holder(file))),
        _ => Err(error),
    }
}

/// Looks through the descriptors of all processes for one that holds a lock on the file, as `/proc/PID/fdinfo/FD` shows
/// it (proc(5)). The kernel itself names no process for this kind of lock.
fn holder(file: &File) -> String {
    let unknown = || "another process".to_owned();
    let Ok(wanted) = file.metadata() else { return unknown() };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        let holds = descriptors
            .filter(|fd| {
                std::fs::metadata(fd.path())
                    .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()))
            })
            .filter_map(|fd| {
                std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().to_str()?)).ok()
            })
            .any(|info| info.lines().any(|line| line.starts_with("lock:")));
        if holds {
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            return format!("process {pid} ({})", name.trim());
        }
    }
    unknown()
}
