//! The main job, step by step, with a line for each: what `make demo` runs.
//!
//! Every figure that is printed was measured in this run, on real parts: a registry on
//! loopback, the agent's own binary, the CSI socket, kernel mounts.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use carport_image::Digest;
use serde_json::Value;

use crate::node::{Node, Pod};
use crate::registry::Registry;

/// Size of one shard of the demo's model: large enough to be measured, small enough for any machine.
const SHARD_BYTES: usize = 32 * 1024 * 1024;

/// Runs the demo with this `carport`, one line a step into `out`.
///
/// # Errors
///
/// When a step does not do what it is there to show.
pub async fn run(binary: &Path, out: &mut dyn Write) -> anyhow::Result<()> {
    let registry =
        Registry::start().context("docker-registry is not installed: run `make setup`")?;
    let models = tempfile::tempdir()?;
    let mut lines = Lines { out, number: 0 };
    lines.text(
        "The main job: a folder of weights, one copy on the node, two pods that read it.\n",
    )?;

    let start = Instant::now();
    let base = write_model(models.path(), "tiny-llama", [1, 2])?;
    let tuned = write_model(models.path(), "tiny-llama-tuned", [1, 3])?;
    let reference = format!("{}/demo/tiny-llama:v1", registry.host());
    let reference_tuned = format!("{}/demo/tiny-llama-tuned:v1", registry.host());
    let packed = pack(binary, &base, &reference, registry.host())?;
    pack(binary, &tuned, &reference_tuned, registry.host())?;
    lines.step(
        "pack",
        format!(
            "a model folder ({}) became an image of {} layers, and a fine-tune of it another; both are in a registry: {:.2} s",
            size(&packed["bytes"]),
            packed["layers"],
            start.elapsed().as_secs_f64()
        ),
    )?;

    let start = Instant::now();
    let mut node =
        Node::start(binary, &[registry.host()]).context("the demo mounts: run it as root")?;
    lines.step(
        "agent",
        format!(
            "serves CSI, gRPC and metrics from an empty store: {:.2} s",
            start.elapsed().as_secs_f64()
        ),
    )?;

    let (pod_a, pod_b) = (node.pod("pod-a"), node.pod("pod-b"));
    let start = Instant::now();
    node.publish(&pod_a, &reference).await?;
    lines.step(
        "publish",
        format!(
            "to pod-a: pulled, verified, mounted read-only: {:.2} s",
            start.elapsed().as_secs_f64()
        ),
    )?;
    let start = Instant::now();
    node.publish(&pod_b, &reference).await?;
    lines.step(
        "publish",
        format!(
            "to pod-b: mounted the copy that is here: {:.1} ms",
            start.elapsed().as_secs_f64() * 1000.0
        ),
    )?;

    let read = compare(&node, &base, [&pod_a, &pod_b])?;
    lines.step("read", read)?;

    let start = Instant::now();
    let pulled = json(node.carport().args(["pull", "-o", "json", &reference_tuned]))?;
    lines.step(
        "share",
        format!(
            "the fine-tune shares a shard: fetched {} of its {}: {:.2} s",
            size(&pulled[0]["fetched_bytes"]),
            size(&pulled[0]["unpacked_bytes"]),
            start.elapsed().as_secs_f64()
        ),
    )?;
    lines.step("disk", disk(&node)?)?;
    lines.step("locate", locate(&node, [&reference, &reference_tuned]).await?)?;
    lines.step("gpus", gpus(&node)?)?;

    let status = node.stop_agent();
    ensure!(status.success(), "the agent ended with {status} on SIGTERM");
    let still = compare(&node, &base, [&pod_a, &pod_b]).context("after the agent stopped")?;
    ensure!(still.contains("same inodes"), "{still}");
    lines.step("stop", "the agent ended on SIGTERM; both pods go on reading".to_owned())?;

    node.start_agent();
    for pod in [&pod_a, &pod_b] {
        node.unpublish(pod).await?;
        ensure!(!node.inside(&pod.target).exists(), "{} is still there", pod.target.display());
    }
    let removed = json(node.carport().args(["rm", "-o", "json", &reference, &reference_tuned]))?;
    ensure!(removed.as_array().is_some_and(|images| images.len() == 2), "{removed}");
    let freed = json(node.carport().args(["gc", "-o", "json"]))?;
    drop(node);
    lines.step(
        "clean",
        format!("a new agent took the volumes away, and gc freed {}", size(&freed["bytes"])),
    )?;
    Ok(())
}

struct Lines<'a> {
    out: &'a mut dyn Write,
    number: u32,
}

impl Lines<'_> {
    fn step(&mut self, name: &str, what: String) -> std::io::Result<()> {
        self.number += 1;
        writeln!(self.out, "{:>2}  {name:<8} {what}", self.number)?;
        self.out.flush()
    }

    fn text(&mut self, text: &str) -> std::io::Result<()> {
        writeln!(self.out, "{text}")
    }
}

/// A model folder with a shard for each seed: equal seeds, equal shards.
fn write_model(parent: &Path, name: &str, seeds: [u64; 2]) -> anyhow::Result<PathBuf> {
    let folder = parent.join(name);
    fs::create_dir_all(folder.join("tokenizer"))?;
    fs::write(folder.join("config.json"), format!(r#"{{"_name_or_path":"{name}"}}"#))?;
    fs::write(folder.join("tokenizer/tokenizer.json"), r#"{"version":"1.0"}"#)?;
    for (n, seed) in seeds.iter().enumerate() {
        let mut state = 0x9e37_79b9_7f4a_7c15 ^ (seed << 32);
        let mut bytes = Vec::with_capacity(SHARD_BYTES);
        while bytes.len() < SHARD_BYTES {
            // xorshift64: bytes that neither repeat nor compress.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        fs::write(folder.join(format!("model-0000{}-of-00002.safetensors", n + 1)), bytes)?;
    }
    Ok(folder)
}

fn pack(binary: &Path, folder: &Path, reference: &str, host: &str) -> anyhow::Result<Value> {
    let mut command = std::process::Command::new(binary);
    command.args(["pack", "-o", "json", "--plain-http", host]).arg(folder).arg(reference);
    json(&mut command)
}

/// Runs a command that answers JSON.
fn json(command: &mut std::process::Command) -> anyhow::Result<Value> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    serde_json::from_slice(&output.stdout).with_context(|| format!("the output of {command:?}"))
}

/// Reads every file of the model in both pods, and says what they have in common.
fn compare(node: &Node, model: &Path, pods: [&Pod; 2]) -> anyhow::Result<String> {
    let (mut bytes, mut files) = (0, 0);
    for entry in walkdir::WalkDir::new(model).sort_by_file_name() {
        let entry = entry?;
        if !entry.file_type().is_file() {
            continue;
        }
        let name = entry.path().strip_prefix(model)?;
        let original = Digest::of(&fs::read(entry.path())?);
        let mut inodes = Vec::new();
        for pod in pods {
            let path = node.inside(&pod.target).join("models").join(name);
            let content = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
            ensure!(Digest::of(&content) == original, "{} has other bytes", path.display());
            let meta = fs::metadata(&path)?;
            inodes.push((meta.dev(), meta.ino()));
            bytes += content.len() as u64;
        }
        ensure!(inodes[0] == inodes[1], "{} is two files: {inodes:?}", name.display());
        files += 1;
    }
    let written = fs::write(node.inside(&pods[0].target).join("models/new"), "x");
    let refused = written.err().context("a pod could write into its volume")?;
    ensure!(refused.raw_os_error() == Some(rustix::io::Errno::ROFS.raw_os_error()), "{refused}");
    Ok(format!(
        "{files} files, {} in both pods, all as packed; same inodes; writing is refused (read-only)",
        bytes_text(bytes)
    ))
}

fn disk(node: &Node) -> anyhow::Result<String> {
    let images = json(node.carport().args(["ls", "-o", "json"]))?;
    let in_images: u64 =
        images.as_array().into_iter().flatten().filter_map(|i| i["unpacked_bytes"].as_u64()).sum();
    let mut on_disk = 0;
    for entry in walkdir::WalkDir::new(node.root().join("objects")) {
        let entry = entry?;
        if entry.file_type().is_file() {
            on_disk += entry.metadata()?.blocks() * 512;
        }
    }
    Ok(format!(
        "two images hold {}, the store keeps {} ({:.2} bytes a byte)",
        bytes_text(in_images),
        bytes_text(on_disk),
        on_disk as f64 / in_images as f64
    ))
}

/// Asks until the daemon has noticed what `carport pull` brought beside it, which it does by itself.
async fn locate(node: &Node, references: [&str; 2]) -> anyhow::Result<String> {
    let mut answer = Value::Null;
    for _ in 0..50 {
        answer = json(node.carport().args(["locate", "-o", "json"]).args(references))?;
        if answer[0]["missing_bytes"] == 0 {
            let name = answer[0]["node_name"].as_str().unwrap_or_default();
            return Ok(format!(
                "both models are ready on {name}: 0 bytes missing, score {}",
                answer[0]["score"]
            ));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("the daemon does not know the models after 5 s: {answer}")
}

fn gpus(node: &Node) -> anyhow::Result<String> {
    let inventory = json(node.carport().args(["gpus", "-o", "json"]))?;
    let gpus = inventory["gpus"].as_array().map_or(&[][..], Vec::as_slice);
    if gpus.is_empty() {
        let why = inventory["provider"]["message"].as_str().unwrap_or_default();
        return Ok(format!("none: {why}"));
    }
    let products: Vec<_> = gpus.iter().filter_map(|gpu| gpu["product"].as_str()).collect();
    Ok(format!("{}: {}", gpus.len(), products.join(", ")))
}

fn size(value: &Value) -> String {
    value.as_u64().map_or_else(|| "?".to_owned(), bytes_text)
}

fn bytes_text(bytes: u64) -> String {
    if bytes < 1_000_000 {
        format!("{bytes} bytes")
    } else {
        format!("{:.1} MB", bytes as f64 / 1e6)
    }
}
