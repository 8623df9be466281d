//! Closing the FUSE device when another program is run.
#![allow(unsafe_code, reason = "a raw system call on a descriptor that another crate owns")]

use std::io;
use std::path::Path;

/// Marks this process's descriptors of `/dev/fuse` close-on-exec.
///
/// `fuse3` receives them without the mark. A program started later would inherit them,
/// and the connection would outlive this process's death: its readers would wait for ever.
///
/// # Errors
///
/// When `/proc` does not tell which descriptors are open.
pub(super) fn close_devices_on_exec() -> io::Result<()> {
    for entry in std::fs::read_dir("/proc/thread-self/fd")? {
        let entry = entry?;
        let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        let target = std::fs::read_link(entry.path());
        if let Some(number) = number
            && target.is_ok_and(|target| target == Path::new("/dev/fuse"))
        {
            // SAFETY: no memory is passed. Should the number mean another file by now, it
            // gets the mark that every file of this program has anyway.
            unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    Ok(())
}
