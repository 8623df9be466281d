//! Pods with a slow registry: streaming, and deletion during a pull.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use carport_tests::cluster::ADDRESS;
use carport_tests::cluster::kube::Kube;
use carport_tests::models::{Model, WEIGHTS_BYTES};

use crate::bench::{Bench, POD_TIMEOUT, Volume, distinct, sleeper};
use crate::slow::Slow;

/// Bytes per second and connection. The model then takes about half a minute.
const SLOW: u64 = 24 * 1024;

/// File system types of the mounts at a path, the topmost last.
pub(crate) fn mounted(target: &Path, mounts: &str) -> Vec<String> {
    let at = target.display().to_string();
    let here = mounts.lines().filter(|line| line.split(' ').nth(4) == Some(&at));
    here.filter_map(|line| line.split(" - ").nth(1)?.split(' ').next().map(str::to_owned)).collect()
}

/// The same in this machine's mount namespace.
pub(crate) fn mounted_on_node(target: &Path) -> Vec<String> {
    mounted(target, &fs::read_to_string("/proc/self/mountinfo").unwrap())
}

/// A model whose bytes are not on the node, in the open registry.
pub(crate) async fn model(bench: &Bench, name: &str) -> anyhow::Result<Model> {
    let model = distinct(name);
    bench.cluster.push(&model, &format!("registry.example/models/{name}:v1")).await?;
    Ok(model)
}

/// `mode: stream`: the pod starts and reads while the image arrives; then the same pod has a kernel mount.
pub(crate) async fn stream(bench: &mut Bench) -> anyhow::Result<String> {
    let slow = Slow::start(SLOW).await?;
    let model = model(bench, "stream").await?;
    let volume = Volume::of("slow.example/models/stream:v1").with("mode", "stream");
    let start = Instant::now();
    bench.sleeps("server", &volume).await?;
    let ready = start.elapsed();
    let read = bench.exec("server", "cat /models/config.json; ls /models").await?;
    let served = slow.served();
    ensure!(read == "streamconfig.json\nmodel.safetensors\ntokenizer\n", "{read}");
    ensure!(
        served < WEIGHTS_BYTES as u64,
        "the image was complete already: {served} bytes were served"
    );
    let target = bench.target("server").await?;
    ensure!(mounted_on_node(&target) == ["fuse.carport"], "{:?}", mounted_on_node(&target));

    slow.set_rate(u64::MAX);
    bench.reads("server", &model).await?;
    let native = async |_: &Kube| {
        let types = mounted_on_node(&target);
        let fuse = types.last().is_none_or(|last| last.starts_with("fuse"));
        Ok(if fuse { Err(format!("{types:?}")) } else { Ok(types) })
    };
    let on_node = bench.kube.until("the volume is a kernel mount", POD_TIMEOUT, native).await?;
    let namespace = bench.namespace.clone();
    let in_pod = async |kube: &Kube| {
        let mounts = ["exec", "-n", &namespace, "server", "--", "cat", "/proc/self/mountinfo"];
        let types = mounted(Path::new("/models"), &kube.run(&mounts).await?);
        let fuse = types.last().is_none_or(|last| last.starts_with("fuse"));
        Ok(if fuse { Err(format!("{types:?}")) } else { Ok(types) })
    };
    let in_pod = bench.kube.until("the pod has a kernel mount", POD_TIMEOUT, in_pod).await?;
    bench.reads("server", &model).await?;
    bench.deleted("server").await?;
    Ok(format!(
        "ready after {:.1} s with {served} of {WEIGHTS_BYTES} bytes served, and read; complete, it is {} on the node and {} in the pod",
        ready.as_secs_f64(),
        on_node.last().context("a mount")?,
        in_pod.last().context("a mount")?
    ))
}

/// A pod is deleted while its image is being pulled: it is gone long before the pull would end, and the pull stops.
pub(crate) async fn deleted(bench: &mut Bench) -> anyhow::Result<String> {
    let slow = Slow::start(SLOW).await?;
    model(bench, "deleted").await?;
    bench.apply(&[sleeper("waits", &Volume::of("slow.example/models/deleted:v1"))]).await?;
    let arriving = async |_: &Kube| {
        let served = slow.served();
        Ok(if served > 64 * 1024 { Ok(()) } else { Err(format!("{served} bytes")) })
    };
    bench.kube.until("the pull is under way", POD_TIMEOUT, arriving).await?;
    let start = Instant::now();
    let took = bench.deleted("waits").await?;
    ensure!(took < Duration::from_secs(15), "it took {took:?}");
    // The kubelet unpublishes when the publish that waits has returned, after ten seconds at most. The pull stops then.
    let url = format!("http://{ADDRESS}:9760/metrics");
    let stopped = async |_: &Kube| {
        let mut curl = tokio::process::Command::new("curl");
        let output = curl.args(["-sSf", "--max-time", "5", &url]).output().await?;
        let metrics = String::from_utf8(output.stdout)?;
        let pulls = metrics.lines().find(|line| line.starts_with("carport_pulls_in_flight "));
        let pulls = pulls.unwrap_or("no carport_pulls_in_flight").to_owned();
        Ok(if pulls == "carport_pulls_in_flight 0" { Ok(()) } else { Err(pulls) })
    };
    bench.kube.until("the pull stops", Duration::from_secs(30), stopped).await?;
    let served = slow.served();
    ensure!(served < WEIGHTS_BYTES as u64, "the pull had ended: {served} bytes");
    Ok(format!(
        "a pod that waits for a pull is gone {:.1} s after its deletion, without a trace; the pull stops after \
         {:.1} s, at {served} of {WEIGHTS_BYTES} bytes",
        took.as_secs_f64(),
        start.elapsed().as_secs_f64()
    ))
}
