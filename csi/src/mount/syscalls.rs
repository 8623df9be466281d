//! `mount_setattr(2)`, which rustix does not wrap, and `unshare(2)`.
#![allow(unsafe_code, reason = "a raw system call")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Makes a detached mount read-only, without set-user-id and device files, and
/// private: a clone otherwise stays a peer of the mount that it was cloned from,
/// and what is mounted in the store would appear in pods.
///
/// <https://man7.org/linux/man-pages/man2/mount_setattr.2.html>
pub(super) fn seal(mount: BorrowedFd<'_>, noexec: bool) -> io::Result<()> {
    let noexec = if noexec { libc::MOUNT_ATTR_NOEXEC } else { 0 };
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | noexec,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the descriptor is open for the length of the call; the path is a
    // NUL-terminated constant; `attributes` is a struct of the size that is passed,
    // which the kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Gives the calling thread a root and a working folder of its own, without which the kernel
/// lets no thread enter another mount namespace.
pub(super) fn leave_shared_paths() -> rustix::io::Result<()> {
    // SAFETY: descriptors stay shared; nothing in this crate relies on threads having one
    // working folder.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }
}
