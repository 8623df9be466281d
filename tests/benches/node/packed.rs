//! Pulling compressed modelcars: one fat gzip layer, and zstd layers of a file each.
//!
//! The weights are bf16 numbers around zero, which compress as real ones do (to about four fifths);
//! the layers are made by the programs that people make them with.

use std::fs;
use std::io::{BufWriter, Write as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use carport_tests::registry::{Registry, installed};
use serde_json::json;

use crate::containerd::Containerd;
use crate::measure::Cost;
use crate::podman::Podman;
use crate::pull::{fresh, pull};
use crate::report::{Figure, Report};

const FILES: usize = 4;
const FILE_BYTES: usize = 512 * 1024 * 1024;
const RUNS: usize = 5;
/// Peers take ten times as long: they take part in so many of the rounds.
const PEER_RUNS: usize = 3;

pub(crate) async fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    if !["skopeo", "tar", "gzip", "zstd"].iter().all(|program| installed(program)) {
        return Ok(());
    }
    let registry =
        Registry::start().context("docker-registry is not installed: run `make setup`")?;
    let folder = tempfile::Builder::new().prefix("carport-bench").tempdir()?;
    let models = folder.path().join("models");
    fs::create_dir(&models)?;
    for n in 0..FILES {
        write_weights(&models.join(format!("model-{n}.safetensors")), n as u64 + 1)?;
    }
    let all: Vec<String> = (0..FILES).map(|n| format!("models/model-{n}.safetensors")).collect();
    let each: Vec<&[String]> = all.chunks(1).collect();
    push(folder.path(), &registry, "gzip", &[&all[..]])?;
    push(folder.path(), &registry, "zstd", &each)?;
    fs::remove_dir_all(&models)?;

    let containerd = Containerd::start(folder.path())?;
    let podman = Podman::new(folder.path());
    for (kind, figure, cpu_figure, setup) in [
        ("gzip", "pull_gzip_seconds", "pull_gzip_cpu_seconds_per_gb", "one gzip layer of 4 files"),
        ("zstd", "pull_zstd_seconds", "pull_zstd_cpu_seconds_per_gb", "4 zstd layers of a file"),
    ] {
        let reference = format!("{}/bench/{kind}:v1", registry.host());
        let (mut ours, mut theirs, mut podmans) = (vec![], vec![], vec![]);
        for round in 0..=RUNS {
            print!("\rpull {kind}: round {round} of {RUNS} ");
            std::io::stdout().flush()?;
            let root = folder.path().join("store");
            let cost = crate::measure::run(&mut pull(carport, &registry, &root, &reference))?;
            fresh(&root)?;
            if round == 0 {
                continue;
            }
            ours.push(cost);
            if round > PEER_RUNS {
                continue;
            }
            if let Some(containerd) = &containerd {
                theirs.push(containerd.pull(&reference)?);
                containerd.remove(&reference)?;
            }
            if let Some(podman) = &podman {
                podmans.push(podman.pull(&reference)?);
            }
        }
        println!();
        let setup = format!("{setup}, 2 GiB of bf16 weights, docker-registry on loopback");
        let name = containerd.as_ref().map(Containerd::version).transpose()?.unwrap_or_default();
        let name = format!("containerd {name}");
        for (peer, costs) in [(name.as_str(), &theirs), ("podman", &podmans)] {
            if costs.is_empty() {
                continue;
            }
            let walls = |costs: &[Cost]| costs.iter().map(|c| c.wall_seconds).collect::<Vec<_>>();
            let per_gb = (FILES * FILE_BYTES) as f64 / 1e9;
            let cpus =
                |costs: &[Cost]| costs.iter().map(|c| c.cpu_seconds / per_gb).collect::<Vec<_>>();
            report.add(Figure {
                name: figure,
                unit: "s",
                values: walls(&ours),
                peer: Some((peer, walls(costs))),
                setup: &setup,
            })?;
            report.add(Figure {
                name: cpu_figure,
                unit: "s/GB",
                values: cpus(&ours),
                peer: Some((peer, cpus(costs))),
                setup: &setup,
            })?;
        }
    }
    Ok(())
}

/// bf16 numbers, drawn from a table of a normal distribution's values.
pub(crate) fn write_weights(path: &Path, seed: u64) -> anyhow::Result<()> {
    // A sum of twelve uniform numbers is near enough to normal.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed);
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let table: Vec<[u8; 2]> = (0..65_536)
        .map(|_| {
            let sum: f32 = (0..12).map(|_| (random() >> 40) as f32 / (1 << 24) as f32).sum();
            let bits = ((sum - 6.0) * 0.02).to_bits();
            ((bits >> 16) as u16).to_le_bytes()
        })
        .collect();
    let mut file = BufWriter::with_capacity(1 << 20, fs::File::create(path)?);
    for _ in 0..FILE_BYTES / 8 {
        let number = random();
        for part in 0..4 {
            file.write_all(&table[(number >> (16 * part)) as u16 as usize])?;
        }
    }
    Ok(file.into_inner()?.sync_all()?)
}

/// Makes an image of a layer a list of files, and brings it to the registry.
pub(crate) fn push(
    folder: &Path,
    registry: &Registry,
    kind: &str,
    layers: &[&[String]],
) -> anyhow::Result<()> {
    let layout = folder.join(kind);
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let (mut diff_ids, mut descriptors) = (vec![], vec![]);
    for files in layers {
        let tar = folder.join("layer.tar");
        sh(
            folder,
            &format!("tar --create --owner=0 --group=0 --file layer.tar {}", files.join(" ")),
        )?;
        diff_ids.push(format!("sha256:{}", sha256(&tar)?));
        let program = match kind {
            "zstd" => "zstd -q -3 -T2",
            _ if Command::new("pigz").arg("--version").output().is_ok() => "pigz -6",
            _ => "gzip -6",
        };
        sh(folder, &format!("{program} < layer.tar > layer.packed && rm layer.tar"))?;
        descriptors.push(json!({
            "mediaType": format!("application/vnd.oci.image.layer.v1.tar+{kind}"),
            "size": fs::metadata(folder.join("layer.packed"))?.len(),
            "digest": format!("sha256:{}", keep(&folder.join("layer.packed"), &blobs)?),
        }));
    }
    let blob = |value: serde_json::Value| -> anyhow::Result<(usize, String)> {
        let text = value.to_string();
        let path = folder.join("blob.json");
        fs::write(&path, &text)?;
        Ok((text.len(), format!("sha256:{}", keep(&path, &blobs)?)))
    };
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let (size, config) = blob(json!({
        "architecture": architecture, "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }))?;
    let (size, manifest) = blob(json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "size": size, "digest": config,
        },
        "layers": descriptors,
    }))?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": size, "digest": manifest,
        "annotations": {"org.opencontainers.image.ref.name": "v1"},
    }]});
    fs::write(layout.join("index.json"), index.to_string())?;
    let target = format!("docker://{}/bench/{kind}:v1", registry.host());
    let copy = "skopeo copy --quiet --preserve-digests --dest-tls-verify=false";
    sh(folder, &format!("{copy} oci:{kind}:v1 {target}"))?;
    Ok(fs::remove_dir_all(&layout)?)
}

/// Moves a file among the blobs; returns the hex of its digest.
fn keep(file: &Path, blobs: &Path) -> anyhow::Result<String> {
    let hex = sha256(file)?;
    fs::rename(file, blobs.join(&hex))?;
    Ok(hex)
}

fn sha256(file: &Path) -> anyhow::Result<String> {
    let output = Command::new("sha256sum").arg(file).output()?;
    let text = String::from_utf8(output.stdout)?;
    Ok(text.split_whitespace().next().context("sha256sum said nothing")?.to_owned())
}

fn sh(folder: &Path, script: &str) -> anyhow::Result<()> {
    let status = Command::new("sh").args(["-c", script]).current_dir(folder).status()?;
    ensure!(status.success(), "{script}: {status}");
    Ok(())
}
