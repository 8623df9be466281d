//! Mounts: the edge of the world on the pod's side.
//!
//! A [`Mounter`] shows a [`Tree`] of the store at a target path, takes it away
//! again, and tells what is at a path. Every implementation passes the same
//! conformance suite; the one that counts is [`KernelMounter`]. Mounts that FUSE serves are
//! turned into the kernel's under running pods by [`native`].
//!
//! ```text
//!            ┌────────── unmount ───────────┐
//!            ▼                              │
//! Absent   Empty ──── mount_tree ───► Mounted{id}    Occupied
//!            ▲                              │        never touched
//!            └─── unmount ─── Dead ◄── its server died
//! ```
//!
//! # What always holds
//!
//! - **Never writable.** A tree is read-only before anybody can see it.
//! - **Never outside.** A folder inside a tree is looked up beneath the tree's
//!   root by the kernel, following no symbolic link.
//! - **Calls block**, some of them on the disk: call them where that is allowed.

use std::fmt;
use std::io;
use std::path::{Component, Path, PathBuf};

use carport_image::Digest;

mod answer;
#[cfg(test)]
mod conformance;
#[cfg(test)]
pub(crate) mod fake;
mod kernel;
mod mountinfo;
pub mod native;
mod reach;
mod syscalls;

pub use kernel::KernelMounter;
pub(crate) use kernel::open as open_tree;
pub use native::Processes;
pub use reach::{Viewer, hidden_by, over};

/// Shows trees at paths.
pub trait Mounter: Send + Sync + fmt::Debug {
    /// Looks up what `tree` names.
    ///
    /// # Errors
    ///
    /// [`MountError::NotInImage`] when it is not there or not a folder.
    fn identify(&self, tree: &Tree) -> Result<FolderId, MountError>;

    /// Shows `tree` at `target`, read-only, without set-user-id and devices, and as
    /// `options` say.
    ///
    /// `target` must be [`TargetState::Empty`]; what is there already is not
    /// looked at. Either all of it is done or nothing.
    ///
    /// # Errors
    ///
    /// [`MountError::NotInImage`] as for [`Mounter::identify`], and whatever the
    /// kernel says to the mount.
    fn mount_tree(
        &self,
        tree: &Tree,
        target: &Path,
        options: MountOptions,
    ) -> Result<(), MountError>;

    /// Takes away every mount at exactly `target`, dead ones included. What is open
    /// stays readable until it is closed. An absent target is fine.
    fn unmount(&self, target: &Path) -> Result<(), MountError>;

    /// What is at `target` now. Waits for no server of files longer than some seconds.
    fn state(&self, target: &Path) -> Result<TargetState, MountError>;

    /// The mounts at `prefix` and below, dead ones included, in the order of mounting, and of
    /// those at one target the topmost last.
    fn under(&self, prefix: &Path) -> Result<Vec<MountPoint>, MountError>;
}

/// A folder of the store that can be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// The image's root in the store.
    pub rootfs: PathBuf,
    /// A folder inside it, instead of all of it.
    pub path: Option<ImagePath>,
}

/// What can be chosen of a mount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct MountOptions {
    /// No program can be started from it.
    #[serde(default)]
    pub noexec: bool,
}

/// A path inside an image, relative to its root: no `..`, no empty part.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImagePath(String);

impl ImagePath {
    /// Parses `models/base` or `/models/base`; `None` for the root itself.
    ///
    /// # Errors
    ///
    /// What is wrong with `text`.
    pub fn parse(text: &str) -> Result<Option<Self>, &'static str> {
        if text.len() > 4096 {
            return Err("is longer than 4096 bytes");
        }
        if text.contains('\0') {
            return Err("has a NUL character in it");
        }
        let mut parts = Vec::new();
        for component in Path::new(text).components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(part) => parts.extend(part.to_str()),
                Component::ParentDir | Component::Prefix(_) => {
                    return Err("must not have `..` in it");
                }
            }
        }
        Ok((!parts.is_empty()).then(|| Self(parts.join("/"))))
    }

    /// The path, relative to the image's root.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }
}

impl fmt::Display for ImagePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.0)
    }
}

impl From<ImagePath> for String {
    fn from(path: ImagePath) -> Self {
        path.0
    }
}

impl TryFrom<String> for ImagePath {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)?.ok_or("is the root")
    }
}

/// Which folder it is, whatever path or mount it is reached by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FolderId {
    /// Device number, as the kernel encodes it.
    pub device: u64,
    /// Inode number on that device.
    pub inode: u64,
}

/// A file system that is mounted somewhere, by the number that the kernel gives it for as long
/// as it is: the same whatever path, bind mount or mount namespace it is seen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct Device {
    /// Of block devices the driver; 0 for file systems without one.
    pub major: u32,
    /// Which one.
    pub minor: u32,
}

impl Device {
    fn of(stat: &rustix::fs::Statx) -> Self {
        Self { major: stat.stx_dev_major, minor: stat.stx_dev_minor }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// What is at a target path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetState {
    /// Nothing.
    Absent,
    /// An empty folder.
    Empty,
    /// Something that is not a mount and not empty; the text says what.
    Occupied(&'static str),
    /// A mount that answers.
    Mounted {
        /// The folder that it shows.
        id: FolderId,
        /// Whether this mount refuses writes.
        read_only: bool,
    },
    /// A mount whose server is gone, or has not answered for seconds.
    Dead,
}

/// One mount, as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountPoint {
    /// Where it is.
    pub target: PathBuf,
    /// Which folder of its file system it shows.
    pub root: PathBuf,
    /// The file system's type: `ext4`, `fuse.carport`.
    pub fs_type: String,
    /// Whether this mount refuses writes.
    pub read_only: bool,
    /// Whether mounts below it appear in its peers, too: in a container with bidirectional
    /// propagation, on the host.
    pub shared: bool,
}

impl MountPoint {
    /// The image whose tree this mount shows, judged by the place in a store:
    /// `…/trees/<digest>/rootfs[/…]`, or `…/trees/<digest>/views/<name>/rootfs`.
    pub fn shown_image(&self) -> Option<Digest> {
        let parts: Vec<&str> =
            self.root.components().filter_map(|part| part.as_os_str().to_str()).collect();
        (0..parts.len()).find_map(|n| match &parts[n..] {
            ["trees", hex, "rootfs", ..] | ["trees", hex, "views", _, "rootfs", ..] => {
                Digest::from_hex(hex).ok()
            }
            _ => None,
        })
    }
}

/// Why a mount could not be made, taken away or looked at.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The image has no such folder.
    #[error(
        "image folder {path}: {why}; the volume's `path` must name a folder that is in the image \
         and not reached through a symbolic link"
    )]
    NotInImage {
        /// As the volume asks for it; `/` for the image's root.
        path: String,
        /// Absent, a file, or behind a link.
        why: &'static str,
    },
    /// The image's tree is not in the store.
    #[error("image tree {}: not in the store", .0.display())]
    TreeGone(PathBuf),
    /// The process may not mount.
    #[error(
        "{what}: not permitted; run the agent as root with CAP_SYS_ADMIN (in Kubernetes: a \
         privileged container)"
    )]
    Denied {
        /// The verb and its object.
        what: String,
    },
    /// The kernel said something else.
    #[error("{what}: {source}")]
    Io {
        /// The verb and its object.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

impl MountError {
    pub(crate) fn new(what: impl Into<String>, error: impl Into<io::Error>) -> Self {
        let (what, source) = (what.into(), error.into());
        match source.kind() {
            io::ErrorKind::PermissionDenied => Self::Denied { what },
            _ => Self::Io { what, source },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_in_an_image_is_relative_and_has_no_way_out() {
        let path = |text| ImagePath::parse(text).map(|path| path.map(|path| path.to_string()));
        assert_eq!(path("/models//base/./"), Ok(Some("/models/base".into())));
        assert_eq!(path("models"), Ok(Some("/models".into())));
        assert_eq!(path("/"), Ok(None));
        assert_eq!(path(""), Ok(None));
        assert_eq!(path("/models/../../etc"), Err("must not have `..` in it"));
        assert_eq!(path("a\0b"), Err("has a NUL character in it"));
        assert_eq!(path(&"a/".repeat(3000)), Err("is longer than 4096 bytes"));
    }

    #[test]
    fn a_mount_of_a_tree_is_known_by_its_place_in_the_store() {
        let digest = Digest::of(b"image");
        let point = |root: &str| MountPoint {
            target: "/t".into(),
            root: root.into(),
            fs_type: "ext4".into(),
            read_only: true,
            shared: false,
        };
        let root = format!("/lib/carport/trees/{}/rootfs", digest.hex());
        assert_eq!(point(&root).shown_image(), Some(digest));
        assert_eq!(point(&format!("{root}/models")).shown_image(), Some(digest));
        let view = format!("/lib/carport/trees/{0}/views/{0}/rootfs", digest.hex());
        assert_eq!(point(&view).shown_image(), Some(digest));
        assert_eq!(point("/lib/trees/short/rootfs").shown_image(), None);
        assert_eq!(point("/").shown_image(), None);
    }
}
