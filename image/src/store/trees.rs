//! Trees on the disk: a folder of hard links an image, complete once it has its name.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::SystemTime;

use rustix::fs::{AtFlags, Mode, OFlags, Timestamps};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::error::{Context as _, StoreError};
use super::ingest::remove_tree;
use super::record::{self, Lock};
use super::{Store, StoredImage, StoredLayer, last_use};
use crate::crash;
use crate::digest::{Digest, ObjectId};
use crate::manifest::Packaging;
use crate::tree::{Node, Tree};

/// What becomes an image in the store.
pub(crate) struct NewTree<'a> {
    pub(crate) digest: Digest,
    pub(crate) packaging: Packaging,
    pub(crate) layers: Vec<StoredLayer>,
    pub(crate) tree: &'a Tree,
    /// As it travelled; its digest is the image's name.
    pub(crate) manifest: &'a [u8],
    /// As it travelled.
    pub(crate) config: &'a [u8],
}

/// `tree.json`.
#[derive(Serialize, Deserialize)]
pub(super) struct TreeRecord {
    digest: Digest,
    packaging: Packaging,
    unpacked_bytes: u64,
    files: u64,
    layers: Vec<StoredLayer>,
    pulled_at: SystemTime,
}

impl TreeRecord {
    pub(super) fn into_image(self, references: Vec<String>) -> StoredImage {
        StoredImage {
            digest: self.digest,
            references,
            packaging: self.packaging,
            unpacked_bytes: self.unpacked_bytes,
            files: self.files,
            layers: self.layers,
            pulled_at: self.pulled_at,
        }
    }
}

impl Store {
    pub(super) fn tree(&self, digest: &Digest) -> PathBuf {
        self.path("trees").join(digest.hex())
    }

    pub(super) fn tree_record(&self, digest: &Digest) -> Result<Option<TreeRecord>, StoreError> {
        if self.is_marked(digest) {
            return Ok(None);
        }
        record::read(&self.tree(digest).join("tree.json"))
    }

    pub(super) fn tree_digests(&self) -> Result<Vec<Digest>, StoreError> {
        let trees = self.path("trees");
        let what = || format!("read {}", trees.display());
        let mut digests = Vec::new();
        for entry in fs::read_dir(&trees).context(what)? {
            let name = entry.context(what)?.file_name();
            digests.extend(name.to_str().and_then(|name| Digest::from_hex(name).ok()));
        }
        Ok(digests)
    }

    /// Links a tree's files together under a name of its own, on the disk when this returns.
    ///
    /// Returns `false` while another worker makes the same tree.
    ///
    /// # Errors
    ///
    /// [`StoreError::Corrupt`] when an object is gone: its layer must be pulled again.
    pub(crate) fn commit_tree(&self, new: &NewTree<'_>) -> Result<bool, StoreError> {
        let Some(ingest) = self.ingest(&new.digest)? else { return Ok(false) };
        if self.tree_record(&new.digest)?.is_some() {
            ingest.discard()?;
            return Ok(true);
        }
        if self.rootfs(&new.digest).is_dir() {
            // Damage. Pods may read the tree: it is mended where it stands.
            self.mend(new)?;
            ingest.discard()?;
            return Ok(true);
        }
        ingest.clear()?;
        let staging = ingest.folder().to_owned();
        let built = self.build(new, &ingest);
        match built {
            Ok(()) => {}
            Err(e) => {
                ingest.discard()?;
                return Err(e);
            }
        }
        crash::point("tree: built");
        let target = self.tree(&new.digest);
        {
            let _shared = Lock::shared(&self.path("lock"))?;
            // What stands there without a readable record is damage, and makes room.
            let damaged = detach(self, &new.digest)?;
            fs::rename(&staging, &target)
                .context(|| format!("rename {} to {}", staging.display(), target.display()))?;
            damaged.as_deref().map(remove_tree).transpose()?;
        }
        crash::point("tree: named");
        record::sync_dir(&self.path("trees"))?;
        ingest.discard()?;
        Ok(true)
    }

    /// Makes what stands under the image's name what it must be, and its records new.
    fn mend(&self, new: &NewTree<'_>) -> Result<(), StoreError> {
        self.mend_tree(&new.digest, new.tree.root())?;
        let files = new.tree.files();
        let record = TreeRecord {
            digest: new.digest,
            packaging: new.packaging,
            unpacked_bytes: files.iter().map(|(_, size, _)| size).sum(),
            files: files.len() as u64,
            layers: new.layers.clone(),
            pulled_at: SystemTime::now(),
        };
        let json = serde_json::to_vec(&record)
            .map_err(|e| StoreError::Corrupt(format!("tree {}: {e}", new.digest)))?;
        let folder = self.tree(&new.digest);
        for (name, bytes) in
            [("manifest.json", new.manifest), ("config.json", new.config), ("tree.json", &json[..])]
        {
            record::write(&folder.join(name), bytes)?;
            crash::point("mend: a record is written");
        }
        self.unmark(&new.digest)
    }

    fn build(&self, new: &NewTree<'_>, ingest: &super::Ingest) -> Result<(), StoreError> {
        let staging = ingest.folder();
        let rootfs = staging.join("rootfs");
        fs::create_dir(&rootfs).context(|| format!("create {}", rootfs.display()))?;
        let mut links = Links::new(self)?;
        let root = open_dir(&rootfs).context(|| format!("open {}", rootfs.display()))?;
        links.fill(root.as_fd(), new.tree.root(), "")?;
        let record = TreeRecord {
            digest: new.digest,
            packaging: new.packaging,
            unpacked_bytes: links.unpacked_bytes,
            files: links.files,
            layers: new.layers.clone(),
            pulled_at: SystemTime::now(),
        };
        let json = serde_json::to_vec(&record)
            .map_err(|e| StoreError::Corrupt(format!("tree {}: {e}", new.digest)))?;
        for (name, bytes) in [
            ("tree.json", &json[..]),
            ("manifest.json", new.manifest),
            ("config.json", new.config),
            (last_use::FILE, b""),
        ] {
            let path = staging.join(name);
            fs::write(&path, bytes).context(|| format!("write {}", path.display()))?;
        }
        // One flush for ten thousand links and the four files; an fsync a directory would cost a
        // journal commit each.
        let staged = File::open(staging).context(|| format!("open {}", staging.display()))?;
        rustix::fs::syncfs(&staged).context(|| format!("sync {}", staging.display()))
    }
}

/// Fills folders with links to objects.
pub(super) struct Links {
    objects: OwnedFd,
    unpacked_bytes: u64,
    files: u64,
}

impl Links {
    pub(super) fn new(store: &Store) -> Result<Self, StoreError> {
        let objects = store.path("objects");
        let objects = open_dir(&objects).context(|| format!("open {}", objects.display()))?;
        Ok(Self { objects, unpacked_bytes: 0, files: 0 })
    }

    /// Fills a directory that only this process knows, so no name in it can be a surprise.
    pub(super) fn fill(
        &mut self,
        directory: BorrowedFd<'_>,
        children: &BTreeMap<String, Node>,
        prefix: &str,
    ) -> Result<(), StoreError> {
        for (name, node) in children {
            let what = || format!("create {prefix}/{name} in the tree");
            match node {
                Node::Directory(children) => {
                    rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o755))
                        .context(what)?;
                    let child = rustix::fs::openat(
                        directory,
                        name,
                        OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY,
                        Mode::empty(),
                    )
                    .context(what)?;
                    self.fill(child.as_fd(), children, &format!("{prefix}/{name}"))?;
                }
                Node::Symlink(target) => {
                    rustix::fs::symlinkat(target.as_str(), directory, name).context(what)?;
                }
                Node::File { size, object } => {
                    self.unpacked_bytes += size;
                    self.files += 1;
                    self.link(directory, name, *size, object).context(what)?;
                }
            }
        }
        // The same image looks the same on each node and at each pull, whatever the umask.
        let what = || format!("set mode and times of {prefix}/ in the tree");
        rustix::fs::fchmod(directory, Mode::from_raw_mode(0o755)).context(what)?;
        rustix::fs::futimens(directory, &EPOCH).context(what)
    }

    fn link(
        &self,
        directory: BorrowedFd<'_>,
        name: &str,
        size: u64,
        object: &ObjectId,
    ) -> io::Result<()> {
        if size == 0 {
            return self.create(directory, name, object).map(drop);
        }
        let path = object.path();
        match rustix::fs::linkat(&self.objects, &path, directory, name, AtFlags::empty()) {
            Ok(()) => Ok(()),
            // ext4 allows 65,000 names for an inode: behind them a copy serves as well.
            Err(Errno::MLINK) => {
                let mut source = File::from(rustix::fs::openat(
                    &self.objects,
                    &path,
                    OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                    Mode::empty(),
                )?);
                let mut copy = self.create(directory, name, object)?;
                io::copy(&mut source, &mut copy)?;
                rustix::fs::futimens(&copy, &EPOCH)?;
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    /// An ordinary file with an object's attributes. Empty files are always made so: they share
    /// nothing, and images of Python packages hold them by the thousand.
    fn create(&self, directory: BorrowedFd<'_>, name: &str, object: &ObjectId) -> io::Result<File> {
        let file = rustix::fs::openat(
            directory,
            name,
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::from_raw_mode(0o600),
        )?;
        rustix::fs::fchmod(&file, object_mode(object.executable()))?;
        rustix::fs::futimens(&file, &EPOCH)?;
        Ok(File::from(file))
    }
}

/// Times mean nothing in a model image, and a fixed one makes equal trees equal.
pub(crate) const EPOCH: Timestamps = Timestamps {
    last_access: rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 },
    last_modification: rustix::fs::Timespec { tv_sec: 0, tv_nsec: 0 },
};

/// Readable by any pod's user, writable by nobody.
pub(crate) fn object_mode(executable: bool) -> Mode {
    Mode::from_raw_mode(if executable { 0o555 } else { 0o444 })
}

pub(super) fn open_dir(path: &std::path::Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::RDONLY, Mode::empty())
}

/// Gives a folder of a tree the mode and times that all have.
pub(super) fn normal_folder(path: &std::path::Path) -> io::Result<()> {
    let folder = open_dir(path)?;
    rustix::fs::fchmod(&folder, Mode::from_raw_mode(0o755))?;
    Ok(rustix::fs::futimens(&folder, &EPOCH)?)
}

/// Puts a tree out of sight at once; deleting its ten thousand links comes after.
pub(super) fn detach(store: &Store, digest: &Digest) -> Result<Option<PathBuf>, StoreError> {
    let from = store.tree(digest);
    let to = store.path("ingest").join(format!("removed-{}", digest.hex()));
    remove_tree(&to)?;
    match fs::rename(&from, &to) {
        Ok(()) => record::sync_dir(&store.path("trees")).map(|()| Some(to)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e).context(|| format!("remove {}", from.display())),
    }
}
