//! Skip before download: of a fine-tune only what is new is fetched and written, however it and its
//! base are packed; and whatever is wrong about what is here, the tree is right in the end.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::BTreeSet;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use carport_image::pull::{PullOptions, PullRequest, Pulled};
use carport_image::{Digest, Puller, Store};
use carport_tests::images::{Image, noise};
use carport_tests::layouts::{Files, Layer, Layout, files_below, tools};
use carport_tests::models::{reference, sources};
use carport_tests::node::eventually;
use carport_tests::registry::installed;
use carport_tests::scripted::{Gate, Scripted};
use serde_json::{Value, json};
use tempfile::TempDir;

const SHARD_BYTES: usize = 8 * 1024 * 1024 + 1000;
const CHUNK_BYTES: usize = 1024 * 1024;

/// Requests of up to so many bytes look for what is here; larger ones fetch.
const LOOK_BYTES: u64 = 64 * 1024;

const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const OCI_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
const FILEPATH: &str = "org.cncf.model.filepath";

/// A node's store, and a way to pull what a scripted registry has.
struct Node {
    folder: TempDir,
    puller: Puller,
}

impl Node {
    fn new(hosts: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let puller = puller(folder.path(), hosts);
        Self { folder, puller }
    }

    fn restart(&mut self, hosts: &[&str]) {
        self.puller = puller(self.folder.path(), hosts);
    }

    async fn pull(&self, host: &str, image: &Image) -> Pulled {
        let place = format!("{host}/models/llama@{}", image.digest());
        let handle = self.puller.start(PullRequest::new(reference(&place)));
        let pulled = handle.wait().await.unwrap_or_else(|error| panic!("{error}"));
        let progress = handle.progress();
        assert_eq!(progress.done_bytes, progress.total_bytes, "all is done");
        assert_eq!(progress.fetched_bytes, pulled.fetched_bytes);
        pulled
    }

    fn files(&self, pulled: &Pulled) -> Files {
        files_below(&self.puller.store().rootfs(&pulled.digest))
    }

    /// The object of a file.
    fn object(&self, content: &[u8]) -> PathBuf {
        let hex = blake3::hash(content).to_hex();
        self.puller.store().root().join("objects").join(&hex[..2]).join(hex.as_str())
    }

    /// Whether the file of a layer that comes behind `before` others is being written.
    fn writes_behind(&self, before: usize) -> bool {
        let ingest = self.puller.store().root().join("ingest");
        let mut names = walkdir::WalkDir::new(ingest).min_depth(2).into_iter().flatten();
        names.any(|entry| entry.file_name().to_str() == Some(&format!("{before:07}")))
    }

    /// No object has other bytes than its name says, and nothing is left under way.
    fn assert_sound(&self) {
        let root = self.puller.store().root();
        for (name, content) in files_below(&root.join("objects")) {
            let Some((_, hex)) = name.split_once('/').filter(|(_, hex)| !hex.is_empty()) else {
                continue;
            };
            assert_eq!(blake3::hash(&content).to_hex().as_str(), hex.trim_end_matches(".x"));
        }
        assert_eq!(files_below(&root.join("ingest")), Files::new());
    }
}

fn puller(folder: &Path, hosts: &[&str]) -> Puller {
    let store = Store::open(folder.join("store")).unwrap();
    Puller::new(store, sources(hosts), PullOptions::default())
}

/// Four shards, of which a fine-tune changes the third, and a config that it changes as well.
fn model(tuned: bool) -> Vec<(String, Vec<u8>)> {
    let seeds = if tuned { [1, 2, 30, 4] } else { [1, 2, 3, 4] };
    let shard = |(n, seed)| (format!("model-{}.safetensors", n + 1), noise(SHARD_BYTES, seed));
    let mut files = vec![("config.json".to_owned(), format!("{{\"tuned\":{tuned}}}").into_bytes())];
    files.extend(seeds.into_iter().enumerate().map(shard));
    files
}

/// The files that `tuned` adds to the base: what cannot be here.
fn new_bytes() -> u64 {
    (SHARD_BYTES + 15) as u64
}

/// An image of these files: a layer of all of them, or of `raw` a layer each.
fn image(kind: &str, files: &[(String, Vec<u8>)]) -> Image {
    let mut layout = Layout::new();
    let digest = if kind == "raw" {
        let layer = |(name, content): &(String, Vec<u8>)| {
            Layer::raw("application/vnd.cncf.model.weight.v1.raw", json!({FILEPATH: name}), content)
        };
        let layers: Vec<_> = files.iter().map(layer).collect();
        layout.add("v1", "", ("application/vnd.cncf.model.config.v1+json", &json!({})), &layers)
    } else {
        let suffix = match kind {
            "tar" => "",
            "estargz" | "tar+gzip" => "+gzip",
            _ => "+zstd",
        };
        let files: Vec<_> =
            files.iter().map(|(name, content)| (name.as_str(), &content[..])).collect();
        let media_type = format!("{OCI_TAR}{suffix}");
        let layers = [Layer::made_in_chunks(&media_type, kind, CHUNK_BYTES, &files)];
        layout.add("v1", "", (OCI_CONFIG, &config(&layers)), &layers)
    };
    Image::of_layout(&layout, &digest)
}

fn config(layers: &[Layer]) -> Value {
    let diff_ids: Vec<_> = layers.iter().map(|layer| &layer.diff_id).collect();
    json!({"architecture": "amd64", "os": "linux",
           "rootfs": {"type": "layers", "diff_ids": diff_ids}})
}

/// A registry that has both; what only the fine-tune has passes the gate.
async fn serve(base: &Image, tune: &Image, gate: &Gate) -> Scripted {
    serve_large(base, tune, gate, 0).await
}

/// As [`serve`], where only requests of more than `small` bytes have to pass the gate.
async fn serve_large(base: &Image, tune: &Image, gate: &Gate, small: u64) -> Scripted {
    let (base, tune, gate) = (base.clone(), tune.clone(), gate.clone());
    Scripted::start(move |request| {
        if base.has(&request.target) {
            return base.answer(request);
        }
        let range = request.header("range").and_then(|range| {
            let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some(to.parse::<u64>().ok()? - from.parse::<u64>().ok()? + 1)
        });
        match range {
            Some(length) if length <= small => tune.answer(request),
            _ => tune.answer_gated(request, &gate),
        }
    })
    .await
}

fn same(found: &Files, expected: &[(String, Vec<u8>)], what: &str) {
    let names: BTreeSet<_> = found.keys().collect();
    assert_eq!(names, expected.iter().map(|(name, _)| name).collect(), "{what}");
    for (name, content) in expected {
        assert!(found[name] == *content, "{what}: {name} has other bytes");
    }
}

#[tokio::test]
async fn of_a_fine_tune_only_what_is_new_is_fetched_and_written() {
    if !tools() {
        return;
    }
    let pairs = [
        ("tar", "tar"),
        ("tar", "zstd:chunked"),
        ("zstd:chunked", "estargz"),
        ("estargz", "zstd:chunked"),
        ("estargz", "tar"),
        ("tar", "raw"),
        ("raw", "raw"),
        ("raw", "tar"),
        ("raw", "zstd:chunked"),
    ];
    for (base_kind, tune_kind) in pairs {
        let what = format!("{tune_kind} over {base_kind}");
        let (base, tune) = (image(base_kind, &model(false)), image(tune_kind, &model(true)));
        let gate = Gate::closed_at(u64::MAX);
        let registry = serve(&base, &tune, &gate).await;
        let host = registry.host();
        let node = Node::new(&[&host]);
        node.pull(&host, &base).await;
        let asked = registry.requests().len();
        let pulled = node.pull(&host, &tune).await;
        same(&node.files(&pulled), &model(true), &what);
        node.assert_sound();

        let most = new_bytes() * 101 / 100;
        assert_eq!(gate.served(), pulled.fetched_bytes, "{what}: counted is what came");
        assert!(gate.served() <= most, "{what}: {} of {most} bytes", gate.served());
        assert!(pulled.written_bytes <= most, "{what}: {} bytes written", pulled.written_bytes);
        assert!(pulled.written_bytes >= SHARD_BYTES as u64, "{what}");
        let requests = registry.requests().len() - asked;
        assert!(requests < 40, "{what}: {requests} requests");
        // Shared is the very file.
        assert_eq!(node.puller.store().usage().unwrap().objects, 7, "{what}");
    }
}

#[tokio::test]
async fn layers_without_places_to_look_at_and_first_pulls_cost_no_request_more() {
    if !tools() {
        return;
    }
    let (base, tune) = (image("tar", &model(false)), image("tar+gzip", &model(true)));
    let gate = Gate::closed_at(u64::MAX);
    let registry = serve(&base, &tune, &gate).await;
    let node = Node::new(&[&registry.host()]);
    node.pull(&registry.host(), &base).await;
    let blobs = |registry: &Scripted| {
        registry.requests().iter().filter(|request| request.target.contains("/blobs/")).count()
    };
    // The config, and three ranges of the layer.
    assert_eq!(blobs(&registry), 4);
    let pulled = node.pull(&registry.host(), &tune).await;
    same(&node.files(&pulled), &model(true), "gzip");
    assert_eq!(pulled.fetched_bytes, tune.layer_bytes(), "each byte once, also those looked at");
    assert_eq!(gate.served(), tune.layer_bytes());
}

#[tokio::test]
async fn an_object_that_is_damaged_is_found_out_and_fetched_again() {
    if !tools() {
        return;
    }
    for kind in ["tar", "zstd:chunked", "estargz"] {
        let (base, tune) = (image("tar", &model(false)), image(kind, &model(true)));
        let gate = Gate::closed_at(u64::MAX);
        let registry = serve(&base, &tune, &gate).await;
        let host = registry.host();
        let node = Node::new(&[&host]);
        node.pull(&host, &base).await;
        // Where nobody takes a sample.
        let path = node.object(&noise(SHARD_BYTES, 2));
        let mut object = std::fs::File::options().write(true).open(&path).unwrap();
        object.seek(SeekFrom::Start(3 * CHUNK_BYTES as u64 + 5)).unwrap();
        object.write_all(b"rot").unwrap();
        object.sync_all().unwrap();
        drop(object);

        let pulled = node.pull(&host, &tune).await;
        same(&node.files(&pulled), &model(true), kind);
        node.assert_sound();
        assert!(
            gate.served() <= tune.layer_bytes() + new_bytes() * 102 / 100,
            "{kind}: whole, once"
        );
    }
}

#[tokio::test]
async fn a_file_that_is_alike_only_where_one_looks_is_fetched() {
    if !tools() {
        return;
    }
    for kind in ["tar", "zstd:chunked"] {
        let mut tuned = model(true);
        tuned[2].1[5 * CHUNK_BYTES + 7] ^= 1;
        let (base, tune) = (image("tar", &model(false)), image(kind, &tuned));
        let gate = Gate::closed_at(u64::MAX);
        let registry = serve(&base, &tune, &gate).await;
        let node = Node::new(&[&registry.host()]);
        node.pull(&registry.host(), &base).await;
        let pulled = node.pull(&registry.host(), &tune).await;
        same(&node.files(&pulled), &tuned, kind);
        node.assert_sound();
        assert!(pulled.fetched_bytes > tune.layer_bytes(), "{kind}: what was wrong counts, too");
        assert_eq!(gate.served(), pulled.fetched_bytes, "{kind}");
        assert!(
            node.object(&noise(SHARD_BYTES, 2)).exists(),
            "{kind}: it was no fault of the object"
        );
    }
}

#[tokio::test]
async fn a_source_without_ranges_is_read_whole() {
    if !tools() {
        return;
    }
    for kind in ["tar", "zstd:chunked"] {
        let (base, tune) = (image("tar", &model(false)), image(kind, &model(true)));
        let served = tune.clone();
        let rangeless = Scripted::start(move |request| {
            let mut request = request.clone();
            request.headers.remove("range");
            served.answer(&request)
        });
        let rangeless = rangeless.await;
        let gate = Gate::closed_at(u64::MAX);
        let registry = serve(&base, &tune, &gate).await;
        let node = Node::new(&[&registry.host(), &rangeless.host()]);
        node.pull(&registry.host(), &base).await;
        let pulled = node.pull(&rangeless.host(), &tune).await;
        same(&node.files(&pulled), &model(true), kind);
        assert_eq!(pulled.fetched_bytes, tune.layer_bytes(), "{kind}");
        node.assert_sound();
    }
}

#[tokio::test]
async fn what_is_collected_during_the_pull_stays_for_it() {
    if !tools() {
        return;
    }
    for kind in ["tar", "zstd:chunked"] {
        let (base, tune) = (image("tar", &model(false)), image(kind, &model(true)));
        // Up to within the new shard, the third.
        let gate = Gate::closed_at((SHARD_BYTES * 5 / 2) as u64);
        let registry = serve_large(&base, &tune, &gate, LOOK_BYTES).await;
        let host = registry.host();
        let node = Node::new(&[&host]);
        let first = node.pull(&host, &base).await;
        let place = format!("{host}/models/llama@{}", tune.digest());
        let handle = node.puller.start(PullRequest::new(reference(&place)));
        gate.reached(new_bytes() / 4).await;
        let store = node.puller.store();
        assert!(store.remove(&first.digest).unwrap());
        store.collect().unwrap();
        assert!(!node.object(&noise(SHARD_BYTES, 3)).exists(), "{kind}: what nobody uses has gone");
        gate.open();
        let pulled = handle.wait().await.unwrap();
        same(&node.files(&pulled), &model(true), kind);
        node.assert_sound();
        assert!(
            pulled.fetched_bytes <= new_bytes() * 101 / 100,
            "{kind}: {}",
            pulled.fetched_bytes
        );
    }
}

#[tokio::test]
async fn a_pull_that_was_stopped_goes_on_and_still_skips() {
    if !tools() {
        return;
    }
    let (base, tune) = (image("tar", &model(false)), image("tar", &model(true)));
    let half_of_the_new = (SHARD_BYTES * 5 / 2) as u64;
    let gate = Gate::closed_at(half_of_the_new);
    let registry = serve_large(&base, &tune, &gate, LOOK_BYTES).await;
    let host = registry.host();
    let mut node = Node::new(&[&host]);
    node.pull(&host, &base).await;
    let place = format!("{host}/models/llama@{}", tune.digest());
    let handle = node.puller.start(PullRequest::new(reference(&place)));
    // The files before it are taken, and what the gate lets pass of it has come.
    let until = half_of_the_new - LOOK_BYTES;
    let arrived = async || handle.progress().done_bytes >= until && node.writes_behind(3);
    eventually("half of it has arrived", arrived).await;
    node.puller.shutdown().await;
    handle.wait().await.unwrap_err();
    gate.open();
    node.restart(&[&host]);
    let pulled = node.pull(&host, &tune).await;
    same(&node.files(&pulled), &model(true), "gone on");
    node.assert_sound();
    let again = pulled.fetched_bytes;
    assert!(again < new_bytes() * 3 / 4, "{again} of {} bytes", new_bytes());
}

#[tokio::test]
async fn layers_that_skopeo_made_are_skipped_in() {
    if !tools() || !installed("skopeo") {
        return;
    }
    let mut layout = Layout::new();
    let files = model(true);
    let files: Vec<_> = files.iter().map(|(name, content)| (name.as_str(), &content[..])).collect();
    let layers = [Layer::made(OCI_TAR, "tar", &files)];
    layout.add("v1", "", (OCI_CONFIG, &config(&layers)), &layers);
    let chunked = Layout::new();
    let done = std::process::Command::new("skopeo")
        .args(["copy", "--quiet", "--dest-compress-format", "zstd:chunked"])
        .args(["--dest-compress", &layout.reference("v1"), &chunked.reference("v1")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stderr);
    if !done.status.success() {
        eprintln!("SKIPPED: this skopeo makes no zstd:chunked: {said}");
        return;
    }
    let index: Value =
        serde_json::from_slice(&std::fs::read(chunked.path().join("index.json")).unwrap()).unwrap();
    let digest: Digest = index["manifests"][0]["digest"].as_str().unwrap().parse().unwrap();
    let tune = Image::of_layout(&chunked, &digest);
    let base = image("tar", &model(false));
    let gate = Gate::closed_at(u64::MAX);
    let registry = serve(&base, &tune, &gate).await;
    let node = Node::new(&[&registry.host()]);
    node.pull(&registry.host(), &base).await;
    let pulled = node.pull(&registry.host(), &tune).await;
    same(&node.files(&pulled), &model(true), "zstd:chunked by skopeo");
    node.assert_sound();
    let most = new_bytes() * 102 / 100;
    assert!(pulled.fetched_bytes <= most, "{} of {most} bytes", pulled.fetched_bytes);
}
