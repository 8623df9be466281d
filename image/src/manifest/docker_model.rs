//! Models of Docker's model runner: a raw file a layer, named by annotations or by its kind.
//!
//! <https://github.com/docker/model-runner/tree/main/pkg/distribution>
//!
//! The root of the tree is what that tool shows to its engines as the folder `model`. Version 0.2
//! gives each file its path. In version 0.1 GGUFs, projector and template have the names that the
//! tool's engines look for, whatever an annotation says; safetensors keep their paths, and their
//! `config.json` comes in a tar. The tool shows no licenses; here they are files.

use std::collections::BTreeMap;

use super::declared::Declared;
use super::{Compression, Content, Place, PlacedLayer};

pub(super) const CONFIG_V01: &str = "application/vnd.docker.ai.model.config.v0.1+json";
pub(super) const CONFIG_V02: &str = "application/vnd.docker.ai.model.config.v0.2+json";
pub(super) const FAMILY: &str = "application/vnd.docker.ai.";

/// How a kind of layer becomes files.
enum Kind {
    /// Its entries have names.
    Tar,
    /// Only an annotation can name it.
    Named,
    /// The tool's name for it, numbered where there are several. In version 0.1 it stands `always`,
    /// else where no annotation says another.
    Called { stem: &'static str, extension: &'static str, always: bool },
}

fn kind(media_type: &str) -> Option<Kind> {
    let called = |stem, extension, always| Kind::Called { stem, extension, always };
    Some(match media_type.strip_prefix(FAMILY)? {
        "gguf.v3" => called("model", ".gguf", true),
        "gguf.v3.lora" => called("lora", ".gguf", false),
        "mmproj" | "gguf.v3.mmproj" => called("model", ".mmproj", true),
        "safetensors" => called("model", ".safetensors", false),
        "dduf" => called("model", ".dduf", false),
        "chat.template.jinja" => called("template", ".jinja", true),
        "license" => called("LICENSE", "", false),
        "model.file" => Kind::Named,
        "vllm.config.tar" | "dir.tar" => Kind::Tar,
        _ => return None,
    })
}

pub(super) fn layers(config: &str, declared: &[Declared<'_>]) -> Result<Vec<PlacedLayer>, String> {
    let mut total: BTreeMap<&str, usize> = BTreeMap::new();
    for declared in declared {
        *total.entry(&declared.media_type).or_default() += 1;
    }
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    declared
        .iter()
        .map(|declared| {
            let number = seen.entry(&declared.media_type).or_default();
            *number += 1;
            let path = declared.path()?;
            match kind(&declared.media_type) {
                Some(Kind::Tar) => {
                    Ok(declared.placed(Content::Tar, Compression::None, Place::Root))
                }
                Some(Kind::Called { stem, extension, always }) => {
                    let path = path.filter(|_| !(always && config == CONFIG_V01));
                    let path =
                        path.unwrap_or_else(|| match total.get(declared.media_type.as_str()) {
                            None | Some(1) => format!("{stem}{extension}"),
                            Some(total) => format!("{stem}-{number:05}-of-{total:05}{extension}"),
                        });
                    Ok(declared.placed(Content::File, Compression::None, Place::File(path)))
                }
                Some(Kind::Named) => declared.file(Compression::None),
                // What other tools add has a path, as in version 0.2.
                None if !declared.media_type.starts_with(FAMILY) => {
                    declared.file(Compression::None)
                }
                None => Err(declared.unsupported(
                    "of Docker models gguf.v3, mmproj, safetensors, dduf, chat.template.jinja, \
                     license, model.file, vllm.config.tar and dir.tar are",
                )),
            }
        })
        .collect()
}
