//! A node that holds much: what its answers take, and what it takes while nobody asks.
//!
//! 1,000 models of 20 files, asked for over the unix socket as a scheduler on the node does. Then 200 watch while
//! 100 pins a second change.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use carport_proto::carport::v1;
use carport_proto::carport::v1::cache_service_client::CacheServiceClient;
use carport_proto::carport::v1::locality_service_client::LocalityServiceClient;
use carport_proto::carport::v1::watch_response::Event;
use carport_proto::client::connect;
use carport_tests::layouts::{Layer, Layout};
use carport_tests::node::{Node, Setup};
use rustix::process::Pid;
use serde_json::json;
use tokio::task::JoinSet;

use crate::measure::{accounts, resident};
use crate::report::{Figure, Report, quantile};

const MODELS: usize = 1_000;
const FILES: usize = 20;
const RUNS: usize = 5;
const CALLS: usize = 2_000;
/// At a time, over as many connections.
const CALLERS: usize = 8;
const WATCHERS: usize = 200;
const CHANGES_A_SECOND: u32 = 100;
const WATCHED: Duration = Duration::from_secs(10);
const SETTLED: Duration = Duration::from_secs(30);
const IDLE: Duration = Duration::from_secs(120);

pub(crate) async fn run(carport: &Path, report: &mut Report) -> anyhow::Result<()> {
    let layout = models()?;
    let node = Node::set_up(carport, Setup::default()).context("run the bench as root")?;
    let references: Vec<String> = (0..MODELS).map(|n| layout.reference(&format!("v{n}"))).collect();
    for part in references.chunks(100) {
        let pulled = node.carport().arg("pull").args(part).output()?;
        ensure!(pulled.status.success(), "pull: {}", String::from_utf8_lossy(&pulled.stderr));
    }
    #[allow(clippy::cast_precision_loss, reason = "a few thousand")]
    node.metric_becomes("carport_images", MODELS as f64).await;

    evaluate(&node, &references, report).await?;
    watch(&node, &references, report).await?;
    idle(&node, report).await
}

/// An OCI layout with all models, each with files of its own.
fn models() -> anyhow::Result<Layout> {
    let mut layout = Layout::new();
    for n in 0..MODELS {
        let mut tar = tar::Builder::new(Vec::new());
        for file in 0..FILES {
            let content = format!("model {n}, file {file}");
            let mut header = tar::Header::new_ustar();
            header.set_mode(0o644);
            header.set_size(content.len() as u64);
            tar.append_data(&mut header, format!("models/{file}.bin"), content.as_bytes())?;
        }
        let media_type = "application/vnd.oci.image.layer.v1.tar";
        let layer = Layer::raw(media_type, json!({}), &tar.into_inner()?);
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id]},
        });
        let config = ("application/vnd.oci.image.config.v1+json", &config);
        layout.add(&format!("v{n}"), "", config, &[layer]);
    }
    Ok(layout)
}

async fn evaluate(node: &Node, references: &[String], report: &mut Report) -> anyhow::Result<()> {
    let question = |at: usize| {
        let models = (0..3).map(|n| named(&references[(at * 3 + n) % MODELS])).collect();
        v1::EvaluatePlacementRequest { models, ..Default::default() }
    };
    let mut client = node.locality().await;
    let answer = client.evaluate_placement(question(0)).await?.into_inner();
    ensure!(answer.nodes[0].score == 100, "the models are not here: {answer:?}");
    let (mut p99s, mut rates) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let mut seconds = Vec::with_capacity(CALLS);
        for at in 0..CALLS {
            let start = Instant::now();
            client.evaluate_placement(question(at)).await?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        p99s.push(quantile(seconds, 0.99));

        let mut clients = Vec::new();
        for _ in 0..CALLERS {
            clients.push(node.locality().await);
        }
        let start = Instant::now();
        let mut callers = JoinSet::new();
        for mut client in clients {
            let questions: Vec<_> = (0..CALLS).map(question).collect();
            callers.spawn(async move {
                for question in questions {
                    client.evaluate_placement(question).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(done) = callers.join_next().await {
            done??;
        }
        #[allow(clippy::cast_precision_loss, reason = "a few thousand")]
        rates.push((CALLERS * CALLS) as f64 / start.elapsed().as_secs_f64());
    }
    report.add(Figure {
        name: "locality_evaluate_seconds_p99",
        unit: "s",
        values: p99s,
        peer: None,
        setup: "EvaluatePlacement for 3 of 1,000 models, one call after the other",
    })?;
    report.add(Figure {
        name: "locality_calls_per_second",
        unit: "/s",
        values: rates,
        peer: None,
        setup: "the same, 8 callers at a time, who share the machine with the agent",
    })
}

async fn watch(node: &Node, references: &[String], report: &mut Report) -> anyhow::Result<()> {
    let channel = connect(&node.socket()).await?;
    let mut cache = CacheServiceClient::new(channel);
    let mut pins = Vec::new();
    for reference in &references[..50] {
        let model = Some(named(reference));
        let pin = v1::PinRequest { model, owner: "bench".into(), ..Default::default() };
        cache.pin(pin.clone()).await?;
        pins.push(pin);
    }
    let changed: Arc<Mutex<HashMap<(String, i64), Instant>>> = Arc::default();
    let lags: Arc<Mutex<Vec<f64>>> = Arc::default();
    let (synced, mut ready) = tokio::sync::mpsc::channel(WATCHERS);
    let mut watchers = JoinSet::new();
    for _ in 0..WATCHERS {
        let mut client = LocalityServiceClient::new(connect(&node.socket()).await?);
        let (changed, lags, synced) = (changed.clone(), lags.clone(), synced.clone());
        watchers.spawn(async move {
            let mut stream = client.watch(v1::WatchRequest::default()).await?.into_inner();
            while let Some(message) = stream.message().await? {
                match message.event {
                    Some(Event::Synced(_)) => synced.send(()).await?,
                    Some(Event::Upsert(model)) => {
                        let end = model.pin.and_then(|pin| pin.expire_time);
                        let name = model.model.unwrap_or_default().reference;
                        let key = (name, end.unwrap_or_default().seconds);
                        let at = changed.lock().expect("no panic").get(&key).copied();
                        if let Some(at) = at {
                            lags.lock().expect("no panic").push(at.elapsed().as_secs_f64());
                        }
                    }
                    _ => {}
                }
            }
            anyhow::Ok(())
        });
    }
    for _ in 0..WATCHERS {
        ready.recv().await.context("a watcher ended")?;
    }
    let pid = Pid::from_raw(i32::try_from(node.pid())?).context("a process")?;
    let (cpu_before, _) = accounts(pid)?;
    let start = Instant::now();
    let mut tick = tokio::time::interval(Duration::from_secs(1) / CHANGES_A_SECOND);
    for round in 1.. {
        tick.tick().await;
        if start.elapsed() > WATCHED {
            break;
        }
        // Another end each time, to the second: the watchers know it again by that.
        let mut pin = pins[round % pins.len()].clone();
        pin.ttl = Some(prost_types::Duration { seconds: 100_000 + round as i64 * 10, nanos: 0 });
        let answer = cache.pin(pin.clone()).await?.into_inner();
        let end = answer.pin.and_then(|pin| pin.expire_time).unwrap_or_default();
        let name = pin.model.unwrap_or_default().reference;
        changed.lock().expect("no panic").insert((name, end.seconds), Instant::now());
    }
    let (cpu, _) = accounts(pid)?;
    let took = start.elapsed().as_secs_f64();
    // What is on its way still.
    tokio::time::sleep(Duration::from_secs(1)).await;
    watchers.abort_all();
    let lags = std::mem::take(&mut *lags.lock().expect("no panic"));
    ensure!(lags.len() > WATCHERS * 100, "{} changes were heard", lags.len());
    let setup = "200 watchers of 1,000 models, 100 pins a second for 10 s, from the answer to Pin until a \
                 watcher has heard of it";
    report.add(Figure {
        name: "watch_lag_seconds_p99",
        unit: "s",
        values: vec![quantile(lags, 0.99)],
        peer: None,
        setup,
    })?;
    report.add(Figure {
        name: "watch_cpu_ratio",
        unit: "cores",
        values: vec![(cpu - cpu_before) / took],
        peer: None,
        setup: "CPU of the agent meanwhile",
    })?;
    report.add(Figure {
        name: "watch_memory_bytes",
        unit: "B",
        values: vec![resident(pid)?],
        peer: None,
        setup: "resident memory of the agent then",
    })
}

async fn idle(node: &Node, report: &mut Report) -> anyhow::Result<()> {
    let pid = Pid::from_raw(i32::try_from(node.pid())?).context("a process")?;
    // Connections end, and the changes of before have one more walk over the store behind them.
    tokio::time::sleep(SETTLED).await;
    let (before, _) = accounts(pid)?;
    let start = Instant::now();
    tokio::time::sleep(IDLE).await;
    let (after, _) = accounts(pid)?;
    report.add(Figure {
        name: "agent_idle_cpu_ratio",
        unit: "cores",
        values: vec![(after - before) / start.elapsed().as_secs_f64()],
        peer: None,
        setup: "an agent with 1,000 models and 20,000 objects that nobody asks, for two minutes",
    })?;
    report.add(Figure {
        name: "agent_idle_memory_bytes",
        unit: "B",
        values: vec![resident(pid)?],
        peer: None,
        setup: "its resident memory then",
    })
}

fn named(reference: &str) -> v1::ModelRef {
    v1::ModelRef { reference: reference.to_owned(), ..Default::default() }
}
