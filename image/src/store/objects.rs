//! Objects: immutable files named after their content.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::error::{Context as _, StoreError};
use super::{Store, Usage};
use crate::digest::ObjectId;

/// A file that lies in `ingest/`, complete and synced, and waits for its name.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Staged {
    /// File name within the layer's ingest folder.
    pub(crate) name: String,
    pub(crate) object: ObjectId,
    pub(crate) size: u64,
}

/// All 256 fan-out folders at once, so that a commit never has to make one.
pub(super) fn create(store: &Store) -> Result<(), StoreError> {
    for n in 0..=255_u8 {
        let path = store.path("objects").join(format!("{n:02x}"));
        fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
    }
    Ok(())
}

impl Store {
    pub(super) fn object(&self, id: &ObjectId) -> PathBuf {
        self.path("objects").join(id.path())
    }

    pub(super) fn has_object(&self, id: &ObjectId, size: u64) -> bool {
        fs::symlink_metadata(self.object(id)).is_ok_and(|meta| meta.is_file() && meta.len() == size)
    }

    /// Gives a staged file its name, or drops it where the content is here already.
    ///
    /// Done again after a crash it does what is left to do.
    pub(super) fn name_object(&self, folder: &Path, staged: &Staged) -> Result<(), StoreError> {
        let from = folder.join(&staged.name);
        let to = self.object(&staged.object);
        let what = || format!("rename {} to {}", from.display(), to.display());
        if self.has_object(&staged.object, staged.size) {
            return match fs::remove_file(&from) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e).context(what),
                _ => Ok(()),
            };
        }
        // An object of another length is damage: the verified one takes its place.
        fs::rename(&from, &to).context(what)?;
        self.counted.add(staged.size);
        Ok(())
    }

    /// Walks all objects, calling `visit` with each one's path and metadata.
    pub(super) fn walk_objects(
        &self,
        mut visit: impl FnMut(&Path, &fs::Metadata) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let objects = self.path("objects");
        let what = |path: &Path| format!("read {}", path.display());
        for fan in fs::read_dir(&objects).context(|| what(&objects))? {
            let fan = fan.context(|| what(&objects))?.path();
            for entry in fs::read_dir(&fan).context(|| what(&fan))? {
                let entry = entry.context(|| what(&fan))?;
                match entry.metadata() {
                    Ok(meta) => visit(&entry.path(), &meta)?,
                    // Collected by another process since.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                    Err(e) => return Err(e).context(|| what(&entry.path())),
                }
            }
        }
        Ok(())
    }

    /// Counts what the store takes. Costs a `stat` an object.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        let space = rustix::fs::statvfs(self.root())
            .context(|| format!("statvfs {}", self.root().display()))?;
        let mut usage = Usage {
            capacity_bytes: space.f_blocks.saturating_mul(space.f_frsize),
            free_bytes: space.f_bavail.saturating_mul(space.f_frsize),
            image_bytes: self.images()?.iter().map(|image| image.unpacked_bytes).sum(),
            ..Usage::default()
        };
        self.walk_objects(|_, meta| {
            usage.objects += 1;
            usage.object_bytes += meta.blocks() * 512;
            if meta.nlink() == 1 {
                usage.unused_bytes += meta.blocks() * 512;
            }
            Ok(())
        })?;
        self.counted.set(usage.object_bytes);
        Ok(usage)
    }
}
