//! An image that containerd has, taken into the store from its blobs.

use std::fs;
use std::path::Path;
use std::process::Command;

use carport_tests::containerd::Containerd;

use crate::containerd::NAMESPACE;
use crate::measure::run as measure;
use crate::model::Model;
use crate::pull::fresh;
use crate::report::{Figure, Report};

const FILES: usize = 8;
const FILE_BYTES: usize = 128 << 20;
const RUNS: usize = 5;

pub(crate) fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let model = Model::pack(carport, FILES, FILE_BYTES)?;
    let folder = model.folder.path();
    let Some(containerd) = Containerd::start(folder)? else { return Ok(()) };
    // Not unpacked: its files would be taken over as they are.
    containerd.run(NAMESPACE, &["content", "fetch", "--plain-http", &model.reference])?;
    let files: Vec<_> = model.blobs()?.iter().map(|blob| containerd.blob(blob)).collect();

    let (mut ours, mut theirs) = (vec![], vec![]);
    // The first round warms the page cache for both.
    for round in 0..=RUNS {
        let cost = measure(&mut model.pull_beside(&containerd, carport)?)?;
        fresh(&model.root())?;
        let peer = folder.join("peer");
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
