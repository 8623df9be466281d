//! Shared by the checks: the cluster, a namespace per check, pods that read a model, and what is left on the node.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use carport_image::Digest;
use carport_tests::cluster::deploy::SYSTEM;
use carport_tests::cluster::kube::Kube;
use carport_tests::cluster::{BUSYBOX, Cluster, registries};
use carport_tests::layouts::files_below;
use carport_tests::models::{Model, weights};
use serde_json::{Value, json};

/// How long a pod may take to become Ready, to finish, or to be deleted. It usually takes seconds.
pub(crate) const POD_TIMEOUT: Duration = Duration::from_secs(60);

/// Prints each file's digest, as [`digests`] has them.
pub(crate) const DIGESTS: &str = "cd /models && find . -type f | sort | xargs sha256sum";

pub(crate) struct Bench {
    pub(crate) cluster: Cluster,
    pub(crate) kube: Kube,
    /// In the open registry as `registry.example/models/llama:v1`.
    pub(crate) model: Model,
    /// The namespace of the current check.
    pub(crate) namespace: String,
    /// Namespaces to delete after the current check.
    namespaces: Vec<String>,
}

/// The volume of a pod: its attributes, and the Secret's name.
#[derive(Clone, Default)]
pub(crate) struct Volume {
    attributes: BTreeMap<String, String>,
    secret: Option<String>,
}

impl Volume {
    /// The folder `/models` of an image.
    pub(crate) fn of(image: &str) -> Self {
        Self::default().with("image", image).with("path", "/models")
    }

    pub(crate) fn with(mut self, key: &str, value: &str) -> Self {
        self.attributes.insert(key.to_owned(), value.to_owned());
        self
    }

    pub(crate) fn secret(mut self, name: &str) -> Self {
        self.secret = Some(name.to_owned());
        self
    }

    fn object(&self) -> Value {
        let mut csi = json!({"driver": "csi.carport.dev", "readOnly": true, "volumeAttributes": self.attributes});
        if let Some(secret) = &self.secret {
            csi["nodePublishSecretRef"] = json!({"name": secret});
        }
        json!({"name": "model", "csi": csi})
    }
}

/// A pod, admitted under Pod Security `restricted`, that runs this shell script once.
pub(crate) fn pod(name: &str, volume: &Volume, script: &str) -> Value {
    pod_with(name, volume.object(), script)
}

/// As [`pod`], with a whole volume called `model`.
pub(crate) fn pod_with(name: &str, volume: Value, script: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
        "spec": {
            "restartPolicy": "Never", "automountServiceAccountToken": false, "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65534, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "reader", "image": BUSYBOX, "command": ["sh", "-c", script],
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "model", "mountPath": "/models", "readOnly": true}],
            }],
            "volumes": [volume],
        },
    })
}

/// A pod that does nothing until it is deleted.
pub(crate) fn sleeper(name: &str, volume: &Volume) -> Value {
    pod(name, volume, "trap 'exit 0' TERM; while true; do sleep 0.2; done")
}

/// A model of its own: no file but the tokenizer is equal to another model's.
pub(crate) fn distinct(name: &str) -> Model {
    let model = Model::new();
    let mut weights = weights();
    weights.iter_mut().zip(name.bytes().cycle()).for_each(|(byte, with)| *byte ^= with);
    model.write("model.safetensors", &weights);
    model.write("config.json", name.as_bytes());
    model
}

/// The Secret `login` with the private registry's login.
pub(crate) fn login() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": {"name": "login"},
        "type": "kubernetes.io/dockerconfigjson",
        "stringData": {".dockerconfigjson": registries::docker_config()},
    })
}

/// What [`DIGESTS`] prints in a pod that has the model.
pub(crate) fn digests(model: &Model) -> String {
    let files = files_below(&model.path());
    let mut lines: Vec<_> = files
        .iter()
        .filter(|(name, _)| !name.ends_with('/'))
        .map(|(name, content)| (format!("./{name}"), Digest::of(content)))
        .collect();
    lines.sort();
    lines.iter().map(|(name, digest)| format!("{}  {name}\n", digest.hex())).collect()
}

/// What the node still has of a pod's volumes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Traces {
    pub(crate) mounts: Vec<String>,
    pub(crate) folders: Vec<PathBuf>,
    pub(crate) records: Vec<String>,
}

impl Traces {
    /// Of the pod with this UID; of all pods if it is empty.
    pub(crate) fn of(uid: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let ours = |line: &&str| line.contains("kubernetes.io~csi") && line.contains(uid);
        let mounts = mounts.lines().filter(ours).map(str::to_owned).collect();
        let pods = fs::read_dir("/var/lib/kubelet/pods").unwrap().filter_map(Result::ok);
        let folders = pods
            .filter(|pod| pod.file_name().display().to_string().contains(uid))
            .flat_map(|pod| {
                fs::read_dir(pod.path().join("volumes/kubernetes.io~csi")).into_iter().flatten()
            })
            .filter_map(Result::ok)
            .map(|volume| volume.path().join("mount"))
            .filter(|mount| fs::symlink_metadata(mount).is_ok())
            .collect();
        let records =
            fs::read_dir("/var/lib/carport/volumes").into_iter().flatten().filter_map(Result::ok);
        let records = records
            .filter_map(|record| fs::read_to_string(record.path()).ok())
            .filter(|record| record.contains(uid))
            .collect();
        Self { mounts, folders, records }
    }

    pub(crate) fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

impl Bench {
    pub(crate) async fn start(state: &Path, image: &Path) -> anyhow::Result<Self> {
        let cluster = Cluster::start(state, |line| println!("cluster: {line}")).await?;
        cluster.import(image)?;
        let kube = cluster.kube.clone();
        let model = Model::new();
        cluster.push(&model, "registry.example/models/llama:v1").await?;
        let (namespace, namespaces) = (String::new(), Vec::new());
        Ok(Self { cluster, kube, model, namespace, namespaces })
    }

    /// Starts a check.
    pub(crate) fn begin(&mut self, name: &str) {
        self.namespace = format!("t-{name}");
    }

    /// After a check: deletes its namespaces. After a failed one, waits until its pods are gone, too.
    pub(crate) async fn end(&mut self, failed: bool) {
        let wait = if failed { "--wait=true" } else { "--wait=false" };
        for namespace in self.namespaces.drain(..) {
            let _ =
                self.kube.run(&["delete", "namespace", &namespace, wait, "--timeout=50s"]).await;
        }
    }

    /// Makes the check's namespace, with this level of Pod Security.
    pub(crate) async fn make_namespace(&mut self, level: &str) -> anyhow::Result<()> {
        let name = self.namespace.clone();
        let labels = json!({"pod-security.kubernetes.io/enforce": level});
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}});
        self.kube.apply(&object.to_string()).await?;
        self.namespaces.push(name.clone());
        let account = async |kube: &Kube| {
            let there = kube.exists(&["serviceaccount", "default", "-n", &name]).await?;
            Ok(if there { Ok(()) } else { Err("none".to_owned()) })
        };
        self.kube.until("the namespace has its ServiceAccount", POD_TIMEOUT, account).await
    }

    /// Applies objects in the check's namespace, which is made first.
    pub(crate) async fn apply(&mut self, objects: &[Value]) -> anyhow::Result<()> {
        if !self.namespaces.contains(&self.namespace) {
            self.make_namespace("restricted").await?;
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string();
        self.kube
            .run_within(&["apply", "-n", &self.namespace, "-f", "-"], &list, POD_TIMEOUT)
            .await
            .map(drop)
    }

    /// Runs a pod to its end, and returns what it printed.
    pub(crate) async fn printed(
        &mut self,
        name: &str,
        volume: &Volume,
        script: &str,
    ) -> anyhow::Result<String> {
        self.apply(&[pod(name, volume, script)]).await?;
        self.succeeded(name).await?;
        self.kube.logs(&self.namespace, name).await
    }

    /// Waits until a pod has succeeded.
    pub(crate) async fn succeeded(&self, name: &str) -> anyhow::Result<()> {
        let (pod, namespace) = (format!("pod/{name}"), &self.namespace);
        let end = "--for=jsonpath={.status.phase}=Succeeded";
        self.kube.wait(&[&pod, "-n", namespace, end], POD_TIMEOUT).await
    }

    /// Starts a pod that lives on, and waits until it is ready.
    pub(crate) async fn sleeps(&mut self, name: &str, volume: &Volume) -> anyhow::Result<()> {
        self.apply(&[sleeper(name, volume)]).await?;
        self.ready(name).await
    }

    pub(crate) async fn ready(&self, name: &str) -> anyhow::Result<()> {
        let pod = format!("pod/{name}");
        self.kube.wait(&[&pod, "-n", &self.namespace, "--for=condition=Ready"], POD_TIMEOUT).await
    }

    /// What a script prints in a running pod.
    pub(crate) async fn exec(&self, name: &str, script: &str) -> anyhow::Result<String> {
        self.kube.run(&["exec", "-n", &self.namespace, name, "--", "sh", "-c", script]).await
    }

    /// Asserts that a running pod reads this model, byte for byte.
    pub(crate) async fn reads(&self, name: &str, model: &Model) -> anyhow::Result<()> {
        let seen = self.exec(name, DIGESTS).await?;
        ensure!(seen == digests(model), "pod {name} reads\n{seen}instead of\n{}", digests(model));
        Ok(())
    }

    pub(crate) async fn uid(&self, name: &str) -> anyhow::Result<String> {
        let pod = self.kube.get(&["pod", name, "-n", &self.namespace]).await?;
        Ok(pod["metadata"]["uid"].as_str().context("a UID")?.to_owned())
    }

    /// Where the kubelet has the pod's volume.
    pub(crate) async fn target(&self, name: &str) -> anyhow::Result<PathBuf> {
        let uid = self.uid(name).await?;
        Ok(format!("/var/lib/kubelet/pods/{uid}/volumes/kubernetes.io~csi/model/mount").into())
    }

    /// Deletes a pod, and waits until it and its volume are gone. Returns how long that took.
    pub(crate) async fn deleted(&self, name: &str) -> anyhow::Result<Duration> {
        let uid = self.uid(name).await?;
        let start = Instant::now();
        self.kube.run(&["delete", "pod", name, "-n", &self.namespace, "--timeout=50s"]).await?;
        let took = start.elapsed();
        self.no_traces(&uid).await?;
        Ok(took)
    }

    /// Waits until nothing of a pod's volumes is left: no mount, folder or record.
    pub(crate) async fn no_traces(&self, uid: &str) -> anyhow::Result<()> {
        let gone = async |_: &Kube| {
            let traces = Traces::of(uid);
            Ok(if traces.is_none() { Ok(()) } else { Err(format!("{traces:?}")) })
        };
        self.kube
            .until("no mount, folder or record of the volume", Duration::from_secs(20), gone)
            .await
    }

    /// Waits for an event about a pod that has this text, and returns the event's message.
    pub(crate) async fn event(&self, name: &str, text: &str) -> anyhow::Result<String> {
        let namespace = &self.namespace;
        let found = async |kube: &Kube| {
            let events = kube.events(namespace, name).await?;
            let found = events.iter().find(|event| event.contains(text)).cloned();
            Ok(found.ok_or_else(|| format!("{events:#?}")))
        };
        self.kube.until(&format!("an event of pod {name} with {text:?}"), POD_TIMEOUT, found).await
    }

    /// A command in the agent's container.
    pub(crate) async fn agent(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let exec = ["exec", "-n", SYSTEM, "daemonset/carport", "-c", "agent", "--"];
        self.kube.run(&[&exec, arguments].concat()).await
    }

    /// carport's pod.
    pub(crate) async fn carport_pod(&self) -> anyhow::Result<Value> {
        let pods =
            self.kube.get(&["pods", "-n", SYSTEM, "-l", "app.kubernetes.io/name=carport"]).await?;
        let pods = pods["items"].as_array().context("a list")?;
        let mut pods = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let pod = pods.next().context("no pod of carport")?;
        ensure!(pods.next().is_none(), "two pods of carport on one node");
        Ok(pod.clone())
    }

    /// Prints pods, events and logs after a failure.
    pub(crate) async fn report(&self) {
        let selector = "app.kubernetes.io/name=carport";
        let looks: &[&[&str]] = &[
            &["get", "pods,csinode,csidriver", "-A", "-o", "wide"],
            &["describe", "pods", "-n", &self.namespace],
            &["get", "events", "-n", &self.namespace, "--sort-by=.lastTimestamp"],
            &["logs", "-n", SYSTEM, "-l", selector, "--all-containers", "--prefix", "--tail=40"],
        ];
        for look in looks {
            println!("==> kubectl {}", look.join(" "));
            match self.kube.run(look).await {
                Ok(text) => println!("{text}"),
                Err(error) => println!("{error:#}"),
            }
        }
    }
}
