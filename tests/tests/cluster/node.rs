//! The pre-pull list, the container runtime, and the public conformance suite.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use carport_tests::carport::workspace;
use carport_tests::cluster::deploy::{DRIVER, SYSTEM};
use carport_tests::cluster::kube::Kube;
use carport_tests::sanity::Proxy;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::arrive::model;
use crate::bench::{Bench, Traces, pod_with};

/// How long the kubelet may take to update a ConfigMap in a running pod.
const LIST_TIMEOUT: Duration = Duration::from_secs(120);

/// Edits the list as `kubectl edit configmap carport-prepull` does.
async fn edit(bench: &Bench, list: &str) -> anyhow::Result<()> {
    let patch = json!({"data": {"list.yaml": list}}).to_string();
    let arguments =
        ["patch", "configmap", "carport-prepull", "-n", SYSTEM, "--type=merge", "-p", &patch];
    bench.kube.run(&arguments).await.map(drop)
}

/// A list that is made as the documentation says and then edited brings a new image to the node, restarts nothing, and
/// outlives an upgrade.
pub(crate) async fn prepull(bench: &mut Bench) -> anyhow::Result<String> {
    let before = bench.carport_pod().await?["metadata"]["uid"].clone();
    model(bench, "listed").await?;
    let image = "registry.example/models/listed:v1";
    let example = workspace().join("deploy/examples/prepull.yaml").display().to_string();
    bench.kube.run(&["apply", "-f", &example]).await?;
    let start = Instant::now();
    let list = format!("images: [{{image: '{image}', pin: forever}}]\n");
    edit(bench, &list).await?;
    let there = async |_: &Kube| {
        let list = bench.agent(&["carport", "ls", "-o", "json"]).await?;
        Ok(if list.contains(image) { Ok(()) } else { Err(list) })
    };
    bench.kube.until("the listed image is on the node", LIST_TIMEOUT, there).await?;
    let took = start.elapsed();
    let pod = bench.carport_pod().await?;
    ensure!(pod["metadata"]["uid"] == before, "carport's pod was replaced");
    let restarts: Vec<_> =
        pod["status"]["containerStatuses"].as_array().into_iter().flatten().collect();
    ensure!(restarts.len() == 2, "{restarts:?}");
    let pins = bench.agent(&["carport", "pins"]).await?;
    ensure!(pins.contains(image), "{pins}");
    bench.cluster.deploy().await?;
    let kept = bench.kube.get(&["configmap", "carport-prepull", "-n", SYSTEM]).await?;
    ensure!(kept["data"]["list.yaml"] == list, "`kubectl apply -k` changed the list: {kept}");
    Ok(format!(
        "an edited list's image is stored and pinned after {:.1} s, in the same pod; `kubectl apply -k` leaves the list",
        took.as_secs_f64()
    ))
}

/// `target: runtime`: the kubelet finds the image, and mounts it as an image volume.
pub(crate) async fn runtime(bench: &mut Bench) -> anyhow::Result<String> {
    model(bench, "runtime").await?;
    let image = "registry.example/models/runtime:v1";
    let start = Instant::now();
    edit(bench, &format!("images: [{{image: '{image}', target: runtime, pin: forever}}]\n"))
        .await?;
    let listed = async |_: &Kube| {
        let mut crictl = bench.cluster.program("crictl");
        crictl.args([
            "--runtime-endpoint=unix:///run/containerd/containerd.sock",
            "images",
            "-o",
            "json",
        ]);
        let output = crictl.output()?;
        let images: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let images = images["images"].as_array().context("images")?;
        let found = images.iter().find(|one| {
            one["repoTags"].as_array().is_some_and(|tags| tags.contains(&json!(image)))
        });
        Ok(found.cloned().ok_or_else(|| format!("{} images", images.len())))
    };
    let found = bench.kube.until("CRI lists the image", LIST_TIMEOUT, listed).await?;
    let took = start.elapsed();
    ensure!(found["pinned"] == true, "{found}");
    let volume = json!({"name": "model", "image": {"reference": image, "pullPolicy": "Never"}});
    bench.apply(&[pod_with("reader", volume, "cat /models/models/config.json")]).await?;
    bench.succeeded("reader").await?;
    let printed = bench.kube.logs(&bench.namespace, "reader").await?;
    ensure!(printed == "runtime", "{printed}");
    edit(bench, "images: []\n").await?;
    Ok(format!(
        "CRI lists the image, pinned, after {:.1} s; a pod has it as an image volume with pullPolicy Never",
        took.as_secs_f64()
    ))
}

/// csi-sanity on the socket that the kubelet uses.
pub(crate) async fn csi_sanity(bench: &mut Bench) -> anyhow::Result<String> {
    let driver = format!("/var/lib/kubelet/plugins/{DRIVER}/csi.sock");
    let socket = std::path::Path::new("/run/csi-sanity.sock");
    let _proxy = Proxy::start(socket, driver.as_ref()).await?;
    let parameters = std::path::Path::new("/run/csi-sanity.yaml");
    std::fs::write(parameters, "image: registry.example/models/llama:v1\n")?;
    // Only mounts in the kubelet's folder of pods reach the host. The kubelet removes unknown folders there, so it is paused.
    let folder = std::path::Path::new("/var/lib/kubelet/pods/csi-sanity");
    std::fs::create_dir_all(folder)?;
    let kubelet =
        Pid::from_raw(i32::try_from(bench.cluster.pid("kubelet")?)?).context("a process")?;
    kill_process(kubelet, Signal::STOP)?;
    let mut command: Command = bench.cluster.program("csi-sanity");
    command
        .arg(format!("--csi.endpoint={}", socket.display()))
        .arg(format!("--csi.testvolumeparameters={}", parameters.display()))
        .arg(format!("--csi.mountdir={}", folder.join("mount").display()))
        .arg(format!("--csi.stagingdir={}", folder.join("staging").display()))
        // The driver has no controller. The proxy adds one, because the suite creates its volumes through it.
        .args([
            "--ginkgo.skip=Controller Server|GroupController|SnapshotMetadata",
            "--ginkgo.no-color",
        ])
        .arg("--ginkgo.timeout=2m");
    let output = tokio::task::spawn_blocking(move || command.output()).await;
    kill_process(kubelet, Signal::CONT)?;
    let output = output??;
    let printed = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{printed}\n{}", String::from_utf8_lossy(&output.stderr));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains("csi-sanity"), "mounts are left");
    ensure!(
        !Traces::of("").records.iter().any(|record| record.contains("csi-sanity")),
        "records are left"
    );
    std::fs::remove_dir_all(folder)?;
    let passed = printed.lines().rfind(|line| line.contains("Passed")).context("a summary")?;
    // Of the pinned version: a suite that skips more than the controller's part says nothing.
    ensure!(passed.contains("17 Passed | 0 Failed"), "{passed}");
    Ok(passed.trim().to_owned())
}
