//! Images that cannot be pulled: the pod's event says why, and the node has no traces.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use carport_image::Digest;
use carport_tests::models::Model;

use crate::bench::{Bench, DIGESTS, Volume, distinct, login, pod};

pub(crate) async fn wrong(bench: &mut Bench) -> anyhow::Result<String> {
    let (model, corrupt) = (distinct("corrupt"), "private.example/models/corrupt:v1");
    bench.cluster.push(&model, corrupt).await?;
    let layer = damage(&bench.cluster.state().join("private/storage"), &model)?;
    bench.apply(&[login()]).await?;

    let absent = Digest::of(b"no such manifest");
    let by_digest = format!("registry.example/models/llama@{absent}");
    let cases: [(&str, &str, Vec<&str>); 4] = [
        (
            "tag",
            "registry.example/models/llama:nope",
            vec!["registry.example/models/llama:nope", "not found"],
        ),
        ("digest", &by_digest, vec![&by_digest, "not found"]),
        ("corrupt", corrupt, vec![&layer, "hash to"]),
        (
            "name",
            "registry.example/Models/llama:v1",
            vec!["registry.example/Models/llama:v1", "lower"],
        ),
    ];
    let mut seen = Vec::new();
    for (name, image, texts) in cases {
        bench.apply(&[pod(name, &Volume::of(image).secret("login"), DIGESTS)]).await?;
        let event = bench.event(name, texts[0]).await?;
        let reason = event.split("desc = ").last().unwrap_or(&event).to_owned();
        for text in texts {
            ensure!(event.contains(text), "{name}: no {text:?} in {event}");
        }
        let uid = bench.uid(name).await?;
        bench.no_traces(&uid).await?;
        bench.deleted(name).await?;
        seen.push(format!("{name}: {reason:?}"));
    }
    Ok(format!("no mount, folder or record; the events say {}", seen.join("; ")))
}

/// Changes a byte of the layer with the model's weights in a registry's storage; returns the layer's digest.
fn damage(storage: &Path, model: &Model) -> anyhow::Result<String> {
    let weights = fs::read(model.path().join("model.safetensors"))?;
    for entry in walkdir::WalkDir::new(storage) {
        let entry = entry?;
        if entry.file_name() != "data" {
            continue;
        }
        let mut bytes = fs::read(entry.path())?;
        // A file's content begins at a block of its tar.
        let is_layer =
            bytes.chunks(512).any(|block| weights.starts_with(block) && block.len() == 512);
        if is_layer {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            fs::write(entry.path(), bytes)?;
            let folder =
                entry.path().parent().and_then(Path::file_name).context("a blob's folder")?;
            return Ok(folder.display().to_string());
        }
    }
    bail!("no layer with the model's weights in {}", storage.display())
}
