//! Parts of images, replicas, Pod Security, and many pods at once.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::time::Instant;

use anyhow::ensure;
use carport_tests::carport::workspace;
use serde_json::json;

use crate::bench::{Bench, DIGESTS, POD_TIMEOUT, Volume, digests, pod};

const IMAGE: &str = "registry.example/models/llama:v1";
const STORM: usize = 30;

/// `path`, `include` and `exclude`.
pub(crate) async fn choose(bench: &mut Bench) -> anyhow::Result<String> {
    const LIST: &str = "cd /models && find . | sort";
    let cases = [
        (
            "all",
            Volume::default().with("image", IMAGE),
            ".\n./models\n./models/config.json\n./models/model.safetensors\n./models/tokenizer\n./models/tokenizer/vocab.json\n",
        ),
        ("path", Volume::of(IMAGE).with("path", "/models/tokenizer"), ".\n./vocab.json\n"),
        (
            "include",
            Volume::of(IMAGE).with("include", "*.safetensors, /config.json"),
            ".\n./config.json\n./model.safetensors\n",
        ),
        (
            "exclude",
            Volume::of(IMAGE).with("exclude", "tokenizer, *.safetensors"),
            ".\n./config.json\n",
        ),
    ];
    for (name, volume, expected) in &cases {
        let seen = bench.printed(name, volume, LIST).await?;
        ensure!(seen == *expected, "{name} shows {seen}");
    }
    let misspelt = Volume::of(IMAGE).with("includes", "*");
    bench.apply(&[pod("misspelt", &misspelt, LIST)]).await?;
    let event = bench.event("misspelt", "includes").await?;
    ensure!(
        event.contains(r#"volume attribute "includes": unknown; did you mean "include"?"#),
        "{event}"
    );
    let uid = bench.uid("misspelt").await?;
    bench.no_traces(&uid).await?;
    Ok("path, include, exclude and the whole image show exactly their files; a misspelt attribute's event names the right one".to_owned())
}

/// Three pods of a Deployment read the same inodes and share one page cache.
pub(crate) async fn replicas(bench: &mut Bench) -> anyhow::Result<String> {
    let template = crate::bench::sleeper("server", &Volume::of(IMAGE));
    let mut spec = template["spec"].clone();
    spec["restartPolicy"] = json!("Always");
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "server"},
        "spec": {
            "replicas": 3, "selector": {"matchLabels": {"app": "server"}},
            "template": {"metadata": {"labels": {"app": "server"}}, "spec": spec},
        },
    });
    bench.apply(&[deployment]).await?;
    let namespace = bench.namespace.clone();
    bench
        .kube
        .wait(&["deployment/server", "-n", &namespace, "--for=condition=Available"], POD_TIMEOUT)
        .await?;
    let pods = bench.kube.get(&["pods", "-n", &namespace, "-l", "app=server"]).await?;
    let names: Vec<String> = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|pod| pod["metadata"]["name"].as_str().map(str::to_owned))
        .collect();
    ensure!(names.len() == 3, "{names:?}");
    let mut seen = Vec::new();
    let mut files = Vec::new();
    for name in &names {
        bench.reads(name, &bench.model).await?;
        seen.push(
            bench.exec(name, "stat -c %d:%i /models/model.safetensors").await?.trim().to_owned(),
        );
        files.push(bench.target(name).await?.join("model.safetensors"));
    }
    let on_node = fs::metadata(&files[0])?;
    let on_node = format!("{}:{}", on_node.dev(), on_node.ino());
    ensure!(
        seen.iter().all(|one| *one == on_node),
        "device and inode in the pods: {seen:?}, on the node: {on_node}"
    );

    // The file is dropped from the page cache, then read by one pod, and must be cached for another.
    let resident = |file: &std::path::Path| -> anyhow::Result<u64> {
        let output = std::process::Command::new("fincore")
            .args(["-b", "-n", "-o", "RES"])
            .arg(file)
            .output()?;
        Ok(String::from_utf8(output.stdout)?.trim().parse()?)
    };
    let file = fs::File::open(&files[0])?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    let before = resident(&files[2])?;
    bench.exec(&names[1], "cat /models/model.safetensors >/dev/null").await?;
    let after = resident(&files[2])?;
    let size = fs::metadata(&files[2])?.len();
    ensure!(
        before == 0 && after >= size,
        "{before} bytes in memory before the read, {after} after it, of {size}"
    );
    Ok(format!(
        "3 pods of a Deployment: one device and inode, 0 B of {size} in memory, all of it for every pod after one has read"
    ))
}

/// The example runs in a namespace that enforces `restricted`; a privileged pod is refused there.
pub(crate) async fn restricted(bench: &mut Bench) -> anyhow::Result<String> {
    bench.make_namespace("restricted").await?;
    let mut privileged = pod("privileged", &Volume::of(IMAGE), DIGESTS);
    privileged["spec"]["containers"][0]["securityContext"] = json!({"privileged": true});
    let refused = bench.apply(&[privileged]).await.unwrap_err().to_string();
    ensure!(refused.contains(r#"violates PodSecurity "restricted:latest""#), "{refused}");
    let example = workspace().join("deploy/examples/inline-volume.yaml").display().to_string();
    bench.kube.run(&["apply", "-n", &bench.namespace, "-f", &example]).await?;
    bench.succeeded("model-reader").await?;
    Ok("Pod Security restricted is enforced (a privileged pod is refused), and the example runs"
        .to_owned())
}

/// 30 pods of one Job start at once, with an image that is not on the node.
pub(crate) async fn storm(bench: &mut Bench) -> anyhow::Result<String> {
    let image = "registry.example/models/storm:v1";
    let model = carport_tests::models::Model::new();
    model.write("storm.txt", b"only here");
    bench.cluster.push(&model, image).await?;
    let template = pod("storm", &Volume::of(image), DIGESTS);
    let job = json!({
        "apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "storm"},
        "spec": {
            "parallelism": STORM, "completions": STORM, "backoffLimit": 0,
            "template": {"metadata": {"labels": {"app": "storm"}}, "spec": template["spec"]},
        },
    });
    let start = Instant::now();
    bench.apply(&[job]).await?;
    let namespace = bench.namespace.clone();
    bench
        .kube
        .wait(&["job/storm", "-n", &namespace, "--for=condition=complete"], 2 * POD_TIMEOUT)
        .await?;
    let took = start.elapsed();
    let logs = ["logs", "-n", &namespace, "-l", "app=storm", "--tail=-1", "--max-log-requests=40"];
    let printed = bench.kube.run(&logs).await?;
    let mut lines: Vec<_> = printed.lines().collect();
    lines.sort_unstable();
    let expected = digests(&model);
    let mut expected: Vec<_> =
        expected.lines().flat_map(|line| std::iter::repeat_n(line, STORM)).collect();
    expected.sort_unstable();
    ensure!(lines == expected, "{} lines instead of {}", lines.len(), expected.len());
    let pulls = bench.agent(&["carport", "ls", "-o", "json"]).await?;
    ensure!(pulls.matches(image).count() == 1, "{pulls}");
    let pods = bench.kube.get(&["pods", "-n", &namespace, "-l", "app=storm"]).await?;
    let uids = pods["items"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|pod| pod["metadata"]["uid"].as_str());
    let uids: Vec<_> = uids.collect();
    ensure!(uids.len() == STORM, "{uids:?}");
    let start = Instant::now();
    bench.kube.run(&["delete", "job", "storm", "-n", &namespace, "--timeout=60s"]).await?;
    for uid in uids {
        bench.no_traces(uid).await?;
    }
    Ok(format!(
        "{STORM} pods hashed an image that was not there, all after {:.1} s; deleted without a trace in {:.1} s",
        took.as_secs_f64(),
        start.elapsed().as_secs_f64()
    ))
}
