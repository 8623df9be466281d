//! Making room: removing an image, and collecting what nobody uses any more.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::error::{Context as _, StoreError};
use super::ingest::remove_tree;
use super::record::Lock;
use super::{LayerRecord, RecordKind, Store, trees};
use crate::digest::Digest;

/// A pull that nobody went on with for so long is given up, and its bytes with it.
const PARTIAL_LAYER_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// What a collection freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Number of objects removed.
    pub objects: u64,
    /// Their disk blocks.
    pub bytes: u64,
}

impl Store {
    /// Removes an image and the references to it; its objects go with the next [`Store::collect`].
    ///
    /// Returns `false` when there is no such image.
    ///
    /// # Errors
    ///
    /// [`StoreError::InUse`] while a volume shows it.
    pub fn remove(&self, digest: &Digest) -> Result<bool, StoreError> {
        #[derive(Deserialize)]
        struct Holder {
            digest: Digest,
        }
        let removed = {
            let _exclusive = Lock::exclusive(&self.path("lock"))?;
            let holders: Vec<(String, Holder)> = self.records(RecordKind::Volumes).list()?;
            if let Some((volume, _)) = holders.iter().find(|(_, holder)| holder.digest == *digest) {
                return Err(StoreError::InUse(format!(
                    "image {digest} is mounted as volume {volume}: stop the pods that use it first"
                )));
            }
            let removed = trees::detach(self, digest)?;
            self.access_records().remove(&digest.hex())?;
            for (name, record) in self.ref_records().list::<super::RefRecord>()? {
                if record.image == *digest {
                    self.ref_records().remove(&name)?;
                }
            }
            removed
        };
        match removed {
            Some(path) => remove_tree(&path).map(|()| true),
            None => Ok(false),
        }
    }

    /// Removes every object that neither a tree nor a pull in flight uses.
    pub fn collect(&self) -> Result<Collected, StoreError> {
        self.drop_old_partial_layers()?;
        let _exclusive = Lock::exclusive(&self.path("lock"))?;
        self.drop_unused_views()?;
        let leased = self.leased()?;
        let mut kept: BTreeSet<OsString> = BTreeSet::new();
        let mut records = Vec::new();
        for name in self.layer_records().names()? {
            // A damaged record protects nothing and goes: its layer is pulled again.
            let record: Option<LayerRecord> = self.layer_records().get(&name).unwrap_or_default();
            let Some(record) = record else {
                self.layer_records().remove(&name)?;
                continue;
            };
            if leased.contains(&record.digest) {
                kept.extend(record.objects().map(|(id, _)| OsString::from(id.to_string())));
            }
            records.push((name, record));
        }

        let mut collected = Collected::default();
        self.walk_objects(|path, meta| {
            let name = path.file_name().unwrap_or_default();
            if meta.nlink() > 1 || kept.contains(name) {
                return Ok(());
            }
            match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(e).context(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
            collected.objects += 1;
            collected.bytes += meta.blocks() * 512;
            Ok(())
        })?;

        // A record of what is not here any more would only mislead.
        self.drop_access_without_image()?;
        for (name, record) in records {
            if !record.objects().all(|(id, size)| self.has_object(&id, size)) {
                self.layer_records().remove(&name)?;
            }
        }
        Ok(collected)
    }

    fn drop_old_partial_layers(&self) -> Result<(), StoreError> {
        let ingest = self.path("ingest");
        let what = || format!("read {}", ingest.display());
        for entry in fs::read_dir(&ingest).context(what)? {
            let entry = entry.context(what)?;
            let name = entry.file_name();
            let Some(digest) = name.to_str().and_then(|name| Digest::from_hex(name).ok()) else {
                continue;
            };
            let age = entry
                .metadata()
                .and_then(|meta| meta.modified())
                .ok()
                .and_then(|at| SystemTime::now().duration_since(at).ok());
            if age.is_some_and(|age| age > PARTIAL_LAYER_AGE)
                && let Some(ingest) = self.ingest(&digest)?
            {
                ingest.discard()?;
            }
        }
        Ok(())
    }
}
