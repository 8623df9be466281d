//! The store: one file for each distinct content, trees of hard links to them.
//!
//! ```text
//! <root>/                         0700, since models may be private
//!   format                        version; a newer one is refused
//!   lock                          flock: shared to commit, exclusive to collect or remove
//!   admission                     flock: whoever counts the room and makes some
//!   objects/ab/<blake3>[.x]       a file's content: 0444 (0555 with .x), never changed once named
//!   layers/<sha256>.json          what a layer unpacked to; <sha256>.file.json where it was read as
//!                                 one raw file, .file-gzip and .file-zstd where that was compressed;
//!                                 .as-<diff_id> where only the diff_id proved it
//!   trees/<sha256>/rootfs/        hard links to objects: what a pod sees
//!                  tree.json      sizes and layers; manifest.json, config.json as they travelled
//!                  used           its time is the image's last use
//!                  damaged          here where the image counts as absent until a pull mends it
//!                  views/<sha256>/rootfs/   some of its files, for volumes that choose
//!   refs/<sha256>.json            reference → manifest; named by the hash of the reference
//!   access/<sha256>.json          who has been found to have a right to an image
//!   pins/<image>.<owner>.json     images that stay because somebody wishes it
//!   reservations/  rates/         room promised to what is to come; how fast registries have been
//!   ingest/<sha256>/              a layer or tree on its way, with <sha256>.lock beside it
//!   volumes/  leases/             small records
//!   scrub.json                    how far the verification is that goes round and round
//!   mounts/                       logs of the processes that serve FUSE mounts, locked while they live
//! ```
//!
//! The file system is the database. An object's reference count is its link
//! count: with one link nobody uses it, with more the container runtime alone may
//! ([`crate::runtime`]), and what images' layers name decides. What an image needs is complete when
//! its tree has its name, and a name is only ever taken by `rename`.
//!
//! # What always holds
//!
//! - **Only verified bytes have a name.** A layer's files enter `objects/` after
//!   the layer's digest and diff_id matched.
//! - **A crash costs time, not correctness.** Each step is a rename or can be
//!   done again; [`Store::open`] finishes or drops what it finds half done.
//! - **Processes may share a store.** The daemon and the command line work on
//!   one root at the same time; locks are `flock`, so a dead owner holds none.
//!
//! # Locks
//!
//! `admission`, then `ingest/<sha256>.lock` (one worker a layer), then `lock`; never the other way round,
//! but that a layer which expands asks for admission: the right to a layer is only ever tried, not waited for.
//!
//! All functions block on the disk: call them from `spawn_blocking` or a thread of your own.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, ObjectId};
use crate::manifest::{Layer, Packaging, Platform};
use crate::reference::Reference;
use crate::tree::{Attributes, LayerEntry};

mod access;
mod capacity;
mod collect;
mod error;
mod evict;
mod holdings;
mod ingest;
mod last_use;
mod lease;
mod objects;
mod outlook;
mod overlay;
mod pins;
mod rates;
mod record;
mod repair;
mod reservations;
mod scrub;
mod sizes;
mod told;
mod trees;
mod verify;
mod views;

pub(crate) use access::{AccessRecord, Standing};
pub(crate) use capacity::Admission;
pub use capacity::{Fits, Held, Limits, Promised, Room, Space};
pub use collect::Collected;
pub use error::StoreError;
pub use evict::{Evicted, EvictedImage, EvictionCount, Reason};
pub use holdings::ImageUsage;
pub(crate) use holdings::Wanted;
pub(crate) use ingest::Ingest;
pub(crate) use lease::Lease;
pub(crate) use objects::Staged;
pub use outlook::Survey;
pub(crate) use overlay::Whole;
pub use pins::{InvalidOwner, Owner, Pin, PinRequest};
pub use record::Records;
pub(crate) use repair::Repair;
pub use reservations::Reservation;
pub use scrub::ScrubRecord;
pub(crate) use sizes::{BySize, Candidate, MIN_FILE_BYTES, Sizes};
pub(crate) use trees::{EPOCH, NewTree, object_mode};
pub(crate) use verify::{Checker, Fault, Part, TreeFault};
pub use verify::{VerifyControl, VerifyProgress};
pub use views::View;

use error::Context as _;

/// The version that this program reads and writes.
const FORMAT: &str = "carport store 1\n";

/// A handle to a store; clones share it.
#[derive(Clone, Debug)]
pub struct Store {
    root: Arc<PathBuf>,
    limits: Limits,
    counted: Arc<capacity::Counted>,
    evictions: Arc<evict::Evictions>,
}

/// A complete image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredImage {
    /// The image manifest of one platform; names the tree.
    pub digest: Digest,
    /// References that point to it, sorted.
    pub references: Vec<String>,
    /// How the model was packed.
    pub packaging: Packaging,
    /// Sum of the sizes of all files in the tree.
    pub unpacked_bytes: u64,
    /// Number of regular files in the tree.
    pub files: u64,
    /// Lowest first.
    pub layers: Vec<StoredLayer>,
    /// When the tree was made.
    pub pulled_at: SystemTime,
}

/// A layer of a stored image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredLayer {
    /// The blob as it travelled.
    pub digest: Digest,
    /// Its length in bytes.
    pub size_bytes: u64,
    /// SHA-256 of it uncompressed.
    pub diff_id: Digest,
}

/// What the store takes, as a walk of `objects/` finds it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Size of the file system that the store is on.
    pub capacity_bytes: u64,
    /// What this user can still write there.
    pub free_bytes: u64,
    /// Disk blocks of all objects.
    pub object_bytes: u64,
    /// Number of objects.
    pub objects: u64,
    /// Disk blocks of objects that no tree uses.
    pub unused_bytes: u64,
    /// Sum of the images' unpacked sizes: what they would take without sharing.
    pub image_bytes: u64,
}

/// The kinds of small records that other rooms keep here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordKind {
    /// Published volumes. A record's field `digest` keeps that image from [`Store::remove`],
    /// its field `view` that view of it from [`Store::collect`].
    Volumes,
}

/// What a layer unpacked to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LayerRecord {
    pub(crate) digest: Digest,
    pub(crate) size_bytes: u64,
    pub(crate) diff_id: Digest,
    pub(crate) entries: Vec<LayerEntry>,
    #[serde(default)]
    pub(crate) attributes: Attributes,
}

impl LayerRecord {
    /// The objects it needs; empty files have none.
    pub(crate) fn objects(&self) -> impl Iterator<Item = (ObjectId, u64)> {
        self.entries.iter().filter_map(|entry| match entry {
            LayerEntry::File { object, size, .. } if *size > 0 => Some((*object, *size)),
            _ => None,
        })
    }
}

/// Where a reference points.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RefRecord {
    pub(crate) reference: String,
    /// The digest that the source gave: of an index or a manifest.
    pub(crate) resolved: Digest,
    pub(crate) platform: Platform,
    /// The image manifest chosen from it.
    pub(crate) image: Digest,
    pub(crate) resolved_at: SystemTime,
}

impl Store {
    /// Opens the store at `root`, made when it is absent, and finishes or drops
    /// what a crash left half done.
    ///
    /// # Errors
    ///
    /// [`StoreError::Format`] when a newer version made it.
    pub fn open(root: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let root = root.into();
        fs::create_dir_all(&root).context(|| format!("create {}", root.display()))?;
        let store = Self {
            root: Arc::new(root),
            limits: Limits::default(),
            counted: Arc::default(),
            evictions: Arc::default(),
        };
        match fs::read_to_string(store.path("format")) {
            Ok(text) if text == FORMAT => {}
            Ok(text) => {
                return Err(StoreError::Format(format!(
                    "store {} has format {:?}, this carport reads {:?}: run the version that made it, \
                     or use another --root",
                    store.root.display(),
                    text.trim(),
                    FORMAT.trim(),
                )));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => store.create()?,
            Err(e) => return Err(e).context(|| format!("read {}", store.path("format").display())),
        }
        // Stores of earlier versions have none.
        for name in ["access", "pins", "reservations", "rates"] {
            let path = store.path(name);
            fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
        }
        let admission = store.path("admission");
        if !admission.exists() {
            record::write(&admission, b"")?;
        }
        store.recover()?;
        Ok(store)
    }

    fn create(&self) -> Result<(), StoreError> {
        if let Some(stranger) = fs::read_dir(self.root())
            .context(|| format!("read {}", self.root.display()))?
            .flatten()
            .find(|entry| entry.file_name() != "lost+found" && !self.is_own(&entry.file_name()))
        {
            return Err(StoreError::Format(format!(
                "{} is not a carport store and not empty (it holds {:?}): use another --root",
                self.root.display(),
                stranger.file_name(),
            )));
        }
        // The kubelet makes a missing host path for everybody to read.
        fs::set_permissions(self.root(), fs::Permissions::from_mode(0o700))
            .context(|| format!("chmod {}", self.root.display()))?;
        for name in ["layers", "trees", "refs", "ingest", "volumes", "leases"] {
            let path = self.path(name);
            fs::create_dir_all(&path).context(|| format!("create {}", path.display()))?;
        }
        objects::create(self)?;
        record::write(&self.path("lock"), b"")?;
        // Last: with it the store is complete.
        record::write(&self.path("format"), FORMAT.as_bytes())
    }

    fn is_own(&self, name: &std::ffi::OsStr) -> bool {
        // What a creation that was cut off may have left.
        const OWN: [&str; 13] = [
            "objects",
            "layers",
            "trees",
            "refs",
            "access",
            "pins",
            "reservations",
            "rates",
            "ingest",
            "volumes",
            "leases",
            "lock",
            "admission",
        ];
        name.to_str().is_some_and(|name| OWN.contains(&name) || name.starts_with(".tmp"))
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The directory that a pod sees of a stored image: hard links, never changed.
    pub fn rootfs(&self, digest: &Digest) -> PathBuf {
        self.tree(digest).join("rootfs")
    }

    /// As [`Store::image`], without a look at all references: for the path of a publish.
    pub(crate) fn image_unnamed(&self, digest: &Digest) -> Result<Option<StoredImage>, StoreError> {
        Ok(self.tree_record(digest)?.map(|tree| tree.into_image(Vec::new())))
    }

    /// The image with this manifest digest, when it is complete.
    pub fn image(&self, digest: &Digest) -> Result<Option<StoredImage>, StoreError> {
        let Some(tree) = self.tree_record(digest)? else { return Ok(None) };
        let mut references: Vec<_> = self
            .refs()?
            .into_iter()
            .filter(|record| record.image == *digest)
            .map(|record| record.reference)
            .collect();
        references.sort();
        Ok(Some(tree.into_image(references)))
    }

    /// All complete images, sorted by digest.
    pub fn images(&self) -> Result<Vec<StoredImage>, StoreError> {
        let mut references: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for record in self.refs()? {
            references.entry(record.image).or_default().push(record.reference);
        }
        let mut images = Vec::new();
        for digest in self.tree_digests()? {
            // Another process may remove it between the two looks.
            // And one damaged record must not hide the other images.
            let tree = match self.tree_record(&digest) {
                Err(StoreError::Corrupt(why)) => {
                    tracing::error!(%why, "skipped a damaged image");
                    None
                }
                tree => tree?,
            };
            if let Some(tree) = tree {
                let mut references = references.remove(&digest).unwrap_or_default();
                references.sort();
                images.push(tree.into_image(references));
            }
        }
        images.sort_by_key(|image| image.digest);
        Ok(images)
    }

    /// The stored image that `reference` means here, without asking anybody.
    ///
    /// A digest reference means that image; a tag means what it was resolved to last.
    pub fn lookup(&self, reference: &Reference) -> Result<Option<Digest>, StoreError> {
        let known = self.reference(reference)?.map(|record| record.image);
        for digest in known.into_iter().chain(reference.digest()) {
            if self.tree_record(&digest)?.is_some() {
                return Ok(Some(digest));
            }
        }
        Ok(None)
    }

    pub(crate) fn reference(&self, reference: &Reference) -> Result<Option<RefRecord>, StoreError> {
        self.ref_records().get_sound(&ref_name(&reference.to_string()))
    }

    pub(crate) fn put_reference(&self, record: &RefRecord) -> Result<(), StoreError> {
        self.ref_records().put(&ref_name(&record.reference), record)
    }

    fn refs(&self) -> Result<Vec<RefRecord>, StoreError> {
        Ok(self.ref_records().list()?.into_iter().map(|(_, record)| record).collect())
    }

    fn ref_records(&self) -> Records {
        Records::new(self.path("refs"))
    }

    /// What `layer` unpacked to, when all of it is still here.
    pub(crate) fn layer(&self, layer: &Layer) -> Result<Option<LayerRecord>, StoreError> {
        let record: Option<LayerRecord> = self.layer_records().get_sound(&layer.record_name())?;
        Ok(record.filter(|record| record.objects().all(|(id, size)| self.has_object(&id, size))))
    }

    /// As [`Store::layer`], for an image that says what the layer unpacks to: also what only that
    /// proved.
    pub(crate) fn layer_as(
        &self,
        layer: &Layer,
        diff_id: Option<&Digest>,
    ) -> Result<Option<LayerRecord>, StoreError> {
        if let Some(record) = self.layer(layer)? {
            return Ok(Some(record));
        }
        let Some(diff_id) = diff_id else { return Ok(None) };
        let name = layer.record_name_as(diff_id);
        let record: Option<LayerRecord> = self.layer_records().get_sound(&name)?;
        Ok(record.filter(|record| record.objects().all(|(id, size)| self.has_object(&id, size))))
    }

    fn layer_records(&self) -> Records {
        Records::new(self.path("layers"))
    }

    /// Small durable records of another room.
    pub fn records(&self, kind: RecordKind) -> Records {
        match kind {
            // Written under the shared lock, so that no image goes between the
            // look of `remove` and its deed.
            RecordKind::Volumes => Records::locked(self.path("volumes"), self.path("lock")),
        }
    }
}

/// References hold slashes and may be longer than a file name: the hash is the name.
fn ref_name(reference: &str) -> String {
    Digest::of(reference.as_bytes()).hex()
}

#[cfg(test)]
#[path = "store/tests.rs"]
mod tests;
