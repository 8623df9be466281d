//! OCI and Docker images: tar layers, whose diff_ids the config lists.
//!
//! <https://github.com/opencontainers/image-spec/blob/main/layer.md>
//!
//! Layers in zstd:chunked or eStargz have the same media types and are read as the tar+zstd and
//! tar+gzip that they are.

use serde::Deserialize;

use super::declared::Declared;
use super::{Compression, Content, Place, PlacedLayer};
use crate::digest::Digest;

pub(super) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(super) const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";

pub(super) fn layer(declared: &Declared<'_>) -> Result<PlacedLayer, String> {
    let compression = compression(&declared.media_type).ok_or_else(|| {
        declared.unsupported("layers of images are tars, uncompressed or with gzip or zstd")
    })?;
    Ok(declared.placed(Content::Tar, compression, Place::Root))
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
        | "application/vnd.docker.image.rootfs.diff.tar" => Compression::of_suffix(suffix),
        _ => None,
    }
}

/// Adds the diff_ids.
pub(super) fn complete(layers: &[PlacedLayer], config: &[u8]) -> Result<Vec<PlacedLayer>, String> {
    // Only this part is read: tools disagree on the rest of a config.
    #[derive(Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    #[derive(Deserialize)]
    struct RootFs {
        diff_ids: Vec<Digest>,
    }
    let config: Config = serde_json::from_slice(config).map_err(|e| e.to_string())?;
    let diff_ids = config.rootfs.diff_ids;
    if diff_ids.len() != layers.len() {
        return Err(format!("{} diff_ids for {} layers", diff_ids.len(), layers.len()));
    }
    let diff_ids = diff_ids.into_iter().map(Some);
    let layers = layers.iter().cloned().zip(diff_ids);
    Ok(layers.map(|(layer, diff_id)| PlacedLayer { diff_id, ..layer }).collect())
}
