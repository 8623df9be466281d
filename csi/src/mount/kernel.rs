//! Mounts by the kernel: detached clones of trees.
//!
//! ```text
//! open_tree(CLONE) ─► mount_setattr(ro, nosuid, nodev) ─► move_mount ─► target
//! ```
//!
//! The clone is sealed while nobody can reach it. A bind mount that is remounted
//! read-only afterwards is not enough: the remount does not propagate, and the
//! copy in the host's mount namespace, from which the pod's is made, stays writable.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatVfsMountFlags, Statx};
use rustix::fs::{StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags};

use super::{
    Device, FolderId, MountError, MountOptions, MountPoint, Mounter, TargetState, Tree, answer,
    mountinfo, syscalls,
};

/// More mounts on top of each other at one target than this is somebody else's
/// fault, and a loop that must end.
const MAX_STACKED_MOUNTS: usize = 64;

/// Mounts in the mount namespace of the calling thread.
#[derive(Debug, Clone, Copy, Default)]
pub struct KernelMounter;

impl KernelMounter {
    /// Does all of a mount but the last step: whether this kernel and this process can mount
    /// `folder` for a pod. Nothing is left of it.
    ///
    /// # Errors
    ///
    /// As [`Mounter::mount_tree`].
    pub fn rehearse(&self, folder: &Path) -> Result<(), MountError> {
        let tree = Tree { rootfs: folder.to_owned(), path: None };
        let context = |verb: &str| format!("{verb} a mount of {}", folder.display());
        sealed_clone(&tree, MountOptions::default(), &context)?;
        // Moves nothing: there is no such path. A kernel, or a seccomp filter, that does not know the
        // call says so before it looks.
        let cwd = rustix::fs::CWD;
        match rustix::mount::move_mount(cwd, "/proc/self/absent", cwd, "/", MoveMountFlags::empty())
        {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(MountError::new(context("move"), e)),
        }
    }
}

impl Mounter for KernelMounter {
    fn identify(&self, tree: &Tree) -> Result<FolderId, MountError> {
        let folder = open(tree)?;
        let stat = rustix::fs::fstat(&folder)
            .map_err(|e| MountError::new(format!("stat {}", tree.rootfs.display()), e))?;
        Ok(FolderId { device: stat.st_dev, inode: stat.st_ino })
    }

    fn mount_tree(
        &self,
        tree: &Tree,
        target: &Path,
        options: MountOptions,
    ) -> Result<(), MountError> {
        let context = |verb: &str| format!("{verb} {}", target.display());
        let clone = sealed_clone(tree, options, &context)?;
        // By descriptor, so that the target cannot become a symbolic link meanwhile.
        let onto = rustix::fs::open(
            target,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(|e| MountError::new(context("open the mount target"), e))?;
        rustix::mount::move_mount(
            &clone,
            "",
            &onto,
            "",
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
        )
        .map_err(|e| MountError::new(context("mount at"), e))
    }

    fn unmount(&self, target: &Path) -> Result<(), MountError> {
        for _ in 0..MAX_STACKED_MOUNTS {
            match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                Ok(()) => {}
                // Not a mount, or nothing at all.
                Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => return Ok(()),
                Err(e) => return Err(MountError::new(format!("unmount {}", target.display()), e)),
            }
        }
        Err(MountError::new(
            format!("unmount {}", target.display()),
            io::Error::other(format!("more than {MAX_STACKED_MOUNTS} mounts are stacked there")),
        ))
    }

    fn state(&self, target: &Path) -> Result<TargetState, MountError> {
        let context = || format!("look at {}", target.display());
        // DONT_SYNC: what a server of files last said will do, it need not be asked.
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
        let stat = match rustix::fs::statx(
            rustix::fs::CWD,
            target,
            flags,
            StatxFlags::TYPE | StatxFlags::INO,
        ) {
            Ok(stat) => stat,
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(TargetState::Absent),
            // Only the list of mounts tells a dead mount from a dead disk below.
            Err(e @ (Errno::NOTCONN | Errno::STALE | Errno::IO | Errno::HOSTDOWN)) => {
                return match self.under(target)?.iter().any(|mount| mount.target == target) {
                    true => Ok(TargetState::Dead),
                    false => Err(MountError::new(context(), e)),
                };
            }
            Err(e) => return Err(MountError::new(context(), e)),
        };
        if stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            let id = folder_id(&stat);
            return match answer::statvfs(target, Device::of(&stat)) {
                Ok(vfs) => {
                    let read_only = vfs.f_flag.contains(StatVfsMountFlags::RDONLY);
                    Ok(TargetState::Mounted { id, read_only })
                }
                Err(
                    Errno::NOTCONN | Errno::STALE | Errno::IO | Errno::HOSTDOWN | Errno::TIMEDOUT,
                ) => Ok(TargetState::Dead),
                Err(e) => Err(MountError::new(context(), e)),
            };
        }
        Ok(match FileType::from_raw_mode(stat.stx_mode.into()) {
            FileType::Directory => {
                let mut entries = std::fs::read_dir(target)
                    .map_err(|e| MountError::new(format!("list {}", target.display()), e))?;
                match entries.next() {
                    None => TargetState::Empty,
                    Some(_) => TargetState::Occupied("a folder with something in it"),
                }
            }
            FileType::Symlink => TargetState::Occupied("a symbolic link"),
            _ => TargetState::Occupied("a file"),
        })
    }

    fn under(&self, prefix: &Path) -> Result<Vec<MountPoint>, MountError> {
        let mounts =
            mountinfo::read().map_err(|e| MountError::new("read the list of mounts", e))?;
        // The kernel lists real paths; answered are paths as they were asked for.
        let real = real_path(prefix);
        Ok(mounts
            .into_iter()
            .filter_map(|mount| {
                let mount = mount.point;
                let below = mount.target.strip_prefix(&real).ok()?;
                let target = match below.as_os_str().is_empty() {
                    true => prefix.to_owned(),
                    false => prefix.join(below),
                };
                Some(MountPoint { target, ..mount })
            })
            .collect())
    }
}

/// `path` with the symbolic links before its last part resolved. The last part is
/// not looked at: it may be a dead mount.
pub(super) fn real_path(path: &Path) -> PathBuf {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => match parent.canonicalize() {
            Ok(parent) => parent.join(name),
            Err(_) => path.to_owned(),
        },
        _ => path.to_owned(),
    }
}

/// A mount of `tree` that is nowhere yet, and can no longer be written through.
fn sealed_clone(
    tree: &Tree,
    options: MountOptions,
    context: &dyn Fn(&str) -> String,
) -> Result<OwnedFd, MountError> {
    let source = open(tree)?;
    // Not recursive: a tree has nothing mounted inside, and if somebody does mount
    // there it must not come along.
    let clone = rustix::mount::open_tree(
        &source,
        "",
        OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH,
    )
    .map_err(|e| MountError::new(context("clone the tree for"), e))?;
    syscalls::seal(clone.as_fd(), options.noexec)
        .map_err(|e| MountError::new(context("make the tree read-only for"), e))?;
    Ok(clone)
}

/// Opens the folder that `tree` names, beneath its root and through no link.
pub(crate) fn open(tree: &Tree) -> Result<OwnedFd, MountError> {
    // Without NOFOLLOW, so that a link is told from a file; it is not followed all the same.
    let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = match rustix::fs::open(&tree.rootfs, folder, Mode::empty()) {
        Ok(root) => root,
        Err(Errno::NOENT | Errno::NOTDIR) => return Err(MountError::TreeGone(tree.rootfs.clone())),
        Err(e) => return Err(MountError::new(format!("open {}", tree.rootfs.display()), e)),
    };
    let Some(path) = &tree.path else { return Ok(root) };
    let inside = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(&root, path.as_path(), folder, Mode::empty(), inside).map_err(|e| {
        let why = match e {
            Errno::NOENT => "is not there",
            Errno::NOTDIR => "is not a folder",
            Errno::LOOP => "is reached through a symbolic link",
            Errno::XDEV => "is outside",
            e => return MountError::new(format!("open {path} in {}", tree.rootfs.display()), e),
        };
        MountError::NotInImage { path: path.to_string(), why }
    })
}

fn folder_id(stat: &Statx) -> FolderId {
    FolderId {
        device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
        inode: stat.stx_ino,
    }
}
