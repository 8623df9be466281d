//! CNCF ModelPack: weights, their configuration, documents, code and datasets, each a tar or a raw
//! file.
//!
//! <https://github.com/modelpack/model-spec/blob/main/docs/spec.md>
//!
//! A tar's entries carry their own paths; a raw file has its path in an annotation. The config says
//! nothing that is needed. Until version 0.0.6 the names said `cnai` for `cncf`. Docker's model
//! runner for a time called raw weights `.gguf` and `.safetensors`.

use super::declared::Declared;
use super::{Compression, PlacedLayer};

pub(super) const ARTIFACTS: [&str; 2] =
    ["application/vnd.cncf.model.manifest.v1+json", "application/vnd.cnai.model.manifest.v1+json"];
pub(super) const CONFIGS: [&str; 2] =
    ["application/vnd.cncf.model.config.v1+json", "application/vnd.cnai.model.config.v1+json"];
pub(super) const FAMILIES: [&str; 2] =
    ["application/vnd.cncf.model.", "application/vnd.cnai.model."];

const KINDS: [&str; 5] = ["weight.config", "weight", "doc", "code", "dataset"];

pub(super) fn layer(declared: &Declared<'_>) -> Result<PlacedLayer, String> {
    let family = FAMILIES.iter().find_map(|family| declared.media_type.strip_prefix(family));
    let Some(rest) = family else {
        // The specification leaves other layers open: with a path they are files.
        return declared.file(Compression::None);
    };
    let format =
        KINDS.iter().find_map(|kind| rest.strip_prefix(kind).and_then(|r| r.strip_prefix(".v1.")));
    let placed = match format {
        Some("gguf" | "safetensors") => Some(declared.file(Compression::None)),
        Some(format) => declared.formatted(format),
        None => None,
    };
    placed.unwrap_or_else(|| {
        Err(declared.unsupported(
            "ModelPack's weight, weight.config, doc, code and dataset .v1 are, as raw and tar, \
             and with +gzip or +zstd",
        ))
    })
}
