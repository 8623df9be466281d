//! Mounts in memory over real folders: for tests without rights, and for faults.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::{fs, io};

use super::{FolderId, MountError, MountOptions, MountPoint, Mounter, TargetState, Tree};

/// Remembers what would be mounted. The folders are looked at for real.
#[derive(Debug, Default)]
pub(crate) struct FakeMounter {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    mounts: Vec<(MountPoint, FolderId)>,
    dead: Vec<PathBuf>,
    failing: HashMap<&'static str, io::ErrorKind>,
}

impl FakeMounter {
    /// Makes every later call of `method` fail.
    pub(crate) fn fail(&self, method: &'static str, kind: io::ErrorKind) {
        self.state.lock().unwrap().failing.insert(method, kind);
    }

    /// Ends all failing.
    pub(crate) fn heal(&self) {
        self.state.lock().unwrap().failing.clear();
    }

    /// Mounts something that is no tree of a store.
    pub(crate) fn mount_foreign(&self, target: &Path) {
        let point = MountPoint {
            target: target.to_owned(),
            root: "/".into(),
            fs_type: "tmpfs".into(),
            read_only: false,
            shared: false,
        };
        let id = FolderId { device: 0, inode: 0 };
        self.state.lock().unwrap().mounts.push((point, id));
    }

    /// Lets the server of the mount at `target` die.
    pub(crate) fn kill(&self, target: &Path) {
        self.state.lock().unwrap().dead.push(target.to_owned());
    }

    fn check(&self, method: &'static str) -> Result<(), MountError> {
        match self.state.lock().unwrap().failing.get(method) {
            Some(kind) => Err(MountError::new(method, io::Error::from(*kind))),
            None => Ok(()),
        }
    }
}

impl Mounter for FakeMounter {
    fn identify(&self, tree: &Tree) -> Result<FolderId, MountError> {
        self.check("identify")?;
        let mut folder = tree.rootfs.clone();
        if !folder.is_dir() {
            return Err(MountError::TreeGone(folder));
        }
        for part in tree.path.iter().flat_map(super::ImagePath::as_path) {
            folder.push(part);
            let why = match fs::symlink_metadata(&folder) {
                Err(_) => "is not there",
                Ok(meta) if meta.is_symlink() => "is reached through a symbolic link",
                Ok(meta) if !meta.is_dir() => "is not a folder",
                Ok(_) => continue,
            };
            let path = tree.path.as_ref().map(ToString::to_string).unwrap_or_default();
            return Err(MountError::NotInImage { path, why });
        }
        let meta = fs::metadata(&folder).map_err(|e| MountError::new("stat", e))?;
        Ok(FolderId { device: meta.dev(), inode: meta.ino() })
    }

    fn mount_tree(&self, tree: &Tree, target: &Path, _: MountOptions) -> Result<(), MountError> {
        let id = self.identify(tree)?;
        self.check("mount_tree")?;
        let meta = fs::symlink_metadata(target).map_err(|e| MountError::new("mount at", e))?;
        if !meta.is_dir() {
            return Err(MountError::new("mount at", io::Error::from(io::ErrorKind::NotADirectory)));
        }
        let root = match &tree.path {
            Some(path) => tree.rootfs.join(path.as_path()),
            None => tree.rootfs.clone(),
        };
        let point = MountPoint {
            target: target.to_owned(),
            root,
            fs_type: "fake".into(),
            read_only: true,
            shared: false,
        };
        self.state.lock().unwrap().mounts.push((point, id));
        Ok(())
    }

    fn unmount(&self, target: &Path) -> Result<(), MountError> {
        self.check("unmount")?;
        let mut state = self.state.lock().unwrap();
        state.mounts.retain(|(point, _)| point.target != target);
        state.dead.retain(|dead| dead != target);
        Ok(())
    }

    fn state(&self, target: &Path) -> Result<TargetState, MountError> {
        self.check("state")?;
        let state = self.state.lock().unwrap();
        if state.dead.iter().any(|dead| dead == target) {
            return Ok(TargetState::Dead);
        }
        if let Some((point, id)) = state.mounts.iter().rfind(|(point, _)| point.target == target) {
            return Ok(TargetState::Mounted { id: *id, read_only: point.read_only });
        }
        Ok(match fs::symlink_metadata(target) {
            Err(_) => TargetState::Absent,
            Ok(meta) if meta.is_symlink() => TargetState::Occupied("a symbolic link"),
            Ok(meta) if !meta.is_dir() => TargetState::Occupied("a file"),
            Ok(_) => match fs::read_dir(target).unwrap().next() {
                None => TargetState::Empty,
                Some(_) => TargetState::Occupied("a folder with something in it"),
            },
        })
    }

    fn under(&self, prefix: &Path) -> Result<Vec<MountPoint>, MountError> {
        self.check("under")?;
        let state = self.state.lock().unwrap();
        let points = state.mounts.iter().map(|(point, _)| point.clone());
        Ok(points.filter(|point| point.target.starts_with(prefix)).collect())
    }
}
