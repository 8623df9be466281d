//! Making room: removing an image, and collecting what nobody uses any more.
//!
//! ```text
//! image ─► out of sight ─► access, references, pins ─► links deleted      (remove)
//! views, objects, partial layers, records that nobody needs ─► deleted    (collect)
//! ```
//!
//! What a crash leaves of either, the next start or the next collection finds and ends.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::error::{Context as _, StoreError};
use super::ingest::remove_tree;
use super::record::{self, Lock};
use super::{LayerRecord, RecordKind, RefRecord, Store, trees};
use crate::crash;
use crate::digest::Digest;

/// Where records are written under another name first; the store's own folder has some, too.
const RECORD_FOLDERS: [&str; 9] =
    ["", "layers", "refs", "access", "pins", "reservations", "rates", "volumes", "leases"];

/// A record is written in moments, on the slowest of disks in minutes.
const UNFINISHED_AFTER: Duration = Duration::from_secs(600);

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
    /// [`StoreError::InUse`] while a volume shows it or somebody has pinned it.
    pub fn remove(&self, digest: &Digest) -> Result<bool, StoreError> {
        self.remove_unless(digest, || Ok(None))
    }

    /// Removes an image unless a volume, a pin, or `needed` says why not.
    pub(super) fn remove_unless(
        &self,
        digest: &Digest,
        needed: impl FnOnce() -> Result<Option<String>, StoreError>,
    ) -> Result<bool, StoreError> {
        let removed = {
            let _exclusive = Lock::exclusive(&self.path("lock"))?;
            let in_use = |why: String| StoreError::InUse(format!("image {digest} is {why}"));
            if let Some(volume) = self.volume_of(digest)? {
                return Err(in_use(format!(
                    "mounted as volume {volume}: stop the pods that use it first"
                )));
            }
            if let Some(why) = self.pinned_by(digest)? {
                return Err(in_use(why));
            }
            if let Some(why) = needed()? {
                return Err(in_use(why));
            }
            let removed = trees::detach(self, digest)?;
            crash::point("remove: out of sight");
            self.access_records().remove(&digest.hex())?;
            for (name, record) in self.ref_records().list::<RefRecord>()? {
                if record.image == *digest {
                    self.ref_records().remove(&name)?;
                    crash::point("remove: a reference is gone");
                }
            }
            self.drop_pins(digest)?;
            removed
        };
        match removed {
            Some(path) => remove_tree(&path).map(|()| true),
            None => Ok(false),
        }
    }

    /// A volume that shows the image.
    pub(super) fn volume_of(&self, digest: &Digest) -> Result<Option<String>, StoreError> {
        #[derive(Deserialize)]
        struct Holder {
            digest: Digest,
        }
        let volumes = self.records(RecordKind::Volumes);
        for volume in volumes.names()? {
            // A record that cannot be read may be of this image: better an error than a pod
            // whose files vanish.
            let holder: Option<Holder> = volumes.get(&volume)?;
            if holder.is_some_and(|holder| holder.digest == *digest) {
                return Ok(Some(volume));
            }
        }
        Ok(None)
    }

    /// Removes every object that neither a tree nor a pull in flight uses, and every partial layer that
    /// no pull is at: who asks for room gets all there is. An object whose file only the container runtime
    /// still has goes, too, and frees nothing.
    pub fn collect(&self) -> Result<Collected, StoreError> {
        self.collect_but(&BTreeSet::new())
    }

    /// As [`Store::collect`], without what came a moment ago: whoever makes room by itself must not
    /// take from an agent that has just started what its pulls will go on with.
    pub(super) fn collect_idle(&self) -> Result<Collected, StoreError> {
        self.collect_but(&self.young_layers()?)
    }

    /// Layers, whole and partial, that came within the time for which images are kept.
    pub(super) fn young_layers(&self) -> Result<BTreeSet<Digest>, StoreError> {
        let mut young = BTreeSet::new();
        for folder in ["layers", "ingest"] {
            let path = self.path(folder);
            let what = || format!("read {}", path.display());
            for entry in fs::read_dir(&path).context(what)? {
                let entry = entry.context(what)?;
                let Ok(modified) = entry.metadata().and_then(|meta| meta.modified()) else {
                    continue;
                };
                // A time to come is as good as now.
                let age = modified.elapsed().unwrap_or_default();
                let name = entry.file_name();
                let digest = name.to_str().and_then(|name| name.split('.').next());
                if age < self.limits.keep_for
                    && let Some(Ok(digest)) = digest.map(Digest::from_hex)
                {
                    young.insert(digest);
                }
            }
        }
        Ok(young)
    }

    fn collect_but(&self, young: &BTreeSet<Digest>) -> Result<Collected, StoreError> {
        let lock = self.path("lock");
        let mut leased = {
            let _exclusive = Lock::exclusive(&lock)?;
            self.leased()?
        };
        leased.extend(young);
        let partial_bytes = self.drop_partial_layers(&leased)?;
        let _exclusive = Lock::exclusive(&lock)?;
        for damaged in self.drop_damaged_images()? {
            remove_tree(&damaged)?;
        }
        self.drop_unused_views()?;
        let mut leased = self.leased()?;
        leased.extend(young);
        let images = self.layers_of_images()?;
        let (mut kept, mut used) = (BTreeSet::new(), BTreeSet::new());
        let mut records = Vec::new();
        for name in self.layer_records().names()? {
            // A damaged record protects nothing and goes: its layer is pulled again.
            let record: Option<LayerRecord> = self.layer_records().get(&name).unwrap_or_default();
            let Some(record) = record else {
                self.layer_records().remove(&name)?;
                continue;
            };
            let names = || record.objects().map(|(id, _)| OsString::from(id.to_string()));
            if leased.contains(&record.digest) {
                kept.extend(names());
            }
            if images.as_ref().is_some_and(|layers| layers.contains(&record.digest)) {
                used.extend(names());
            }
            records.push((name, record));
        }
        // Only where all is known of what images use can a file that has other names be of no use: one that
        // only the container runtime still has.
        let recorded: BTreeSet<Digest> = records.iter().map(|(_, record)| record.digest).collect();
        let used = images.is_some_and(|layers| layers.is_subset(&recorded)).then_some(used);
        let in_use = |name: &OsStr, links: u64| match &used {
            Some(used) => links > 1 && used.contains(name),
            None => links > 1,
        };

        let mut collected = Collected { objects: 0, bytes: partial_bytes };
        let mut kept_bytes = 0;
        self.walk_objects(|path, meta| {
            let name = path.file_name().unwrap_or_default();
            if in_use(name, meta.nlink()) || kept.contains(name) {
                kept_bytes += meta.blocks() * 512;
                return Ok(());
            }
            match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(e).context(|| format!("remove {}", path.display()));
                }
                _ => {}
            }
            collected.objects += 1;
            // Whoever else has the file keeps its bytes.
            collected.bytes += if meta.nlink() == 1 { meta.blocks() * 512 } else { 0 };
            crash::point("collect: an object is gone");
            Ok(())
        })?;
        self.counted.set(kept_bytes);

        self.drop_unfinished_records()?;
        // A record of what is not here any more would only mislead.
        self.drop_access_without_image()?;
        self.drop_references_without_image()?;
        self.drop_expired_pins()?;
        for (name, record) in records {
            if !record.objects().all(|(id, size)| self.has_object(&id, size)) {
                self.layer_records().remove(&name)?;
            }
        }
        Ok(collected)
    }

    /// Records whose writers were killed before these had their names.
    fn drop_unfinished_records(&self) -> Result<(), StoreError> {
        for folder in RECORD_FOLDERS {
            let folder = self.path(folder);
            let what = || format!("read {}", folder.display());
            for entry in fs::read_dir(&folder).context(what)? {
                let entry = entry.context(what)?;
                let is_unfinished = entry.file_name().as_encoded_bytes().starts_with(b".tmp");
                let modified = entry.metadata().and_then(|meta| meta.modified());
                // One that is young may be somebody's at this moment; so may one of a time to come.
                let age = modified.ok().and_then(|modified| modified.elapsed().ok());
                if is_unfinished && age.is_some_and(|age| age > UNFINISHED_AFTER) {
                    match fs::remove_file(entry.path()) {
                        Err(e) if e.kind() != io::ErrorKind::NotFound => {
                            return Err(e).context(|| format!("remove {}", entry.path().display()));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// The layers of all images; `None` where an image's record cannot be read.
    fn layers_of_images(&self) -> Result<Option<BTreeSet<Digest>>, StoreError> {
        let mut layers = BTreeSet::new();
        for image in self.tree_digests()? {
            match record::read::<trees::TreeRecord>(&self.tree(&image).join("tree.json")) {
                Ok(Some(tree)) => {
                    layers.extend(tree.into_image(Vec::new()).layers.iter().map(|l| l.digest));
                }
                Ok(None) | Err(StoreError::Corrupt(_)) => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some(layers))
    }

    /// What a removal that was cut off has left.
    fn drop_references_without_image(&self) -> Result<(), StoreError> {
        for (name, record) in self.ref_records().list::<RefRecord>()? {
            if !self.tree(&record.image).exists() {
                self.ref_records().remove(&name)?;
            }
        }
        Ok(())
    }

    /// Gives up layers that nobody works on any more, unless a pull that waits for its turn has
    /// `leased` them; returns the bytes that were freed.
    fn drop_partial_layers(&self, leased: &BTreeSet<Digest>) -> Result<u64, StoreError> {
        let ingest = self.path("ingest");
        let what = || format!("read {}", ingest.display());
        let mut bytes = 0;
        for entry in fs::read_dir(&ingest).context(what)? {
            let name = entry.context(what)?.file_name();
            let Some(digest) = name.to_str().and_then(|name| Digest::from_hex(name).ok()) else {
                continue;
            };
            if leased.contains(&digest) {
                continue;
            }
            // One that is locked is being brought in at this moment.
            if let Some(ingest) = self.ingest(&digest)? {
                for file in fs::read_dir(ingest.folder()).context(what)?.flatten() {
                    // A link to an object frees nothing.
                    let own = file.metadata().ok().filter(|meta| meta.nlink() == 1);
                    bytes += own.map_or(0, |meta| meta.blocks() * 512);
                }
                super::Repair::finish(self, &ingest)?;
                ingest.discard()?;
            }
        }
        Ok(bytes)
    }
}
