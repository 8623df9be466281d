//! What the agent may take: memory, bytes written, time for very many files.

#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::fs;
use std::io::Write as _;
use std::path::Path;

use carport_tests::carport::binary;
use carport_tests::images::{Image, Tar, noise};
use carport_tests::node::Node;
use carport_tests::registry::Registry;
use carport_tests::scripted::Gate;

/// What the agent's design allows it while it pulls.
const MEMORY_BYTES: u64 = 150_000_000;

/// Of an image byte, so many are written; the rest is records and the last block of each file.
const WRITTEN_RATIO: f64 = 1.05;

const SHARDS: u64 = 4;
const SHARD_BYTES: u64 = 256 << 20;

/// A number of a process from `/proc/<pid>/<file>`.
fn number(pid: u32, file: &str, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
    let line = text.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn peak_memory_bytes(pid: u32) -> u64 {
    number(pid, "status", "VmHWM:") * 1024
}

/// What of it stays its own afterwards: the manifests ask Kubernetes for 128 MiB in all, the program's own pages included.
const KEPT_BYTES: u64 = 40 << 20;

/// A shard of which no block is like another's.
fn write_shard(path: &Path, shard: u64) {
    let mut block = noise(4 << 20, 0);
    let mut file = fs::File::create(path).unwrap();
    for n in 0..SHARD_BYTES / block.len() as u64 {
        for (page, bytes) in block.chunks_mut(4096).enumerate() {
            bytes[..8].copy_from_slice(&(shard << 48 | n << 24 | page as u64).to_le_bytes());
        }
        file.write_all(&block).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pulling_a_gibibyte_takes_little_memory_and_writes_each_byte_once() {
    let Some(registry) = Registry::start() else { return };
    let model = tempfile::tempdir().unwrap();
    for shard in 0..SHARDS {
        write_shard(&model.path().join(format!("model-{shard}.safetensors")), shard);
    }
    let Some(node) = Node::start(binary(), &[registry.host()]) else { return };
    let name = format!("{}/team/large:v1", registry.host());
    let packed = node.carport().arg("pack").arg(model.path()).arg(&name).output().unwrap();
    assert!(packed.status.success(), "{}", String::from_utf8_lossy(&packed.stderr));
    // Its pages belong to the pages that the pull needs.
    drop(model);

    let before = number(node.pid(), "io", "write_bytes:");
    let pod = node.pod("pod-a");
    node.publish(&pod, &name).await.unwrap();
    let written = number(node.pid(), "io", "write_bytes:") - before;
    let peak = peak_memory_bytes(node.pid());
    let image = SHARDS * SHARD_BYTES;
    #[allow(clippy::cast_precision_loss)]
    let ratio = written as f64 / image as f64;
    println!("peak memory {peak} bytes, written {written} of {image} bytes ({ratio:.3})");
    assert!(peak < MEMORY_BYTES, "{peak}");
    assert!(ratio <= WRITTEN_RATIO, "{ratio}");
    // Freed at once, and not with the next turn of a minute.
    let kept = || number(node.pid(), "status", "RssAnon:") * 1024;
    let began = std::time::Instant::now();
    while kept() > KEPT_BYTES && began.elapsed().as_secs() < 20 {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    println!("{} bytes stay after {:?}", kept(), began.elapsed());
    assert!(kept() <= KEPT_BYTES, "{}", kept());
    let shown = node.inside(&pod.target).join("models");
    assert_eq!(fs::read_dir(&shown).unwrap().count() as u64, SHARDS);
    node.unpublish(&pod).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_of_ten_thousand_files_is_published_and_listed() {
    const FILES: usize = 10_000;
    let tar = (0..FILES).fold(Tar::default(), |tar, n| {
        // A third of them are copies of others.
        let content = format!("file {}", n % 6_667);
        tar.file(&format!("site-packages/{:02}/{n}.py", n % 100), content.as_bytes())
    });
    let image = Image::of(&[tar.end()]);
    let server = image.serve(&Gate::closed_at(u64::MAX)).await;
    let Some(node) = Node::start(binary(), &[&server.host()]) else { return };
    let name = format!("{}/team/many:v1", server.host());
    let pod = node.pod("pod-a");
    node.publish(&pod, &name).await.unwrap();
    let peak = peak_memory_bytes(node.pid());
    println!("peak memory {peak} bytes");
    assert!(peak < MEMORY_BYTES, "{peak}");

    let files = walkdir::WalkDir::new(node.inside(&pod.target)).into_iter();
    let files = files.map(Result::unwrap).filter(|entry| entry.file_type().is_file());
    assert_eq!(files.count(), FILES);
    let listed = node.json(&["ls"]);
    assert_eq!(listed[0]["files"], FILES);
    node.metric_becomes("carport_store_objects", 6_667.0).await;
    let second = node.pod("pod-b");
    let began = std::time::Instant::now();
    node.publish(&second, &name).await.unwrap();
    // A cached one is a mount, however many files it shows.
    assert!(began.elapsed().as_millis() < 500, "{:?}", began.elapsed());
    for pod in [&pod, &second] {
        node.unpublish(pod).await.unwrap();
    }
    node.json(&["rm", &name]);
    assert_eq!(node.json(&["gc"])["objects"], 6_667);
}
