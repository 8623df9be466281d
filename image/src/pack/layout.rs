//! Writing an image into an OCI layout folder.
//!
//! ```text
//! .pack-XXXXXX ─ hashed while written, fsync ─► blobs/sha256/<hex> ─► … ─► index.json by rename
//! ```
//!
//! One writer at a time, by a lock on the folder; so what an interrupted writer left
//! (`.pack-*`) can be removed by the next. Readers need no lock: they see the old
//! `index.json` or the new one, whose blobs are all there. Blobs of a manifest that
//! lost its tag stay; nothing here collects them.

use std::collections::BTreeMap;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures_util::StreamExt as _;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde_json::{Value, json};
use sha2::Digest as _;
use tempfile::NamedTempFile;

use super::base::{Base, BaseLayer};
use super::document::{self, DoneLayer};
use super::plan::Plan;
use super::tar::LayerReader;
use super::{Meter, PackError, PackOptions, PackPhase, Packed};
use crate::digest::Digest;
use crate::manifest::Blob;
use crate::source::MAX_MANIFEST_BYTES;
use crate::source::layout::{REF_NAME, blob_path};

const TEMPORARY: &str = ".pack-";

/// What is written.
pub(super) struct What<'a> {
    pub(super) plan: &'a Plan,
    pub(super) base: Option<&'a Base>,
    pub(super) annotations: BTreeMap<String, String>,
}

/// Writes the planned image; `tag` names it in `index.json`. Reads the base through the runtime that it is called
/// from, on a thread that may block.
pub(super) fn write(
    folder: &Path,
    tag: Option<&str>,
    What { plan, base, annotations }: What<'_>,
    options: &PackOptions,
    stopped: &Arc<AtomicBool>,
) -> Result<Packed, PackError> {
    let layout = Writer::open(folder)?;
    let mut readers = Vec::new();
    for layer in &plan.layers {
        readers.push((layer, LayerReader::new(layer)?));
    }
    let own: u64 = readers.iter().map(|(_, reader)| reader.size()).sum();
    let total = own + base.map_or(0, Base::bytes);
    let meter = Meter::new(options, stopped, PackPhase::Writing, total);
    let mut layers = Vec::new();
    if let Some(base) = base {
        for layer in &base.layers {
            layout.base_layer(base, layer, &meter)?;
        }
    }
    for (layer, mut reader) in readers {
        let (digest, size) = layout.layer(&mut reader, &meter)?;
        layers.push(DoneLayer { digest, size, description: layer.description() });
    }
    let invalid = |source: serde_json::Error| layout.io(source.into());
    let config = document::config(base, &layers, &options.platform).map_err(invalid)?;
    let manifest = document::manifest(base, &config, &layers, annotations).map_err(invalid)?;
    layout.blob(&config.bytes, &config.digest)?;
    layout.blob(&manifest.bytes, &manifest.digest)?;
    layout.sync("blobs/sha256")?;
    let mut entry = json!({
        "mediaType": document::MANIFEST_TYPE,
        "digest": manifest.digest,
        "size": manifest.bytes.len(),
        "platform": options.platform,
    });
    if let Some(tag) = tag {
        entry["annotations"] = json!({ REF_NAME: tag });
    }
    layout.name(tag, entry)?;
    Ok(Packed {
        digest: manifest.digest,
        layers: base.map_or(0, |base| base.layers.len()) + layers.len(),
        bytes: total,
    })
}

/// The layout folder, locked.
struct Writer<'a> {
    folder: &'a Path,
    _lock: File,
}

impl<'a> Writer<'a> {
    fn open(folder: &'a Path) -> Result<Self, PackError> {
        let fail = |source| PackError::Io { path: folder.to_owned(), source };
        let refuse = |why: &str| PackError::Destination {
            destination: format!("oci:{}", folder.display()),
            why: why.into(),
        };
        std::fs::create_dir_all(folder).map_err(fail)?;
        let lock = File::open(folder).map_err(fail)?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(refuse("another process packs into it; try again when that has ended"));
            }
            Err(error) => return Err(fail(error.into())),
        }
        let marker = folder.join("oci-layout");
        let fresh = !marker.exists();
        for entry in std::fs::read_dir(folder).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                std::fs::remove_file(entry.path()).map_err(fail)?;
            } else if fresh
                && !["blobs", "index.json"].iter().any(|name| entry.file_name() == *name)
            {
                // A marker is written after the folder is made, so a crash leaves `blobs` at most.
                return Err(refuse(
                    "the folder holds other files and is no OCI layout; name an empty or new one",
                ));
            }
        }
        let writer = Self { folder, _lock: lock };
        std::fs::create_dir_all(folder.join("blobs/sha256")).map_err(fail)?;
        if fresh {
            writer.replace("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        Ok(writer)
    }

    /// Reads the layer once: hashed while it is written.
    fn layer(&self, reader: &mut LayerReader, meter: &Meter) -> Result<(Digest, u64), PackError> {
        let mut hash = sha2::Sha256::new();
        let mut file = self.temporary()?;
        let mut size = 0;
        while let Some(chunk) = reader.next_chunk()? {
            hash.update(&chunk);
            file.write_all(&chunk).map_err(|source| self.io(source))?;
            size += chunk.len() as u64;
            meter.add(chunk.len() as u64)?;
        }
        let digest = Digest::from_sha256(hash.finalize().into());
        self.keep(file, &digest, size)?;
        Ok((digest, size))
    }

    /// Copies a layer of the base, unless it is there.
    fn base_layer(&self, base: &Base, layer: &BaseLayer, meter: &Meter) -> Result<(), PackError> {
        let Blob { digest, size } = layer.blob;
        let there = self.folder.join(blob_path(&digest)).symlink_metadata();
        if there.is_ok_and(|there| there.is_file() && there.len() == size) {
            return meter.add(size);
        }
        let runtime = tokio::runtime::Handle::current();
        loop {
            let mut hash = sha2::Sha256::new();
            let mut file = self.temporary()?;
            let mut stream = base.open(layer);
            let mut copied = 0;
            while let Some(chunk) = runtime.block_on(stream.next()) {
                let chunk = chunk.map_err(|error| base.fail(error.to_string()))?;
                hash.update(&chunk);
                file.write_all(&chunk).map_err(|source| self.io(source))?;
                copied += chunk.len() as u64;
                meter.add(chunk.len() as u64)?;
                if copied > size {
                    break;
                }
            }
            if Digest::from_sha256(hash.finalize().into()) == digest && copied == size {
                return self.keep(file, &digest, size);
            }
            // A mirror that lied is not asked again.
            if !base.distrust(layer) {
                let why = format!("layer {digest}: the source served other bytes");
                return Err(base.fail(why));
            }
        }
    }

    fn blob(&self, bytes: &[u8], digest: &Digest) -> Result<(), PackError> {
        let mut file = self.temporary()?;
        file.write_all(bytes).map_err(|source| self.io(source))?;
        self.keep(file, digest, bytes.len() as u64)
    }

    /// Gives a written file its name, unless a blob of that name and size is there.
    fn keep(&self, file: NamedTempFile, digest: &Digest, size: u64) -> Result<(), PackError> {
        let path = self.folder.join(blob_path(digest));
        let io = |source| PackError::Io { path: path.clone(), source };
        match path.symlink_metadata() {
            Ok(there) if there.is_file() && there.len() == size => return Ok(()),
            _ => {}
        }
        file.as_file().sync_data().map_err(io)?;
        file.persist(&path).map_err(|error| io(error.error))?;
        Ok(())
    }

    /// Puts `entry` into `index.json`, instead of the one that had the tag. Everything else
    /// that stands there is kept, also what this program does not know.
    fn name(&self, tag: Option<&str>, entry: Value) -> Result<(), PackError> {
        let path = self.folder.join("index.json");
        let refuse = |why: &str| PackError::Destination {
            destination: path.display().to_string(),
            why: why.into(),
        };
        let mut index = match std::fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "manifests": [],
            }),
            Ok(metadata) if metadata.len() > MAX_MANIFEST_BYTES => {
                return Err(refuse("too large; name another folder"));
            }
            _ => {
                let text = std::fs::read(&path).map_err(|source| self.io(source))?;
                serde_json::from_slice::<Value>(&text)
                    .map_err(|_| refuse("no valid index; name another folder"))?
            }
        };
        let manifests = index
            .get_mut("manifests")
            .and_then(Value::as_array_mut)
            .ok_or_else(|| refuse("no list of manifests in it; name another folder"))?;
        let tag_of = |entry: &Value| -> Option<String> {
            Some(entry.get("annotations")?.get(REF_NAME)?.as_str()?.to_owned())
        };
        manifests.retain(|there| {
            // The same manifest under another tag stays, too.
            tag_of(there).as_deref() != tag
        });
        manifests.push(entry);
        let text = serde_json::to_vec(&index).map_err(|source| self.io(source.into()))?;
        self.replace("index.json", &text)
    }

    fn replace(&self, name: &str, text: &[u8]) -> Result<(), PackError> {
        let path = self.folder.join(name);
        let io = |source| PackError::Io { path: path.clone(), source };
        let mut file = self.temporary()?;
        file.write_all(text).and_then(|()| file.as_file().sync_all()).map_err(io)?;
        file.persist(&path).map_err(|error| io(error.error))?;
        self.sync("")
    }

    fn temporary(&self) -> Result<NamedTempFile, PackError> {
        tempfile::Builder::new()
            .prefix(TEMPORARY)
            // As other programs' layouts are: for all to read, less the umask.
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(self.folder)
            .map_err(|source| self.io(source))
    }

    fn sync(&self, folder: &str) -> Result<(), PackError> {
        let path = self.folder.join(folder);
        let io = |source| PackError::Io { path: path.clone(), source };
        File::open(&path).and_then(|folder| folder.sync_all()).map_err(io)
    }

    fn io(&self, source: io::Error) -> PackError {
        PackError::Io { path: self.folder.to_owned(), source }
    }
}
