//! What the store has, by size: where to look for a file before its bytes are fetched.
//!
//! Held in memory and read from the layers' records, those that came since the last look. What it
//! says is a guess: an object may have gone since, or hold other bytes than the file that is
//! looked for.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::{Context as _, StoreError};
use super::record::{self, Lock};
use super::{LayerRecord, Store};
use crate::crash;
use crate::digest::{Digest, ObjectId};
use crate::tree::LayerEntry;

/// Smaller files are fetched sooner than they are found.
pub(crate) const MIN_FILE_BYTES: u64 = 1024 * 1024;

/// Objects that are remembered; some 20 MB of memory. A node that has more shares what it can.
const MAX_OBJECTS: usize = 100_000;

/// Objects of one size that are looked at: many fine-tunes of one base have them.
const MAX_OF_A_SIZE: usize = 64;

/// An object, and its SHA-256 where that is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) object: ObjectId,
    pub(crate) sha256: Option<Digest>,
}

/// Objects of at least [`MIN_FILE_BYTES`], by size.
pub(crate) type BySize = BTreeMap<u64, Vec<Candidate>>;

/// The index. [`Store::refresh`] keeps it current.
#[derive(Debug, Default)]
pub(crate) struct Sizes {
    /// What each layer's record names.
    layers: HashMap<String, Vec<(u64, Candidate)>>,
    /// SHA-256 of objects that somebody computed.
    computed: HashMap<ObjectId, Digest>,
    by_size: Arc<BySize>,
}

impl Sizes {
    /// Notes the SHA-256 of an object's content.
    pub(crate) fn learn(&mut self, object: ObjectId, sha256: Digest) {
        if self.computed.len() < MAX_OBJECTS {
            self.computed.insert(object, sha256);
            self.index();
        }
    }

    fn index(&mut self) {
        let mut by_size = BySize::new();
        for (size, candidate) in self.layers.values().flatten().take(MAX_OBJECTS) {
            let known = self.computed.get(&candidate.object).copied();
            let candidate = Candidate { sha256: candidate.sha256.or(known), ..*candidate };
            let of_size = by_size.entry(*size).or_default();
            if let Some(other) = of_size.iter_mut().find(|other| other.object == candidate.object) {
                other.sha256 = other.sha256.or(candidate.sha256);
            } else if of_size.len() < MAX_OF_A_SIZE {
                of_size.push(candidate);
            }
        }
        self.by_size = Arc::new(by_size);
    }
}

impl Store {
    /// Brings `sizes` up to date with the layers that are here, and gives what it then says.
    pub(crate) fn refresh(&self, sizes: &mut Sizes) -> Result<Arc<BySize>, StoreError> {
        let records = self.layer_records();
        let names = records.names()?;
        let known = sizes.layers.len();
        sizes.layers.retain(|name, _| names.binary_search(name).is_ok());
        let mut changed = sizes.layers.len() != known;
        for name in names {
            if sizes.layers.contains_key(&name) {
                continue;
            }
            let record = records.get_sound::<LayerRecord>(&name)?;
            sizes
                .layers
                .insert(name, record.map(|record| large_files(&record)).unwrap_or_default());
            changed = true;
        }
        if changed {
            sizes.index();
        }
        Ok(Arc::clone(&sizes.by_size))
    }

    /// A folder for links to objects, removed with all that is in it when dropped, and at the next
    /// start when that could not be.
    pub(crate) fn scratch(&self) -> Result<tempfile::TempDir, StoreError> {
        let ingest = self.path("ingest");
        let made = tempfile::Builder::new().prefix("removed-").tempdir_in(&ingest);
        made.context(|| format!("make a folder in {}", ingest.display()))
    }

    /// Where an object's file is.
    pub(crate) fn object_path(&self, id: &ObjectId) -> PathBuf {
        self.object(id)
    }

    /// Links an object into a layer's ingest folder, where no collection takes it, and gives its
    /// name there; `None` where it has gone, or has all the links that it can have.
    pub(crate) fn link_object(
        &self,
        id: &ObjectId,
        size: u64,
        folder: &Path,
    ) -> Result<Option<String>, StoreError> {
        let name = format!("here-{id}");
        let (from, to) = (self.object(id), folder.join(&name));
        match fs::hard_link(&from, &to) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::TooManyLinks) => {
                return Ok(None);
            }
            Err(e) => return Err(e).context(|| format!("link {}", from.display())),
        }
        crash::point("layer: an object is at hand");
        let there = fs::symlink_metadata(&to);
        let meta = there.context(|| format!("look at {}", to.display()))?;
        Ok((meta.is_file() && meta.size() == size).then_some(name))
    }

    /// Takes away an object whose content is not what its name says; true where it was. Trees that
    /// have it keep it.
    pub(crate) fn drop_if_damaged(&self, id: &ObjectId) -> Result<bool, StoreError> {
        let path = self.object(id);
        let what = || format!("read {}", path.display());
        let mut hasher = blake3::Hasher::new();
        let Ok(meta) = fs::symlink_metadata(&path) else { return Ok(false) };
        let read = crate::layer::FileReader::open(&path, meta.size()).and_then(|mut file| {
            file.read(0..meta.size(), |bytes| {
                hasher.update(bytes);
                true
            })
        });
        match read {
            Ok(()) if ObjectId::new(hasher.finalize(), id.executable()) == *id => return Ok(false),
            Ok(()) => {}
            // A disk that cannot read it any more has lost it.
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(e).context(what),
        }
        let _shared = Lock::shared(&self.path("lock"))?;
        fs::remove_file(&path).context(|| format!("remove {}", path.display()))?;
        path.parent().map(record::sync_dir).transpose()?;
        Ok(true)
    }
}

fn large_files(record: &LayerRecord) -> Vec<(u64, Candidate)> {
    // A raw layer is one file, and what it unpacks to is that file.
    let raw = matches!(&record.entries[..], [LayerEntry::File { path, .. }] if path.is_empty());
    let sha256 = raw.then_some(record.diff_id);
    let large = record.objects().filter(|(_, size)| *size >= MIN_FILE_BYTES);
    large.map(|(object, size)| (size, Candidate { object, sha256 })).collect()
}
