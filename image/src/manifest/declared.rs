//! A layer's descriptor, and what all packagings make of one: a media type that ends in a format,
//! a name in an annotation.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use super::{Blob, Compression, Content, Layer, Place, PlacedLayer};
use crate::layer::clean_path;

/// ModelPack's annotation for a layer's path, which others took over; and what it was called first.
pub(super) const FILEPATH: &str = "org.cncf.model.filepath";
const FILEPATH_CNAI: &str = "org.cnai.model.filepath";

/// OCI's annotation for a layer's name, with folders where ORAS writes it.
pub(super) const TITLE: &str = "org.opencontainers.image.title";

/// What the digest of a table of contents is annotated as, of eStargz and of zstd:chunked.
const ESTARGZ_TOC: &str = "containerd.io/snapshot/stargz/toc.digest";
const CHUNKED_TOC: &str = "io.github.containers.zstd-chunked.manifest-checksum";

/// A layer's descriptor.
pub(super) struct Declared<'a> {
    pub(super) blob: Blob,
    pub(super) media_type: String,
    pub(super) annotations: &'a HashMap<String, String>,
}

impl Declared<'_> {
    pub(super) fn refuse(&self, why: impl fmt::Display) -> String {
        format!("layer {}: {why}", self.blob.digest)
    }

    pub(super) fn unsupported(&self, supported: &str) -> String {
        let media_type = &self.media_type;
        self.refuse(format!("media type {media_type} is not supported: {supported}"))
    }

    pub(super) fn placed(
        &self,
        content: Content,
        compression: Compression,
        place: Place,
    ) -> PlacedLayer {
        let said = match compression {
            Compression::None => None,
            Compression::Gzip => self.annotations.get(ESTARGZ_TOC),
            Compression::Zstd => self.annotations.get(CHUNKED_TOC),
        };
        let toc = said.and_then(|digest| digest.parse().ok());
        let layer = Layer { blob: self.blob, compression, content, toc };
        PlacedLayer { layer, media_type: self.media_type.clone(), place, diff_id: None }
    }

    /// The path that an annotation gives, held to the rules for a tar's names.
    pub(super) fn path(&self) -> Result<Option<String>, String> {
        let Some(name) = name(self.annotations) else { return Ok(None) };
        match clean_path(name.as_bytes()) {
            Ok(path) if path.is_empty() => Err(self.refuse(format!("the name {name:?} is none"))),
            Ok(path) => Ok(Some(path)),
            Err(why) => Err(self.refuse(why)),
        }
    }

    /// A raw layer, which has no name but the annotation's.
    pub(super) fn file(&self, compression: Compression) -> Result<PlacedLayer, String> {
        let path = self.path()?.ok_or_else(|| {
            let media_type = &self.media_type;
            self.refuse(format!(
                "a file of type {media_type} without a name: neither {FILEPATH} nor {TITLE} is there"
            ))
        })?;
        Ok(self.placed(Content::File, compression, Place::File(path)))
    }

    /// A layer in one of the formats that ModelPack and KitOps share: `tar` or `raw`, with `+gzip`
    /// or `+zstd` behind it.
    pub(super) fn formatted(&self, format: &str) -> Option<Result<PlacedLayer, String>> {
        let (kind, suffix) = format.split_once('+').unwrap_or((format, ""));
        let compression = Compression::of_suffix(suffix)?;
        match kind {
            "tar" => Some(Ok(self.placed(Content::Tar, compression, Place::Root))),
            "raw" => Some(self.file(compression)),
            _ => None,
        }
    }
}

impl Compression {
    /// What stands behind the `+` of a media type; empty for nothing.
    pub(super) fn of_suffix(suffix: &str) -> Option<Self> {
        match suffix {
            "" => Some(Self::None),
            "gzip" => Some(Self::Gzip),
            "zstd" => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// The name that annotations give to a layer. Tools write one or the other, some both.
pub(super) fn name(annotations: &HashMap<String, String>) -> Option<&str> {
    let given =
        |key: &str| annotations.get(key).map(String::as_str).filter(|name| !name.is_empty());
    given(FILEPATH).or_else(|| given(FILEPATH_CNAI)).or_else(|| given(TITLE))
}

/// Refuses two files of one name, and a file where another needs a folder. A layer that is named
/// twice is one file.
pub(super) fn one_file_a_name(layers: &[PlacedLayer]) -> Result<(), String> {
    let mut files: BTreeMap<&str, Layer> = BTreeMap::new();
    for placed in layers {
        let Place::File(path) = &placed.place else { continue };
        match files.insert(path, placed.layer) {
            Some(other) if other != placed.layer => {
                return Err(format!(
                    "layers {} and {} are both the file {path:?}",
                    other.blob.digest, placed.layer.blob.digest
                ));
            }
            _ => {}
        }
    }
    for path in files.keys() {
        let folders = path.match_indices('/').map(|(end, _)| &path[..end]);
        if let Some(folder) = folders.into_iter().find(|folder| files.contains_key(folder)) {
            return Err(format!("{folder:?} is a file, and the folder of the file {path:?}"));
        }
    }
    Ok(())
}
