//! Pulling a modelcar of large files, a layer each, from a registry on loopback.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use carport_tests::registry::{Registry, installed};
use serde_json::Value;

use crate::containerd::Containerd;
use crate::measure::{Cost, run as measure};
use crate::model::{Model, REPOSITORY};
use crate::podman::Podman;
use crate::report::{Figure, Report};

const FILES: usize = 14;
const FILE_BYTES: usize = 150 * 1024 * 1024;
const RUNS: usize = 5;

pub(crate) async fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let model = Model::pack(carport, FILES, FILE_BYTES)?;
    let (registry, folder, reference) = (&model.registry, &model.folder, &model.reference);
    let blobs = model.blobs()?;
    let image_bytes = (FILES * FILE_BYTES) as f64;

    let with_skopeo = installed("skopeo");
    let podman = Podman::new(folder.path());
    let containerd = Containerd::start(folder.path())?;
    let (mut ours, mut skopeo, mut limit, mut theirs) = (vec![], vec![], vec![], vec![]);
    let mut podmans = vec![];
    let mut disk = 0.0;
    // The first round warms up what is common: the registry's page cache, the file system.
    for round in 0..=RUNS {
        print!("\rpull: round {round} of {RUNS} ");
        std::io::stdout().flush()?;
        let root = model.root();
        let cost = measure(&mut model.pull(carport))?;
        disk = objects_bytes(&root)?;
        fresh(&root)?;
        let peer = folder.path().join("peer");
        let skopeo_cost = if with_skopeo { Some(copy(&peer, reference)?) } else { None };
        fresh(&peer)?;
        let limit_cost = download(&peer, registry, &blobs)?;
        fresh(&peer)?;
        let containerd_cost = match &containerd {
            Some(containerd) => {
                let cost = containerd.pull(reference)?;
                containerd.remove(reference)?;
                Some(cost)
            }
            None => None,
        };
        let podman_cost = podman.as_ref().map(|podman| podman.pull(reference)).transpose()?;
        if round > 0 {
            podmans.extend(podman_cost);
            ours.push(cost);
            limit.push(limit_cost);
            skopeo.extend(skopeo_cost);
            theirs.extend(containerd_cost);
        }
    }
    println!();

    let setup = format!(
        "modelcar of {FILES} files of 150 MiB, one uncompressed layer a file, docker-registry on loopback"
    );
    let walls = |costs: &[Cost]| costs.iter().map(|cost| cost.wall_seconds).collect::<Vec<_>>();
    let cpus = |costs: &[Cost]| {
        costs.iter().map(|cost| cost.cpu_seconds / (image_bytes / 1e9)).collect::<Vec<_>>()
    };
    let version = containerd.as_ref().map(Containerd::version).transpose()?.unwrap_or_default();
    let containerd_name = format!("containerd {version}");
    let peers: Vec<(&str, &[Cost])> = [
        ("skopeo", &skopeo[..]),
        ("podman", &podmans[..]),
        (containerd_name.as_str(), &theirs[..]),
    ]
    .into_iter()
    .filter(|(_, costs)| !costs.is_empty())
    .collect();
    for (name, costs) in &peers {
        report.add(Figure {
            name: "pull_tar_seconds",
            unit: "s",
            values: walls(&ours),
            peer: Some((name, walls(costs))),
            setup: &setup,
        })?;
    }
    report.add(Figure {
        name: "pull_tar_vs_limit_seconds",
        unit: "s",
        values: walls(&ours),
        peer: Some(("curl, sync, sha256sum", walls(&limit))),
        setup: &setup,
    })?;
    for (name, costs) in peers.iter().copied().chain([("curl, sync, sha256sum", &limit[..])]) {
        report.add(Figure {
            name: "pull_tar_cpu_seconds_per_gb",
            unit: "s/GB",
            values: cpus(&ours),
            peer: Some((name, cpus(costs))),
            setup: &setup,
        })?;
    }
    let written = |costs: &[Cost]| {
        costs.iter().map(|cost| cost.written_bytes / image_bytes).collect::<Vec<_>>()
    };
    report.add(Figure {
        name: "pull_written_ratio",
        unit: "bytes/byte",
        values: written(&ours),
        peer: peers.last().map(|(name, costs)| (*name, written(costs))),
        setup: &setup,
    })?;
    report.add(Figure {
        name: "store_bytes_ratio",
        unit: "bytes/byte",
        values: vec![disk / image_bytes],
        peer: None,
        setup: "disk blocks of all objects after one pull ÷ bytes of the model's files",
    })?;
    report.add(Figure {
        name: "pull_peak_memory_bytes",
        unit: "bytes",
        values: ours.iter().map(|cost| cost.peak_memory_bytes).collect(),
        peer: None,
        setup: "resident memory of `carport pull`, two layers at four connections",
    })
}

pub(crate) fn pull(carport: &Path, registry: &Registry, root: &Path, reference: &str) -> Command {
    let mut command = Command::new(carport);
    command.args(["pull", "--plain-http", registry.host(), "--root"]).arg(root).arg(reference);
    command
}

/// Blobs only, not unpacked.
fn copy(folder: &Path, reference: &str) -> anyhow::Result<Cost> {
    let mut command = Command::new("skopeo");
    command
        .args(["copy", "--quiet", "--src-tls-verify=false"])
        .arg(format!("docker://{reference}"))
        .arg(format!("dir:{}", folder.display()));
    measure(&mut command)
}

/// What the wire, the disk and SHA-256 allow when they do not overlap.
fn download(folder: &Path, registry: &Registry, blobs: &[String]) -> anyhow::Result<Cost> {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--fail", "--parallel", "--parallel-max", "2"]);
    let mut hash = Command::new("sha256sum");
    for blob in blobs {
        let file = folder.join(blob.replace(':', "-"));
        hash.arg(&file);
        curl.arg("--output").arg(file);
        curl.arg(format!("http://{}/v2/{REPOSITORY}/blobs/{blob}", registry.host()));
    }
    let mut sync = Command::new("sync");
    sync.arg("--file-system").arg(folder);
    Ok(measure(&mut curl)?.then(measure(&mut sync)?).then(measure(&mut hash)?))
}

/// `files` files of `bytes` random bytes.
pub(crate) fn write_model(folder: &Path, files: usize, bytes: usize) -> anyhow::Result<()> {
    fs::create_dir_all(folder)?;
    let mut random = fs::File::open("/dev/urandom")?;
    for n in 1..=files {
        let mut file = fs::File::create(folder.join(format!("model-{n:05}.safetensors")))?;
        std::io::copy(&mut std::io::Read::take(&mut random, bytes as u64), &mut file)?;
    }
    Ok(())
}

/// The digests of the image's layers.
pub(crate) fn blobs(
    registry: &Registry,
    repository: &str,
    reference: &str,
) -> anyhow::Result<Vec<String>> {
    let output = Command::new("curl")
        .args(["--silent", "--show-error", "--fail"])
        .args(["--header", "Accept: application/vnd.oci.image.manifest.v1+json"])
        .arg(format!("http://{}/v2/{repository}/manifests/v1", registry.host()))
        .output()?;
    let manifest: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("manifest of {reference}"))?;
    let layers = manifest["layers"].as_array().context("no layers")?;
    Ok(layers.iter().filter_map(|l| l["digest"].as_str()).map(str::to_owned).collect())
}

fn objects_bytes(root: &Path) -> anyhow::Result<f64> {
    use std::os::unix::fs::MetadataExt as _;
    let mut bytes = 0;
    for entry in walkdir::WalkDir::new(root.join("objects")) {
        let entry = entry?;
        if entry.file_type().is_file() {
            bytes += entry.metadata()?.blocks() * 512;
        }
    }
    Ok(bytes as f64)
}

/// An empty folder, and nothing left to be written from what was in it.
pub(crate) fn fresh(folder: &PathBuf) -> anyhow::Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    let status = Command::new("sync").arg("--file-system").arg(folder).status()?;
    ensure!(status.success(), "sync {}", folder.display());
    if folder.ends_with("store") {
        fs::remove_dir(folder)?;
    }
    Ok(())
}
