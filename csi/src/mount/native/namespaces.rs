//! The mount namespaces of this machine, and a thread's way through them.
//!
//! ```text
//! home ──► namespace ──► home ──► namespace ...       one thread, setns(2)
//!   └ /proc, kept open: the namespaces of pods have another one
//! ```

use std::collections::HashSet;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::thread::LinkNameSpaceType;

use super::super::mountinfo::{self, Entry};
use super::super::syscalls;
use super::NamespaceId;

/// More mount namespaces than this are not looked into: thousands of pods do not fit on a node.
const MAX_NAMESPACES: usize = 4096;

/// What the kernel calls its first process namespace: whoever lives there sees all processes.
/// <https://github.com/torvalds/linux/blob/v6.12/include/linux/proc_ns.h#L44>
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// A mount namespace that was found. Held open, so it stays what it is.
#[derive(Debug)]
pub(super) struct Namespace {
    pub(super) id: NamespaceId,
    file: File,
    /// A process that was in it when it was found; `None` for the caller's own.
    process: Option<u32>,
}

impl Namespace {
    /// The mounts that a process in it sees, without entering.
    pub(super) fn mounts_from_outside(&self) -> io::Result<Vec<Entry>> {
        let process =
            self.process.map_or_else(|| "thread-self".to_owned(), |process| process.to_string());
        Ok(mountinfo::parse(&fs::read(format!("/proc/{process}/mountinfo"))?))
    }
}

/// What was found.
#[derive(Debug)]
pub(super) struct Found {
    /// The caller's own first, then in the order of the oldest process.
    pub(super) namespaces: Vec<Namespace>,
    /// Processes whose namespace could not be told, and namespaces beyond the bound.
    pub(super) hidden: usize,
    /// Whether the processes of the whole machine are seen.
    pub(super) all_processes: bool,
}

/// A thread that goes into mount namespaces and comes back. It must end with this.
#[derive(Debug)]
pub(super) struct Walker {
    proc: OwnedFd,
    descriptors: OwnedFd,
    home: File,
}

impl Walker {
    /// Makes the calling thread one. Its root and working folder are its own from here on.
    pub(super) fn new() -> io::Result<Self> {
        syscalls::leave_shared_paths()?;
        let folder = |path: &str| {
            rustix::fs::open(
                path,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
        };
        Ok(Self {
            proc: folder("/proc")?,
            descriptors: folder("/proc/thread-self/fd")?,
            home: File::open("/proc/thread-self/ns/mnt")?,
        })
    }

    /// Finds the namespaces of all processes that are seen. To be called at home.
    pub(super) fn find(&self) -> io::Result<Found> {
        let home = NamespaceId(self.home.metadata()?.ino());
        let mut namespaces =
            vec![Namespace { id: home, file: self.home.try_clone()?, process: None }];
        let mut processes: Vec<u32> = fs::read_dir("/proc")?
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        processes.sort_unstable();
        let mut hidden = 0;
        let mut known = HashSet::from([home]);
        for process in processes {
            let namespace = fs::metadata(format!("/proc/{process}/ns/mnt")).and_then(|meta| {
                let id = NamespaceId(meta.ino());
                if known.contains(&id) {
                    return Ok(None);
                }
                let file = File::open(format!("/proc/{process}/ns/mnt"))?;
                // The process may have gone elsewhere between the two.
                let id = NamespaceId(file.metadata()?.ino());
                Ok(Some(Namespace { id, file, process: Some(process) }))
            });
            match namespace {
                Ok(Some(namespace)) if known.insert(namespace.id) => {
                    match namespaces.len() < MAX_NAMESPACES {
                        true => namespaces.push(namespace),
                        false => hidden += 1,
                    }
                }
                Ok(_) => {}
                // It has ended.
                Err(error) if gone(&error) => {}
                Err(_) => hidden += 1,
            }
        }
        Ok(Found { namespaces, hidden, all_processes: Processes::seen() != Processes::OfContainer })
    }

    /// Goes into `namespace`, to its root.
    pub(super) fn enter(&self, namespace: &Namespace) -> rustix::io::Result<()> {
        enter(&namespace.file)
    }

    /// Goes back.
    pub(super) fn go_home(&self) -> rustix::io::Result<()> {
        enter(&self.home)
    }

    /// The mounts of the namespace that the thread is in.
    pub(super) fn mounts(&self) -> io::Result<Vec<Entry>> {
        Ok(mountinfo::parse(&self.read(c"thread-self/mountinfo")?))
    }

    /// Which mount a descriptor was opened through.
    pub(super) fn mount_of(&self, file: BorrowedFd<'_>) -> io::Result<u64> {
        let path = format!("thread-self/fdinfo/{}\0", file.as_raw_fd());
        let path = CStr::from_bytes_with_nul(path.as_bytes()).map_err(io::Error::other)?;
        let text = String::from_utf8_lossy(&self.read(path)?).into_owned();
        let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        id.and_then(|id| id.trim().parse().ok())
            .ok_or_else(|| io::Error::other("the kernel does not tell a descriptor's mount"))
    }

    /// The path of a descriptor, for who is at home.
    pub(super) fn path_of(&self, file: BorrowedFd<'_>) -> io::Result<PathBuf> {
        fs::read_link(format!("/proc/thread-self/fd/{}", file.as_raw_fd()))
    }

    /// Detaches exactly the mount that `top` was opened through, and never one beneath it, which
    /// a path would reach when the mount has gone meanwhile. Asks no server of files anything.
    pub(super) fn detach(&self, top: BorrowedFd<'_>) -> rustix::io::Result<()> {
        // The name in the list of descriptors leads to the mount itself, wherever the thread is.
        rustix::process::fchdir(&self.descriptors)?;
        rustix::mount::unmount(top.as_raw_fd().to_string(), UnmountFlags::DETACH)
    }

    fn read(&self, path: &CStr) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(&self.proc, path, flags, Mode::empty())?);
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

fn enter(namespace: &File) -> rustix::io::Result<()> {
    rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))
}

fn gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
        || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// Which processes this one sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processes {
    /// All of the machine: outside containers, and in a pod with `hostPID`.
    OfMachine,
    /// Those of a node that is a container itself, as kind and k3d make them: in a pod with `hostPID`,
    /// whose first process lives among other mounts.
    OfNode,
    /// Only those of its own container.
    OfContainer,
}

impl Processes {
    /// Looks at `/proc`.
    pub fn seen() -> Self {
        if fs::read_link("/proc/thread-self/ns/pid")
            .is_ok_and(|it| it.as_os_str() == FIRST_PID_NAMESPACE)
        {
            return Self::OfMachine;
        }
        let namespace = |path| fs::metadata(path).map(|namespace| namespace.ino());
        match (namespace("/proc/1/ns/mnt"), namespace("/proc/thread-self/ns/mnt")) {
            (Ok(first), Ok(own)) if first != own => Self::OfNode,
            _ => Self::OfContainer,
        }
    }
}
