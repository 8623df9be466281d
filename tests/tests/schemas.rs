//! Kubernetes knows every object of `deploy/` and of the documents, field by field.
//!
//! The schemas are those that Kubernetes publishes, of the oldest version that is supported and of the
//! newest one that `kubernetes-validate` carries; strict, so that a field with a slip in its name is an
//! error. `make test-deploy` installs it.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::collections::BTreeSet;
use std::process::Command;

use carport_tests::carport::workspace;
use carport_tests::pod_security::{pod_of, violations};
use carport_tests::registry::installed;
use carport_tests::{helm, kustomize};
use serde_json::{Value, json};

/// As Chart.yaml says; and a newer one.
const VERSIONS: [&str; 2] = ["1.25", "1.37"];
/// Of operators: Kubernetes has no schemas of them.
const FOREIGN: [&str; 4] = ["InferenceService", "PodMonitor", "ServiceMonitor", "PrometheusRule"];

/// What the validator says against these objects, line by line.
fn complaints(version: &str, objects: &[Value]) -> Vec<String> {
    let file = tempfile::NamedTempFile::new().unwrap();
    // JSON is YAML.
    let text: Vec<String> = objects.iter().map(Value::to_string).collect();
    std::fs::write(file.path(), text.join("\n---\n")).unwrap();
    let mut command = Command::new("kubernetes-validate");
    command.args(["--strict", "--quiet", "--kubernetes-version", version]).arg(file.path());
    let output = command.output().unwrap();
    assert_eq!(output.stderr, b"", "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

fn documents(text: &str) -> Vec<Value> {
    let found: Vec<Value> = serde_saphyr::from_multiple(text).unwrap();
    found.into_iter().filter(|object| !object.is_null()).collect()
}

fn files(folder: &str) -> Vec<(String, Vec<Value>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(workspace().join(folder)).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("{folder}/{}", path.file_name().unwrap().to_string_lossy());
        if path.extension().is_some_and(|extension| extension == "yaml") {
            found.push((name, documents(&std::fs::read_to_string(&path).unwrap())));
        }
    }
    assert!(!found.is_empty(), "{folder}");
    found
}

/// The objects that documents show whole.
fn shown() -> Vec<(String, Vec<Value>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(workspace().join("docs")).unwrap() {
        let path = entry.unwrap().path();
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let blocks = text.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next());
        for block in blocks.filter(|block| block.contains("apiVersion:")) {
            found.push((path.display().to_string(), documents(block)));
        }
    }
    found
}

/// Everything that somebody might apply, by where it comes from.
fn everything() -> Vec<(String, Vec<Value>)> {
    let mut found = files("deploy/examples");
    found.extend(files("deploy/observability"));
    found.extend(shown());
    let overlays = std::fs::read_dir(workspace().join("deploy/daemonset/overlays")).unwrap();
    let overlays = overlays.map(|entry| entry.unwrap().path());
    for path in overlays.chain([workspace().join("deploy/daemonset")]) {
        let text = kustomize::rendered(&path);
        found.extend(text.map(|text| (path.display().to_string(), documents(&text))));
    }
    let all = "
        config:
          api: {tcp: {listen: '0.0.0.0:4321', certificate: /c, key: /k, tokens: /t}}
          csi: {layoutFolders: [/srv/models]}
        imagePullSecrets: [{name: login}]
        runtimeClassName: nvidia
        streaming: {enabled: true}
        networkPolicy: {from: [{namespaceSelector: {matchLabels: {a: b}}}]}
        podMonitor: {enabled: true, labels: {release: prometheus}}
        extraVolumes: [{name: tls, secret: {secretName: carport-tls}}]
        extraVolumeMounts: [{name: tls, mountPath: /etc/carport/tls, readOnly: true}]";
    for (what, values) in [("the chart", "{}"), ("the chart with all of its values", all)] {
        let text = helm::rendered(&[], values);
        found.extend(text.map(|text| (what.to_owned(), documents(&text.unwrap()))));
    }
    // Rules of Prometheus and the like are no objects.
    for (_, objects) in &mut found {
        objects.retain(|object| object["kind"].is_string());
    }
    found.retain(|(_, objects)| !objects.is_empty());
    found
}

fn pod(spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec})
}

#[test]
fn kubernetes_takes_every_object() {
    if !installed("kubernetes-validate") {
        return;
    }
    for version in VERSIONS {
        let mut seen = BTreeSet::new();
        for (source, objects) in everything() {
            let of_operators = |object: &Value| FOREIGN.iter().any(|kind| object["kind"] == *kind);
            let pods = objects.iter().filter(|object| object["kind"] == "InferenceService");
            let pods: Vec<Value> = pods.filter_map(pod_of).map(pod).collect();
            let known = objects.into_iter().filter(|object| !of_operators(object));
            let known: Vec<Value> = known.chain(pods).collect();
            let said = complaints(version, &known);
            assert_eq!(said, Vec::<String>::new(), "{source}, Kubernetes {version}");
            seen.extend(known.iter().map(|object| object["kind"].as_str().unwrap().to_owned()));
        }
        assert!(seen.contains("Deployment") && seen.contains("PersistentVolume"), "{seen:?}");
    }
}

/// Else the test above would say nothing.
#[test]
fn a_slip_is_told() {
    if !installed("kubernetes-validate") {
        return;
    }
    for (field, value) in [("hostNetwork", json!("yes")), ("hostNetwrok", json!(true))] {
        let mut pod = pod(json!({"containers": [{"name": "c", "image": "i"}]}));
        assert_eq!(complaints("1.37", &[pod.clone()]), Vec::<String>::new());
        pod["spec"][field] = value;
        let said = complaints("1.37", &[pod]);
        assert!(said.len() == 1 && said[0].starts_with("ERROR"), "{field}: {said:?}");
    }
}

/// Also where no validator is installed.
#[test]
fn pods_that_documents_show_whole_are_restricted() {
    for (source, objects) in shown() {
        for pod in objects.iter().filter(|object| object["kind"] == "Pod") {
            assert_eq!(violations(&pod["spec"]), Vec::<String>::new(), "{source}");
        }
    }
}
