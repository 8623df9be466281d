//! FUSE: a stored image for who may not mount, or one that arrives, served by this process.
//!
//! ```text
//! reader ─► kernel ─► /dev/fuse ─► session thread: adapter ─► fs ─► stored files
//!                                        │ what is not cached
//!                                        ├─► threads that wait for the disk
//!                                        └─► the pull, of what has not come
//! ```
//!
//! A [`FuseMount`] is a session: a thread of its own with a runtime of its own, which
//! serves one mount until the last reader of an unmounted tree has closed its files.
//! `fs` is the file system and knows no FUSE; `adapter` only translates. Root has
//! kernel mounts instead ([`crate::mount`]), which need no process to stay.
//!
//! # What always holds
//!
//! - **Never writable**, nor with set-user-id or device files in it.
//! - **The session ends when the mount does**, and never takes another's mount away: only
//!   [`unmount`] and dropping a mount that still serves unmount anything.
//! - **Readers never hang.** Waits for bytes on their way are bounded. When this process dies the kernel ends the connection, and
//!   each read is an error (ENOTCONN) from then on; [`unmount`] takes such a mount away.

use std::io;
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use carport_image::Store;
use carport_image::pull::Arriving;
use fuse3::MountOptions;
use fuse3::raw::Session;
use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::mount::{Device, ImagePath, KernelMounter, MountError, Mounter as _, Tree, open_tree};

mod adapter;
mod descriptor;
mod fs;
mod read;
mod table;
#[cfg(test)]
mod tests;

use adapter::Adapter;
use fs::Fs;

/// The file system's type in the list of mounts.
pub const FS_TYPE: &str = "fuse.carport";

/// The program that mounts for users without the right to.
const HELPER: &str = "fusermount3";

const DEVICE: &str = "/dev/fuse";

/// Read-ahead of a mount. The default of 128 kB halves the speed of a first read, since
/// each request pays its way through the kernel twice.
const READ_AHEAD_KB: &str = "4096";

/// How long reads that hang on a dead disk may hold up the end of a session.
const PATIENCE: Duration = Duration::from_secs(2);

/// Threads that wait for the disk; more do not make it faster.
const DISK_THREADS: usize = 32;

/// Why a tree could not be served, or its mount not be taken away.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// The helper program is missing.
    #[error(
        "{HELPER}: not found; install the package fuse3 (apt install fuse3, dnf install fuse3)"
    )]
    NotInstalled,
    /// The kernel has no FUSE, or the container does not show it.
    #[error(
        "{DEVICE}: not there; load the kernel's module (modprobe fuse), or give it to the container \
         (--device {DEVICE})"
    )]
    NoDevice,
    /// Only root may use FUSE here.
    #[error(
        "{DEVICE}: not for this user; run `chmod 0666 {DEVICE}` as root (udev does it on most systems)"
    )]
    DeviceDenied,
    /// The helper said no.
    #[error(
        "mount on {}: {HELPER} refused; the folder must be empty and writable for this user, \
         and {HELPER} be installed set-user-id root", .0.display()
    )]
    Refused(PathBuf),
    /// Something is in the folder.
    #[error("mount on {}: not an empty folder; choose an empty one", .0.display())]
    Occupied(PathBuf),
    /// What is to be shown is not there.
    #[error(transparent)]
    Tree(#[from] MountError),
    /// The system said no.
    #[error("{what}: {source}")]
    Io {
        /// The verb and its object.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
}

impl FuseError {
    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io { what: what.into(), source: source.into() }
    }
}

/// Tells whether this machine has what FUSE mounts need, for who wants to know before
/// a long pull.
///
/// # Errors
///
/// [`FuseError::NotInstalled`], [`FuseError::NoDevice`] or [`FuseError::DeviceDenied`], which
/// say what to do.
pub fn check() -> Result<(), FuseError> {
    let folders = std::env::var_os("PATH").unwrap_or_default();
    if !std::env::split_paths(&folders).any(|folder| folder.join(HELPER).is_file()) {
        return Err(FuseError::NotInstalled);
    }
    // The helper opens it with the rights of who runs it.
    match rustix::fs::access(DEVICE, Access::READ_OK | Access::WRITE_OK) {
        Ok(()) => Ok(()),
        Err(Errno::ACCESS | Errno::PERM) => Err(FuseError::DeviceDenied),
        Err(_) => Err(FuseError::NoDevice),
    }
}

/// A tree served by this process.
///
/// Dropping it unmounts and ends the session, also for who has files open.
#[derive(Debug)]
pub struct FuseMount {
    target: PathBuf,
    device: Device,
    /// True once the session has ended.
    ended: watch::Receiver<bool>,
    /// Ends the waits for bytes that have not come.
    waits: CancellationToken,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
    /// Once taken away, what is at the target is somebody else's.
    unmounted: AtomicBool,
}

impl FuseMount {
    /// Serves `tree` at `target`, an empty folder; it answers when this returns.
    ///
    /// As root all users may read it, else only this one. Blocks, at most as long as
    /// reading the tree's folders takes.
    ///
    /// # Errors
    ///
    /// [`FuseError`]; nothing is mounted then.
    pub fn mount(tree: &Tree, target: &Path) -> Result<Self, FuseError> {
        check()?;
        let root = open_tree(tree)?;
        let fs = Fs::load(root).map_err(|(path, error)| {
            FuseError::io(format!("read {}", tree.rootfs.join(path).display()), error)
        })?;
        Self::serve(fs, target, CancellationToken::new())
    }

    /// Serves an image that arrives in `store`, or the folder `path` of it, at `target`, an empty folder.
    ///
    /// A read of bytes that have not come waits for `patience` at most, and is an I/O error then; so
    /// is each read of a layer that turned out to be wrong. For whom, and what blocks, as for
    /// [`FuseMount::mount`].
    ///
    /// # Errors
    ///
    /// [`FuseError`]; nothing is mounted then.
    pub fn mount_arriving(
        image: &Arriving,
        store: &Store,
        path: Option<&ImagePath>,
        patience: Duration,
        target: &Path,
    ) -> Result<Self, FuseError> {
        check()?;
        let objects = store.root().join("objects");
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let objects = rustix::fs::open(&objects, flags, Mode::empty())
            .map_err(|error| FuseError::io(format!("open {}", objects.display()), error))?;
        let waits = CancellationToken::new();
        let fs =
            Fs::arriving(image, path.map(ImagePath::as_path), objects, patience, waits.clone());
        let fs = fs.map_err(|(path, error)| {
            FuseError::io(format!("{}: no folder of the image", path.display()), error)
        })?;
        Self::serve(fs, target, waits)
    }

    fn serve(fs: Fs, target: &Path, waits: CancellationToken) -> Result<Self, FuseError> {
        let (ready, starts) = mpsc::channel();
        let (end, ended) = watch::channel(false);
        let stop = CancellationToken::new();
        let serving = Serving { fs: Arc::new(fs), target: target.to_owned(), stop: stop.clone() };
        let thread = std::thread::Builder::new()
            .name("fuse".into())
            .spawn(move || {
                serving.run(&ready);
                end.send_replace(true);
            })
            .map_err(|error| FuseError::io("start a thread", error))?;
        let mut mount = Self {
            target: target.to_owned(),
            device: Device { major: 0, minor: 0 },
            ended,
            waits,
            stop,
            thread: Some(thread),
            unmounted: AtomicBool::new(false),
        };
        match starts.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error),
            Err(mpsc::RecvError) => {
                return Err(FuseError::io("serve", io::Error::other("the session ended at once")));
            }
        }
        mount.device = mount.tune()?;
        tracing::info!(target = %target.display(), "mounted through fuse");
        Ok(mount)
    }

    /// Asks the mount a first question, and makes it fast.
    fn tune(&self) -> Result<Device, FuseError> {
        let shown = self.target.display();
        descriptor::close_devices_on_exec()
            .map_err(|error| FuseError::io("look at open files", error))?;
        let stat = rustix::fs::stat(&self.target)
            .map_err(|error| FuseError::io(format!("look at {shown}"), error))?;
        let (major, minor) = (rustix::fs::major(stat.st_dev), rustix::fs::minor(stat.st_dev));
        let device = Device { major, minor };
        let knob = format!("/sys/class/bdi/{device}/read_ahead_kb");
        // Root's only, and not there in some containers; it works without.
        if let Err(error) = std::fs::write(&knob, READ_AHEAD_KB) {
            tracing::debug!(%knob, %error, "left the read-ahead as it is");
        }
        Ok(device)
    }

    /// The number by which all mounts of it are known.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Where it is mounted.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Waits until the session has ended: nothing is mounted and no file is open any more.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future only gives up this wait.
    pub async fn ended(&self) {
        // An error is the end as well: the thread is gone.
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Gives who waits for bytes on their way an error now, and from now on.
    pub fn end_waits(&self) {
        self.waits.cancel();
    }

    /// Takes the mount away. What is open stays readable until it is closed, and until
    /// then the session goes on: wait for [`FuseMount::ended`] before dropping it. Blocks.
    ///
    /// # Errors
    ///
    /// As [`unmount`].
    pub fn unmount(&self) -> Result<(), FuseError> {
        if *self.ended.borrow() || self.unmounted.load(Ordering::Relaxed) {
            return Ok(());
        }
        unmount(&self.target)?;
        self.unmounted.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for FuseMount {
    fn drop(&mut self) {
        self.end_waits();
        if let Err(error) = self.unmount() {
            tracing::warn!(%error, "left a mount behind");
        }
        self.stop.cancel();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a fuse session panicked");
        }
    }
}

/// Takes the FUSE mount at `target` away, also a dead one. What is open stays readable
/// until it is closed, as long as the session's process lives. Blocks.
///
/// # Errors
///
/// When it is another user's, or no mount at all.
pub fn unmount(target: &Path) -> Result<(), FuseError> {
    let what = || format!("unmount {}", target.display());
    if rustix::process::geteuid().is_root() {
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        return rustix::mount::unmount(target, flags).map_err(|e| FuseError::io(what(), e));
    }
    let output = Command::new(HELPER)
        .args(["-u", "-z", "--"])
        .arg(target)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => FuseError::NotInstalled,
            _ => FuseError::io(format!("run {HELPER}"), error),
        })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim().strip_prefix("fusermount3: ").unwrap_or(text.trim()).to_owned();
    Err(FuseError::io(what(), io::Error::other(text)))
}

/// Whether a FUSE mount of ours is at `target`, dead ones included.
///
/// # Errors
///
/// When the list of mounts cannot be read.
pub fn is_mounted(target: &Path) -> Result<bool, MountError> {
    let mounts = KernelMounter.under(target)?;
    Ok(mounts.iter().rfind(|mount| mount.target == target).is_some_and(|m| m.fs_type == FS_TYPE))
}

/// What the session's thread owns.
struct Serving {
    fs: Arc<Fs>,
    target: PathBuf,
    stop: CancellationToken,
}

impl Serving {
    fn run(self, ready: &mpsc::Sender<Result<(), FuseError>>) {
        // One thread: with more, requests of one reader wait for each other's wake-ups.
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(DISK_THREADS)
            .build();
        let runtime = match runtime {
            Ok(runtime) => runtime,
            Err(error) => {
                // The other side is gone only when its process ends.
                let _ = ready.send(Err(FuseError::io("start a runtime", error)));
                return;
            }
        };
        runtime.block_on(self.serve(ready));
        runtime.shutdown_timeout(PATIENCE);
    }

    async fn serve(self, ready: &mpsc::Sender<Result<(), FuseError>>) {
        let session = Session::new(options());
        let mounted = session.mount_with_unprivileged(Adapter(self.fs), &self.target).await;
        // Never dropped: its `drop` unmounts whatever is at the target by then.
        let mut handle = match mounted {
            Ok(handle) => ManuallyDrop::new(handle),
            Err(error) => {
                let _ = ready.send(Err(refused(self.target, error)));
                return;
            }
        };
        let _ = ready.send(Ok(()));
        let target = self.target.display();
        tokio::select! {
            result = &mut *handle => match result {
                Ok(()) => tracing::info!(%target, "fuse session ended"),
                Err(error) => tracing::warn!(%target, %error, "fuse session broke off"),
            },
            () = self.stop.cancelled() => tracing::info!(%target, "fuse session stopped"),
        }
    }
}

fn refused(target: PathBuf, error: io::Error) -> FuseError {
    match error.kind() {
        io::ErrorKind::AlreadyExists => FuseError::Occupied(target),
        // What the helper writes to standard error says more; the crate does not give it.
        io::ErrorKind::Other => FuseError::Refused(target),
        _ => FuseError::io(format!("mount on {}", target.display()), error),
    }
}

fn options() -> MountOptions {
    let mut options = MountOptions::default();
    options
        .fs_name("carport")
        .custom_options("subtype=carport,nosuid,nodev")
        .read_only(true)
        .default_permissions(true)
        .no_open_dir_support(true)
        // Others than root may ask only where /etc/fuse.conf says so, and need not.
        .allow_other(rustix::process::geteuid().is_root());
    options
}
