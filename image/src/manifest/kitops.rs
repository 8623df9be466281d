//! ModelKits of KitOps: a tar or a raw file for each part that the Kitfile names.
//!
//! <https://github.com/kitops-ml/kitops>
//!
//! The config is the Kitfile in JSON; it says the diffId of each layer, by digest. Tars carry paths
//! from the ModelKit's root, raw files have theirs in ModelPack's annotation. Kits made before kit
//! 0.5 name no digests: there each tar stands beside the path of its part, the parts of a kind in
//! the layers' order. The Kitfile itself is no file of the tree, and what it refers to elsewhere
//! (another ModelKit's model, datasets in S3) is not fetched: without its model a kit is refused.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::declared::Declared;
use super::{Content, Place, PlacedLayer};
use crate::digest::Digest;
use crate::layer::clean_path;

pub(super) const CONFIG: &str = "application/vnd.kitops.modelkit.config.v1+json";
pub(super) const FAMILY: &str = "application/vnd.kitops.modelkit.";

/// The parts of a Kitfile that have layers, as the layers' media types call them.
const KINDS: [&str; 5] = ["model", "modelpart", "dataset", "code", "docs"];

pub(super) fn layer(declared: &Declared<'_>) -> Result<PlacedLayer, String> {
    let placed = kind(&declared.media_type).and_then(|(_, format)| declared.formatted(format));
    placed.unwrap_or_else(|| {
        Err(declared.unsupported(
            "of ModelKits model, modelpart, dataset, code and docs .v1 are, as tar and raw, and \
             with +gzip or +zstd",
        ))
    })
}

fn kind(media_type: &str) -> Option<(&'static str, &str)> {
    let (kind, format) = media_type.strip_prefix(FAMILY)?.split_once(".v1.")?;
    Some((KINDS.into_iter().find(|known| *known == kind)?, format))
}

#[derive(Deserialize)]
struct Kitfile {
    model: Option<Model>,
    #[serde(default)]
    code: Vec<Part>,
    #[serde(default)]
    datasets: Vec<Part>,
    #[serde(default)]
    docs: Vec<Part>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(flatten)]
    itself: Part,
    #[serde(default)]
    parts: Vec<Part>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Part {
    #[serde(default)]
    path: String,
    digest: Option<Digest>,
    diff_id: Option<Digest>,
}

impl Kitfile {
    fn parts(&self) -> BTreeMap<&'static str, Vec<&Part>> {
        let model = self.model.iter();
        BTreeMap::from([
            ("model", model.clone().map(|model| &model.itself).collect()),
            ("modelpart", model.flat_map(|model| &model.parts).collect()),
            ("dataset", self.datasets.iter().collect()),
            ("code", self.code.iter().collect()),
            ("docs", self.docs.iter().collect()),
        ])
    }
}

/// Adds the diffIds, and the folders of old kits.
pub(super) fn complete(layers: &[PlacedLayer], config: &[u8]) -> Result<Vec<PlacedLayer>, String> {
    let kitfile: Kitfile = serde_json::from_slice(config).map_err(|e| e.to_string())?;
    let is_model =
        |placed: &PlacedLayer| kind(&placed.media_type).is_some_and(|(kind, _)| kind == "model");
    if let Some(model) = &kitfile.model
        && !model.itself.path.is_empty()
        && !layers.iter().any(is_model)
    {
        return Err(format!(
            "the model is not in this ModelKit but in {:?}, which is not followed: pack it into one",
            model.itself.path
        ));
    }
    let parts = kitfile.parts();
    let diff_ids: BTreeMap<Digest, Option<Digest>> = parts
        .values()
        .flatten()
        .filter_map(|part| part.digest.map(|digest| (digest, part.diff_id)))
        .collect();
    let mut layers = layers.to_vec();
    if diff_ids.is_empty() {
        place_beside_parts(&mut layers, &parts)?;
        return Ok(layers);
    }
    for placed in &mut layers {
        let digest = placed.layer.blob.digest;
        let diff_id = diff_ids.get(&digest);
        placed.diff_id =
            *diff_id.ok_or_else(|| format!("the Kitfile has no part for layer {digest}"))?;
    }
    Ok(layers)
}

/// As kit before 0.5 had it.
fn place_beside_parts(
    layers: &mut [PlacedLayer],
    parts: &BTreeMap<&'static str, Vec<&Part>>,
) -> Result<(), String> {
    let mut used: BTreeMap<&str, usize> = BTreeMap::new();
    for placed in layers {
        let Some((kind, _)) = kind(&placed.media_type) else { continue };
        let number = used.entry(kind).or_default();
        let part = parts.get(kind).and_then(|parts| parts.get(*number)).ok_or_else(|| {
            format!("the Kitfile has no {kind} for layer {}", placed.layer.blob.digest)
        })?;
        *number += 1;
        let path = clean_path(part.path.as_bytes()).map_err(|why| why.to_string())?;
        if placed.layer.content == Content::Tar
            && let Some((folder, _)) = path.rsplit_once('/')
        {
            placed.place = Place::Below(folder.to_owned());
        }
    }
    Ok(())
}
