//! An image that containerd has, taken into the store from its blobs.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use carport_tests::containerd::Containerd;
use carport_tests::registry::Registry;

use crate::containerd::NAMESPACE;
use crate::measure::run as measure;
use crate::pull::{blobs, fresh, pull, write_model};
use crate::report::{Figure, Report};

const FILES: usize = 8;
const FILE_BYTES: usize = 128 << 20;
const RUNS: usize = 5;

pub(crate) fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let registry =
        Registry::start().context("docker-registry is not installed: run `make setup`")?;
    let folder = tempfile::Builder::new().prefix("carport-bench").tempdir()?;
    let Some(containerd) = Containerd::start(folder.path())? else { return Ok(()) };
    let model = folder.path().join("model");
    write_model(&model, FILES, FILE_BYTES)?;
    let reference = format!("{}/bench/model:v1", registry.host());
    let pack = ["pack", "--plain-http", registry.host()];
    let packed = Command::new(carport).args(pack).arg(&model).arg(&reference).output()?;
    ensure!(packed.status.success(), "pack: {}", String::from_utf8_lossy(&packed.stderr));
    fs::remove_dir_all(&model)?;
    // Not unpacked: its files would be taken over as they are.
    containerd.run(NAMESPACE, &["content", "fetch", "--plain-http", &reference])?;
    let files: Vec<_> = blobs(&registry, "bench/model", &reference)?
        .iter()
        .map(|blob| containerd.blob(blob))
        .collect();
    let config = folder.path().join("config.yaml");
    let socket = containerd.socket();
    let text =
        format!("runtime: {{containerd: {{enabled: true, socket: {}}}}}\n", socket.display());
    fs::write(&config, text)?;

    let (mut ours, mut theirs) = (vec![], vec![]);
    // The first round warms the page cache for both.
    for round in 0..=RUNS {
        let root = folder.path().join("store");
        let mut taking = pull(carport, &registry, &root, &reference);
        let cost = measure(taking.arg("--config").arg(&config))?;
        fresh(&root)?;
        let peer = folder.path().join("peer");
        fresh(&peer)?;
        let copied = measure(Command::new("cp").arg("--reflink=never").args(&files).arg(&peer))?;
        let copies = fs::read_dir(&peer)?.map(|entry| Ok(entry?.path()));
        let copies = copies.collect::<std::io::Result<Vec<_>>>()?;
        let synced = measure(Command::new("sync").arg("--file-system").arg(&peer))?;
        let hashed = measure(Command::new("sha256sum").args(copies))?;
        fresh(&peer)?;
        if round > 0 {
            ours.push(cost.wall_seconds);
            theirs.push(copied.then(synced).then(hashed).wall_seconds);
        }
    }
    report.add(Figure {
        name: "ingest_containerd_ratio",
        unit: "s",
        values: ours,
        peer: Some(("cp + sync, sha256sum", theirs)),
        setup: "1 GiB of one-file tar layers from containerd's content store, unpacked",
    })
}
