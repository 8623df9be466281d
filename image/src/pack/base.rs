//! The image that a model is appended to: its layers stay what they are, byte for byte.
//!
//! ```text
//! reference ─► manifest (of an index the platform's) ─► config ─► Base ─┬► registry: mounted, else copied
//!                                                                       └► layout: copied, digests checked
//! ```
//!
//! Docker's media types become OCI's, which mean the same: an OCI manifest names no others. Nothing is unpacked.

use std::sync::Arc;

use futures_util::{StreamExt as _, TryStreamExt as _};
use serde_json::Value;

use super::{PackError, PackOptions};
use crate::digest::Digest;
use crate::manifest::{Blob, ImageManifest, MAX_CONFIG_BYTES, Manifest, Packaging, Platform};
use crate::reference::Reference;
use crate::source::registry::UploadStream;
use crate::source::{ManifestName, RawManifest, Source, SourceError, Sources};

/// Docker's overlay driver ends at 128 layers, and a runtime adds a few of its own.
const MAX_IMAGE_LAYERS: usize = 120;

/// The least a model takes: one layer for small files, one for large ones.
const MODEL_LAYERS: usize = 2;

/// An image to append to.
pub(super) struct Base {
    pub(super) reference: Reference,
    /// Of its manifest; of an index the one that was chosen.
    pub(super) digest: Digest,
    /// As it travelled.
    pub(super) config: Value,
    pub(super) layers: Vec<BaseLayer>,
    source: Arc<dyn Source>,
}

/// One of its layers.
pub(super) struct BaseLayer {
    pub(super) blob: Blob,
    /// As in its manifest, with OCI's media type.
    pub(super) descriptor: Value,
}

impl Base {
    /// Reads manifest and config, and checks that a model can be appended.
    pub(super) async fn read(
        reference: &Reference,
        options: &PackOptions,
        sources: &Sources,
    ) -> Result<Self, PackError> {
        let refuse = |why: String| PackError::Base { base: reference.to_string(), why };
        let from = |error: SourceError| refuse(error.to_string());
        let source = sources.open(reference, &options.secret).map_err(from)?;
        let platform = &options.platform;
        let mut raw = source.manifest(&reference.name()).await.map_err(from)?;
        check(&raw, reference.digest()).map_err(refuse)?;
        let mut parsed = Manifest::parse(&raw).map_err(|error| refuse(error.to_string()))?;
        if let Manifest::Index(index) = &parsed {
            let chosen = index.choose(platform).map_err(|error| {
                refuse(format!("{error}; name another platform with --platform"))
            })?;
            raw = source.manifest(&ManifestName::Digest(chosen)).await.map_err(from)?;
            check(&raw, Some(chosen)).map_err(refuse)?;
            parsed = Manifest::parse(&raw).map_err(|error| refuse(error.to_string()))?;
        }
        let Manifest::Image(image) = parsed else {
            return Err(refuse("the index names another index".into()));
        };
        if !matches!(image.packaging, Packaging::OciImage | Packaging::DockerImage) {
            return Err(refuse(format!(
                "it is an artifact ({}) and no image: name an image that has sh, ln and sleep, such as \
                 busybox",
                image.packaging
            )));
        }
        if image.layers.len() + MODEL_LAYERS > MAX_IMAGE_LAYERS {
            return Err(refuse(format!(
                "it has {} layers, which leaves too few of the {MAX_IMAGE_LAYERS} that runtimes take: \
                 name a smaller image",
                image.layers.len()
            )));
        }
        let bytes = config(&*source, &image).await.map_err(refuse)?;
        image.layers_with(&bytes).map_err(|error| refuse(error.to_string()))?;
        let config: Value = serde_json::from_slice(&bytes)
            .map_err(|error| refuse(format!("config {}: {error}", image.config.digest)))?;
        let text = |key: &str| config[key].as_str().unwrap_or_default().to_owned();
        let own = Platform { os: text("os"), architecture: text("architecture") };
        if own != *platform {
            return Err(refuse(format!(
                "it is for {own}, and the image is to be for {platform}: name another base, or \
                 --platform {own}"
            )));
        }
        let layers = layers(&raw, &image).map_err(refuse)?;
        Ok(Self { reference: reference.clone(), digest: image.digest, config, layers, source })
    }

    /// How many layers the model may have.
    pub(super) fn room(&self) -> usize {
        MAX_IMAGE_LAYERS - self.layers.len()
    }

    /// The layers' bytes together.
    pub(super) fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.blob.size).sum()
    }

    /// The bytes of a layer, unverified.
    pub(super) fn open(&self, layer: &BaseLayer) -> UploadStream {
        let (source, blob) = (Arc::clone(&self.source), layer.blob);
        let body = async move {
            match blob.size {
                0 => Ok(futures_util::stream::empty().boxed()),
                size => source.blob(&blob.digest, size, 0..size).await.map(|body| body.stream),
            }
        };
        futures_util::stream::once(body).try_flatten().map_err(std::io::Error::other).boxed()
    }

    /// Takes note that a place has served other bytes than a layer's; true when another one is asked next.
    pub(super) fn distrust(&self, layer: &BaseLayer) -> bool {
        self.source.distrust(&layer.blob.digest)
    }

    pub(super) fn fail(&self, why: String) -> PackError {
        PackError::Base { base: self.reference.to_string(), why }
    }
}

fn check(raw: &RawManifest, wanted: Option<Digest>) -> Result<(), String> {
    match wanted {
        Some(wanted) if raw.digest() != wanted => {
            Err(format!("manifest {wanted}: the source served bytes that hash to {}", raw.digest()))
        }
        _ => Ok(()),
    }
}

async fn config(source: &dyn Source, image: &ImageManifest) -> Result<Vec<u8>, String> {
    let Blob { digest, size } = image.config;
    if size == 0 || size > MAX_CONFIG_BYTES {
        return Err(format!("config {digest}: {size} bytes is no image's config"));
    }
    let read = async {
        let mut bytes = Vec::new();
        let mut body = source.blob(&digest, size, 0..size).await?.stream;
        while let Some(chunk) = body.next().await {
            bytes.extend_from_slice(&chunk?);
            if bytes.len() as u64 > size {
                break;
            }
        }
        Ok::<_, SourceError>(bytes)
    };
    let bytes = read.await.map_err(|error| error.to_string())?;
    match Digest::of(&bytes) == digest {
        true => Ok(bytes),
        false => Err(format!("config {digest}: the source served other bytes")),
    }
}

/// The descriptors as they stand, beside what was checked of them.
fn layers(raw: &RawManifest, image: &ImageManifest) -> Result<Vec<BaseLayer>, String> {
    let mut manifest: Value =
        serde_json::from_slice(&raw.bytes).map_err(|error| error.to_string())?;
    let listed = manifest["layers"].as_array_mut().map(std::mem::take).unwrap_or_default();
    if listed.len() != image.layers.len() {
        return Err(format!(
            "{} layers are listed, {} were read",
            listed.len(),
            image.layers.len()
        ));
    }
    let layers = listed.into_iter().zip(&image.layers).map(|(mut descriptor, placed)| {
        let blob = placed.layer.blob;
        let kind = oci_type(&placed.media_type).ok_or_else(|| {
            format!("layer {}: {} may not be copied", blob.digest, placed.media_type)
        })?;
        descriptor["mediaType"] = kind.into();
        Ok(BaseLayer { blob, descriptor })
    });
    layers.collect()
}

/// OCI's name of a layer's media type; none of a layer that may not be handed on.
fn oci_type(media_type: &str) -> Option<&str> {
    match media_type {
        "application/vnd.docker.image.rootfs.diff.tar" => {
            Some("application/vnd.oci.image.layer.v1.tar")
        }
        "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            Some("application/vnd.oci.image.layer.v1.tar+gzip")
        }
        "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
            Some("application/vnd.oci.image.layer.v1.tar+zstd")
        }
        other if other.contains(".foreign.") || other.contains(".nondistributable.") => None,
        other => Some(other),
    }
}
