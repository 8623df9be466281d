//! Making room: removing an image, and collecting what nobody uses any more.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use super::error::{Context as _, StoreError};
use super::ingest::remove_tree;
use super::record::Lock;
use super::{LayerRecord, RecordKind, Store, trees};
use crate::digest::Digest;

/// What a collection freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Number of objects removed.
    pub objects: u64,
    /// Their disk blocks, and those of layers that no pull goes on with.
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
            let volumes = self.records(RecordKind::Volumes);
            for volume in volumes.names()? {
                // A record that cannot be read may be of this image: better an error than a pod
                // whose files vanish.
                let holder: Option<Holder> = volumes.get(&volume)?;
                if holder.is_none_or(|holder| holder.digest != *digest) {
                    continue;
                }
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

    /// Removes every object that neither a tree nor a pull in flight uses, and every partial layer that
    /// no pull is at: who asks for room gets all there is.
    pub fn collect(&self) -> Result<Collected, StoreError> {
        let partial_bytes = self.drop_partial_layers()?;
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

        let mut collected = Collected { objects: 0, bytes: partial_bytes };
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

    /// Gives up layers that nobody works on any more; returns the bytes that were freed.
    fn drop_partial_layers(&self) -> Result<u64, StoreError> {
        let ingest = self.path("ingest");
        let what = || format!("read {}", ingest.display());
        let mut bytes = 0;
        for entry in fs::read_dir(&ingest).context(what)? {
            let name = entry.context(what)?.file_name();
            let Some(digest) = name.to_str().and_then(|name| Digest::from_hex(name).ok()) else {
                continue;
            };
            // One that is locked is being brought in at this moment.
            if let Some(ingest) = self.ingest(&digest)? {
                for file in fs::read_dir(ingest.folder()).context(what)?.flatten() {
                    bytes += file.metadata().map(|meta| meta.blocks() * 512).unwrap_or_default();
                }
                ingest.discard()?;
            }
        }
        Ok(bytes)
    }
}
