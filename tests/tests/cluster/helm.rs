//! The chart, installed by the real helm, with the API over TCP.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use carport_tests::carport::workspace;
use carport_tests::cluster::deploy::SYSTEM;
use carport_tests::cluster::{ADDRESS, NODE};
use carport_tests::registry::make_certificate;
use serde_json::{Value, json};

use crate::bench::{Bench, DIGESTS, POD_TIMEOUT, Traces, Volume, digests, sleeper};

const IMAGE: &str = "registry.example/models/llama:v1";
const TOKEN: &str = "scheduler-reads-only";

fn helm(bench: &Bench, arguments: &[&str]) -> anyhow::Result<String> {
    let mut helm = bench.cluster.program("helm");
    let output = helm
        .env("HELM_CACHE_HOME", "/run/helm")
        .args(arguments)
        .current_dir(workspace())
        .output()?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "helm {}: {error}", arguments.join(" "));
    Ok(String::from_utf8(output.stdout)?)
}

fn certificates(bench: &Bench) -> PathBuf {
    bench.cluster.state().join("api")
}

/// As docs/install.md has it, with values that serve the API over TCP.
pub(crate) async fn chart(bench: &mut Bench) -> anyhow::Result<String> {
    let folder = certificates(bench);
    fs::create_dir_all(&folder)?;
    let names = format!("DNS:{NODE},IP:{ADDRESS}");
    make_certificate(&names, &folder.join("tls.key"), &folder.join("tls.crt"));
    fs::write(folder.join("tokens"), format!("{TOKEN} scheduler read\n"))?;
    bench.kube.run(&["create", "namespace", SYSTEM]).await?;
    let privileged = "pod-security.kubernetes.io/enforce=privileged";
    bench.kube.run(&["label", "namespace", SYSTEM, privileged]).await?;
    let file = |name: &str| folder.join(name).display().to_string();
    bench
        .kube
        .run(&[
            "create",
            "secret",
            "generic",
            "carport-api",
            "-n",
            SYSTEM,
            &format!("--from-file=tls.crt={}", file("tls.crt")),
            &format!("--from-file=tls.key={}", file("tls.key")),
            &format!("--from-file=tokens={}", file("tokens")),
        ])
        .await?;
    let at = "/etc/carport/tls";
    let values = json!({
        "config": {"api": {"tcp": {
            "listen": "0.0.0.0:9761", "certificate": format!("{at}/tls.crt"), "key": format!("{at}/tls.key"),
            "tokens": format!("{at}/tokens"),
        }}},
        "extraVolumes": [{"name": "api", "secret": {"secretName": "carport-api"}}],
        "extraVolumeMounts": [{"name": "api", "mountPath": at, "readOnly": true}],
    });
    let values_file = folder.join("values.yaml");
    fs::write(&values_file, values.to_string())?;
    let start = Instant::now();
    let values_file = values_file.display().to_string();
    helm(bench, &["install", "carport", "deploy/helm/carport", "-n", SYSTEM, "-f", &values_file])?;
    bench.cluster.registered().await?;
    let took = start.elapsed();
    bench.cluster.rolled_out().await?;
    let seen = bench.printed("reader", &Volume::of(IMAGE), DIGESTS).await?;
    ensure!(seen == digests(&bench.model), "{seen}");
    bench.sleeps("server", &Volume::of(IMAGE)).await?;
    bench.deleted("server").await?;
    let version = helm(bench, &["version", "--short"])?;
    Ok(format!(
        "helm {}: the driver is listed {:.1} s after `helm install`, and a pod reads its model",
        version.trim(),
        took.as_secs_f64()
    ))
}

/// grpcurl from the network of a pod, over TLS.
pub(crate) async fn tls(bench: &mut Bench) -> anyhow::Result<String> {
    bench.sleeps("client", &Volume::of(IMAGE)).await?;
    let pod = bench.kube.get(&["pod", "client", "-n", &bench.namespace]).await?;
    let status = &pod["status"];
    let id = status["containerStatuses"][0]["containerID"].as_str().context("an ID")?;
    let mut crictl = bench.cluster.program("crictl");
    crictl.args(["--runtime-endpoint=unix:///run/containerd/containerd.sock", "inspect"]);
    let inspected: Value = serde_json::from_slice(
        &crictl.arg(id.trim_start_matches("containerd://")).output()?.stdout,
    )?;
    let process = inspected["info"]["pid"].as_u64().context("a process")?.to_string();
    let ask = |more: &[&str], service: &str, data: &str| -> anyhow::Result<Output> {
        let mut grpcurl = Command::new("nsenter");
        grpcurl.args(["-t", &process, "-n"]).arg(carport_tests::cluster::bin().join("grpcurl"));
        grpcurl
            .arg("-max-time")
            .arg("10")
            .arg("-cacert")
            .arg(certificates(bench).join("tls.crt"))
            .args(more);
        Ok(grpcurl.args(["-d", data, &format!("{ADDRESS}:9761"), service]).output()?)
    };
    let token = format!("authorization: Bearer {TOKEN}");
    let token = ["-H", token.as_str()];
    let data = json!({"models": [{"reference": IMAGE}]}).to_string();
    let answer = ask(&token, "carport.v1.LocalityService/EvaluatePlacement", &data)?;
    ensure!(answer.status.success(), "{}", String::from_utf8_lossy(&answer.stderr));
    let answer: Value = serde_json::from_slice(&answer.stdout)?;
    let node = &answer["nodes"][0];
    ensure!(node["nodeName"] == NODE && node["state"] == "NODE_STATE_READY", "{answer}");
    ensure!(node["models"][0]["state"] == "MODEL_STATE_READY", "{answer}");

    let refusal = |output: Output| String::from_utf8_lossy(&output.stderr).into_owned();
    let unknown = refusal(ask(&[], "carport.v1.LocalityService/EvaluatePlacement", &data)?);
    ensure!(unknown.contains("Unauthenticated"), "{unknown}");
    let prefetch = json!({"model": {"reference": IMAGE}, "validate_only": true}).to_string();
    let writes = refusal(ask(&token, "carport.v1.CacheService/Prefetch", &prefetch)?);
    ensure!(writes.contains("PermissionDenied") && writes.contains("api.tcp.writes"), "{writes}");
    bench.deleted("client").await?;
    Ok(format!(
        "from {}: {IMAGE} is READY on {NODE}; without a token Unauthenticated; Prefetch PermissionDenied",
        status["podIP"]
    ))
}

/// `helm uninstall` with a pod that has been deleted before.
pub(crate) async fn uninstall(bench: &mut Bench) -> anyhow::Result<String> {
    bench.apply(&[sleeper("server", &Volume::of(IMAGE))]).await?;
    bench.ready("server").await?;
    let uid = bench.uid("server").await?;
    bench.deleted("server").await?;
    ensure!(Traces::of(&uid).is_none());
    let start = Instant::now();
    helm(bench, &["uninstall", "carport", "-n", SYSTEM, "--wait", "--timeout=60s"])?;
    let gone = async |_: &carport_tests::cluster::kube::Kube| {
        Ok(crate::short::nothing_left(bench).await.map_err(|error| error.to_string()))
    };
    bench.kube.until("nothing is left", POD_TIMEOUT, gone).await?;
    let took: Duration = start.elapsed();
    Ok(format!(
        "`helm uninstall`: CSIDriver, DaemonSet and mounts are gone after {:.1} s",
        took.as_secs_f64()
    ))
}
