//! A layer on its way in: a locked folder of unnamed files, and the commit that names them.
//!
//! ```text
//! locked ─► files written, synced ─► digests match ─► commit.json ─► renames ─► layers/<sha256>.json
//!    └── checkpoint.json now and then                     └── from here on a crash is finished by `recover`
//! ```

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::error::{Context as _, StoreError};
use super::objects::Staged;
use super::record::{self, Lock};
use super::{LayerRecord, Repair, Store};
use crate::crash;
use crate::digest::Digest;

const COMMIT: &str = "commit.json";
const CHECKPOINT: &str = "checkpoint.json";
/// Of a layer that comes out of order: which of its bytes are here.
const LANDED: &str = "landed.json";

/// The right to bring in one digest; nobody else in any process has it at the same time.
#[derive(Debug)]
pub(crate) struct Ingest {
    store: Store,
    digest: Digest,
    folder: PathBuf,
    lock_path: PathBuf,
    // The lock itself.
    _lock: File,
}

#[derive(Serialize, Deserialize)]
struct Commit {
    /// What the record is kept under.
    name: String,
    record: LayerRecord,
    staged: Vec<Staged>,
}

impl Store {
    /// Takes the right to bring in `digest`; `None` while another worker has it.
    pub(crate) fn ingest(&self, digest: &Digest) -> Result<Option<Ingest>, StoreError> {
        let folder = self.path("ingest").join(digest.hex());
        let lock_path = folder.with_extension("lock");
        let what = || format!("lock {}", lock_path.display());
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .context(what)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(e)) => return Err(e).context(what),
        }
        // The owner before us removes the file before it lets go: then this is a
        // lock on nothing, and the caller tries again.
        let ours = lock.metadata().context(what)?;
        match fs::metadata(&lock_path) {
            Ok(there) if there.ino() == ours.ino() => {}
            Ok(_) => return Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e).context(what),
        }
        fs::create_dir_all(&folder).context(|| format!("create {}", folder.display()))?;
        Ok(Some(Ingest { store: self.clone(), digest: *digest, folder, lock_path, _lock: lock }))
    }

    /// After a crash: finishes commits that were decided, drops trees and
    /// removals that were not, keeps partial layers for their next pull.
    pub(super) fn recover(&self) -> Result<(), StoreError> {
        let ingest = self.path("ingest");
        let what = || format!("read {}", ingest.display());
        for entry in fs::read_dir(&ingest).context(what)? {
            let path = entry.context(what)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if name.starts_with("removed-") {
                remove_tree(&path)?;
                continue;
            }
            let Some(digest) = path.file_stem().and_then(|s| Digest::from_hex(s.to_str()?).ok())
            else {
                continue;
            };
            let Some(ingest) = self.ingest(&digest)? else { continue };
            let commit = match record::read::<Commit>(&ingest.folder.join(COMMIT)) {
                Err(StoreError::Corrupt(why)) => {
                    // Of no use to anybody; and one damaged layer must not close the store.
                    tracing::warn!(%why, "a layer that was cut off has to come again");
                    ingest.discard()?;
                    continue;
                }
                commit => commit?,
            };
            if let Some(commit) = commit {
                ingest.apply(&commit)?;
                ingest.discard()?;
            } else if Repair::finish(self, &ingest)?
                || ![CHECKPOINT, LANDED].iter().any(|name| ingest.folder.join(name).exists())
            {
                ingest.discard()?;
            }
        }
        Ok(())
    }
}

impl Ingest {
    /// Where the layer's files are written, named at will but for the two records.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes room for `bytes` more than the layer was let in with.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`] with the numbers when there is none to be made.
    pub(crate) fn make_room(&self, bytes: u64) -> Result<(), StoreError> {
        self.store.make_room_for(&format!("layer {} expands", self.digest), bytes)
    }

    /// What an interrupted pull left, when it can be gone on from.
    pub(crate) fn checkpoint<T: DeserializeOwned>(&self) -> Option<T> {
        self.left(CHECKPOINT)
    }

    /// What an interrupted pull left of a layer that came out of order.
    pub(crate) fn landed<T: DeserializeOwned>(&self) -> Option<T> {
        self.left(LANDED)
    }

    /// Whether a pull was interrupted that brought the layer in order.
    pub(crate) fn has_checkpoint(&self) -> bool {
        self.folder.join(CHECKPOINT).exists()
    }

    /// Whether one was that brought it out of order.
    pub(crate) fn has_landed(&self) -> bool {
        self.folder.join(LANDED).exists()
    }

    fn left<T: DeserializeOwned>(&self, name: &str) -> Option<T> {
        record::read(&self.folder.join(name)).unwrap_or_else(|why| {
            tracing::warn!(layer = %self.digest, %why, "starting the layer again");
            None
        })
    }

    /// Saves how far the layer is. What it speaks of must be on the disk already.
    pub(crate) fn save_checkpoint<T: Serialize>(&self, value: &T) -> Result<(), StoreError> {
        save(&self.folder.join(CHECKPOINT), value)
    }

    /// As [`Ingest::save_checkpoint`], for [`Ingest::landed`].
    pub(crate) fn save_landed<T: Serialize>(&self, value: &T) -> Result<(), StoreError> {
        save(&self.folder.join(LANDED), value)
    }

    /// Throws away all partial work, keeping the right.
    pub(crate) fn clear(&self) -> Result<(), StoreError> {
        remove_tree(&self.folder)?;
        fs::create_dir_all(&self.folder).context(|| format!("create {}", self.folder.display()))
    }

    /// Throws away all partial work and the right with it.
    pub(crate) fn discard(self) -> Result<(), StoreError> {
        remove_tree(&self.folder)?;
        fs::remove_file(&self.lock_path).context(|| format!("remove {}", self.lock_path.display()))
    }

    /// Names the staged files and records the layer. Everything staged is synced already.
    pub(crate) fn commit(
        self,
        name: String,
        record: LayerRecord,
        staged: Vec<Staged>,
    ) -> Result<(), StoreError> {
        let commit = Commit { name, record, staged };
        let path = self.folder.join(COMMIT);
        let bytes = serde_json::to_vec(&commit)
            .map_err(|e| StoreError::Corrupt(format!("{}: {e}", path.display())))?;
        crash::point("commit: before the decision");
        record::write(&path, &bytes)?;
        crash::point("commit: decided");
        self.apply(&commit)?;
        self.discard()
    }

    fn apply(&self, commit: &Commit) -> Result<(), StoreError> {
        let _shared = Lock::shared(&self.store.path("lock"))?;
        for staged in &commit.staged {
            self.store.name_object(&self.folder, staged)?;
            crash::point("commit: an object has its name");
        }
        self.store.layer_records().put(&commit.name, &commit.record)?;
        crash::point("commit: recorded");
        Ok(())
    }
}

fn save<T: Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let bytes = serde_json::to_vec(value)
        .map_err(|e| StoreError::Corrupt(format!("{}: {e}", path.display())))?;
    record::write(path, &bytes)
}

/// `remove_dir_all` that takes absence for success.
pub(super) fn remove_tree(path: &Path) -> Result<(), StoreError> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
