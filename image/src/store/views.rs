//! Views: some of an image's files, as a tree of its own.
//!
//! ```text
//! trees/<image>/views/<name>/rootfs/    hard links to the image's files
//!                           /view.json  how many they are
//! ```
//!
//! A view belongs to its image and goes with it; before that, when no volume's record names it
//! any more and somebody collects. It is made once for each name, complete when it has the name.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::error::{Context as _, StoreError};
use super::ingest::remove_tree;
use super::record::{self, Lock};
use super::trees::EPOCH;
use super::{RecordKind, Store};
use crate::digest::Digest;

/// How often a view that another worker makes is looked at.
const OTHER_WORKER_POLL: Duration = Duration::from_millis(10);

/// What a view shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Sum of the sizes of its files.
    pub bytes: u64,
    /// Number of regular files.
    pub files: u64,
}

/// What a volume's record says of the view that it needs.
#[derive(Deserialize)]
struct Holder {
    digest: Digest,
    #[serde(default)]
    view: Option<Digest>,
}

impl Store {
    /// The directory that a pod sees of a view.
    pub fn view_rootfs(&self, image: &Digest, name: &Digest) -> PathBuf {
        self.view_folder(image, name).join("rootfs")
    }

    fn view_folder(&self, image: &Digest, name: &Digest) -> PathBuf {
        self.tree(image).join("views").join(name.hex())
    }

    /// Makes the view `name` of the files below `path` of the image for which `keep` is true,
    /// unless it is there. `keep` gets paths relative to `path`, of files and symbolic links.
    ///
    /// A record that names the view must have been written before. `path` must be relative,
    /// and lead through no symbolic link.
    ///
    /// # Errors
    ///
    /// [`StoreError::Corrupt`] when the image or `path` is not there.
    pub fn view(
        &self,
        image: &Digest,
        name: &Digest,
        path: &Path,
        keep: impl Fn(&Path) -> bool,
    ) -> Result<View, StoreError> {
        let folder = self.view_folder(image, name);
        // Names of views are made by others: their right of way is taken under this one.
        let right = Digest::of(format!("{image} {name}").as_bytes());
        loop {
            if let Some(view) = record::read(&folder.join("view.json"))? {
                return Ok(view);
            }
            let Some(ingest) = self.ingest(&right)? else {
                std::thread::sleep(OTHER_WORKER_POLL);
                continue;
            };
            if folder.exists() {
                ingest.discard()?;
                continue;
            }
            ingest.clear()?;
            let made = self
                .build_view(ingest.folder(), &self.rootfs(image).join(path), &keep)
                .and_then(|view| self.name_view(ingest.folder(), &folder).map(|()| view));
            ingest.discard()?;
            return made;
        }
    }

    fn build_view(
        &self,
        staging: &Path,
        from: &Path,
        keep: &impl Fn(&Path) -> bool,
    ) -> Result<View, StoreError> {
        if from.components().any(|part| part == Component::ParentDir) || !from.is_dir() {
            return Err(StoreError::Corrupt(format!("{} is no folder of a tree", from.display())));
        }
        let rootfs = staging.join("rootfs");
        fs::create_dir(&rootfs).context(|| format!("create {}", rootfs.display()))?;
        let mut view = View::default();
        for entry in walkdir::WalkDir::new(from).follow_links(false).sort_by_file_name() {
            let entry = entry.map_err(io::Error::from).context(|| walk(from))?;
            let Ok(inside) = entry.path().strip_prefix(from) else { continue };
            if entry.file_type().is_dir() || !keep(inside) {
                continue;
            }
            let to = rootfs.join(inside);
            let what = || format!("link {}", to.display());
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).context(what)?;
            }
            if entry.file_type().is_file() {
                view.bytes += entry.metadata().map_err(io::Error::from).context(what)?.len();
                view.files += 1;
            }
            link(entry.path(), &to).context(what)?;
        }
        // As in the image, whatever the umask.
        for entry in walkdir::WalkDir::new(&rootfs).contents_first(true) {
            let entry = entry.map_err(io::Error::from).context(|| walk(&rootfs))?;
            if entry.file_type().is_dir() {
                super::trees::normal_folder(entry.path()).context(|| walk(entry.path()))?;
            }
        }
        let json = serde_json::to_vec(&view)
            .map_err(|e| StoreError::Corrupt(format!("a view of {}: {e}", from.display())))?;
        let path = staging.join("view.json");
        fs::write(&path, json).context(|| format!("write {}", path.display()))?;
        let staged = fs::File::open(staging).context(|| format!("open {}", staging.display()))?;
        rustix::fs::syncfs(&staged).context(|| format!("sync {}", staging.display()))?;
        Ok(view)
    }

    fn name_view(&self, staging: &Path, folder: &Path) -> Result<(), StoreError> {
        let what = || format!("rename {} to {}", staging.display(), folder.display());
        let views = folder.parent().unwrap_or(folder);
        let _shared = Lock::shared(&self.path("lock"))?;
        match fs::create_dir(views) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e).context(what),
            _ => {}
        }
        fs::rename(staging, folder).context(what)?;
        record::sync_dir(views)
    }

    /// Removes views that no volume's record names. Under the exclusive lock.
    pub(super) fn drop_unused_views(&self) -> Result<(), StoreError> {
        let mut holders: Option<Vec<Holder>> = None;
        for image in self.tree_digests()? {
            let views = self.tree(&image).join("views");
            let Ok(entries) = fs::read_dir(&views) else { continue };
            let holders = match &mut holders {
                Some(holders) => holders,
                none => {
                    let records = self.records(RecordKind::Volumes).list::<Holder>()?;
                    none.insert(records.into_iter().map(|(_, holder)| holder).collect())
                }
            };
            for entry in entries {
                let path = entry.context(|| walk(&views))?.path();
                let name = path.file_name().and_then(|name| Digest::from_hex(name.to_str()?).ok());
                let held = holders.iter().any(|held| held.digest == image && held.view == name);
                if name.is_none() || !held {
                    remove_tree(&path)?;
                }
            }
        }
        Ok(())
    }
}

fn walk(path: &Path) -> String {
    format!("read {}", path.display())
}

/// One more name for a file or a symbolic link.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::linkat(CWD, from, CWD, to, AtFlags::empty()) {
        // ext4 allows 65,000 names for an inode: behind them a copy serves as well.
        Err(Errno::MLINK) => {
            fs::copy(from, to)?;
            rustix::fs::utimensat(CWD, to, &EPOCH, AtFlags::empty())?;
            Ok(())
        }
        other => Ok(other?),
    }
}
