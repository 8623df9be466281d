//! The short form: what must work wherever carport is installed.

use std::time::{Duration, Instant};

use anyhow::ensure;
use carport_tests::carport::workspace;
use carport_tests::cluster::deploy::{DRIVER, SYSTEM, drivers};
use carport_tests::cluster::kube::Kube;

use crate::bench::{Bench, DIGESTS, POD_TIMEOUT, Traces, Volume, digests, login, pod, sleeper};

/// The private image.
const PRIVATE: &str = "private.example/team/llama:v1";

/// `kubectl apply -k deploy/daemonset`: the real kubelet registers the driver.
pub(crate) async fn register(bench: &mut Bench) -> anyhow::Result<String> {
    let took = bench.cluster.deploy().await?;
    let doctor = bench.agent(&["carport", "doctor"]).await?;
    let failed: Vec<_> = doctor.lines().filter(|line| line.starts_with("fail")).collect();
    ensure!(failed.is_empty(), "carport doctor: {failed:?}");
    Ok(format!(
        "CSINode lists {DRIVER} after {:.1} s, pod 2/2 ready, no failure in carport doctor",
        took.as_secs_f64()
    ))
}

/// deploy/examples/inline-volume.yaml as it is, and a pod that hashes all files.
pub(crate) async fn inline(bench: &mut Bench) -> anyhow::Result<String> {
    bench.make_namespace("restricted").await?;
    let example = workspace().join("deploy/examples/inline-volume.yaml").display().to_string();
    bench.kube.run(&["apply", "-n", &bench.namespace, "-f", &example]).await?;
    bench.succeeded("model-reader").await?;
    let printed = bench.kube.logs(&bench.namespace, "model-reader").await?;
    ensure!(
        printed.ends_with(r#"{"architectures":["LlamaForCausalLM"]}"#),
        "the example prints {printed}"
    );
    let start = Instant::now();
    let seen =
        bench.printed("hashes", &Volume::of("registry.example/models/llama:v1"), DIGESTS).await?;
    ensure!(seen == digests(&bench.model), "{seen}");
    let took = start.elapsed();
    let uid = bench.uid("hashes").await?;
    bench.deleted("hashes").await?;
    ensure!(Traces::of(&uid).is_none());
    Ok(format!(
        "deploy/examples/inline-volume.yaml reads its model; a pod hashed {} files as packed and ended after {:.1} s",
        digests(&bench.model).lines().count(),
        took.as_secs_f64()
    ))
}

/// deploy/examples/persistent-volume.yaml as it is.
pub(crate) async fn claim(bench: &mut Bench) -> anyhow::Result<String> {
    // The example's objects name their namespace.
    bench.namespace = "default".to_owned();
    let example = workspace().join("deploy/examples/persistent-volume.yaml").display().to_string();
    bench.kube.run(&["apply", "-f", &example]).await?;
    bench.succeeded("claim-reader").await?;
    let printed = bench.kube.logs("default", "claim-reader").await?;
    for line in [
        "3145745 Jan  1  1970 model.safetensors",
        "/models/tokenizer:",
        "7 Jan  1  1970 vocab.json",
    ] {
        ensure!(printed.contains(line), "no {line:?} in {printed}");
    }
    let uid = bench.uid("claim-reader").await?;
    bench.kube.run(&["delete", "-f", &example, "--timeout=50s"]).await?;
    bench.no_traces(&uid).await?;
    Ok("deploy/examples/persistent-volume.yaml is bound, read, and deleted without a trace"
        .to_owned())
}

/// A private image with the pod's own Secret.
pub(crate) async fn private(bench: &mut Bench) -> anyhow::Result<String> {
    bench.cluster.push(&bench.model, PRIVATE).await?;
    bench.apply(&[login()]).await?;
    let seen = bench.printed("reader", &Volume::of(PRIVATE).secret("login"), DIGESTS).await?;
    ensure!(seen == digests(&bench.model), "{seen}");
    Ok("a private image is read by a pod with its namespace's Secret, from a registry with TLS and a login".to_owned())
}

/// The same image, now cached on the node, without a Secret.
pub(crate) async fn refused(bench: &mut Bench) -> anyhow::Result<String> {
    bench.apply(&[pod("stranger", &Volume::of(PRIVATE), DIGESTS)]).await?;
    let uid = bench.uid("stranger").await?;
    let event = bench.event("stranger", "private.example/team/llama:v1").await?;
    for text in [
        "MountVolume.SetUp failed for volume \"model\"",
        "code = PermissionDenied",
        "add credentials for private.example",
    ] {
        ensure!(event.contains(text), "no {text:?} in {event}");
    }
    bench.no_traces(&uid).await?;
    let phase = bench.kube.get(&["pod", "stranger", "-n", &bench.namespace]).await?;
    ensure!(phase["status"]["phase"] == "Pending", "{}", phase["status"]["phase"]);
    let took = bench.deleted("stranger").await?;
    Ok(format!(
        "without the Secret the event says {:?}; no mount, folder or record; deleted in {:.1} s",
        event.split("desc = ").last().unwrap_or(&event),
        took.as_secs_f64()
    ))
}

/// Deletes the DaemonSet, under which pods keep reading, then everything as docs/install.md says.
pub(crate) async fn uninstall(bench: &mut Bench) -> anyhow::Result<String> {
    let volume = Volume::of("registry.example/models/llama:v1");
    bench.apply(&[sleeper("stays", &volume), sleeper("first", &volume)]).await?;
    bench.ready("stays").await?;
    bench.ready("first").await?;
    bench.kube.run(&["delete", "daemonset", "carport", "-n", SYSTEM, "--timeout=50s"]).await?;
    let unlisted = async |kube: &Kube| {
        let drivers = drivers(kube).await?;
        Ok(if drivers.is_empty() { Ok(()) } else { Err(format!("{drivers:?}")) })
    };
    bench.kube.until("CSINode lists no driver", POD_TIMEOUT, unlisted).await?;
    bench.reads("stays", &bench.model).await?;

    // Without the driver the kubelet cannot unmount, so the pod stays Terminating.
    let namespace = bench.namespace.clone();
    bench.kube.run(&["delete", "pod", "first", "-n", &namespace, "--wait=false"]).await?;
    let waits = bench
        .kube
        .wait(&["pod/first", "-n", &namespace, "--for=delete"], Duration::from_secs(5))
        .await;
    ensure!(waits.is_err(), "a pod went although its volume could not be unmounted");
    bench.cluster.deploy().await?;
    let start = Instant::now();
    bench.kube.wait(&["pod/first", "-n", &namespace, "--for=delete"], POD_TIMEOUT).await?;
    let back = start.elapsed();
    bench.deleted("stays").await?;

    let folder = workspace().join("deploy/daemonset").display().to_string();
    bench.kube.run(&["delete", "-k", &folder, "--timeout=50s"]).await?;
    nothing_left(bench).await?;
    Ok(format!(
        "without the DaemonSet pods read on; a deleted one waits for it and goes {:.1} s after it is back; then \
         CSIDriver and namespace are gone, and nothing is mounted",
        back.as_secs_f64()
    ))
}

/// Nothing of carport is in the API or mounted on the node.
pub(crate) async fn nothing_left(bench: &Bench) -> anyhow::Result<()> {
    ensure!(!bench.kube.exists(&["csidriver", DRIVER]).await?, "the CSIDriver is still there");
    ensure!(
        !bench.kube.exists(&["daemonset", "-A", "-l", "app.kubernetes.io/name=carport"]).await?
    );
    ensure!(drivers(&bench.kube).await?.is_empty(), "CSINode still lists a driver");
    bench.no_traces("").await?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    let left: Vec<_> = mounts.lines().filter(|line| line.contains("/run/carport")).collect();
    ensure!(left.is_empty(), "still mounted: {left:?}");
    for socket in ["plugins_registry/csi.carport.dev-reg.sock", "plugins/csi.carport.dev/csi.sock"]
    {
        ensure!(
            !std::path::Path::new("/var/lib/kubelet").join(socket).exists(),
            "{socket} is still there"
        );
    }
    Ok(())
}
