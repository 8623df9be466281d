//! Files that the store and containerd share: taken over from its snapshots, and published to it.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use carport_image::runtime::{Namespace, Publication, Runtime, RuntimeOptions};
use carport_image::{Reference, Store};
use carport_tests::containerd::Containerd;

use crate::containerd::NAMESPACE;
use crate::measure::{accounts, run as measure};
use crate::model::Model;
use crate::pull::fresh;
use crate::report::{Figure, Report};

const FILES: usize = 2;
const FILE_BYTES: usize = 1 << 30;
const RUNS: usize = 5;

pub(crate) async fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let model = Model::pack(carport, FILES, FILE_BYTES)?;
    let (root, reference) = (model.root(), &model.reference);
    let Some(containerd) = Containerd::start(model.folder.path())? else { return Ok(()) };
    containerd.run(NAMESPACE, &["images", "pull", "--plain-http", reference])?;
    let mut written = vec![];
    for _ in 0..RUNS {
        fresh(&root)?;
        let cost = measure(&mut model.pull_beside(&containerd, carport)?)?;
        written.push(cost.written_bytes / (FILES * FILE_BYTES) as f64);
    }
    report.add(Figure {
        name: "adopt_written_ratio",
        unit: "",
        values: written,
        peer: None,
        setup: "bytes written ÷ bytes of a 2 GiB image that containerd has unpacked, 2 one-file layers",
    })?;

    // What the pulls' processes had no time to end.
    let leases = containerd.run(NAMESPACE, &["leases", "ls", "-q"])?;
    for lease in leases.lines() {
        containerd.run(NAMESPACE, &["leases", "rm", lease])?;
    }
    containerd.run(NAMESPACE, &["images", "rm", "--sync", reference])?;
    let namespaces = Namespace::parse(NAMESPACE).into_iter().collect();
    let runtime = Runtime::new(RuntimeOptions { socket: containerd.socket(), namespaces });
    let store = Store::open(&root)?;
    let name: Reference = reference.parse()?;
    let image = store.lookup(&name)?.context("the image is not in the store")?;
    let what = Publication { image, name, pinned: false };
    let (mut seconds, mut bytes) = (vec![], vec![]);
    // The first round tries whether it works at all.
    for round in 0..=RUNS {
        let processes = [rustix::process::getpid(), containerd.pid()];
        let so_far = || -> anyhow::Result<f64> {
            let written = processes.into_iter().map(|pid| Ok(accounts(pid)?.1));
            written.sum()
        };
        let (before, started) = (so_far()?, Instant::now());
        let published = runtime.publish(&store, &what).await?;
        let took = started.elapsed().as_secs_f64();
        let after = so_far()?;
        ensure!(published.snapshots == FILES, "{published:?}");
        let mut remove = vec!["images", "rm", "--sync"];
        remove.extend(published.names.iter().map(String::as_str));
        containerd.run(NAMESPACE, &remove)?;
        if round > 0 {
            seconds.push(took);
            bytes.push(after - before);
        }
    }
    let setup = "a stored 2 GiB image of 2 layers made containerd's by snapshots of hard links";
    report.add(Figure {
        name: "publish_runtime_seconds",
        unit: "s",
        values: seconds,
        peer: None,
        setup,
    })?;
    report.add(Figure {
        name: "publish_runtime_written_bytes",
        unit: "B",
        values: bytes,
        peer: None,
        setup,
    })
}
