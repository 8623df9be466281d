//! Each packaging of a model, pulled from a layout and from docker-registry: the tree is exactly
//! what its own tool would show, or the error says what is wrong.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::Path;
use std::process::Command;

use carport_image::pull::{PullOptions, PullRequest, Pulled};
use carport_image::{Digest, PullError, Puller, Store};
use carport_tests::layouts::{Files, Layer, Layout, files_below, tools};
use carport_tests::models::{reference, sources};
use carport_tests::registry::{Registry, installed};
use serde_json::json;
use tempfile::TempDir;

#[path = "formats/cases.rs"]
mod cases;

use cases::{Case, EMPTY, FILEPATH, OCI_CONFIG, OCI_TAR, TITLE, image_config, tree, weights};

/// A node's store.
struct Node {
    _folder: TempDir,
    puller: Puller,
}

impl Node {
    fn new(hosts: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("store")).unwrap();
        let puller = Puller::new(store, sources(hosts), PullOptions::default());
        Self { _folder: folder, puller }
    }

    async fn pull(&self, image: &str) -> Result<Pulled, PullError> {
        self.puller.start(PullRequest::new(reference(image))).wait().await
    }

    /// The tree of an image.
    async fn files(&self, image: &str) -> (Files, Pulled) {
        let pulled = self.pull(image).await.unwrap_or_else(|error| panic!("{image}: {error}"));
        (files_below(&self.puller.store().rootfs(&pulled.digest)), pulled)
    }

    async fn refused(&self, image: &str) -> String {
        let error = self.pull(image).await.err().unwrap_or_else(|| panic!("{image} was pulled"));
        error.to_string()
    }
}

#[tokio::test]
async fn each_packaging_is_pulled_from_a_layout_and_from_a_registry() {
    if !tools() || !installed("curl") {
        return;
    }
    let weights = weights();
    let cases: Vec<Case> = cases::all(&weights);
    let mut layout = Layout::new();
    let node = Node::new(&[]);
    let registry = Registry::start();
    for case in &cases {
        let config = (case.config_type, &case.config);
        let digest = layout.add(case.name, case.artifact_type, config, &case.layers);
        let (files, pulled) = node.files(&layout.reference(case.name)).await;
        same(&files, &case.tree, case.name);
        assert_eq!(pulled.image.packaging.to_string(), case.packaging, "{}", case.name);
        let diff_ids = pulled.image.layers.iter().map(|layer| layer.diff_id.to_string());
        let expected = case.layers.iter().map(|layer| layer.diff_id.clone());
        assert!(diff_ids.eq(expected), "{}: diff_ids", case.name);

        let Some(registry) = &registry else { continue };
        layout.push(&digest, registry.host(), "team/model", case.name);
        let other = Node::new(&[registry.host()]);
        let (files, pulled) =
            other.files(&format!("{}/team/model:{}", registry.host(), case.name)).await;
        same(&files, &case.tree, case.name);
        assert_eq!(pulled.digest, digest);
    }
    // The weights are one object, however they came.
    let usage = node.puller.store().usage().unwrap();
    let distinct: std::collections::BTreeSet<_> =
        cases.iter().flat_map(|case| case.tree.values()).filter(|file| !file.is_empty()).collect();
    assert_eq!(usage.objects, distinct.len() as u64);
}

fn same(found: &Files, expected: &Files, name: &str) {
    let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected), "{name}");
    for (path, content) in expected {
        assert!(found[path] == *content, "{name}: {path} has other bytes");
    }
}

#[tokio::test]
async fn a_layer_is_fetched_once_whatever_the_images_call_it() {
    let mut layout = Layout::new();
    let weights = weights();
    let layer = |path: &str| {
        vec![Layer::raw(
            "application/vnd.cncf.model.weight.v1.raw",
            json!({FILEPATH: path}),
            &weights,
        )]
    };
    let config = ("application/vnd.cncf.model.config.v1+json", &json!({}));
    layout.add("one", "", config, &layer("one/a.gguf"));
    layout.add("two", "", config, &layer("b.gguf"));
    let titled = layer("c").remove(0);
    let titled = Layer { annotations: json!({TITLE: "c.gguf"}), ..titled };
    layout.add("three", "application/vnd.example", (EMPTY, &json!({})), &[titled]);
    let node = Node::new(&[]);
    let (one, pulled) = node.files(&layout.reference("one")).await;
    same(&one, &tree(&[("one/", b""), ("one/a.gguf", &weights)]), "one");
    assert_eq!(pulled.fetched_bytes, weights.len() as u64);
    for (tag, name) in [("two", "b.gguf"), ("three", "c.gguf")] {
        let (files, pulled) = node.files(&layout.reference(tag)).await;
        same(&files, &tree(&[(name, &weights)]), tag);
        assert_eq!((pulled.fetched_bytes, pulled.written_bytes), (0, 0), "{tag}");
    }
    let store = node.puller.store();
    assert_eq!(store.usage().unwrap().objects, 1);
    // It goes with the last of them.
    for (left, image) in store.images().unwrap().iter().enumerate().rev() {
        assert!(store.remove(&image.digest).unwrap());
        store.collect().unwrap();
        assert_eq!(store.usage().unwrap().objects, u64::from(left > 0));
    }
    assert!(files_below(&store.root().join("layers")).is_empty());
}

#[tokio::test]
async fn what_cannot_become_a_tree_is_refused_with_the_reason() {
    let mut layout = Layout::new();
    let node = Node::new(&[]);
    let raw = |path: &str, bytes: &[u8]| {
        Layer::raw("application/vnd.cncf.model.weight.v1.raw", json!({FILEPATH: path}), bytes)
    };
    let pack = "application/vnd.cncf.model.config.v1+json";
    let helm = "application/vnd.cncf.helm.config.v1+json";
    let unknown = Layer::raw("application/vnd.ollama.image.model", json!({}), b"x");
    let nameless = Layer::raw("text/plain", json!({}), b"x");
    let titled = Layer::raw("text/plain", json!({TITLE: "x"}), b"y");
    let other = Digest::of(b"other");
    let cases: Vec<(&str, &str, Vec<Layer>, String)> = vec![
        ("climbs", pack, vec![raw("../a", b"x")], r#"climbs out with "..""#.into()),
        ("absolute", pack, vec![raw("/etc/passwd", b"x")], "absolute names are not allowed".into()),
        ("twice", pack, vec![raw("a", b"x"), raw("a", b"y")], r#"are both the file "a""#.into()),
        ("inside", pack, vec![raw("a", b"x"), raw("a/b", b"y")], "and the folder of".into()),
        ("helm", helm, vec![nameless.clone()], format!("artifact of type {helm} is not supported")),
        ("ollama", OCI_CONFIG, vec![unknown], "vnd.ollama.image.model is not supported".into()),
        (
            "nameless",
            EMPTY,
            vec![titled.clone(), nameless],
            "type text/plain without a name".into(),
        ),
        (
            "unpacked",
            EMPTY,
            vec![Layer {
                annotations: json!({TITLE: "x", "io.deis.oras.content.unpack": "true"}),
                ..titled.clone()
            }],
            "gzip:".into(),
        ),
        (
            "hologram",
            "application/vnd.docker.ai.model.config.v0.2+json",
            vec![Layer::raw("application/vnd.docker.ai.hologram", json!({FILEPATH: "a"}), b"x")],
            "vnd.docker.ai.hologram is not supported".into(),
        ),
        (
            "kit",
            "application/vnd.kitops.modelkit.config.v1+json",
            vec![Layer::raw("application/vnd.kitops.modelkit.model.v1.zip", json!({}), b"x")],
            "modelkit.model.v1.zip is not supported".into(),
        ),
    ];
    for (tag, config_type, layers, expected) in cases {
        layout.add(tag, "", (config_type, &json!({})), &layers);
        let why = node.refused(&layout.reference(tag)).await;
        assert!(why.contains(&expected), "{tag}: {why}");
    }
    if tools() {
        let gzip = "application/vnd.oci.image.layer.v1.tar+gzip";
        let unpack = |title: &str| {
            Layer::made(gzip, "tar+gzip", &[("config", b"evil")])
                .annotated(TITLE, title)
                .annotated("io.deis.oras.content.unpack", "true")
        };
        layout.add("outside", "", (EMPTY, &json!({})), &[unpack("tokenizer")]);
        let why = node.refused(&layout.reference("outside")).await;
        assert!(
            why.ends_with(r#""config": stands outside of the layer's folder "tokenizer""#),
            "{why}"
        );
        let altered = unpack("config").annotated("io.deis.oras.content.digest", &other.to_string());
        layout.add("altered", "", (EMPTY, &json!({})), &[altered]);
        let why = node.refused(&layout.reference("altered")).await;
        assert!(why.contains(&format!("says diff_id {other}")), "{why}");
    }
    assert!(node.puller.store().images().unwrap().is_empty());
}

fn skopeo(arguments: &[&str]) {
    let done = Command::new("skopeo").args(["copy", "--quiet"]).args(arguments).output().unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "skopeo copy {arguments:?}: {said}");
}

/// Puts files into a tar with Python; `name` is stored, `path` is read.
fn python_tar(out: &Path, files: &[(&str, &[u8])]) {
    let layer = Layer::made("", "tar", files);
    std::fs::write(out, layer.bytes).unwrap();
}

#[tokio::test]
async fn archives_that_skopeo_made_are_pulled() {
    if !tools() || !installed("skopeo") {
        return;
    }
    let weights = weights();
    let mut layout = Layout::new();
    let files: [(&str, &[u8]); 2] = [("models/model.gguf", &weights), ("models/a", b"1")];
    let layers = vec![
        Layer::made(&format!("{OCI_TAR}+gzip"), "tar+gzip", &files[..1]),
        Layer::made(OCI_TAR, "tar", &files[1..]),
    ];
    let digest = layout.add("v1", "", (OCI_CONFIG, &image_config(&layers)), &layers);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let expected = tree(&[("models/", b""), files[0], files[1]]);

    let oci = format!("oci-archive:{}:v1", path("oci.tar"));
    skopeo(&["--preserve-digests", &layout.reference("v1"), &oci]);
    let node = Node::new(&[]);
    let (files, pulled) = node.files(&oci).await;
    same(&files, &expected, "oci-archive");
    assert_eq!(pulled.digest, digest);
    let again = Node::new(&[]);
    let (files, _) = again.files(&format!("oci-archive:{}", path("oci.tar"))).await;
    same(&files, &expected, "oci-archive without a tag");

    let docker = format!("docker-archive:{}:team/model:v1", path("docker.tar"));
    skopeo(&[&layout.reference("v1"), &docker]);
    for image in [docker.clone(), format!("docker-archive:{}", path("docker.tar"))] {
        let node = Node::new(&[]);
        let (files, pulled) = node.files(&image).await;
        same(&files, &expected, &image);
        assert_eq!(pulled.image.packaging.to_string(), "docker-image");
        assert!(node.pull(&image).await.unwrap().already_present);
    }
    let why = node.refused(&docker.replace("team", "other")).await;
    assert!(
        why.ends_with("docker.io/other/model:v1: not there; it holds :docker.io/team/model:v1"),
        "{why}"
    );
    let why = node.refused(&oci.replace("oci-archive", "docker-archive")).await;
    assert!(why.ends_with("it has no manifest.json; as oci-archive: it can be read"), "{why}");
    let why = node.refused(&docker.replace("docker-archive", "oci-archive")).await;
    assert!(why.ends_with("no file oci-layout; as docker-archive: it can be read"), "{why}");
}

#[tokio::test]
async fn archives_of_other_tools_are_pulled_whatever_their_layers_are() {
    if !tools() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("images.tar");
    let weights = weights();
    // Compressed layers, as ko and kaniko write them; two images, one without a tag.
    let kinds = ["tar", "tar+gzip", "tar+zstd"];
    let made = kinds.map(|kind| Layer::made("", kind, &[(kind, &weights)]));
    let config = image_config(&made).to_string();
    let other = image_config(&made[..1]).to_string();
    let manifest = json!([
        {"Config": "sha256:abc", "RepoTags": ["team/model:v1", "localhost:5000/m:x"],
         "Layers": ["0.tar", "1.tar.gz", "deep/layer.tar"]},
        {"Config": "other.json", "RepoTags": null, "Layers": ["0.tar"]},
    ]);
    let manifest = manifest.to_string();
    python_tar(
        &path,
        &[
            ("sha256:abc", config.as_bytes()),
            ("0.tar", &made[0].bytes),
            ("1.tar.gz", &made[1].bytes),
            ("deep/layer.tar", &made[2].bytes),
            ("other.json", other.as_bytes()),
            ("manifest.json", manifest.as_bytes()),
        ],
    );
    let archive = format!("docker-archive:{}", path.display());
    let node = Node::new(&[]);
    let all = tree(&[("tar", &weights), ("tar+gzip", &weights), ("tar+zstd", &weights)]);
    for name in ["team/model:v1", "docker.io/team/model:v1", "localhost:5000/m:x"] {
        let (files, _) = node.files(&format!("{archive}:{name}")).await;
        same(&files, &all, name);
    }
    assert_eq!(node.puller.store().images().unwrap().len(), 1);
    let why = node.refused(&archive).await;
    assert!(
        why.contains("2 images are meant; it holds :docker.io/team/model:v1, :localhost"),
        "{why}"
    );
    let untagged = why.rsplit_once('@').unwrap().1.to_owned();
    let (files, _) = node.files(&format!("{archive}@{untagged}")).await;
    same(&files, &tree(&[("tar", &weights)]), "by digest");

    // Bytes that are not what the config says get no name.
    let mut wrong = made[0].bytes.clone();
    wrong[1000] ^= 1;
    let manifest = json!([{"Config": "c", "RepoTags": ["a:b"], "Layers": ["l"]}]).to_string();
    let files: [(&str, &[u8]); 3] =
        [("c", other.as_bytes()), ("l", &wrong), ("manifest.json", manifest.as_bytes())];
    python_tar(&path, &files);
    let fresh = Node::new(&[]);
    let why = fresh.refused(&archive).await;
    assert!(why.contains("the source altered them"), "{why}");
    python_tar(&path, &files[..2]);
    assert!(fresh.refused(&archive).await.contains("not made by docker save"));
    python_tar(&path, &files[1..]);
    assert!(fresh.refused(&archive).await.contains("c in "));
}
