//! Files that the store and containerd share: taken over from its snapshots, and published to it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use carport_image::runtime::{Namespace, Publication, Runtime, RuntimeOptions};
use carport_image::{Reference, Store};
use carport_tests::containerd::Containerd;
use carport_tests::registry::Registry;

use crate::containerd::NAMESPACE;
use crate::measure::{accounts, run as measure};
use crate::pull::{fresh, pull, write_model};
use crate::report::{Figure, Report};

const FILES: usize = 2;
const FILE_BYTES: usize = 1 << 30;
const RUNS: usize = 5;

pub(crate) async fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
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
    containerd.run(NAMESPACE, &["images", "pull", "--plain-http", &reference])?;
    let (config, socket) = (folder.path().join("config.yaml"), containerd.socket());
    let text =
        format!("runtime: {{containerd: {{enabled: true, socket: {}}}}}\n", socket.display());
    fs::write(&config, text)?;

    let root = folder.path().join("store");
    let mut written = vec![];
    for _ in 0..RUNS {
        fresh(&root)?;
        let mut taking = pull(carport, &registry, &root, &reference);
        let cost = measure(taking.arg("--config").arg(&config))?;
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
    containerd.run(NAMESPACE, &["images", "rm", "--sync", &reference])?;
    let namespaces = Namespace::parse(NAMESPACE).into_iter().collect();
    let runtime = Runtime::new(RuntimeOptions { socket, namespaces });
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
