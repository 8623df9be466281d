//! `deploy/helm/carport` makes what `deploy/daemonset` makes, and its schema lets in what the agent does.
//!
//! The chart is rendered by Helm's own engine.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::PathBuf;
use std::process::Command;

use carport_agent::prepull::List;
use carport_tests::carport::{binary, workspace};
use carport_tests::helm::{helm, rendered};
use serde_json::{Value, json};

fn chart() -> PathBuf {
    workspace().join("deploy/helm/carport")
}

fn read(name: &str) -> String {
    std::fs::read_to_string(chart().join(name)).unwrap()
}

fn documents(text: &str) -> Vec<Value> {
    let found: Vec<Value> =
        serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    found.into_iter().filter(|object| !object.is_null()).collect()
}

/// The objects of the chart with the values of these files and of this text.
fn render(files: &[&str], values: &str) -> Option<Result<Vec<Value>, String>> {
    Some(rendered(files, values)?.map(|text| documents(&text)))
}

fn one<'a>(objects: &'a [Value], kind: &str, name: &str) -> &'a Value {
    let mut found = objects.iter().filter(|o| o["kind"] == kind && o["metadata"]["name"] == name);
    let object = found.next().unwrap_or_else(|| panic!("no {kind} {name}"));
    assert!(found.next().is_none(), "two {kind} {name}");
    object
}

/// What is alike by intention: texts of ConfigMaps become what they say, and how each tool makes a
/// new configuration roll out is left out.
fn alike(mut objects: Vec<Value>) -> Vec<Value> {
    let mut hashed = String::new();
    for object in &mut objects {
        if let Some(labels) = object["metadata"]["labels"].as_object_mut() {
            labels.remove("app.kubernetes.io/managed-by");
        }
        if object["kind"] == "ConfigMap" {
            for (_, text) in object["data"].as_object_mut().unwrap() {
                *text = documents(text.as_str().unwrap()).remove(0);
            }
            let name = object["metadata"]["name"].as_str().unwrap();
            if name.starts_with("carport-config") {
                hashed = name.to_owned();
                object["metadata"]["name"] = json!("carport-config");
            }
        }
    }
    for object in objects.iter_mut().filter(|object| object["kind"] == "DaemonSet") {
        let template = &mut object["spec"]["template"];
        template["metadata"]["annotations"].as_object_mut().unwrap().remove("checksum/config");
        for volume in template["spec"]["volumes"].as_array_mut().unwrap() {
            if volume["configMap"]["name"] == hashed.as_str() {
                volume["configMap"]["name"] = json!("carport-config");
            }
        }
        // In whatever order: the runtime mounts parents first.
        let by_name = |list: &mut Value| {
            list.as_array_mut().unwrap().sort_by_key(|entry| entry["name"].to_string());
        };
        by_name(&mut template["spec"]["volumes"]);
        for container in template["spec"]["containers"].as_array_mut().unwrap() {
            by_name(&mut container["volumeMounts"]);
        }
    }
    // Helm makes no namespace: `--create-namespace` does.
    objects.retain(|object| object["kind"] != "Namespace");
    objects.sort_by_key(|object| format!("{}/{}", object["kind"], object["metadata"]["name"]));
    objects
}

fn kustomize(path: &str) -> Option<Vec<Value>> {
    let folder = workspace().join("deploy").join(path);
    Some(documents(&carport_tests::kustomize::rendered(&folder)?))
}

#[test]
fn the_chart_makes_what_the_manifests_make() {
    let nvidia: &[&str] = &["deploy/helm/carport/values-nvidia.yaml"];
    let pairs: [(&str, &[&str], &str); 5] = [
        ("daemonset", &[], "{}"),
        ("daemonset/overlays/nvidia", nvidia, "{}"),
        // A list of its own, which names no image until somebody writes one.
        ("daemonset/overlays/kserve", nvidia, "prepull: {refresh: 1h}"),
        ("daemonset/overlays/without-streaming", &[], "streaming: {enabled: false}"),
        ("daemonset/overlays/shared-with-containerd", &[], "commonParent: /var/lib"),
    ];
    for (path, files, values) in pairs {
        let Some(rendered) = render(files, values) else { return };
        let Some(manifests) = kustomize(path) else { return };
        let (chart, manifests) = (alike(rendered.unwrap()), alike(manifests));
        let names = |objects: &[Value]| -> Vec<String> {
            objects.iter().map(|o| format!("{} {}", o["kind"], o["metadata"]["name"])).collect()
        };
        assert_eq!(names(&chart), names(&manifests), "{path}");
        for (left, right) in chart.iter().zip(&manifests) {
            assert_eq!(left, right, "{path}: chart, manifests");
        }
    }
}

#[test]
fn the_chart_passes_helms_lint() {
    let Some(output) = helm(&["lint", "deploy/helm/carport"]) else { return };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The agent would look where the manifest mounts nothing.
#[test]
fn paths_of_the_configuration_are_mounted() {
    let values = "
        config:
          root: /data/carport
          api: {socket: /data/run/c.sock, tcp: {listen: '0.0.0.0:4321', certificate: /c, key: /k, tokens: /t}}
          http: {listen: '[::]:1234'}
          csi:
            driverName: csi.example.org
            kubeletDir: /var/snap/kubelet
            layoutFolders: [/srv/models, /mnt/more]
          registries: {hostsDir: /etc/hosts.d}
          runtime: {containerd: {socket: /run/k3s/containerd/containerd.sock}}
        containerdRoot: /var/lib/rancher/k3s/agent/containerd
        podMonitor: {enabled: true, labels: {release: prometheus}}
        extraVolumes: [{name: tls, secret: {secretName: carport-tls}}]
        extraVolumeMounts: [{name: tls, mountPath: /etc/carport/tls, readOnly: true}]";
    let Some(objects) = render(&[], values) else { return };
    let objects = objects.unwrap();
    let pod = &one(&objects, "DaemonSet", "carport")["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let folders: Vec<String> = pod["volumes"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|volume| volume["hostPath"]["path"].as_str().map(str::to_owned))
        .collect();
    let expected = [
        "/etc/hosts.d",
        "/run/k3s/containerd",
        "/var/lib/rancher/k3s/agent/containerd",
        "/data/carport",
        "/data/run",
        "/var/snap/kubelet/plugins/csi.example.org",
        "/var/snap/kubelet/plugins_registry",
        "/var/snap/kubelet/pod-resources",
        "/var/snap/kubelet/pods",
        "/dev",
        "/srv/models",
        "/mnt/more",
    ];
    assert_eq!(folders, expected);
    for folder in expected {
        let mounts = container["volumeMounts"].as_array().unwrap();
        assert!(mounts.iter().any(|mount| mount["mountPath"] == folder), "{folder}");
    }
    assert_eq!(pod["volumes"].as_array().unwrap().last().unwrap()["name"], "tls");
    let sessions = pod["containers"][1]["volumeMounts"].as_array().unwrap();
    for folder in ["/etc/hosts.d", "/data/carport", "/data/run", "/dev", "/srv/models", "/mnt/more"]
    {
        assert!(sessions.iter().any(|mount| mount["mountPath"] == folder), "{folder}");
    }
    assert_eq!(container["ports"][0]["containerPort"], 1234);
    assert_eq!(container["ports"][1]["containerPort"], 4321);
    let service = &one(&objects, "Service", "carport")["spec"]["ports"];
    assert_eq!((&service[0]["port"], &service[1]["port"]), (&json!(1234), &json!(4321)));
    let ports = &one(&objects, "NetworkPolicy", "carport")["spec"]["ingress"][0]["ports"];
    let ports: Vec<u64> =
        ports.as_array().unwrap().iter().map(|port| port["port"].as_u64().unwrap()).collect();
    assert_eq!(ports, [1234, 4321]);
    one(&objects, "CSIDriver", "csi.example.org");
    let monitor = one(&objects, "PodMonitor", "carport");
    assert_eq!(monitor["metadata"]["labels"]["release"], "prometheus");
    assert_eq!(monitor["spec"]["podMetricsEndpoints"][0]["port"], container["ports"][0]["name"]);
    // The agent takes the file that comes out.
    let text = one(&objects, "ConfigMap", "carport-config")["data"]["config.yaml"].clone();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("c.yaml"), text.as_str().unwrap()).unwrap();
    let output = Command::new(binary())
        .args(["agent", "--print-config", "-o", "json", "--config"])
        .arg(dir.path().join("c.yaml"))
        .env_clear()
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let config: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(config["root"], "/data/carport");
    assert_eq!(config["prepull"]["list"], "/etc/carport/prepull/list.yaml");
    assert_eq!(config["csi"]["layoutFolders"], json!(["/srv/models", "/mnt/more"]));
}

#[test]
fn monitors_and_the_policy_come_as_they_are_asked_for() {
    let Some(plain) = render(&[], "{}") else { return };
    let asked = "{serviceMonitor: {enabled: true, interval: 5s}, networkPolicy: {enabled: false}}";
    let (plain, asked) = (plain.unwrap(), render(&[], asked).unwrap().unwrap());
    let has = |objects: &[Value], kind: &str| objects.iter().any(|object| object["kind"] == kind);
    assert!(has(&plain, "NetworkPolicy") && !has(&plain, "ServiceMonitor"));
    assert!(!has(&asked, "NetworkPolicy") && !has(&asked, "PodMonitor"));
    let monitor = one(&asked, "ServiceMonitor", "carport");
    let service = one(&asked, "Service", "carport");
    assert_eq!(monitor["spec"]["endpoints"][0]["port"], service["spec"]["ports"][0]["name"]);
    assert_eq!(monitor["spec"]["endpoints"][0]["interval"], "5s");
    let selected = &monitor["spec"]["selector"]["matchLabels"]["app.kubernetes.io/name"];
    assert_eq!(selected, &service["metadata"]["labels"]["app.kubernetes.io/name"]);
}

#[test]
fn the_list_that_comes_out_is_one() {
    let values = "
        prepull:
          refresh: 10m
          images:
            - {image: 'registry.example/a:v1', priority: 10, pin: forever, warmPageCache: true}
            - {image: 'registry.example/b:v1', when: {gpus: {count: 2, memory: 80GB}}}
            - {image: 'registry.example/c:v1', target: runtime}";
    let Some(objects) = render(&[], values) else { return };
    let objects = objects.unwrap();
    let text = &one(&objects, "ConfigMap", "carport-prepull")["data"]["list.yaml"];
    let list = List::parse("list.yaml".as_ref(), text.as_str().unwrap()).unwrap();
    assert_eq!(list.images.len(), 3);

    // One of somebody else, or none, is not the chart's.
    let Some(plain) = render(&[], "{}") else { return };
    let theirs = render(&[], "prepull: {existingConfigMap: models}").unwrap().unwrap();
    for (objects, name) in [(plain.unwrap(), "carport-prepull"), (theirs, "models")] {
        let made = objects.iter().filter(|object| object["kind"] == "ConfigMap");
        assert_eq!(made.count(), 1, "the agent's configuration");
        let pod = &one(&objects, "DaemonSet", "carport")["spec"]["template"]["spec"];
        let volumes = pod["volumes"].as_array().unwrap();
        let volume = volumes.iter().find(|volume| volume["name"] == "prepull").unwrap();
        assert_eq!(volume["configMap"], json!({"name": name, "optional": true}));
    }
}

#[test]
fn wrong_values_are_refused_by_name() {
    for (values, name) in [
        ("imag: {}", "imag"),
        ("image: {tag: 1}", "tag"),
        ("config: {stor: {}}", "stor"),
        ("config: {root: data}", "root"),
        ("config: {prepull: {list: /x}}", "prepull"),
        ("config: {stream: {start: true}}", "stream"),
        ("config: {http: {listen: '0.0.0.0:0'}}", "listen"),
        ("prepull: {images: [{imag: a}]}", "imag"),
        ("prepull: {existingConfigMap: a, images: [{image: b}]}", "not in both"),
        ("networkPolicy: {from: []}", "from"),
        ("commonParent: /var/lib/", "commonParent"),
        (
            "{commonParent: /var/lib, config: {root: /data/carport}}",
            "/data/carport is not below /var/lib",
        ),
        (
            "{podMonitor: {enabled: true}, serviceMonitor: {enabled: true}}",
            "scrape each agent twice",
        ),
    ] {
        let Some(result) = render(&[], values) else { return };
        let error = result.expect_err(values);
        assert!(error.contains(name), "{values}: {error}");
    }
}

/// Also where there is no Helm.
#[test]
fn the_schema_names_each_value_and_each_section_of_the_configuration() {
    let schema: Value = serde_json::from_str(&read("values.schema.json")).unwrap();
    let values = documents(&read("values.yaml")).remove(0);
    let keys =
        |value: &Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    let sorted = |mut keys: Vec<String>| {
        keys.sort_unstable();
        keys
    };
    assert_eq!(sorted(keys(&schema["properties"])), sorted(keys(&values)));

    let empty = tempfile::NamedTempFile::new().unwrap();
    let output = Command::new(binary())
        .args(["agent", "--print-config", "-o", "json", "--config"])
        .arg(empty.path())
        .env_clear()
        .output()
        .unwrap();
    let config: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut sections = keys(&config);
    // Each node has its own, from the downward API.
    sections.retain(|name| name != "nodeName");
    assert_eq!(sorted(keys(&schema["properties"]["config"]["properties"])), sorted(sections));

    // And each field of an entry of the pre-pull list.
    let fields = std::fs::read_to_string(workspace().join("docs/prepull.md")).unwrap();
    let (_, fields) = fields.split_once("| `images` |").unwrap();
    let (fields, _) = fields.split_once("\n\n").unwrap();
    let names = fields.lines().skip(1).map(|row| {
        let name = row.trim_start_matches("| `").split('`').next().unwrap();
        name.split('.').next().unwrap().to_owned()
    });
    let mut names = sorted(names.collect());
    names.dedup();
    let entry = &schema["properties"]["prepull"]["properties"]["images"]["items"]["properties"];
    assert_eq!(sorted(keys(entry)), names);

    let about = documents(&read("Chart.yaml")).remove(0);
    assert_eq!(about["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(about["appVersion"], env!("CARGO_PKG_VERSION"));
}
