//! Files of containerd's snapshots for the store, without a copy.
//!
//! ```text
//! chain id ─► committed? ─► View, under a lease ─► its own folder ─► file by the layer's path and size ─► hard link
//! ```
//!
//! That a snapshot is called by a layer's chain id proves nothing: who takes a file hashes it as a part of
//! the layer ([`crate::layer::Plan`]).
//!
//! # What always holds
//!
//! - **Shared inodes are changed by nobody**: what is committed is only ever a lower layer, and only files
//!   are taken whose owner, mode and attributes may be an object's as they are.
//! - **No path leads out**: folders and files are opened below the snapshot's, through no symbolic link.

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use containerd_client::services::v1::snapshots::{Kind, StatSnapshotRequest};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};

use super::snapshots::{SNAPSHOTTER, Session};
use super::{Failed, Namespace, PublishError, Runtime};
use crate::digest::Digest;
use crate::store::{Store, object_mode};

/// The attribute that SELinux gives to every file; it says nothing of the image.
const LABEL: &[u8] = b"security.selinux";

/// A layer's files in containerd. They stay while this lives.
pub(crate) struct Snapshot {
    folder: OwnedFd,
    // Taken on drop.
    held: Option<(Session, String)>,
}

impl Runtime {
    /// The snapshot of a layer and all below it, where containerd has it and files can be shared with
    /// `store`, which is tried out where that is not known yet.
    ///
    /// # Cancel safety
    ///
    /// What was made in containerd ends by itself.
    pub(crate) async fn snapshot(&self, chain: &Digest, store: &Store) -> Option<Snapshot> {
        if self.rests() {
            return None;
        }
        match self.find_snapshot(chain, store).await {
            Ok(snapshot) => Some(snapshot),
            Err(PublishError::Away(why)) => {
                self.away(&why);
                None
            }
            Err(why) => {
                tracing::debug!(%why, "no files are taken from containerd's snapshots");
                None
            }
        }
    }

    async fn find_snapshot(&self, chain: &Digest, store: &Store) -> Result<Snapshot, PublishError> {
        for namespace in &self.shared.options.namespaces {
            if !self.is_committed(namespace, chain).await? {
                continue;
            }
            let root = self.room_for(store).await?;
            let session = self.session(namespace, root.clone()).await?;
            let key = session.key(chain.hex());
            let folder = session.view(&key, &chain.to_string()).await;
            // From here on it is given back, whatever comes.
            let mut snapshot = Snapshot { folder: open(&root)?, held: Some((session, key)) };
            let folder = folder.map_err(|status| match status.code() {
                tonic::Code::NotFound => PublishError::NotPossible("it has just gone".to_owned()),
                _ => status.into(),
            });
            snapshot.folder = open(&folder?)?;
            return Ok(snapshot);
        }
        Err(PublishError::NotPossible(format!("it has no snapshot {chain}")))
    }

    async fn is_committed(&self, namespace: &Namespace, chain: &Digest) -> Result<bool, Failed> {
        use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
        let (snapshotter, key) = (SNAPSHOTTER.to_owned(), chain.to_string());
        let request = super::within(namespace, StatSnapshotRequest { snapshotter, key });
        match super::ask(SnapshotsClient::new(self.channel()).stat(request)).await {
            Ok(found) => Ok(found.info.is_some_and(|info| info.kind() == Kind::Committed)),
            Err(Failed::NotFound) => Ok(false),
            Err(failed) => Err(failed),
        }
    }
}

fn open(folder: &Path) -> Result<OwnedFd, Failed> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::open(folder, flags, Mode::empty())
        .map_err(|error| Failed::Away(format!("cannot open {}: {error}", folder.display())))
}

impl Snapshot {
    /// Gives it back, and waits for that. Dropped, it is given back in the background.
    pub(crate) async fn end(mut self) {
        if let Some((session, key)) = self.held.take() {
            give_back(session, key).await;
        }
    }

    /// Links the file at the layer's `path` to `to`, where it may be an object of `size` bytes as it is.
    /// What it holds is unproven. Blocks.
    pub(crate) fn link(&self, path: &str, size: u64, executable: bool, to: &Path) -> bool {
        link(&self.folder, path, size, executable, to).unwrap_or_else(|error| {
            tracing::debug!(path, %error, "a file of a snapshot cannot be used");
            false
        })
    }
}

fn link(
    folder: &OwnedFd,
    path: &str,
    size: u64,
    executable: bool,
    to: &Path,
) -> rustix::io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let file = rustix::fs::openat2(folder, path, flags, Mode::empty(), resolve)?;
    let stat = rustix::fs::fstat(&file)?;
    let mode = Mode::from_raw_mode(stat.st_mode).difference(Mode::WUSR);
    let is_fit = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
        && u64::try_from(stat.st_size) == Ok(size)
        && (stat.st_uid, stat.st_gid) == (0, 0)
        && mode == object_mode(executable);
    if !is_fit || has_attributes(&file)? {
        return Ok(false);
    }
    match rustix::fs::unlink(to) {
        Err(rustix::io::Errno::NOENT) | Ok(()) => {}
        Err(error) => return Err(error),
    }
    // By descriptor: what was looked at is what is linked.
    let file = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::fs::linkat(CWD, file, CWD, to, AtFlags::SYMLINK_FOLLOW)?;
    Ok(true)
}

/// Whether a file has extended attributes that a tree would not show.
fn has_attributes(file: &OwnedFd) -> rustix::io::Result<bool> {
    let mut names = [0; 1024];
    let length = match rustix::fs::flistxattr(file, &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(rustix::io::Errno::RANGE) => return Ok(true),
        Err(error) => return Err(error),
    };
    let mut names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(names.any(|name| name != LABEL))
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let Some((session, key)) = self.held.take() else { return };
        // Outside of a Tokio runtime the lease's time has to do.
        let Ok(tokio) = tokio::runtime::Handle::try_current() else { return };
        tokio.spawn(give_back(session, key));
    }
}

async fn give_back(session: Session, key: String) {
    let removed = session.remove(&key).await;
    if let Err(status) = removed.and(session.end().await) {
        tracing::debug!(%status, "a view in containerd ends with its lease");
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown, symlink};

    use super::*;

    #[test]
    fn only_files_that_may_be_objects_as_they_are_are_linked() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: files of others need root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (fs, to) = (folder.path().join("fs"), folder.path().join("link"));
        fs::create_dir_all(fs.join("m")).unwrap();
        let file = |path: &str, mode: u32| {
            fs::write(fs.join(path), b"12345").unwrap();
            fs::set_permissions(fs.join(path), Permissions::from_mode(mode)).unwrap();
        };
        let snapshot = Snapshot { folder: open(&fs).unwrap(), held: None };
        let linked = |path: &str, executable: bool| {
            let linked = snapshot.link(path, 5, executable, &to);
            let there = fs::metadata(&to).map(|meta| meta.ino()).ok();
            assert!(!linked || there == Some(fs::metadata(fs.join(path)).unwrap().ino()));
            linked
        };
        for (mode, plain, executable) in [
            (0o644, true, false),
            (0o444, true, false),
            (0o755, false, true),
            (0o555, false, true),
            (0o600, false, false),
            (0o666, false, false),
            (0o4755, false, false),
        ] {
            file("m/a", mode);
            assert_eq!(
                (linked("m/a", false), linked("m/a", true)),
                (plain, executable),
                "{mode:o}"
            );
        }
        file("m/a", 0o644);
        assert!(!snapshot.link("m/a", 6, false, &to), "another size");
        assert!(!linked("m", false) && !linked("m/gone", false));
        symlink("a", fs.join("m/l")).unwrap();
        symlink("m", fs.join("n")).unwrap();
        assert!(!linked("m/l", false) && !linked("n/a", false) && !linked("../link", false));
        file("m/b", 0o644);
        chown(fs.join("m/b"), Some(7), None).unwrap();
        assert!(!linked("m/b", false), "another owner");
        file("m/c", 0o644);
        let set = rustix::fs::setxattr(
            fs.join("m/c"),
            "trusted.overlay.metacopy",
            b"",
            rustix::fs::XattrFlags::empty(),
        );
        assert!(set.is_err() || !linked("m/c", false), "an attribute");
    }
}
