//! An image or artifact of each packaging, and the tree that its own tool would show.

use carport_tests::images::noise;
use carport_tests::layouts::{Files, Layer};
use serde_json::{Value, json};

pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const FILEPATH: &str = "org.cncf.model.filepath";
pub(crate) const TITLE: &str = "org.opencontainers.image.title";
pub(crate) const EMPTY: &str = "application/vnd.oci.empty.v1+json";

pub(crate) fn tree(files: &[(&str, &[u8])]) -> Files {
    files.iter().map(|(path, content)| ((*path).to_owned(), content.to_vec())).collect()
}

/// The config of an OCI image of these layers.
pub(crate) fn image_config(layers: &[Layer]) -> Value {
    let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.diff_id).collect();
    json!({"architecture": "amd64", "os": "linux",
           "rootfs": {"type": "layers", "diff_ids": diff_ids}})
}

/// An image or artifact, and what becomes of it.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) packaging: &'static str,
    pub(crate) artifact_type: &'static str,
    pub(crate) config_type: &'static str,
    pub(crate) config: Value,
    pub(crate) layers: Vec<Layer>,
    pub(crate) tree: Files,
}

/// Weights that span several chunks and ranges.
pub(crate) fn weights() -> Vec<u8> {
    noise(3_000_001, 7)
}

fn images(weights: &[u8]) -> Vec<Case> {
    let files: [(&str, &[u8]); 4] = [
        ("models/", b""),
        ("models/config.json", b"{}"),
        ("models/model.safetensors", weights),
        ("models/empty", b""),
    ];
    let formats = [
        ("tar", "", "tar"),
        ("gzip", "+gzip", "tar+gzip"),
        ("zstd", "+zstd", "tar+zstd"),
        ("zstd-chunked", "+zstd", "zstd:chunked"),
        ("estargz", "+gzip", "estargz"),
    ];
    let image = |(name, suffix, kind): (&'static str, &str, &str)| {
        let media_type = format!("{OCI_TAR}{suffix}");
        let layers = vec![Layer::made(&media_type, kind, &files)];
        Case {
            name,
            packaging: "oci-image",
            artifact_type: "",
            config_type: OCI_CONFIG,
            config: image_config(&layers),
            layers,
            tree: tree(&files),
        }
    };
    formats.into_iter().map(image).collect()
}

fn model_pack(weights: &[u8], project: &str) -> Case {
    let cncf = project == "cncf";
    let kind = |rest: &str| format!("application/vnd.{project}.model.{rest}");
    let at = |path: &str| json!({format!("org.{project}.model.filepath"): path});
    let layers = vec![
        Layer::raw(&kind("weight.v1.raw"), at("model-00001.safetensors"), weights),
        Layer::made(&kind("weight.v1.tar"), "tar", &[("deep/er/lora.bin", b"lora")]),
        Layer::raw(&kind("weight.config.v1.raw"), at("tokenizer/vocab.json"), b"{\"a\":0}"),
        Layer::made(&kind("code.v1.tar+gzip"), "tar+gzip", &[("run.py", b"print()")]),
        Layer::made(&kind("dataset.v1.tar+zstd"), "tar+zstd", &[("data/x.csv", b"1,2")]),
        Layer::raw(&kind("doc.v1.raw"), at("README.md"), b""),
    ];
    Case {
        name: if cncf { "model-pack" } else { "model-pack-cnai" },
        packaging: "model-pack",
        artifact_type: if cncf { "application/vnd.cncf.model.manifest.v1+json" } else { "" },
        config_type: if cncf {
            "application/vnd.cncf.model.config.v1+json"
        } else {
            "application/vnd.cnai.model.config.v1+json"
        },
        config: json!({"descriptor": {"name": "tiny"}, "modelfs": {"type": "layers",
            "diffIds": layers.iter().map(|layer| &layer.diff_id).collect::<Vec<_>>()}}),
        layers,
        tree: tree(&[
            ("model-00001.safetensors", weights),
            ("deep/", b""),
            ("deep/er/", b""),
            ("deep/er/lora.bin", b"lora"),
            ("tokenizer/", b""),
            ("tokenizer/vocab.json", b"{\"a\":0}"),
            ("run.py", b"print()"),
            ("data/", b""),
            ("data/x.csv", b"1,2"),
            ("README.md", b""),
        ]),
    }
}

fn model_kits(weights: &[u8]) -> [Case; 2] {
    let kind = |rest: &str| format!("application/vnd.kitops.modelkit.{rest}");
    let config_type = "application/vnd.kitops.modelkit.config.v1+json";
    let layers = vec![
        Layer::made(&kind("model.v1.tar+gzip"), "tar+gzip", &[("weights/model.gguf", weights)]),
        Layer::raw(&kind("modelpart.v1.raw"), json!({FILEPATH: "parts/lora.gguf"}), b"lora"),
        Layer::made(&kind("docs.v1.tar"), "tar", &[("README.md", b"# tiny")]),
    ];
    let info = |path: &str, layer: &Layer| json!({"path": path, "digest": layer.digest(), "diffId": layer.diff_id});
    let mut model = info("weights/model.gguf", &layers[0]);
    model["parts"] = json!([info("parts/lora.gguf", &layers[1])]);
    let config = json!({"manifestVersion": "1.0.0", "package": {"name": "tiny"}, "model": model,
                        "docs": [info("README.md", &layers[2])]});
    let old = vec![
        Layer::made(&kind("model.v1.tar+gzip"), "tar+gzip", &[("model.gguf", weights)]),
        Layer::made(&kind("code.v1.tar+gzip"), "tar+gzip", &[("src/", b""), ("src/a.py", b"")]),
    ];
    let old_config = json!({"manifestVersion": "1.0.0", "model": {"path": "./weights/model.gguf"},
                            "code": [{"path": "src"}]});
    let kit = |name, config, layers, files: &[(&str, &[u8])]| Case {
        name,
        packaging: "model-kit",
        artifact_type: "",
        config_type,
        config,
        layers,
        tree: tree(files),
    };
    let now: [(&str, &[u8]); 5] = [
        ("weights/", b""),
        ("weights/model.gguf", weights),
        ("parts/", b""),
        ("parts/lora.gguf", b"lora"),
        ("README.md", b"# tiny"),
    ];
    let then: [(&str, &[u8]); 4] =
        [("weights/", b""), ("weights/model.gguf", weights), ("src/", b""), ("src/a.py", b"")];
    [kit("model-kit", config, layers, &now), kit("model-kit-old", old_config, old, &then)]
}

fn docker_models(weights: &[u8]) -> [Case; 3] {
    let kind = |rest: &str| format!("application/vnd.docker.ai.{rest}");
    let raw = |rest: &str, bytes: &[u8]| Layer::raw(&kind(rest), json!({}), bytes);
    let at = |path: &str, rest: &str, bytes: &[u8]| raw(rest, bytes).annotated(FILEPATH, path);
    let v01 = "application/vnd.docker.ai.model.config.v0.1+json";
    let case = |name, config_type, layers: Vec<Layer>, files: &[(&str, &[u8])]| Case {
        name,
        packaging: "docker-model",
        artifact_type: "",
        config_type,
        config: json!({"config": {"format": "gguf"}, "descriptor": {}, "rootfs": {"type": "rootfs",
            "diff_ids": layers.iter().map(|layer| &layer.diff_id).collect::<Vec<_>>()}}),
        layers,
        tree: tree(files),
    };
    let gguf = vec![
        raw("gguf.v3", weights),
        raw("license", b"MIT"),
        raw("chat.template.jinja", b"{{ x }}"),
        raw("mmproj", b"projector"),
    ];
    let shards = vec![
        raw("safetensors", weights),
        raw("safetensors", b"second"),
        Layer::made(&kind("vllm.config.tar"), "tar", &[("config.json", b"{}")]),
    ];
    let paths = vec![
        at("text_encoder/model.safetensors", "safetensors", weights),
        at("unet/model.safetensors", "safetensors", b"unet"),
        at("unet/config.json", "model.file", b"{}"),
    ];
    [
        case(
            "docker-gguf",
            v01,
            gguf,
            &[
                ("model.gguf", weights),
                ("LICENSE", b"MIT"),
                ("template.jinja", b"{{ x }}"),
                ("model.mmproj", b"projector"),
            ],
        ),
        case(
            "docker-safetensors",
            v01,
            shards,
            &[
                ("model-00001-of-00002.safetensors", weights),
                ("model-00002-of-00002.safetensors", b"second"),
                ("config.json", b"{}"),
            ],
        ),
        case(
            "docker-paths",
            "application/vnd.docker.ai.model.config.v0.2+json",
            paths,
            &[
                ("text_encoder/", b""),
                ("text_encoder/model.safetensors", weights),
                ("unet/", b""),
                ("unet/model.safetensors", b"unet"),
                ("unet/config.json", b"{}"),
            ],
        ),
    ]
}

fn oras(weights: &[u8]) -> Case {
    let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
    let folder: [(&str, &[u8]); 3] =
        [("tokenizer/", b""), ("tokenizer/vocab.json", b"{}"), ("tokenizer/empty/", b"")];
    let folder = Layer::made(gzip, "tar+gzip", &folder);
    let diff_id = folder.diff_id.clone();
    let archive = Layer::made("", "tar+gzip", &[("x", b"y")]).bytes;
    let layers = vec![
        Layer::raw("application/octet-stream", json!({TITLE: "model.gguf"}), weights),
        Layer::raw(OCI_TAR, json!({TITLE: "notes/a.txt"}), b"not a tar, whatever the type says"),
        Layer::raw(gzip, json!({TITLE: "archive.tar.gz"}), &archive),
        folder
            .annotated(TITLE, "tokenizer")
            .annotated("io.deis.oras.content.unpack", "true")
            .annotated("io.deis.oras.content.digest", &diff_id),
    ];
    Case {
        name: "oras",
        packaging: "files",
        artifact_type: "application/vnd.example.model",
        config_type: EMPTY,
        config: json!({}),
        layers,
        tree: tree(&[
            ("model.gguf", weights),
            ("notes/", b""),
            ("notes/a.txt", b"not a tar, whatever the type says"),
            ("archive.tar.gz", &archive),
            ("tokenizer/", b""),
            ("tokenizer/vocab.json", b"{}"),
            ("tokenizer/empty/", b""),
        ]),
    }
}

/// One of each.
pub(crate) fn all(weights: &[u8]) -> Vec<Case> {
    let mut cases = images(weights);
    cases.extend([model_pack(weights, "cncf"), model_pack(weights, "cnai"), oras(weights)]);
    cases.extend(model_kits(weights));
    cases.extend(docker_models(weights));
    cases
}
