//! Volumes that stream, on a node in small: a pod starts while its model arrives, reads what it
//! wants first, and outlives whatever ends meanwhile.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::path::PathBuf;

use carport_csi::fuse::{self, FS_TYPE};
use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::node::{Node, Pod, Setup, eventually};
use carport_tests::scripted::{Gate, Request, Scripted};

const SHARD_BYTES: usize = 12 * 1024 * 1024 + 333;

/// What a registry lets pass of the first shard: its head, which comes early.
const OPEN_BYTES: u64 = 2 * 1024 * 1024;

fn shard(n: u64) -> Vec<u8> {
    noise(SHARD_BYTES, n)
}

/// Three shards and small files in one layer.
fn image_with(shards: [&[u8]; 3]) -> Image {
    let [first, second, third] = shards;
    Image::of(&[Tar::default()
        .entry("models", tar::EntryType::Directory, "", b"")
        .file("models/config.json", b"{}")
        .file("models/model-1.safetensors", first)
        .file("models/model-2.safetensors", second)
        .file("models/model-3.safetensors", third)
        .symlink("models/latest", "model-3.safetensors")
        .end()])
}

fn image() -> Image {
    image_with([&shard(1), &shard(2), &shard(3)])
}

fn range_of(request: &Request) -> Option<(u64, u64)> {
    let (from, to) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((from.parse().ok()?, to.parse::<u64>().ok()? + 1))
}

/// A registry that holds the end of the first shard back behind the gate.
async fn holding_back(image: &Image, gate: &Gate) -> Scripted {
    let (image, gate) = (image.clone(), gate.clone());
    Scripted::start(move |request| {
        let held = request.target.ends_with(&image.layers[0].to_string())
            && range_of(request)
                .is_some_and(|(from, to)| from < SHARD_BYTES as u64 && OPEN_BYTES < to);
        if held { image.answer_gated(request, &gate) } else { image.answer(request) }
    })
    .await
}

/// Bytes of the layer that were asked for.
fn asked(server: &Scripted, image: &Image) -> u64 {
    let layer = image.layers[0].to_string();
    let requests = server.requests().into_iter().filter(|r| r.target.ends_with(&layer));
    requests.filter_map(|request| range_of(&request)).map(|(from, to)| to - from).sum()
}

/// A node on which volumes can stream.
fn node(test: &str, server: &Scripted) -> Option<Node> {
    if let Err(error) = fuse::check() {
        eprintln!("SKIPPED {test}: {error}");
        return None;
    }
    Node::set_up(binary(), Setup::plain_http(&[&server.host()]))
}

fn name(server: &Scripted) -> String {
    format!("{}/models/llama:v1", server.host())
}

async fn stream(node: &Node, pod: &Pod, image: &str) -> Result<(), tonic::Status> {
    node.publish_with(pod, &[("image", image), ("mode", "stream")]).await
}

/// The type of the topmost mount that a pod's volume is.
fn fs_type(node: &Node, pod: &Pod) -> Option<String> {
    let mounts = node.mounts_below(&pod.target);
    let (_, fields) = mounts.last()?.split_once(" - ")?;
    Some(fields.split(' ').next()?.to_owned())
}

fn at(node: &Node, pod: &Pod, file: &str) -> PathBuf {
    node.inside(&pod.target).join("models").join(file)
}

/// Reads a file of a pod, on a thread that may wait.
async fn read(node: &Node, pod: &Pod, file: &str) -> std::io::Result<Vec<u8>> {
    let path = at(node, pod, file);
    tokio::task::spawn_blocking(move || fs::read(path)).await.unwrap()
}

fn stored(node: &Node) -> bool {
    !node.json(&["ls"]).as_array().unwrap().is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_starts_while_its_image_arrives_and_the_next_one_gets_a_kernel_mount() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let server = holding_back(&image, &gate).await;
    let test = "a_pod_starts_while_its_image_arrives_and_the_next_one_gets_a_kernel_mount";
    let Some(node) = node(test, &server) else { return };
    let name = name(&server);
    let [first, second, third] = ["first", "second", "third"].map(|uid| node.pod(uid));

    stream(&node, &first, &name).await.unwrap();
    stream(&node, &second, &name).await.unwrap();
    stream(&node, &second, &name).await.unwrap();
    assert!(!stored(&node), "not complete");
    for pod in [&first, &second] {
        assert_eq!(fs_type(&node, pod).as_deref(), Some(FS_TYPE));
        assert!(read(&node, pod, "latest").await.unwrap() == shard(3));
    }
    let device = |pod: &Pod| {
        use std::os::unix::fs::MetadataExt as _;
        fs::metadata(node.inside(&pod.target)).unwrap().dev()
    };
    assert_eq!(device(&first), device(&second), "one page cache");
    assert!(fs::write(at(&node, &first, "config.json"), b"").is_err());
    let pull = node.json(&["status"])["models"][0]["pull"].clone();
    assert!(pull["done_bytes"].as_u64() > Some(OPEN_BYTES), "{pull}");

    let late = read(&node, &first, "model-1.safetensors");
    gate.open();
    assert!(late.await.unwrap() == shard(1));
    eventually("the image is stored", async || stored(&node)).await;
    stream(&node, &third, &name).await.unwrap();
    assert_ne!(fs_type(&node, &third).as_deref(), Some(FS_TYPE));
    for pod in [&first, &second, &third] {
        assert!(read(&node, pod, "model-2.safetensors").await.unwrap() == shard(2));
    }
    assert_eq!(asked(&server, &image), image.layer_bytes(), "each byte once");

    for pod in [&first, &second, &third] {
        node.unpublish(pod).await.unwrap();
        assert!(!node.inside(&pod.target).exists());
    }
    let folder = node.socket().with_file_name("stream");
    eventually("the session ends", async || node.mounts_below(&folder).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_its_last_volume_a_session_ends_and_what_came_is_kept() {
    let (image, gate) = (image(), Gate::closed_at(OPEN_BYTES));
    let server = holding_back(&image, &gate).await;
    let test = "with_its_last_volume_a_session_ends_and_what_came_is_kept";
    let Some(node) = node(test, &server) else { return };
    let pods = ["first", "second"].map(|uid| node.pod(uid));
    for pod in &pods {
        stream(&node, pod, &name(&server)).await.unwrap();
    }
    assert!(read(&node, &pods[0], "model-3.safetensors").await.unwrap() == shard(3));
    node.unpublish(&pods[0]).await.unwrap();
    assert!(read(&node, &pods[1], "model-2.safetensors").await.unwrap() == shard(2));
    node.unpublish(&pods[1]).await.unwrap();
    let folder = node.socket().with_file_name("stream");
    eventually("the session ends", async || node.mounts_below(&folder).is_empty()).await;
    let none = async || node.json(&["status"])["models"].as_array().unwrap().is_empty();
    eventually("the pull stops", none).await;

    gate.open();
    let pod = node.pod("third");
    node.publish(&pod, &name(&server)).await.unwrap();
    assert!(read(&node, &pod, "model-1.safetensors").await.unwrap() == shard(1));
    let again = asked(&server, &image) - image.layer_bytes();
    assert!(again < SHARD_BYTES as u64, "{again} bytes came twice");
}
