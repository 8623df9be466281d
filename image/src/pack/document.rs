//! The image's config and manifest, as bytes that are the same for the same image.
//!
//! Written here rather than with `oci_spec`'s types, whose annotations are in a hash
//! map and come out in another order each time. A test reads them back with those types.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::{Value, json};

use super::base::Base;
use crate::digest::Digest;
use crate::manifest::Platform;

pub(super) const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_TYPE: &str = "application/vnd.oci.image.config.v1+json";
const LAYER_TYPE: &str = "application/vnd.oci.image.layer.v1.tar";

/// Some programs insist on a time; this one is the same for everybody.
const CREATED: &str = "1970-01-01T00:00:00Z";

/// A layer that was read to its end.
#[derive(Debug, Clone)]
pub(super) struct DoneLayer {
    /// Of the tar bytes: a plain layer's digest and diff id are one.
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) description: String,
}

/// A document with its digest.
pub(super) struct Document {
    pub(super) bytes: Vec<u8>,
    pub(super) digest: Digest,
}

impl Document {
    fn new(value: &impl Serialize) -> Result<Self, serde_json::Error> {
        let bytes = serde_json::to_vec(value)?;
        Ok(Self { digest: Digest::of(&bytes), bytes })
    }
}

/// The image configuration: <https://github.com/opencontainers/image-spec/blob/main/config.md>
///
/// With a base it is the base's, with the model's layers behind its own.
pub(super) fn config(
    base: Option<&Base>,
    layers: &[DoneLayer],
    platform: &Platform,
) -> Result<Document, serde_json::Error> {
    if let Some(base) = base {
        return appended(base.config.clone(), layers);
    }
    Document::new(&Config {
        created: CREATED,
        architecture: &platform.architecture,
        os: &platform.os,
        config: Empty {},
        rootfs: RootFs {
            kind: "layers",
            diff_ids: layers.iter().map(|layer| layer.digest).collect(),
        },
        history: layers.iter().map(History::of).collect(),
    })
}

/// What is not known of the base's config stays.
fn appended(mut config: Value, layers: &[DoneLayer]) -> Result<Document, serde_json::Error> {
    if let Some(diff_ids) = config["rootfs"]["diff_ids"].as_array_mut() {
        diff_ids.extend(layers.iter().map(|layer| json!(layer.digest)));
    }
    // One without a history gets none: an entry for each layer, or for none.
    if let Some(history) = config.get_mut("history").and_then(Value::as_array_mut) {
        history.extend(layers.iter().map(|layer| json!(History::of(layer))));
    }
    Document::new(&config)
}

/// The image manifest: <https://github.com/opencontainers/image-spec/blob/main/manifest.md>
pub(super) fn manifest(
    base: Option<&Base>,
    config: &Document,
    layers: &[DoneLayer],
    annotations: BTreeMap<String, String>,
) -> Result<Document, serde_json::Error> {
    Document::new(&Manifest {
        schema_version: 2,
        media_type: MANIFEST_TYPE,
        config: Descriptor {
            media_type: CONFIG_TYPE,
            digest: config.digest,
            size: config.bytes.len() as u64,
        },
        layers: base
            .iter()
            .flat_map(|base| &base.layers)
            .map(|layer| LayerDescriptor::Base(&layer.descriptor))
            .chain(layers.iter().map(|layer| {
                LayerDescriptor::Own(Descriptor {
                    media_type: LAYER_TYPE,
                    digest: layer.digest,
                    size: layer.size,
                })
            }))
            .collect(),
        annotations,
    })
}

#[derive(Serialize)]
struct Config<'a> {
    created: &'static str,
    architecture: &'a str,
    os: &'a str,
    config: Empty,
    rootfs: RootFs,
    history: Vec<History>,
}

#[derive(Serialize)]
struct Empty {}

#[derive(Serialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: &'static str,
    diff_ids: Vec<Digest>,
}

#[derive(Serialize)]
struct History {
    created: &'static str,
    created_by: String,
}

impl History {
    fn of(layer: &DoneLayer) -> Self {
        Self { created: CREATED, created_by: format!("carport pack: {}", layer.description) }
    }
}

#[derive(Serialize)]
#[serde(untagged)]
enum LayerDescriptor<'a> {
    Own(Descriptor),
    Base(&'a Value),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest<'a> {
    schema_version: u32,
    media_type: &'static str,
    config: Descriptor,
    layers: Vec<LayerDescriptor<'a>>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: &'static str,
    digest: Digest,
    size: u64,
}
