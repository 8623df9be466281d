//! What a pull costs that was killed: bytes that come over the wire twice.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use carport_tests::registry::Registry;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::packed::{push, write_weights};
use crate::pull::{fresh, write_model};
use crate::report::{Figure, Report};

const FILE_BYTES: usize = 2 * 1024 * 1024 * 1024;
const RUNS: u64 = 5;

pub(crate) async fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let registry =
        Registry::start().context("docker-registry is not installed: run `make setup`")?;
    let folder = tempfile::Builder::new().prefix("carport-bench").tempdir()?;
    let model = folder.path().join("model");
    write_model(&model, 1, FILE_BYTES)?;
    let wire = Wire::before(registry.host()).await?;
    let reference = format!("{}/bench/one:v1", wire.host);
    let packed = Command::new(carport)
        .args(["pack", "--plain-http", registry.host()])
        .arg(&model)
        .arg(format!("{}/bench/one:v1", registry.host()))
        .output()?;
    ensure!(packed.status.success(), "pack: {}", String::from_utf8_lossy(&packed.stderr));
    std::fs::remove_dir_all(&model)?;

    let again = killed(carport, &wire, folder.path(), &reference).await?;
    report.add(Figure {
        name: "resume_refetched_bytes",
        unit: "bytes",
        values: again,
        peer: None,
        setup: "one uncompressed layer of 2 GiB, SIGKILL at five places, bytes on the wire of both \
                pulls less those of one that goes through",
    })?;

    write_weights(&folder.path().join("weights"), 1)?;
    push(folder.path(), &registry, "gzip", &[&["weights".to_owned()]])?;
    let reference = format!("{}/bench/gzip:v1", wire.host);
    let again = killed(carport, &wire, folder.path(), &reference).await?;
    report.add(Figure {
        name: "resume_gzip_refetched_bytes",
        unit: "bytes",
        values: again,
        peer: None,
        setup: "one gzip layer of one member, 512 MiB of weights, the same",
    })
}

/// What came over the wire in vain, for each place where a pull was killed.
async fn killed(
    carport: &Path,
    wire: &Wire,
    folder: &Path,
    reference: &str,
) -> anyhow::Result<Vec<f64>> {
    let root = folder.join("store");
    let pull = || {
        let mut command = tokio::process::Command::new(carport);
        command.args(["pull", "--plain-http", &wire.host, "--root"]).arg(&root).arg(reference);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let before = wire.bytes();
    let status = pull().status().await?;
    ensure!(status.success(), "a pull that goes through: {status}");
    let whole = wire.bytes() - before;
    fresh(&root)?;
    let mut again = Vec::new();
    for round in 1..=RUNS {
        print!("\rresume: round {round} of {RUNS} ");
        std::io::stdout().flush()?;
        let before = wire.bytes();
        let mut killed = pull().spawn()?;
        // Anywhere in the layer, and not at a border of anything.
        let until = before + round * (whole / (RUNS + 1)) + 7_654_321;
        while wire.bytes() < until {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        killed.kill().await?;
        let status = pull().status().await?;
        ensure!(status.success(), "the second pull: {status}");
        again.push((wire.bytes() - before).saturating_sub(whole) as f64);
        fresh(&root)?;
    }
    println!();
    Ok(again)
}

/// A TCP proxy that counts what the registry sends.
struct Wire {
    host: String,
    bytes: Arc<AtomicU64>,
}

impl Wire {
    async fn before(registry: &str) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let host = listener.local_addr()?.to_string();
        let bytes = Arc::new(AtomicU64::new(0));
        let (counted, registry) = (Arc::clone(&bytes), registry.to_owned());
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(relay(client, registry.clone(), Arc::clone(&counted)));
            }
        });
        Ok(Self { host, bytes })
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

async fn relay(client: TcpStream, registry: String, counted: Arc<AtomicU64>) -> anyhow::Result<()> {
    let server = TcpStream::connect(registry).await?;
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let asking =
        tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = from_server.read(&mut buffer).await?;
        if count == 0 || to_client.write_all(&buffer[..count]).await.is_err() {
            break;
        }
        counted.fetch_add(count as u64, Ordering::Relaxed);
    }
    asking.abort();
    Ok(())
}
