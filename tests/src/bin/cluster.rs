//! `make cluster`: a one-node Kubernetes cluster with carport on it, to look around in.
//!
//! ```text
//! carport-cluster up [bare]          starts it, without carport where `bare` is given, and leaves it running
//! carport-cluster enter [COMMAND…]   a shell on the node, or a command: kubectl, helm, ctr, crictl, carport …
//! carport-cluster down               removes it
//! ```

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use carport_tests::cluster::{Cluster, Machine, build, deployed, images, machine, session};
use carport_tests::{carport, models};

/// The cluster's name. The tests use another one.
const NAME: &str = "up";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match &arguments[..] {
        ["up"] => up(true).await,
        ["up", "bare"] => up(false).await,
        ["enter", command @ ..] => enter(command),
        ["down"] => down(),
        // What `up` runs inside.
        ["inside", state, rest @ ..] => inside(Path::new(state), rest).await,
        _ => Err(anyhow::anyhow!("usage: carport-cluster up [bare] | enter [COMMAND…] | down")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cluster: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn up(with_carport: bool) -> anyhow::Result<()> {
    if !build()? {
        bail!("it was not started");
    }
    println!("cluster: building carport and its image");
    let image = images::carport(&deployed(carport::beside_this)?, &machine::folder())?
        .display()
        .to_string();
    let machine = Machine::make(NAME)?;
    let state = machine.state().display().to_string();
    let mut arguments = vec!["inside", &state];
    if with_carport {
        arguments.push(&image);
    }
    let done = session::run(&machine, &arguments, Duration::from_secs(180)).await;
    if !done.as_ref().is_ok_and(std::process::ExitStatus::success) {
        eprintln!("{}", session::logs(machine.state()));
        machine.remove()?;
        bail!("it did not come up: {done:?}");
    }
    println!(
        "
It runs until you remove it.
  make cluster-enter                        a shell on the node, with kubectl, helm, ctr, crictl, crane, carport
  make cluster-enter RUN='kubectl get pods -A'
  make cluster-down                         removes all of it
Logs of its parts: {state}/logs"
    );
    Ok(())
}

async fn inside(state: &Path, image: &[&str]) -> anyhow::Result<()> {
    let cluster = Cluster::start(state, |line| println!("cluster: {line}")).await?;
    let Some(image) = image.first() else { return Ok(()) };
    cluster.import(Path::new(image))?;
    let model = models::Model::new();
    cluster.push(&model, "registry.example/models/llama:v1").await?;
    let took = cluster.deploy().await?;
    println!("cluster: carport is ready after {:.1} s", took.as_secs_f64());
    println!(
        "cluster: a small model is registry.example/models/llama:v1: kubectl apply -f deploy/examples/inline-volume.yaml"
    );
    Ok(())
}

fn enter(command: &[&str]) -> anyhow::Result<()> {
    let machine =
        Machine::open(NAME)?.filter(Machine::runs).context("no cluster runs: make cluster")?;
    let command = if command.is_empty() { &["bash", "-i"] } else { command };
    let folder = std::env::current_dir()?;
    // nsenter ends in the root folder.
    let mut entered = machine.command("sh");
    entered.args(["-c", "cd \"$0\"; exec \"$@\"", &folder.display().to_string()]).args(command);
    entered.stdin(Stdio::inherit());
    let path = std::env::var("PATH").unwrap_or_default();
    let beside = carport::beside_this().parent().context("a folder")?.display().to_string();
    entered.env("PATH", format!("{}:{beside}:{path}", carport_tests::cluster::bin().display()));
    Err(entered.exec()).context("sh")
}

fn down() -> anyhow::Result<()> {
    let machine = Machine::open(NAME)?.context("no cluster runs")?;
    machine.remove()?;
    ensure!(Machine::open(NAME)?.is_none(), "it is still there");
    println!("cluster: removed");
    Ok(())
}
