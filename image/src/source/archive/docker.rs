//! What `docker save` writes: images without manifests, for which manifests are made.
//!
//! ```text
//! manifest.json   [{"Config": "<hex>.json", "RepoTags": ["team/model:v1"], "Layers": ["<hex>/layer.tar", …]}, …]
//! ```
//! <https://github.com/moby/docker-image-spec/blob/main/spec.md>
//!
//! A made manifest names config and layers by digest, is the same each time, and says what docker's
//! own would. Docker's layers are uncompressed: their digests are the config's diff_ids, and hold
//! or not when they are pulled. Other tools (ko, kaniko, crane) compress them: these are read once
//! to learn their digests.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::{Archive, ArchiveFile};
use crate::digest::Digest;
use crate::manifest::MAX_CONFIG_BYTES;
use crate::reference::clean_docker_tag;
use crate::source::part::{Part, check_range};
use crate::source::{Audience, BlobBody, ManifestName, RawManifest, Source, SourceError};

const MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// More images than anybody saves into one file.
const MAX_IMAGES: usize = 1000;

/// In an error, so many tags are listed.
const MAX_TAGS_LISTED: usize = 20;

/// An archive of `docker save` to pull from.
pub(crate) struct DockerArchive {
    file: Arc<ArchiveFile>,
    read: Arc<Mutex<Option<Read>>>,
}

/// An archive, and what was read of it.
type Read = (Arc<Archive>, Arc<Images>);

/// What an archive holds.
#[derive(Default)]
struct Images {
    images: Vec<Image>,
    blobs: BTreeMap<Digest, Part>,
}

struct Image {
    /// Canonical: `docker.io/library/busybox:latest`.
    tags: Vec<String>,
    digest: Digest,
    manifest: Bytes,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl DockerArchive {
    /// Names the file; opens nothing yet.
    pub(crate) fn new(path: &Path) -> Self {
        Self { file: Arc::new(ArchiveFile::new(path)), read: Arc::default() }
    }

    async fn images(&self) -> Result<Arc<Images>, SourceError> {
        let (file, read) = (Arc::clone(&self.file), Arc::clone(&self.read));
        let task = tokio::task::spawn_blocking(move || {
            let archive = file.open()?;
            let mut read = read.lock().unwrap_or_else(PoisonError::into_inner);
            match read.as_ref() {
                Some((of, images)) if Arc::ptr_eq(of, &archive) => Ok(Arc::clone(images)),
                _ => {
                    let images = Arc::new(Images::read(&archive)?);
                    *read = Some((archive, Arc::clone(&images)));
                    Ok(images)
                }
            }
        });
        task.await.map_err(|_| SourceError::Unavailable(format!("{}: interrupted", self.name())))?
    }
}

#[async_trait]
impl Source for DockerArchive {
    fn name(&self) -> String {
        format!("docker-archive:{}", self.file.path().display())
    }

    fn is_local(&self) -> bool {
        true
    }

    fn audience(&self) -> Audience {
        Audience::Everybody
    }

    async fn manifest(&self, want: &ManifestName) -> Result<RawManifest, SourceError> {
        let images = self.images().await?;
        let image = images.find(want).map_err(|(not_there, why)| {
            let message = format!("manifest {}{want}: {why}", self.name());
            if not_there { SourceError::NotFound(message) } else { SourceError::Invalid(message) }
        })?;
        Ok(RawManifest { media_type: MANIFEST.to_owned(), bytes: image.manifest.clone() })
    }

    async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        range: Range<u64>,
    ) -> Result<BlobBody, SourceError> {
        let name = format!("blob {digest} of {}", self.name());
        check_range(&name, &range, size)?;
        let images = self.images().await?;
        let part = images
            .blobs
            .get(digest)
            .ok_or_else(|| SourceError::NotFound(format!("{name}: not there")))?;
        if part.length != size {
            return Err(SourceError::Invalid(format!(
                "{name}: it has {} bytes, not {size}",
                part.length
            )));
        }
        Ok(part.clone().body(name, range))
    }
}

impl Images {
    fn read(archive: &Archive) -> Result<Self, SourceError> {
        if !archive.has("manifest.json") {
            let hint =
                if archive.has("oci-layout") { "; as oci-archive: it can be read" } else { "" };
            return Err(SourceError::NotFound(format!(
                "archive {}: not made by docker save, it has no manifest.json{hint}",
                archive.path.display()
            )));
        }
        let name = archive.full("manifest.json");
        let text = archive.part("manifest.json")?.read_document(&name)?;
        let saved: Vec<Saved> = serde_json::from_slice(&text)
            .map_err(|error| SourceError::Invalid(format!("{name}: {error}")))?;
        if saved.len() > MAX_IMAGES {
            return Err(SourceError::Invalid(format!("{name}: more than {MAX_IMAGES} images")));
        }
        let mut read = Self::default();
        for saved in saved {
            let image = read.image(archive, &saved)?;
            read.images.push(image);
        }
        Ok(read)
    }

    fn image(&mut self, archive: &Archive, saved: &Saved) -> Result<Image, SourceError> {
        let invalid =
            |path: &str, why: &str| SourceError::Invalid(format!("{}: {why}", archive.full(path)));
        let config_part = archive.part(&saved.config)?;
        let config = config_part.read_all(&archive.full(&saved.config), MAX_CONFIG_BYTES)?;
        let config_digest = Digest::of(&config);
        let diff_ids = diff_ids(&config).map_err(|why| invalid(&saved.config, &why))?;
        if diff_ids.len() != saved.layers.len() {
            let why = format!("{} diff_ids for {} layers", diff_ids.len(), saved.layers.len());
            return Err(invalid(&saved.config, &why));
        }
        let mut layers = Vec::new();
        for (path, diff_id) in saved.layers.iter().zip(diff_ids) {
            let part = archive.part(path)?;
            let unavailable =
                |error| SourceError::Unavailable(format!("{}: {error}", archive.full(path)));
            let (suffix, digest) = match &*part.read(&(0..4)).map_err(unavailable)? {
                [0x1f, 0x8b, ..] => (".gzip", hash(&part).map_err(unavailable)?),
                [0x28, 0xb5, 0x2f, 0xfd] => (".zstd", hash(&part).map_err(unavailable)?),
                _ => ("", diff_id),
            };
            layers.push(json!({
                "mediaType": format!("{LAYER}{suffix}"), "digest": digest, "size": part.length,
            }));
            self.blobs.insert(digest, part);
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": config_digest, "size": config.len()},
            "layers": layers,
        });
        self.blobs.insert(config_digest, config_part);
        let manifest = Bytes::from(manifest.to_string());
        let tags = saved.repo_tags.iter().flatten();
        let tags = tags.filter_map(|tag| clean_docker_tag(tag).ok()).collect();
        Ok(Image { tags, digest: Digest::of(&manifest), manifest })
    }

    /// The image meant, or whether it is not there, and why.
    fn find(&self, want: &ManifestName) -> Result<&Image, (bool, String)> {
        let fits = |image: &&Image| match want {
            ManifestName::Tag(tag) => image.tags.contains(tag),
            ManifestName::Digest(digest) => image.digest == *digest,
            ManifestName::Only => true,
        };
        let mut found: Vec<&Image> = self.images.iter().filter(fits).collect();
        found.dedup_by_key(|image| image.digest);
        match found.as_slice() {
            [image] => Ok(image),
            [] => Err((true, format!("not there; {}", self.listed()))),
            _ => Err((false, format!("{} images are meant; {}", found.len(), self.listed()))),
        }
    }

    fn listed(&self) -> String {
        let names = self.images.iter().flat_map(|image| match image.tags.as_slice() {
            [] => vec![format!("@{}", image.digest)],
            tags => tags.iter().map(|tag| format!(":{tag}")).collect(),
        });
        let mut names: Vec<String> = names.take(MAX_TAGS_LISTED + 1).collect();
        if names.len() > MAX_TAGS_LISTED {
            names.truncate(MAX_TAGS_LISTED);
            names.push("…".to_owned());
        }
        if names.is_empty() {
            "it holds no image".into()
        } else {
            format!("it holds {}", names.join(", "))
        }
    }
}

fn diff_ids(config: &[u8]) -> Result<Vec<Digest>, String> {
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        #[serde(default)]
        diff_ids: Vec<Digest>,
    }
    let config: Config = serde_json::from_slice(config).map_err(|error| error.to_string())?;
    Ok(config.rootfs.diff_ids)
}

fn hash(part: &Part) -> std::io::Result<Digest> {
    let mut hash = Sha256::new();
    let mut at = 0;
    while at < part.length {
        let chunk = part.read(&(at..part.length))?;
        if chunk.is_empty() {
            break;
        }
        hash.update(&chunk);
        at += chunk.len() as u64;
    }
    Ok(Digest::from_sha256(hash.finalize().into()))
}
