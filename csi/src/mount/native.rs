//! Turning native, live: running pods are moved from FUSE to kernel mounts of the tree.
//!
//! ```text
//!  before            beneath              after
//!                   ┌ fuse ┐
//! ┌ fuse ┐          ├──────┤                          in each mount namespace
//! ├──────┤   ──►    │ tree │    ──►    ┌ tree ┐       that shows the fuse mount
//! │ path │          ├──────┤           ├──────┤
//! └──────┘          │ path │           │ path │
//!                   └──────┘           └──────┘
//! ```
//!
//! The kernel mount is moved beneath the FUSE mount, which is detached then: there is no moment
//! in which a path leads nowhere. What is open or mapped stays on FUSE until it is closed.
//!
//! # What always holds
//!
//! - **Nothing is lost.** Whatever fails, FUSE stays on top and serves. A mount that something
//!   else is mounted on, or in, is left as it is.
//! - **By device number, never by path**: pods mount volumes wherever they like.
//! - **Call it again.** What is native stays so, a turn that was broken off is ended, and kernel
//!   mounts are never stacked. A container that was being made meanwhile is found by the next call.
//! - **Nothing is asked of the server of files**, so a dead one is replaced as a living one is.
//!
//! Needs Linux 6.5, `CAP_SYS_ADMIN`, and for the namespaces of pods that their processes are seen
//! (in Kubernetes: `hostPID`). Why this way: docs/decisions/live-native.md.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::mountinfo::{self, Entry};
use super::{Device, MountError, kernel, syscalls};
use crate::crash;

mod namespaces;
#[cfg(test)]
mod tests;

pub use namespaces::Processes;
use namespaces::{Namespace, Walker};

/// A mount namespace, by the number in `/proc/<pid>/ns/mnt`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NamespaceId(pub u64);

impl fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mnt:[{}]", self.0)
    }
}

/// What [`turn`] did.
#[derive(Debug, Default)]
pub struct Turned {
    /// The mounts that this call turned. Those that followed by propagation are not named.
    pub turned: Vec<TurnedMount>,
    /// The mounts that are still FUSE.
    pub remaining: Vec<Remaining>,
    /// How many mount namespaces were looked into.
    pub namespaces: usize,
    /// Namespaces, and processes of unknown namespace, that could not be looked into.
    pub hidden: usize,
    /// Only the processes of this container are seen: give it `hostPID`.
    pub blind: bool,
}

/// A mount that shows the tree now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TurnedMount {
    /// Where.
    pub namespace: NamespaceId,
    /// At which path there.
    pub target: PathBuf,
    /// How long it took, from the mount beneath to the end of the one on top.
    pub took: Duration,
}

/// A mount that could not be turned, and serves on.
#[derive(Debug)]
pub struct Remaining {
    /// Where.
    pub namespace: NamespaceId,
    /// At which path there.
    pub target: PathBuf,
    /// Why.
    pub why: Why,
}

/// Why a mount stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum Why {
    /// There is no way to mount beneath another mount here.
    #[error("this kernel cannot mount beneath another mount: that takes Linux 6.5")]
    Kernel,
    /// Taking it away would take the other mount along.
    #[error("something else is mounted on it or inside it")]
    Covered,
    /// The kernel said no.
    #[error(transparent)]
    Mount(#[from] MountError),
}

impl Device {
    /// The file system of the topmost mount at `target`; `None` where nothing is mounted. Looks
    /// at the list of mounts alone, so it answers for dead mounts, too.
    ///
    /// # Errors
    ///
    /// When the list of mounts cannot be read.
    pub fn mounted_at(target: &Path) -> Result<Option<Self>, MountError> {
        let mounts =
            mountinfo::read().map_err(|e| MountError::new("read the list of mounts", e))?;
        let real = kernel::real_path(target);
        Ok(mounts.iter().rfind(|mount| mount.point.target == real).map(|mount| mount.device))
    }

    /// Whether anything holds this file system: a mount in any namespace, seen or not, an open
    /// file, a mapping, a working folder. Its server may end when nothing does.
    ///
    /// The kernel lets the number go a moment after the session has ended, and gives it to another
    /// file system then: ask while the session that made it is known to run.
    ///
    /// # Errors
    ///
    /// Where the kernel's files about devices (`/sys`) are not to be seen.
    pub fn in_use(self) -> io::Result<bool> {
        const DEVICES: &str = "/sys/class/bdi";
        // Each FUSE file system has one, from its first mount to its last holder.
        match std::fs::symlink_metadata(format!("{DEVICES}/{self}")) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                std::fs::metadata(DEVICES).map(|_| false)
            }
            Err(e) => Err(e),
        }
    }
}

/// Turns every mount of the FUSE file system `device` into a kernel mount of `rootfs`, in all
/// mount namespaces that are seen. `rootfs` is what the file system's root shows; a mount of a
/// folder or a file inside becomes one of the same inside `rootfs`. `noexec` is kept.
///
/// Call again for as long as [`Device::in_use`]: containers that were being made meanwhile may
/// have the FUSE mount, and open files have theirs until they are closed. Blocks, for some ms on
/// a node with a hundred pods.
///
/// # Errors
///
/// [`MountError`] when it could not begin: the tree is not there, or `/proc` is not. What goes
/// wrong with one mount is told in [`Turned::remaining`].
pub fn turn(device: Device, rootfs: &Path) -> Result<Turned, MountError> {
    turn_where(device, rootfs, can_mount_beneath())
}

fn turn_where(device: Device, rootfs: &Path, able: bool) -> Result<Turned, MountError> {
    // Two at once would both put a kernel mount beneath the same FUSE mount.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = match rustix::fs::open(rootfs, flags, Mode::empty()) {
        Ok(root) => root,
        Err(Errno::NOENT | Errno::NOTDIR) => return Err(MountError::TreeGone(rootfs.to_owned())),
        Err(e) => return Err(MountError::new(format!("open {}", rootfs.display()), e)),
    };
    let begin = |e: io::Error| MountError::new("look for the mounts of all pods", e);
    std::thread::scope(|scope| {
        // A thread of its own, which never comes back to other work: it has been elsewhere.
        let thread = std::thread::Builder::new().name("turn native".into());
        let work = thread.spawn_scoped(scope, || {
            let walker = Walker::new().map_err(begin)?;
            let tree = Tree::new(root, &walker).map_err(begin)?;
            Turn { device, tree, walker, able }.run().map_err(begin)
        });
        match work.map_err(begin)?.join() {
            Ok(turned) => turned,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Whether this kernel knows the flag. It says so before it looks at the paths, of which there
/// are none.
fn can_mount_beneath() -> bool {
    let flags = MoveMountFlags::MOVE_MOUNT_BENEATH;
    rustix::mount::move_mount(CWD, "", CWD, "", flags) != Err(Errno::INVAL)
}

/// The folder that mounts are made of.
#[derive(Debug)]
struct Tree {
    root: OwnedFd,
    /// Where it is, as lists of mounts put it: on this device, at this path from the device's root.
    device: Device,
    path: PathBuf,
}

impl Tree {
    fn new(root: OwnedFd, walker: &Walker) -> io::Result<Self> {
        let (mount, path) = (walker.mount_of(root.as_fd())?, walker.path_of(root.as_fd())?);
        let mounts = walker.mounts()?;
        let found = mounts.into_iter().find_map(|entry| {
            let below = path.strip_prefix(&entry.point.target).ok()?;
            (entry.id == mount).then(|| (entry.device, join(&entry.point.root, below)))
        });
        let (device, path) = found.ok_or_else(|| {
            io::Error::other(format!("{}: on none of the mounts that are seen", path.display()))
        })?;
        Ok(Self { root, device, path })
    }

    /// Whether `mount` shows what the root `shown` of a FUSE mount shows.
    fn is_shown_by(&self, mount: &Entry, shown: &Path) -> bool {
        mount.device == self.device && mount.point.root == join(&self.path, inside(shown))
    }

    /// A sealed mount of what is at `shown`, a folder or a file, that is nowhere yet.
    fn clone_of(&self, shown: &Path, noexec: bool) -> Result<OwnedFd, MountError> {
        let context = |verb: &str| format!("{verb} {} in the stored image", shown.display());
        let folder;
        let source = match inside(shown) {
            root if root.as_os_str().is_empty() => self.root.as_fd(),
            path => {
                let resolve =
                    ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
                let flags = OFlags::PATH | OFlags::CLOEXEC;
                folder = rustix::fs::openat2(&self.root, path, flags, Mode::empty(), resolve)
                    .map_err(|e| MountError::new(context("open"), e))?;
                folder.as_fd()
            }
        };
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let clone = rustix::mount::open_tree(source, "", flags)
            .map_err(|e| MountError::new(context("clone"), e))?;
        syscalls::seal(clone.as_fd(), noexec)
            .map_err(|e| MountError::new(context("make read-only"), e))?;
        Ok(clone)
    }
}

/// A mount's root, relative to its file system's.
fn inside(root: &Path) -> &Path {
    root.strip_prefix("/").unwrap_or(root)
}

/// As `Path::join`, without the slash that an empty path leaves at the end.
fn join(base: &Path, below: &Path) -> PathBuf {
    base.iter().chain(below.iter()).collect()
}

/// One call's work, on a thread of its own.
#[derive(Debug)]
struct Turn {
    device: Device,
    tree: Tree,
    walker: Walker,
    /// Whether the kernel can mount beneath.
    able: bool,
}

impl Turn {
    fn run(self) -> io::Result<Turned> {
        let found = self.walker.find()?;
        let mut done = Turned {
            namespaces: found.namespaces.len(),
            hidden: found.hidden,
            blind: !found.all_processes,
            ..Turned::default()
        };
        // Where mounts come from before where they go to: a turn there reaches the others by
        // propagation, and would put a second kernel mount beneath one that is there already.
        for namespace in &found.namespaces {
            self.look_into(namespace, false, &mut done)?;
        }
        for namespace in &found.namespaces {
            self.look_into(namespace, true, &mut done)?;
        }
        Ok(done)
    }

    /// Turns what `namespace` has of the device, but if not `all` no mount that is where mounts
    /// arrive by propagation. Ends at home.
    fn look_into(&self, namespace: &Namespace, all: bool, done: &mut Turned) -> io::Result<()> {
        if let Err(error) = self.walker.enter(namespace) {
            if all {
                self.left_outside(namespace, error, done);
            }
            return Ok(());
        }
        let result = self.walker.mounts().map(|mounts| {
            // The topmost first.
            for mount in mounts.iter().rev().filter(|mount| mount.device == self.device) {
                let parent = mounts.iter().find(|parent| parent.id == mount.parent);
                if !all && parent.is_some_and(|parent| parent.slave) {
                    continue;
                }
                let (namespace_id, target) = (namespace.id, mount.point.target.clone());
                match self.turn_one(namespace, mount, parent, &mounts) {
                    Ok(took) => {
                        done.turned.push(TurnedMount { namespace: namespace_id, target, took });
                    }
                    Err(why) if all => {
                        done.remaining.push(Remaining { namespace: namespace_id, target, why });
                    }
                    // The second round says it.
                    Err(_) => {}
                }
            }
        });
        self.walker.go_home()?;
        result
    }

    fn turn_one(
        &self,
        namespace: &Namespace,
        mount: &Entry,
        parent: Option<&Entry>,
        mounts: &[Entry],
    ) -> Result<Duration, Why> {
        if !self.able {
            return Err(Why::Kernel);
        }
        if mounts.iter().any(|other| other.parent == mount.id) {
            return Err(Why::Covered);
        }
        let (shown, target) = (&mount.point.root, &mount.point.target);
        let context = |verb: &str| format!("{verb} {}", target.display());
        // By a call that was broken off.
        let beneath_already = parent.is_some_and(|parent| {
            parent.point.target == *target && self.tree.is_shown_by(parent, shown)
        });
        let clone = match beneath_already {
            true => None,
            false => Some(self.clone_at_home(namespace, shown, mount.noexec)?),
        };
        // No server of files is asked for a descriptor of this kind, so it need not be alive.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let top = rustix::fs::open(target, flags, Mode::empty())
            .map_err(|e| MountError::new(context("open the mount"), e))?;
        let id = self
            .walker
            .mount_of(top.as_fd())
            .map_err(|e| MountError::new(context("look at the mount"), e))?;
        if id != mount.id {
            return Err(Why::Covered);
        }
        let start = Instant::now();
        if let Some(clone) = clone {
            put_beneath(clone.as_fd(), top.as_fd())
                .map_err(|e| MountError::new(context("mount beneath"), e))?;
        }
        crash::point("kernel mount beneath");
        self.walker.detach(top.as_fd()).map_err(|e| MountError::new(context("detach"), e))?;
        Ok(start.elapsed())
    }

    /// Only at home the tree can be cloned. Ends in `namespace`.
    fn clone_at_home(
        &self,
        namespace: &Namespace,
        shown: &Path,
        noexec: bool,
    ) -> Result<OwnedFd, MountError> {
        let change = |e: Errno| MountError::new(format!("enter {}", namespace.id), e);
        self.walker.go_home().map_err(change)?;
        let clone = self.tree.clone_of(shown, noexec);
        self.walker.enter(namespace).map_err(change)?;
        clone
    }

    /// Tells what stays in a namespace that may not be entered.
    fn left_outside(&self, namespace: &Namespace, error: Errno, done: &mut Turned) {
        let Ok(mounts) = namespace.mounts_from_outside() else {
            done.hidden += 1;
            return;
        };
        for mount in mounts.into_iter().filter(|mount| mount.device == self.device) {
            let why = MountError::new(format!("enter {}", namespace.id), error).into();
            let (namespace, target) = (namespace.id, mount.point.target);
            done.remaining.push(Remaining { namespace, target, why });
        }
    }
}

fn put_beneath(mount: BorrowedFd<'_>, top: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_BENEATH;
    rustix::mount::move_mount(mount, "", top, "", flags)
}
