//! Claims: who serves which image of a store, so that it is not removed meanwhile.
//!
//! ```text
//! <store>/volumes/<name>.json   the record, which keeps the image
//! <store>/mounts/<name>.log     locked by the server for as long as it lives; its log
//! ```
//!
//! The lock comes before the record. So a record whose log is gone or not locked is of a
//! server that ends or died, and whoever comes across it removes it.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, bail};
use carport_csi::volume::VolumeRecord;
use carport_image::store::{RecordKind, Records};
use carport_image::{Digest, Store};

/// How our records are named; those of pods' volumes are named in hex.
const PREFIX: &str = "mount-";

/// A name that no other server has or had.
pub(super) fn new_name() -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{PREFIX}{}-{}", std::process::id(), now.as_nanos())
}

/// The log of a server; its folder is made.
pub(super) fn file(root: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let folder = root.join("mounts");
    let made = DirBuilder::new().recursive(true).mode(0o700).create(&folder);
    made.with_context(|| format!("make {}", folder.display()))?;
    Ok(folder.join(format!("{name}.log")))
}

/// Where `digest` is served by a process that lives.
pub(in crate::commands) fn served_at(
    store: &Store,
    digest: &Digest,
) -> anyhow::Result<Option<PathBuf>> {
    let living = Claims::of(store).living()?;
    let found = living.into_iter().find(|claim| claim.digest == *digest);
    Ok(found.map(|claim| claim.target.as_path().to_owned()))
}

/// The claims on a store's images.
pub(super) struct Claims {
    store: Store,
    records: Records,
}

impl Claims {
    pub(super) fn of(store: &Store) -> Self {
        Self { store: store.clone(), records: store.records(RecordKind::Volumes) }
    }

    /// Keeps the image that `record` names until the claim is dropped or this process ends.
    ///
    /// # Errors
    ///
    /// Also when the image has been removed a moment ago.
    pub(super) fn claim(&self, name: &str, record: &VolumeRecord) -> anyhow::Result<Claim> {
        let claim = self.claim_arriving(name, record)?;
        // A removal either saw the record or was done before this look.
        if self.store.image(&record.digest)?.is_none() {
            bail!("{}: removed from the store meanwhile; run it again", record.image);
        }
        Ok(claim)
    }

    /// As [`Claims::claim`], for an image that a pull of this process is bringing: it keeps the image
    /// from the moment in which that is complete.
    pub(super) fn claim_arriving(
        &self,
        name: &str,
        record: &VolumeRecord,
    ) -> anyhow::Result<Claim> {
        let path = file(self.store.root(), name)?;
        let what = || format!("lock {}", path.display());
        let lock = File::options().create(true).append(true).open(&path).with_context(what)?;
        lock.try_lock().with_context(what)?;
        let claim = Claim { records: self.records.clone(), name: name.into(), path, _lock: lock };
        self.records.put(name, record)?;
        Ok(claim)
    }

    /// The claims of servers that live. Those of dead ones are removed.
    pub(super) fn living(&self) -> anyhow::Result<Vec<VolumeRecord>> {
        let mut living = Vec::new();
        for (name, record) in self.records.list::<VolumeRecord>()? {
            if !name.starts_with(PREFIX) {
                continue;
            }
            let path = file(self.store.root(), &name)?;
            if is_locked(&path).with_context(|| format!("look at {}", path.display()))? {
                living.push(record);
            } else {
                self.records.remove(&name)?;
                remove(&path);
            }
        }
        Ok(living)
    }
}

fn is_locked(path: &Path) -> io::Result<bool> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    // Shared, so that two who look at the same time do not take each other for the server.
    match file.try_lock_shared() {
        Ok(()) => Ok(false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "left a log behind");
        }
        _ => {}
    }
}

/// An image that is kept.
pub(super) struct Claim {
    records: Records,
    name: String,
    path: PathBuf,
    _lock: File,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The record last: who waits for it to go finds nothing left of this server.
        remove(&self.path);
        if let Err(error) = self.records.remove(&self.name) {
            tracing::warn!(name = %self.name, %error, "left a record behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use carport_csi::mount::MountOptions;
    use carport_csi::volume::{TargetPath, VolumeId};

    use super::*;

    fn record(name: &str) -> VolumeRecord {
        VolumeRecord {
            volume_id: VolumeId::parse(name).unwrap(),
            target: TargetPath::parse("/mnt/model").unwrap(),
            image: "registry.example/model:v1".parse().unwrap(),
            digest: Digest::of(b"image"),
            path: None,
            filter: None,
            view: None,
            stream: false,
            options: MountOptions::default(),
            bytes: 1,
            files: 1,
            pin_seconds: None,
            pod: None,
            published_at: SystemTime::now(),
        }
    }

    #[test]
    fn what_is_not_stored_cannot_be_claimed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let name = new_name();
        assert!(Claims::of(&store).claim(&name, &record(&name)).is_err());
        assert_eq!(Claims::of(&store).living().unwrap(), []);
        assert_eq!(fs::read_dir(dir.path().join("mounts")).unwrap().count(), 0);
    }

    #[test]
    fn a_claim_lasts_as_long_as_its_lock() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let digest = Digest::of(b"image");
        let name = new_name();
        store.records(RecordKind::Volumes).put(&name, &record(&name)).unwrap();
        let path = file(store.root(), &name).unwrap();
        let lock = File::create(&path).unwrap();
        lock.lock().unwrap();
        let target = Some(PathBuf::from("/mnt/model"));
        assert_eq!(served_at(&store, &digest).unwrap(), target);
        assert!(store.remove(&digest).is_err());
        assert_eq!(served_at(&store, &Digest::of(b"other")).unwrap(), None);

        drop(lock);
        assert_eq!(served_at(&store, &digest).unwrap(), None);
        assert!(!path.exists());
        assert!(!store.remove(&digest).unwrap(), "nothing in the way, and nothing there");
    }

    #[test]
    fn volumes_of_pods_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let records = store.records(RecordKind::Volumes);
        records.put("0123abcd", &record("pv")).unwrap();
        assert_eq!(Claims::of(&store).living().unwrap(), []);
        assert_eq!(records.list::<VolumeRecord>().unwrap().len(), 1);
    }
}
