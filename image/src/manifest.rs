//! Manifests: from the bytes a source served to a plan of layers.
//!
//! In: raw bytes that already match their digest. Out: either an [`Index`] to
//! choose a platform from, or an [`ImageManifest`] whose every digest, size,
//! media type and file name has been checked. What is not understood is refused
//! by name before a byte of it is fetched.
//!
//! Each [`Packaging`] has its own rules of what a layer is and what its files
//! are called; they live in a module each:
//!
//! ```text
//! config's media type ─► image         tars, diff_ids in the config
//!                        modelpack     tars and raw files, paths in annotations
//!                        kitops        tars and raw files, a Kitfile for config
//!                        docker_model  raw files by kind
//!                        files         anything whose layers have titles (ORAS)
//! ```
//!
//! A layer's bytes are one thing and its name in an image another: [`Layer`] is
//! what is fetched and kept, once for all images; [`PlacedLayer`] says where one
//! image puts it.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use oci_spec::image as oci;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::source::RawManifest;
use crate::tree::{LayerEntry, Tree, TreeError};

mod declared;
mod docker_model;
mod files;
mod image;
mod index;
mod kitops;
mod modelpack;

use declared::{Declared, TITLE, name, one_file_a_name};
pub use index::{Index, Platform};

/// More layers than any packaging makes (one a file, of the largest models),
/// and few enough that a hostile manifest costs nothing.
const MAX_LAYERS: usize = 8192;

/// Config blobs hold history lines, not weights.
pub const MAX_CONFIG_BYTES: u64 = 8 * 1024 * 1024;

const DOCKER_MANIFEST_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";

/// Why a manifest cannot be used. Fetching it again will not help.
#[derive(Debug, Clone, thiserror::Error)]
#[error("manifest {digest}: {why}")]
pub struct ManifestError {
    digest: Digest,
    why: String,
}

/// What a manifest's bytes turned out to be.
#[derive(Debug, Clone)]
pub enum Manifest {
    /// One image for several platforms.
    Index(Index),
    /// An image that can be pulled.
    Image(ImageManifest),
}

/// An image: a config blob, and layers from the lowest to the highest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageManifest {
    /// SHA-256 of the manifest, which is the image's identity in the store.
    pub digest: Digest,
    /// How the model is packed.
    pub packaging: Packaging,
    /// The config blob.
    pub config: Blob,
    /// Lowest first. What the config says of them is added by [`ImageManifest::layers_with`].
    pub layers: Vec<PlacedLayer>,
}

/// A family of media types that carries models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Packaging {
    /// An OCI image: a "modelcar".
    OciImage,
    /// A Docker image, manifest version 2.
    DockerImage,
    /// A CNCF ModelPack artifact.
    ModelPack,
    /// A ModelKit of KitOps.
    ModelKit,
    /// A model of Docker's model runner.
    DockerModel,
    /// Any other artifact whose layers are files with titles, as ORAS makes them.
    Files,
}

impl fmt::Display for Packaging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OciImage => "oci-image",
            Self::DockerImage => "docker-image",
            Self::ModelPack => "model-pack",
            Self::ModelKit => "model-kit",
            Self::DockerModel => "docker-model",
            Self::Files => "files",
        })
    }
}

/// A blob's name and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Blob {
    /// SHA-256 of the bytes as they travel.
    pub digest: Digest,
    /// Their number.
    pub size: u64,
}

/// A layer's bytes and how to read them; what is fetched once for all images that name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Layer {
    /// The bytes as they travel.
    pub blob: Blob,
    /// How these are compressed.
    pub compression: Compression,
    /// What is in them.
    pub content: Content,
    /// The digest of its table of contents, where the manifest says one: of zstd:chunked over the
    /// table as it travels, of eStargz over its JSON.
    pub toc: Option<Digest>,
}

impl Layer {
    /// What the store keeps its record under. The same blob may be a tar to one image and a file
    /// to another, and these are two things.
    pub(crate) fn record_name(&self) -> String {
        let hex = self.blob.digest.hex();
        match (self.content, self.compression) {
            (Content::Tar, _) => hex,
            (Content::File, Compression::None) => format!("{hex}.file"),
            (Content::File, Compression::Gzip) => format!("{hex}.file-gzip"),
            (Content::File, Compression::Zstd) => format!("{hex}.file-zstd"),
        }
    }

    /// As [`Layer::record_name`], where not all of the blob was seen and `diff_id` is what its
    /// content was proved by: good for images that say the same diff_id, and for no others.
    pub(crate) fn record_name_as(&self, diff_id: &Digest) -> String {
        format!("{}.as-{}", self.record_name(), diff_id.hex())
    }
}

/// What a layer is, under its compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Content {
    /// An archive of files with names.
    Tar,
    /// One file, whose name the manifest gives.
    File,
}

/// A layer of one image: where its files go, and what they must unpack to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedLayer {
    /// The bytes.
    pub layer: Layer,
    /// As the manifest says it.
    pub media_type: String,
    /// Where its files go.
    pub place: Place,
    /// SHA-256 of the uncompressed content, where the image says one.
    pub diff_id: Option<Digest>,
}

impl PlacedLayer {
    /// The layer and what the image says that it unpacks to: two images may disagree on that.
    pub(crate) fn key(&self) -> (Layer, Option<Digest>) {
        (self.layer, self.diff_id)
    }
}

/// Where in the tree a layer's files go. Paths are relative and clean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A tar's entries stand where they say.
    Root,
    /// A tar's entries stand below this folder.
    Below(String),
    /// A tar's entries stand where they say, and all in this folder.
    Within(String),
    /// A raw layer is the file of this name.
    File(String),
}

impl Place {
    /// Lays a layer's entries over `tree` where they belong.
    pub(crate) fn lay(&self, tree: &mut Tree, entries: &[LayerEntry]) -> Result<(), TreeError> {
        match self {
            Self::Root => tree.apply(entries),
            Self::Below(folder) => tree.apply_below(folder, entries),
            Self::Within(folder) => tree.apply_within(folder, entries),
            Self::File(path) => tree.place_file(path, entries),
        }
    }
}

/// Compression of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Compression {
    /// Plain bytes: what weights should be, since bf16 does not compress.
    None,
    /// RFC 1952, any number of members.
    Gzip,
    /// RFC 8878, any number of frames.
    Zstd,
}

impl Manifest {
    /// Reads a manifest or an index.
    ///
    /// # Errors
    ///
    /// When the bytes are no manifest, or one that cannot be unpacked into
    /// files: the message names the media type.
    pub fn parse(raw: &RawManifest) -> Result<Self, ManifestError> {
        let digest = raw.digest();
        let refuse = |why: String| ManifestError { digest, why };

        // The body decides; the header only helps where the body says nothing.
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Kind {
            media_type: Option<String>,
            manifests: Option<serde::de::IgnoredAny>,
            layers: Option<serde::de::IgnoredAny>,
        }
        let kind: Kind =
            serde_json::from_slice(&raw.bytes).map_err(|e| refuse(format!("not JSON: {e}")))?;
        let media_type = kind.media_type.unwrap_or_else(|| raw.media_type.clone());
        if media_type.starts_with(DOCKER_SCHEMA_1) {
            return Err(refuse(
                "Docker schema 1 is not supported: push the image again with a current tool".into(),
            ));
        }
        let is_index = media_type == OCI_INDEX || media_type == DOCKER_MANIFEST_LIST;
        match (kind.manifests.is_some(), kind.layers.is_some()) {
            // A document that can be read as both is how one digest is made to mean two images.
            (true, true) => Err(refuse("has both layers and manifests".into())),
            (true, false) => Index::read(digest, &raw.bytes).map(Self::Index).map_err(refuse),
            (false, true) if is_index => Err(refuse(format!("{media_type} without manifests"))),
            (false, true) => {
                let manifest: oci::ImageManifest =
                    serde_json::from_slice(&raw.bytes).map_err(|e| refuse(e.to_string()))?;
                Ok(Self::Image(ImageManifest::new(digest, &manifest)?))
            }
            (false, false) => {
                Err(refuse(format!("neither layers nor manifests (media type {media_type:?})")))
            }
        }
    }
}

impl ImageManifest {
    fn new(digest: Digest, manifest: &oci::ImageManifest) -> Result<Self, ManifestError> {
        let refuse = |why: String| ManifestError { digest, why };
        let packaging = Packaging::of(manifest).map_err(refuse)?;
        if manifest.layers().len() > MAX_LAYERS {
            return Err(refuse(format!(
                "{} layers, at most {MAX_LAYERS} are read",
                manifest.layers().len()
            )));
        }
        let config = blob(digest, manifest.config())?;
        if config.size > MAX_CONFIG_BYTES {
            return Err(refuse(format!(
                "config of {} bytes, at most {MAX_CONFIG_BYTES} are read",
                config.size
            )));
        }
        let none = HashMap::new();
        let mut declared = Vec::new();
        for layer in manifest.layers() {
            let media_type = layer.media_type().to_string();
            // What an artifact without content names, since a manifest must have a layer.
            if media_type == EMPTY
                && !matches!(packaging, Packaging::OciImage | Packaging::DockerImage)
            {
                continue;
            }
            declared.push(Declared {
                blob: blob(digest, layer)?,
                media_type,
                annotations: layer.annotations().as_ref().unwrap_or(&none),
            });
        }
        let layers = match packaging {
            Packaging::OciImage | Packaging::DockerImage => {
                declared.iter().map(image::layer).collect()
            }
            Packaging::ModelPack => declared.iter().map(modelpack::layer).collect(),
            Packaging::ModelKit => declared.iter().map(kitops::layer).collect(),
            Packaging::DockerModel => {
                docker_model::layers(manifest.config().media_type().as_ref(), &declared)
            }
            Packaging::Files => declared.iter().map(files::layer).collect(),
        };
        let layers: Vec<PlacedLayer> = layers.map_err(refuse)?;
        layers
            .iter()
            .try_fold(0_u64, |sum, placed| sum.checked_add(placed.layer.blob.size))
            .filter(|sum| *sum < 1 << 60)
            .ok_or_else(|| refuse("the layers' sizes add up to more than an exbibyte".into()))?;
        one_file_a_name(&layers).map_err(refuse)?;
        Ok(Self { digest, packaging, config, layers })
    }

    /// The layers, lowest first, with what the config adds: an image's diff_ids, a ModelKit's paths.
    ///
    /// `config` already matches its digest.
    ///
    /// # Errors
    ///
    /// When the config is unreadable, or speaks of other layers.
    pub fn layers_with(&self, config: &[u8]) -> Result<Vec<PlacedLayer>, ManifestError> {
        let layers = match self.packaging {
            Packaging::OciImage | Packaging::DockerImage => image::complete(&self.layers, config),
            Packaging::ModelKit => kitops::complete(&self.layers, config),
            Packaging::ModelPack | Packaging::DockerModel | Packaging::Files => {
                Ok(self.layers.clone())
            }
        };
        layers.map_err(|why| ManifestError {
            digest: self.digest,
            why: format!("config {}: {why}", self.config.digest),
        })
    }

    /// Bytes of all layers as they travel, a layer that is named twice counted once.
    pub fn download_bytes(&self) -> u64 {
        let mut seen = BTreeSet::new();
        let blobs = self.layers.iter().map(|placed| placed.layer.blob);
        blobs.filter(|blob| seen.insert(blob.digest)).map(|blob| blob.size).sum()
    }
}

impl Packaging {
    fn of(manifest: &oci::ImageManifest) -> Result<Self, String> {
        let config = manifest.config().media_type().to_string();
        let artifact = manifest.artifact_type().as_ref().map(ToString::to_string);
        match config.as_str() {
            image::OCI_CONFIG => return Ok(Self::OciImage),
            image::DOCKER_CONFIG => return Ok(Self::DockerImage),
            kitops::CONFIG => return Ok(Self::ModelKit),
            docker_model::CONFIG_V01 | docker_model::CONFIG_V02 => return Ok(Self::DockerModel),
            _ => {}
        }
        if modelpack::CONFIGS.contains(&config.as_str())
            || artifact.as_deref().is_some_and(|artifact| modelpack::ARTIFACTS.contains(&artifact))
        {
            return Ok(Self::ModelPack);
        }
        // A version to come of a family that is known has rules that are not.
        let families =
            [kitops::FAMILY, docker_model::FAMILY].into_iter().chain(modelpack::FAMILIES);
        let is_new_version = families.clone().any(|family| config.starts_with(family));
        let has_names = manifest.layers().iter().any(|layer| {
            layer.annotations().as_ref().is_some_and(|annotations| name(annotations).is_some())
        });
        if has_names && !is_new_version {
            return Ok(Self::Files);
        }
        // The empty config's type says nothing of the artifact.
        let what = artifact.unwrap_or(config);
        Err(format!(
            "artifact of type {what} is not supported: OCI and Docker images, CNCF ModelPack \
             (v1), KitOps ModelKits (v1), Docker models (v0.1, v0.2), and artifacts whose layers \
             are named by {TITLE} are"
        ))
    }
}

fn blob(manifest: Digest, descriptor: &oci::Descriptor) -> Result<Blob, ManifestError> {
    let digest =
        descriptor.digest().to_string().parse().map_err(|e: crate::digest::InvalidDigest| {
            ManifestError { digest: manifest, why: e.to_string() }
        })?;
    Ok(Blob { digest, size: descriptor.size() })
}

#[cfg(test)]
#[path = "manifest/tests.rs"]
mod tests;
