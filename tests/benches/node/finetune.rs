//! Pulling a fine-tune of a model that is here: four large files, of which it changes one, packed
//! otherwise than the base is.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use carport_tests::registry::installed;
use serde_json::{Value, json};

use crate::measure::run_to;
use crate::report::{Figure, Report};

const FILES: usize = 4;
const FILE_BYTES: u64 = 256 * 1024 * 1024;
const RUNS: usize = 3;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";

pub(crate) fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let folder = tempfile::Builder::new().prefix("carport-bench").tempdir()?;
    let model = folder.path().join("model");
    fs::create_dir(&model)?;
    (1..=FILES).try_for_each(|n| write_shard(&model, n))?;
    let base = format!("oci:{}:v1", folder.path().join("base").display());
    let packed =
        Command::new(carport).args(["pack", "-o", "json"]).arg(&model).arg(&base).output()?;
    ensure!(packed.status.success(), "pack: {}", String::from_utf8_lossy(&packed.stderr));

    write_shard(&model, 3)?;
    let tune = folder.path().join("tune");
    write_layout(&model, &tune)?;
    let tune = format!("oci:{}:v1", tune.display());
    let mut kinds = vec![("one uncompressed layer", tune.clone())];
    if installed("skopeo") {
        let chunked = format!("oci:{}:v1", folder.path().join("chunked").display());
        let mut skopeo = Command::new("skopeo");
        skopeo.args(["copy", "--quiet", "--dest-compress"]);
        skopeo.args(["--dest-compress-format", "zstd:chunked", &tune, &chunked]);
        ensure!(skopeo.status()?.success(), "{skopeo:?}");
        kinds.push(("one zstd:chunked layer, made by skopeo", chunked));
    }
    for (kind, tune) in kinds {
        let (mut network, mut written) = (vec![], vec![]);
        for _ in 0..RUNS {
            let root = folder.path().join("store");
            pull(carport, &root, &base, folder.path())?;
            let (fetched, wrote) = pull(carport, &root, &tune, folder.path())?;
            fs::remove_dir_all(&root)?;
            network.push(fetched / FILE_BYTES as f64);
            written.push(wrote / FILE_BYTES as f64);
        }
        let setup = format!(
            "a fine-tune of {FILES} files of 256 MiB, one of them new, in {kind}; the base is here, a \
             layer a file; from an OCI layout"
        );
        for (name, values) in
            [("pull_finetune_network_ratio", network), ("pull_finetune_written_ratio", written)]
        {
            report.add(Figure { name, unit: "bytes/byte", values, peer: None, setup: &setup })?;
        }
    }
    Ok(())
}

/// Bytes fetched, as the pull counts them, and written, as the kernel does.
fn pull(carport: &Path, root: &Path, image: &str, folder: &Path) -> anyhow::Result<(f64, f64)> {
    let said = folder.join("said.json");
    let mut command = Command::new(carport);
    command.args(["pull", "-o", "json", "--root"]).arg(root).arg(image);
    let cost = run_to(&mut command, Stdio::from(File::create(&said)?))?;
    let pulled: Value = serde_json::from_slice(&fs::read(&said)?)?;
    let fetched = pulled[0]["fetched_bytes"].as_f64().context("no fetched_bytes")?;
    Ok((fetched, cost.written_bytes))
}

fn write_shard(folder: &Path, n: usize) -> anyhow::Result<()> {
    let random = File::open("/dev/urandom")?;
    let mut file = File::create(folder.join(format!("model-0000{n}.safetensors")))?;
    std::io::copy(&mut std::io::Read::take(random, FILE_BYTES), &mut file)?;
    Ok(())
}

/// An OCI layout of an image with one layer of all files in `model`.
fn write_layout(model: &Path, folder: &Path) -> anyhow::Result<()> {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let incoming = folder.join("layer.tar");
    let mut tar = tar::Builder::new(File::create(&incoming)?);
    tar.append_dir_all("models", model)?;
    tar.into_inner()?.sync_all()?;
    let size = fs::metadata(&incoming)?.len();
    let summed = Command::new("sha256sum").arg(&incoming).output()?;
    let text = String::from_utf8(summed.stdout)?;
    let hex = text.split(' ').next().filter(|hex| hex.len() == 64).context("sha256sum")?;
    fs::rename(&incoming, blobs.join(hex))?;
    let put = |value: &Value| -> anyhow::Result<Value> {
        let text = value.to_string();
        let digest = carport_image::Digest::of(text.as_bytes());
        fs::write(blobs.join(digest.hex()), &text)?;
        Ok(json!({"digest": digest, "size": text.len()}))
    };
    let described = |kind: &str, mut descriptor: Value| {
        descriptor["mediaType"] = json!(kind);
        descriptor
    };
    let layer = format!("sha256:{hex}");
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = put(&json!({
        "architecture": arch, "os": "linux", "rootfs": {"type": "layers", "diff_ids": [layer]},
    }))?;
    let mut manifest = described(
        MANIFEST,
        put(&json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": described(CONFIG, config),
            "layers": [{"mediaType": TAR, "digest": layer, "size": size}],
        }))?,
    );
    manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "v1"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(folder.join("index.json"), index.to_string())?;
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(())
}
