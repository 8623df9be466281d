//! Manifests: from the bytes a source served to a plan of layers.
//!
//! In: raw bytes that already match their digest. Out: either an [`Index`] to
//! choose a platform from, or an [`ImageManifest`] whose every digest, size and
//! media type has been checked. What is not understood is refused by name
//! before a byte of it is fetched.

use std::fmt;

use oci_spec::image as oci;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::source::RawManifest;

/// More layers than any packaging makes (one a file, of the largest models),
/// and few enough that a hostile manifest costs nothing.
const MAX_LAYERS: usize = 8192;

/// Config blobs hold history lines, not weights.
pub const MAX_CONFIG_BYTES: u64 = 8 * 1024 * 1024;

const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_MANIFEST_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1";

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

/// Manifests of one image, a platform each.
#[derive(Debug, Clone)]
pub struct Index {
    digest: Digest,
    entries: Vec<IndexEntry>,
}

#[derive(Debug, Clone)]
struct IndexEntry {
    digest: Digest,
    platform: Option<Platform>,
}

/// Operating system and processor architecture, in Go's names: `linux/amd64`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    pub os: String,
    /// `amd64`, `arm64`, …
    pub architecture: String,
}

impl Default for Platform {
    /// The machine this runs on.
    fn default() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned() }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
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
    /// Lowest first.
    pub layers: Vec<Layer>,
}

/// A family of media types that carries models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Packaging {
    /// An OCI image: a "modelcar".
    OciImage,
    /// A Docker image, manifest version 2.
    DockerImage,
}

impl fmt::Display for Packaging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OciImage => "oci-image",
            Self::DockerImage => "docker-image",
        })
    }
}

/// A blob's name and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// SHA-256 of the bytes as they travel.
    pub digest: Digest,
    /// Their number.
    pub size: u64,
}

/// A layer as the manifest declares it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// The bytes as they travel.
    pub blob: Blob,
    /// How these are compressed.
    pub compression: Compression,
}

/// Compression of a layer's tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// A plain tar: what weights should be, since bf16 does not compress.
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
            (true, false) => {
                let index: oci::ImageIndex = serde_json::from_slice(&raw.bytes)
                    .map_err(|e| refuse(format!("index: {e}")))?;
                Ok(Self::Index(Index::new(digest, &index)?))
            }
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

impl Index {
    fn new(digest: Digest, index: &oci::ImageIndex) -> Result<Self, ManifestError> {
        let entries = index
            .manifests()
            .iter()
            .map(|entry| {
                Ok(IndexEntry {
                    digest: blob(digest, entry)?.digest,
                    platform: entry.platform().as_ref().map(|p| Platform {
                        os: p.os().to_string(),
                        architecture: p.architecture().to_string(),
                    }),
                })
            })
            .collect::<Result<_, ManifestError>>()?;
        Ok(Self { digest, entries })
    }

    /// The manifest for `platform`; an entry that names no platform serves where none does.
    ///
    /// # Errors
    ///
    /// When there is none: the message lists what there is.
    pub fn choose(&self, platform: &Platform) -> Result<Digest, ManifestError> {
        let exact = self.entries.iter().find(|e| e.platform.as_ref() == Some(platform));
        let any = || self.entries.iter().find(|e| e.platform.is_none());
        exact.or_else(any).map(|e| e.digest).ok_or_else(|| {
            let mut there: Vec<_> = self
                .entries
                .iter()
                .filter_map(|e| e.platform.as_ref())
                // Build attestations ride along as unknown/unknown.
                .filter(|p| p.os != "unknown")
                .map(ToString::to_string)
                .collect();
            there.dedup();
            let why = format!("no image for {platform}; there is: {}", there.join(", "));
            ManifestError { digest: self.digest, why }
        })
    }
}

impl ImageManifest {
    fn new(digest: Digest, manifest: &oci::ImageManifest) -> Result<Self, ManifestError> {
        let refuse = |why: String| ManifestError { digest, why };
        let config_type = manifest.config().media_type().to_string();
        let packaging = match config_type.as_str() {
            OCI_CONFIG => Packaging::OciImage,
            DOCKER_CONFIG => Packaging::DockerImage,
            _ => {
                let what =
                    manifest.artifact_type().as_ref().map_or(config_type, ToString::to_string);
                return Err(refuse(format!(
                    "artifact of type {what} is not supported: expected an OCI or Docker image"
                )));
            }
        };
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
        let layers = manifest
            .layers()
            .iter()
            .map(|layer| {
                let media_type = layer.media_type().to_string();
                let compression = compression(&media_type).ok_or_else(|| {
                    refuse(format!(
                        "layer {}: media type {media_type} is not supported",
                        layer.digest()
                    ))
                })?;
                Ok(Layer { blob: blob(digest, layer)?, compression })
            })
            .collect::<Result<Vec<_>, ManifestError>>()?;
        layers
            .iter()
            .try_fold(0_u64, |sum, layer| sum.checked_add(layer.blob.size))
            .filter(|sum| *sum < 1 << 60)
            .ok_or_else(|| refuse("the layers' sizes add up to more than an exbibyte".into()))?;
        Ok(Self { digest, packaging, config, layers })
    }

    /// Bytes of all layers as they travel, a layer that is named twice counted once.
    pub fn download_bytes(&self) -> u64 {
        let mut seen = std::collections::BTreeSet::new();
        self.layers.iter().filter(|l| seen.insert(l.blob.digest)).map(|l| l.blob.size).sum()
    }
}

/// The digests of the layers' tars, lowest first, from a config blob that
/// already matches its digest.
///
/// # Errors
///
/// When the config is unreadable, or names another number of layers.
pub fn diff_ids(manifest: &ImageManifest, config: &[u8]) -> Result<Vec<Digest>, ManifestError> {
    let refuse = |why: String| ManifestError { digest: manifest.digest, why };
    // Only this part is read: tools disagree on the rest of a config.
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Vec<Digest>,
    }
    let config: Config = serde_json::from_slice(config)
        .map_err(|e| refuse(format!("config {}: {e}", manifest.config.digest)))?;
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() != manifest.layers.len() {
        return Err(refuse(format!(
            "{} layers, but its config names {} diff_ids",
            manifest.layers.len(),
            diff_ids.len()
        )));
    }
    Ok(diff_ids)
}

fn blob(manifest: Digest, descriptor: &oci::Descriptor) -> Result<Blob, ManifestError> {
    let digest =
        descriptor.digest().to_string().parse().map_err(|e: crate::digest::InvalidDigest| {
            ManifestError { digest: manifest, why: e.to_string() }
        })?;
    Ok(Blob { digest, size: descriptor.size() })
}

fn compression(media_type: &str) -> Option<Compression> {
    let (kind, suffix) = match media_type {
        "application/vnd.docker.image.rootfs.diff.tar.gzip"
        | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip" => {
            return Some(Compression::Gzip);
        }
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => return Some(Compression::Zstd),
        _ => media_type.split_once('+').unwrap_or((media_type, "")),
    };
    match kind {
        "application/vnd.oci.image.layer.v1.tar"
        | "application/vnd.oci.image.layer.nondistributable.v1.tar"
        | "application/vnd.docker.image.rootfs.diff.tar" => match suffix {
            "" => Some(Compression::None),
            "gzip" => Some(Compression::Gzip),
            "zstd" => Some(Compression::Zstd),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn digest(n: u8) -> String {
        Digest::of(&[n]).to_string()
    }

    fn parse(value: &Value) -> Result<Manifest, ManifestError> {
        let bytes = serde_json::to_vec(value).unwrap().into();
        Manifest::parse(&RawManifest { media_type: String::new(), bytes })
    }

    fn image(config_type: &str, layer_types: &[&str]) -> Value {
        let layers: Vec<_> = layer_types
            .iter()
            .enumerate()
            .map(|(n, t)| json!({"mediaType": t, "digest": digest(n as u8), "size": 10 * (n + 1)}))
            .collect();
        json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": config_type, "digest": digest(200), "size": 7},
            "layers": layers,
        })
    }

    #[test]
    fn layers_of_images_are_known_by_media_type() {
        let value = image(
            OCI_CONFIG,
            &[
                "application/vnd.oci.image.layer.v1.tar",
                "application/vnd.oci.image.layer.v1.tar+gzip",
                "application/vnd.oci.image.layer.v1.tar+zstd",
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
            ],
        );
        let Manifest::Image(image) = parse(&value).unwrap() else { panic!("not an image") };
        let compressions: Vec<_> = image.layers.iter().map(|l| l.compression).collect();
        use Compression::{Gzip, None, Zstd};
        assert_eq!(compressions, [None, Gzip, Zstd, Gzip]);
        assert_eq!(image.packaging, Packaging::OciImage);
        assert_eq!(image.download_bytes(), 100);
    }

    #[test]
    fn a_layer_named_twice_is_downloaded_once() {
        let mut value = image(OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"; 2]);
        value["layers"][1] = value["layers"][0].clone();
        let Manifest::Image(image) = parse(&value).unwrap() else { panic!("not an image") };
        assert_eq!((image.layers.len(), image.download_bytes()), (2, 10));
    }

    #[test]
    fn what_is_not_an_image_is_refused_by_its_media_type() {
        let why = |value: &Value| parse(value).unwrap_err().to_string();
        let unknown = image("application/vnd.example.thing.v1+json", &[]);
        assert!(
            why(&unknown).contains("application/vnd.example.thing.v1+json"),
            "{}",
            why(&unknown)
        );
        let layer = image(OCI_CONFIG, &["application/x-rar"]);
        assert!(
            why(&layer).ends_with("media type application/x-rar is not supported"),
            "{}",
            why(&layer)
        );
        let mut both = image(OCI_CONFIG, &[]);
        both["manifests"] = json!([]);
        assert!(why(&both).ends_with("has both layers and manifests"));
        assert!(why(&json!({})).contains("neither layers nor manifests"));
        let mut huge = image(OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"; 2]);
        huge["layers"][0]["size"] = json!(u64::MAX);
        assert!(why(&huge).contains("exbibyte"), "{}", why(&huge));
        let mut sha512 = image(OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"]);
        sha512["layers"][0]["digest"] = json!(format!("sha512:{}", "a".repeat(128)));
        assert!(why(&sha512).contains("only sha256"), "{}", why(&sha512));
    }

    #[test]
    fn an_index_gives_this_platform_or_lists_what_it_has() {
        let entry = |n: u8, os: &str, arch: &str| {
            json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": digest(n),
                   "size": 1, "platform": {"os": os, "architecture": arch}})
        };
        let value = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [
            entry(1, "linux", "arm64"), entry(2, "linux", "amd64"), entry(3, "unknown", "unknown")]});
        let Manifest::Index(index) = parse(&value).unwrap() else { panic!("not an index") };
        let platform = |arch: &str| Platform { os: "linux".into(), architecture: arch.into() };
        assert_eq!(index.choose(&platform("amd64")).unwrap().to_string(), digest(2));
        let why = index.choose(&platform("riscv64")).unwrap_err().to_string();
        assert!(
            why.ends_with("no image for linux/riscv64; there is: linux/arm64, linux/amd64"),
            "{why}"
        );
    }

    #[test]
    fn a_config_must_name_a_diff_id_for_each_layer() {
        let value = image(OCI_CONFIG, &["application/vnd.oci.image.layer.v1.tar"]);
        let Manifest::Image(image) = parse(&value).unwrap() else { panic!("not an image") };
        let config =
            |ids: &[String]| serde_json::to_vec(&json!({"rootfs": {"diff_ids": ids}})).unwrap();
        assert_eq!(diff_ids(&image, &config(&[digest(9)])).unwrap(), [digest(9).parse().unwrap()]);
        assert!(
            diff_ids(&image, &config(&[]))
                .unwrap_err()
                .to_string()
                .contains("1 layers, but its config names 0")
        );
        assert!(diff_ids(&image, b"{}").is_err());
    }
}
