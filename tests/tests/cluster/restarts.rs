//! Restarts of carport's containers, the kubelet and the DaemonSet under running pods.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use carport_tests::cluster::deploy::{SYSTEM, drivers};
use carport_tests::cluster::kube::Kube;
use serde_json::Value;

use crate::arrive::{model, mounted_on_node};
use crate::bench::{Bench, DIGESTS, POD_TIMEOUT, Volume, digests};
use crate::slow::Slow;

const IMAGE: &str = "registry.example/models/llama:v1";

/// ID and restarts of a container of carport's pod.
fn container(pod: &Value, name: &str) -> anyhow::Result<(String, u64)> {
    let statuses = pod["status"]["containerStatuses"].as_array().context("containers")?;
    let status = statuses.iter().find(|status| status["name"] == name).context("the container")?;
    let id = status["containerID"].as_str().context("an ID")?.trim_start_matches("containerd://");
    Ok((id.to_owned(), status["restartCount"].as_u64().context("a number")?))
}

/// Kills a container's first process with SIGKILL; the pod `reader` must keep reading the model meanwhile. Returns the time
/// until carport's pod was ready again.
async fn kill(bench: &Bench, name: &str, reader: &str) -> anyhow::Result<Duration> {
    let (id, restarts) = container(&bench.carport_pod().await?, name)?;
    let start = Instant::now();
    let killed = bench
        .cluster
        .program("ctr")
        .args(["tasks", "kill", "--signal", "SIGKILL", &id])
        .status()?;
    ensure!(killed.success(), "ctr tasks kill: {killed}");
    bench.reads(reader, &bench.model).await?;
    let back = async |_: &Kube| {
        let pod = bench.carport_pod().await?;
        let ready = pod["status"]["containerStatuses"]
            .as_array()
            .into_iter()
            .flatten()
            .all(|one| one["ready"] == true);
        let (_, now) = container(&pod, name)?;
        Ok(if ready && now == restarts + 1 {
            Ok(())
        } else {
            Err(format!("{now} restarts, ready: {ready}"))
        })
    };
    bench.kube.until(&format!("the container {name} is back"), 2 * POD_TIMEOUT, back).await?;
    Ok(start.elapsed())
}

/// kill -9 of the agent.
pub(crate) async fn agent_killed(bench: &mut Bench) -> anyhow::Result<String> {
    bench.sleeps("server", &Volume::of(IMAGE)).await?;
    let target = bench.target("server").await?;
    let took = kill(bench, "agent", "server").await?;
    bench.reads("server", &bench.model).await?;
    ensure!(mounted_on_node(&target).len() == 1, "{:?}", mounted_on_node(&target));
    let namespace = ["logs", "-n", SYSTEM, "daemonset/carport", "-c", "agent"];
    let registered = async |kube: &Kube| {
        let log = kube.run(&namespace).await?;
        Ok(if log.contains("registered with the kubelet") { Ok(()) } else { Err(log) })
    };
    bench.kube.until("the kubelet registers it again", POD_TIMEOUT, registered).await?;
    let seen = bench.printed("next", &Volume::of(IMAGE), DIGESTS).await?;
    ensure!(seen == digests(&bench.model), "{seen}");
    bench.deleted("server").await?;
    Ok(format!(
        "kill -9: the pod reads on; ready again after {:.1} s, registered, and serves new pods",
        took.as_secs_f64()
    ))
}

/// kill -9 of the sessions, with a complete volume and one whose image is still arriving.
pub(crate) async fn sessions_killed(bench: &mut Bench) -> anyhow::Result<String> {
    let slow = Slow::start(24 * 1024).await?;
    let model = model(bench, "sessions").await?;
    bench.sleeps("complete", &Volume::of(IMAGE)).await?;
    let volume = Volume::of("slow.example/models/sessions:v1").with("mode", "stream");
    bench.sleeps("arriving", &volume).await?;
    let target = bench.target("arriving").await?;
    ensure!(mounted_on_node(&target) == ["fuse.carport"], "{:?}", mounted_on_node(&target));
    let took = kill(bench, "sessions", "complete").await?;
    bench.reads("complete", &bench.model).await?;
    slow.set_rate(u64::MAX);
    let namespace = bench.namespace.clone();
    let expected = digests(&model);
    let read = async |kube: &Kube| {
        let exec = ["exec", "-n", &namespace, "arriving", "--", "sh", "-c", DIGESTS];
        let seen = kube.run(&exec).await.map_err(|error| error.to_string());
        Ok(match seen {
            Ok(seen) if seen == expected => Ok(()),
            Ok(seen) | Err(seen) => Err(seen),
        })
    };
    bench.kube.until("the pod reads its model again", POD_TIMEOUT, read).await?;
    bench.deleted("arriving").await?;
    bench.deleted("complete").await?;
    Ok(format!(
        "kill -9: a complete volume is read on; back after {:.1} s, and the pod with the arriving one reads all of it",
        took.as_secs_f64()
    ))
}

/// The kubelet is killed and started again.
pub(crate) async fn kubelet(bench: &mut Bench) -> anyhow::Result<String> {
    bench.sleeps("server", &Volume::of(IMAGE)).await?;
    let target = bench.target("server").await?;
    let uid = bench.uid("server").await?;
    bench.cluster.kill("kubelet")?;
    bench.cluster.run("kubelet")?;
    let start = Instant::now();
    // exec is served by the kubelet.
    let namespace = bench.namespace.clone();
    let answers = async |kube: &Kube| {
        let exec = ["exec", "-n", &namespace, "server", "--", "sh", "-c", "exit 0"];
        Ok(kube.run(&exec).await.map(drop).map_err(|error| error.to_string()))
    };
    bench.kube.until("the kubelet answers again", POD_TIMEOUT, answers).await?;
    bench.cluster.registered().await?;
    let seen = bench.printed("next", &Volume::of(IMAGE), DIGESTS).await?;
    let took = start.elapsed();
    ensure!(seen == digests(&bench.model), "{seen}");
    bench.reads("server", &bench.model).await?;
    ensure!(bench.uid("server").await? == uid);
    let pod = bench.kube.get(&["pod", "server", "-n", &bench.namespace]).await?;
    ensure!(pod["status"]["containerStatuses"][0]["restartCount"] == 0, "the pod was restarted");
    ensure!(mounted_on_node(&target).len() == 1, "stacked: {:?}", mounted_on_node(&target));
    bench.deleted("server").await?;
    Ok(format!(
        "the pod is untouched, with one mount; the next one had read its model {:.1} s after the start",
        took.as_secs_f64()
    ))
}

/// The DaemonSet is deleted and applied again: running pods keep reading, new pods wait.
pub(crate) async fn reapplied(bench: &mut Bench) -> anyhow::Result<String> {
    bench.sleeps("server", &Volume::of(IMAGE)).await?;
    bench.kube.run(&["delete", "daemonset", "carport", "-n", SYSTEM, "--timeout=50s"]).await?;
    let unlisted = async |kube: &Kube| {
        let drivers = drivers(kube).await?;
        Ok(if drivers.is_empty() { Ok(()) } else { Err(format!("{drivers:?}")) })
    };
    bench.kube.until("CSINode lists no driver", POD_TIMEOUT, unlisted).await?;
    bench.reads("server", &bench.model).await?;
    // A pod that is created meanwhile waits for the driver, and says so.
    bench.apply(&[crate::bench::pod("waits", &Volume::of(IMAGE), DIGESTS)]).await?;
    bench
        .event(
            "waits",
            "driver name csi.carport.dev not found in the list of registered CSI drivers",
        )
        .await?;
    let took = bench.cluster.deploy().await?;
    bench.succeeded("waits").await?;
    bench.reads("server", &bench.model).await?;
    bench.deleted("server").await?;
    Ok(format!(
        "pods read on without the DaemonSet, a new one waits with an event that says so; applied again, the driver is \
         listed after {:.1} s and the pod runs",
        took.as_secs_f64()
    ))
}
