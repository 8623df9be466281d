//! `deploy/` says what the agent does and what the kubelet needs.
//!
//! The configuration in the ConfigMap is read by the real `carport agent`, with the
//! environment that the DaemonSet gives it; what comes out decides which mounts, ports and
//! names the manifests must have. Attributes of example volumes are parsed by the driver itself.
#![allow(clippy::unwrap_used)] // a test that cannot go on says where

use std::path::{Path, PathBuf};
use std::process::Command;

use carport_agent::prepull::List;
use carport_csi::volume::VolumeAttributes;
use carport_tests::carport::{binary, workspace};
use carport_tests::pod_security::{pod_of, violations};
use serde_json::{Value, json};

fn deploy(path: &str) -> PathBuf {
    workspace().join("deploy").join(path)
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The documents of a YAML text.
fn documents(text: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(text).unwrap_or_else(|error| panic!("{error}"))
}

/// The one object of this kind in the base.
fn base(kind: &str) -> Value {
    let list = &documents(&read(&deploy("daemonset/base/kustomization.yaml")))[0];
    let mut found: Vec<Value> = strings(&list["resources"])
        .iter()
        .flat_map(|file| documents(&read(&deploy("daemonset/base").join(file))))
        .filter(|object| object["kind"] == kind)
        .collect();
    assert_eq!(found.len(), 1, "{kind} in the base");
    found.remove(0)
}

fn strings(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

fn array(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

/// The entry of a list with this name.
fn named<'a>(list: &'a Value, name: &str) -> &'a Value {
    array(list)
        .iter()
        .find(|entry| entry["name"] == name)
        .unwrap_or_else(|| panic!("no {name:?} in {list:#}"))
}

fn pod() -> Value {
    base("DaemonSet")["spec"]["template"]["spec"].clone()
}

fn agent(pod: &Value) -> &Value {
    assert_eq!(array(&pod["containers"]).len(), 2);
    named(&pod["containers"], "agent")
}

/// The container that serves streaming volumes.
fn sessions(pod: &Value) -> &Value {
    named(&pod["containers"], "sessions")
}

/// What `carport agent` makes of the ConfigMap and the DaemonSet's environment.
fn config() -> Value {
    let pod = pod();
    let container = agent(&pod);
    let mut words = strings(&container["command"]).into_iter();
    assert_eq!(words.next(), Some("carport"));
    let mut command = Command::new(binary());
    command.args(words).args(strings(&container["args"])).args(["--print-config", "-o", "json"]);
    command.env_clear();
    for variable in array(&container["env"]) {
        let name = variable["name"].as_str().unwrap();
        let value = match name {
            "CARPORT_NODE_NAME" => {
                assert_eq!(variable["valueFrom"]["fieldRef"]["fieldPath"], "spec.nodeName");
                "gpu-node-7".to_owned()
            }
            // Where the ConfigMap is mounted in a pod; here its source.
            "CARPORT_CONFIG" => {
                let path = variable["value"].as_str().unwrap();
                let config = volume_at(&pod, Path::new(path).parent().unwrap());
                assert_eq!(config["configMap"]["name"], "carport-config");
                let file = Path::new(path).file_name().unwrap();
                deploy("daemonset/base").join(file).display().to_string()
            }
            _ => variable["value"].as_str().unwrap().to_owned(),
        };
        command.env(name, value);
    }
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"))
}

/// The volume that is mounted at exactly `path` in the agent's container.
fn volume_at<'a>(pod: &'a Value, path: &Path) -> &'a Value {
    let mounts = &agent(pod)["volumeMounts"];
    let mount = array(mounts)
        .iter()
        .find(|mount| mount["mountPath"].as_str() == path.to_str())
        .unwrap_or_else(|| panic!("nothing is mounted at {}", path.display()));
    named(&pod["volumes"], mount["name"].as_str().unwrap())
}

#[test]
fn the_agent_accepts_the_config_map_and_the_environment() {
    let config = config();
    assert_eq!(config["nodeName"], "gpu-node-7");
    assert_eq!(config["csi"]["enabled"], json!(true), "as root, which the container is");
    assert_eq!(config["log"]["format"], "json");
}

#[test]
fn the_csi_driver_is_as_the_kubelet_needs_it() {
    let driver = base("CSIDriver");
    assert_eq!(driver["apiVersion"], "storage.k8s.io/v1");
    assert_eq!(driver["metadata"]["name"], config()["csi"]["driverName"]);
    let expected = json!({
        "attachRequired": false,
        "volumeLifecycleModes": ["Persistent", "Ephemeral"],
        "podInfoOnMount": true,
        "requiresRepublish": false,
        "fsGroupPolicy": "None",
        "seLinuxMount": false,
    });
    assert_eq!(driver["spec"], expected);
}

#[test]
fn every_path_of_the_agent_is_the_hosts_under_the_same_name() {
    let (config, pod) = (config(), pod());
    let path = |value: &Value| PathBuf::from(value.as_str().unwrap());
    let kubelet = path(&config["csi"]["kubeletDir"]);
    let driver = config["csi"]["driverName"].as_str().unwrap();
    let socket = path(&config["api"]["socket"]);
    for (host_path, kind) in [
        (path(&config["root"]), "DirectoryOrCreate"),
        (socket.parent().unwrap().to_owned(), "DirectoryOrCreate"),
        (kubelet.join("plugins").join(driver), "DirectoryOrCreate"),
        (kubelet.join("plugins_registry"), "Directory"),
        (kubelet.join("pod-resources"), "DirectoryOrCreate"),
        (kubelet.join("pods"), "Directory"),
        ("/dev".into(), "Directory"),
    ] {
        let volume = volume_at(&pod, &host_path);
        let expected = json!({"path": host_path.to_str().unwrap(), "type": kind});
        assert_eq!(volume["hostPath"], expected);
    }
}

#[test]
fn mounts_reach_the_host_from_the_pods_folder_alone() {
    let pod = pod();
    for mount in array(&agent(&pod)["volumeMounts"]) {
        let expected = match mount["mountPath"].as_str().unwrap() {
            "/var/lib/kubelet/pods" => json!("Bidirectional"),
            // From the host only: what is unmounted there goes here, too, and the sessions' mounts
            // come.
            "/run/carport" | "/run/containerd" | "/var/lib/containerd" => json!("HostToContainer"),
            _ => Value::Null,
        };
        assert_eq!(mount["mountPropagation"], expected, "{mount}");
        assert_eq!(mount["subPath"], Value::Null, "a subPath never changes");
        let named = named(&pod["volumes"], mount["name"].as_str().unwrap());
        let of_host = named.get("hostPath").is_some();
        // Of the host's folders these are somebody else's: the container runtime's.
        let borrowed = ["/etc/containerd/certs.d", "/var/lib/containerd"]
            .contains(&mount["mountPath"].as_str().unwrap());
        assert_eq!(mount["readOnly"] == true, !of_host || borrowed, "{mount}");
    }
    assert_eq!(
        array(&agent(&pod)["volumeMounts"]).len(),
        array(&pod["volumes"]).len(),
        "each volume is mounted once"
    );
}

#[test]
fn the_agent_has_the_rights_it_needs_and_no_token() {
    let (pod, account) = (pod(), base("ServiceAccount"));
    let expected = json!({
        "privileged": true, "runAsUser": 0, "runAsGroup": 0, "readOnlyRootFilesystem": true,
    });
    assert_eq!(agent(&pod)["securityContext"], expected);
    assert_eq!(pod["hostNetwork"], true);
    // Turns streaming volumes of running pods native, and so must see their processes.
    assert_eq!(pod["hostPID"], true);
    for absent in ["hostIPC", "initContainers"] {
        assert_eq!(pod[absent], Value::Null, "{absent}");
    }
    assert_eq!(pod["serviceAccountName"], account["metadata"]["name"]);
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(account["automountServiceAccountToken"], false);
    let (role, binding) = (base("Role"), base("RoleBinding"));
    let expected = json!([{
        "apiGroups": ["security.openshift.io"], "resources": ["securitycontextconstraints"],
        "resourceNames": ["privileged"], "verbs": ["use"],
    }]);
    assert_eq!(role["rules"], expected, "nothing of Kubernetes itself");
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    assert_eq!(binding["subjects"][0]["name"], account["metadata"]["name"]);
    let labels = &base("Namespace")["metadata"]["labels"];
    assert_eq!(labels["pod-security.kubernetes.io/enforce"], "privileged");
}

#[test]
fn the_sessions_have_what_the_agent_has_for_pulls_and_their_mounts_reach_it() {
    let (config, pod) = (config(), pod());
    let (agent, sessions) = (agent(&pod), sessions(&pod));
    assert_eq!(config["stream"]["start"], false, "it is a container of its own");
    assert_eq!(sessions["command"], json!(["carport", "fuse"]));
    for same in ["image", "imagePullPolicy", "securityContext", "terminationMessagePolicy"] {
        assert_eq!(sessions[same], agent[same], "{same}");
    }
    for variable in array(&sessions["env"]) {
        assert!(array(&agent["env"]).contains(variable), "{variable}");
    }
    let run = Path::new(config["api"]["socket"].as_str().unwrap()).parent().unwrap();
    for mount in array(&sessions["volumeMounts"]) {
        if mount["mountPath"].as_str() == run.to_str() {
            assert_eq!(mount["mountPropagation"], "Bidirectional");
        } else {
            assert!(array(&agent["volumeMounts"]).contains(mount), "{mount}");
        }
    }
    for volume in ["config", "registry", "registry-hosts", "containerd", "store", "run", "dev"] {
        named(&sessions["volumeMounts"], volume);
    }
}

#[test]
fn an_agent_is_on_every_node_and_two_never_on_one() {
    let set = base("DaemonSet");
    let expected =
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}});
    assert_eq!(set["spec"]["updateStrategy"], expected);
    let pod = &set["spec"]["template"]["spec"];
    assert_eq!(pod["tolerations"], json!([{"operator": "Exists"}]));
    assert_eq!(pod["priorityClassName"], "system-node-critical");
    let selected = &set["spec"]["selector"]["matchLabels"];
    assert_eq!(&set["spec"]["template"]["metadata"]["labels"], selected);
}

#[test]
fn probes_ask_the_port_that_the_agent_serves() {
    let (config, pod) = (config(), pod());
    let container = agent(&pod);
    let listen: std::net::SocketAddr = config["http"]["listen"].as_str().unwrap().parse().unwrap();
    assert!(listen.ip().is_unspecified(), "the kubelet asks at the node's address");
    assert_eq!(named(&container["ports"], "http")["containerPort"], listen.port());
    for (probe, path) in
        [("startupProbe", "/healthz"), ("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")]
    {
        let expected = json!({"path": path, "port": "http"});
        assert_eq!(container[probe]["httpGet"], expected, "{probe}");
    }
    let check = json!({"command": ["carport", "fuse", "--check"]});
    for probe in ["startupProbe", "livenessProbe"] {
        assert_eq!(sessions(&pod)[probe]["exec"], check, "{probe}");
    }
    // A restart takes the open files of pods: minutes of silence come first.
    let liveness = &sessions(&pod)["livenessProbe"];
    let silence = [&liveness["periodSeconds"], &liveness["failureThreshold"]];
    let silence: u64 = silence.map(|n| n.as_u64().unwrap()).iter().product();
    assert!(silence >= 300, "{silence} s");
    // Else Kubernetes would kill what still drains.
    assert_eq!(pod["terminationGracePeriodSeconds"], 30);
}

/// `kubectl apply -k` sets what it makes to what the files say: a list that somebody has edited is not among it.
#[test]
fn the_pre_pull_list_is_made_apart_and_mounted_where_the_agent_looks() {
    let (config, pod) = (config(), pod());
    let list = Path::new(config["prepull"]["list"].as_str().unwrap());
    let volume = volume_at(&pod, list.parent().unwrap());
    assert_eq!(volume["configMap"], json!({"name": "carport-prepull", "optional": true}));
    let kustomization = &documents(&read(&deploy("daemonset/base/kustomization.yaml")))[0];
    let made = array(&kustomization["configMapGenerator"]);
    assert_eq!(made.len(), 1, "the agent's configuration and nothing else");

    let example = documents(&read(&deploy("examples/prepull.yaml"))).remove(0);
    let expected = json!({"name": "carport-prepull", "namespace": "carport-system"});
    assert_eq!(example["metadata"], expected);
    let file = list.file_name().unwrap().to_str().unwrap();
    let text = example["data"][file].as_str().unwrap();
    assert_eq!(List::parse(list, text).unwrap().images, []);
    assert_eq!(without_comments(text).images.len(), 2);
}

#[test]
fn the_api_overlay_serves_what_its_configuration_names() {
    let file = deploy("daemonset/overlays/api-tcp/config.yaml");
    let output = Command::new(binary())
        .args(["agent", "--print-config", "-o", "json", "--config"])
        .arg(&file)
        .env_clear()
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let config: Value = serde_json::from_slice(&output.stdout).unwrap();
    let tcp = &config["api"]["tcp"];
    let listen: std::net::SocketAddr = tcp["listen"].as_str().unwrap().parse().unwrap();
    assert_eq!((tcp["writes"].clone(), tcp["clientCa"].clone()), (json!(false), Value::Null));
    // But for the API it is the base's.
    let base_config = documents(&read(&deploy("daemonset/base/config.yaml"))).remove(0);
    let mut own = documents(&read(&file)).remove(0);
    own.as_object_mut().unwrap().remove("api").unwrap();
    assert_eq!(own, base_config);

    let Some(objects) = kustomize("daemonset/overlays/api-tcp") else { return };
    let find = |kind: &str| objects.iter().find(|object| object["kind"] == kind).unwrap();
    let pod = &find("DaemonSet")["spec"]["template"]["spec"];
    for (key, secret, name) in [
        ("certificate", "carport-api-tls", "tls.crt"),
        ("key", "carport-api-tls", "tls.key"),
        ("tokens", "carport-api-tokens", "tokens"),
    ] {
        let path = Path::new(tcp[key].as_str().unwrap());
        assert_eq!(path.file_name().unwrap(), name);
        let volume = volume_at(pod, path.parent().unwrap());
        assert_eq!(volume["secret"], json!({"secretName": secret}), "{key}");
    }
    assert_eq!(named(&agent(pod)["ports"], "api")["containerPort"], listen.port());
    let port = named(&find("Service")["spec"]["ports"], "api");
    assert_eq!(
        (port["port"].clone(), port["targetPort"].clone()),
        (json!(listen.port()), json!("api"))
    );
    let rules = array(&find("NetworkPolicy")["spec"]["ingress"]);
    assert_eq!(rules[1]["ports"], json!([{"port": listen.port(), "protocol": "TCP"}]));
    // The rest is as without it.
    let plain = kustomize("daemonset").unwrap();
    assert_eq!(objects.len(), plain.len());
}

/// The list, as somebody would have it who takes the comments from its entries.
fn without_comments(text: &str) -> List {
    let example = text.replace("images: []", "images:").replace("\n#  ", "\n  ");
    let example = example.replace('…', &"0".repeat(64));
    List::parse("list.yaml".as_ref(), &example).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_registry_login_is_optional_and_where_it_is_looked_for() {
    let pod = pod();
    let folder = named(&agent(&pod)["env"], "DOCKER_CONFIG")["value"].as_str().unwrap();
    let secret = &volume_at(&pod, Path::new(folder))["secret"];
    assert_eq!(secret["optional"], true);
    let expected = json!([{"key": ".dockerconfigjson", "path": "config.json"}]);
    assert_eq!(secret["items"], expected);
}

#[test]
fn the_image_is_of_this_version() {
    for path in [
        "daemonset",
        "daemonset/overlays/nvidia",
        "daemonset/overlays/without-streaming",
        "daemonset/overlays/shared-with-containerd",
        "daemonset/overlays/k3s",
        "daemonset/overlays/api-tcp",
    ] {
        let text = read(&deploy(path).join("kustomization.yaml"));
        let images = &documents(&text)[0]["images"];
        assert_eq!(named(images, "carport")["newTag"], env!("CARGO_PKG_VERSION"), "{path}");
    }
    assert_eq!(agent(&pod())["image"], "carport", "the name that is replaced");
}

/// All example objects, with the file that they stand in.
fn examples() -> Vec<(String, Value)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(deploy("examples")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        found.extend(documents(&read(&path)).into_iter().map(|object| (name.clone(), object)));
    }
    assert!(!found.is_empty());
    found
}

#[test]
fn the_driver_takes_the_volumes_of_the_examples() {
    let driver = base("CSIDriver")["metadata"]["name"].clone();
    let mut seen = 0;
    for (file, object) in examples() {
        let pod = pod_of(&object).unwrap_or_default();
        let of_pv = [object["spec"].clone()];
        let is_pv = object["kind"] == "PersistentVolume";
        let volumes = if is_pv { &of_pv } else { array(&pod["volumes"]) };
        for csi in volumes.iter().filter_map(|volume| volume.get("csi")) {
            assert_eq!(csi["driver"], driver, "{file}");
            assert_eq!(csi["readOnly"], true, "{file}: SELinux hosts need it said");
            let attributes = csi["volumeAttributes"].as_object().unwrap();
            let context = attributes.iter().map(|(key, value)| (&**key, value.as_str().unwrap()));
            let parsed =
                VolumeAttributes::parse(context).unwrap_or_else(|error| panic!("{file}: {error}"));
            assert_eq!(parsed.path.unwrap().to_string(), "/models", "{file}");
            seen += 1;
        }
    }
    assert_eq!(seen, 8, "inline, persistent, vLLM, KServe (2), LoRA (3)");
}

#[test]
fn a_claim_finds_its_volume() {
    let examples = examples();
    let all = |kind: &'static str| {
        examples.iter().map(|(_, object)| object).filter(move |object| object["kind"] == kind)
    };
    let mut seen = 0;
    for claim in all("PersistentVolumeClaim") {
        let name = &claim["metadata"]["name"];
        let volume = all("PersistentVolume")
            .find(|volume| volume["metadata"]["name"] == claim["spec"]["volumeName"])
            .unwrap_or_else(|| panic!("{name}"));
        for key in ["name", "namespace"] {
            assert_eq!(volume["spec"]["claimRef"][key], claim["metadata"][key]);
        }
        for key in ["accessModes", "storageClassName"] {
            assert_eq!(volume["spec"][key], claim["spec"][key]);
        }
        assert_eq!(claim["spec"]["resources"]["requests"], volume["spec"]["capacity"]);
        let uri = format!("pvc://{}", name.as_str().unwrap());
        let claimed = examples.iter().any(|(_, object)| {
            let pod = pod_of(object).unwrap_or_default();
            object["spec"]["predictor"]["model"]["storageUri"] == *uri
                || array(&pod["volumes"])
                    .iter()
                    .any(|volume| volume["persistentVolumeClaim"]["claimName"] == *name)
        });
        assert!(claimed, "{name}: somebody shows how");
        seen += 1;
    }
    assert_eq!(seen, 2);
}

#[test]
fn pods_of_the_examples_are_restricted() {
    let mut seen = 0;
    for (file, object) in examples() {
        let Some(pod) = pod_of(&object) else { continue };
        assert_eq!(violations(&pod), Vec::<String>::new(), "{file}");
        seen += 1;
    }
    assert!(seen >= 5, "{seen}");
}

/// What is given up for the agent, and no more than that.
#[test]
fn the_agent_is_not_restricted_in_what_its_rights_are_for() {
    let pod = pod();
    let mut found = violations(&pod);
    found.retain(|violation| !violation.starts_with("volume "));
    let mut expected = vec!["hostNetwork: true".to_owned(), "hostPID: true".to_owned()];
    for container in ["agent", "sessions"] {
        let of_each = [
            "runAsUser: 0",
            "runAsNonRoot is not true",
            "privileged: true",
            "allowPrivilegeEscalation is not false",
            "capabilities.drop without ALL",
        ];
        expected.extend(of_each.map(|violation| format!("{container}: {violation}")));
    }
    assert_eq!(found, expected);
}

/// Each path of the host, and each right, has a reason that can be read.
#[test]
fn the_rights_of_the_agent_stand_in_the_security_document() {
    let text = read(&workspace().join("docs/security.md"));
    let (_, table) = text.split_once("## The agent's rights, one by one").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();
    let pod = pod();
    for volume in array(&pod["volumes"]) {
        let Some(path) = volume["hostPath"]["path"].as_str() else { continue };
        // Of the driver's two sockets only the fixed part.
        let path = path.strip_suffix("/csi.carport.dev").unwrap_or(path);
        let short = path.strip_prefix("/var/lib/kubelet/").unwrap_or(path);
        let told = table.contains(&format!("`{path}")) || table.contains(&format!("`{short}`"));
        assert!(told, "{path}");
    }
    let mut rights = vec!["privileged", "readOnlyRootFilesystem", "hostNetwork", "seccompProfile"];
    rights.extend(["hostPID", "hostIPC"]);
    for right in rights {
        assert!(table.contains(&format!("`{right}")), "{right}");
    }
}

#[test]
fn the_service_and_the_policy_are_for_the_port_that_is_served() {
    let (config, pod) = (config(), pod());
    let listen: std::net::SocketAddr = config["http"]["listen"].as_str().unwrap().parse().unwrap();
    let (service, policy) = (base("Service"), base("NetworkPolicy"));
    let labels = &base("DaemonSet")["spec"]["template"]["metadata"]["labels"];
    assert_eq!(&service["spec"]["selector"], labels);
    assert_eq!(service["spec"]["clusterIP"], "None");
    let port = &service["spec"]["ports"][0];
    assert_eq!(port["port"], listen.port());
    named(&agent(&pod)["ports"], port["targetPort"].as_str().unwrap());
    assert_eq!(policy["spec"]["podSelector"], json!({}), "every pod");
    let expected = json!([{
        "from": [{"namespaceSelector": {}}],
        "ports": [{"port": listen.port(), "protocol": "TCP"}],
    }]);
    assert_eq!(policy["spec"]["ingress"], expected, "the cluster's pods, at that port");
}

fn kustomize(path: &str) -> Option<Vec<Value>> {
    Some(documents(&carport_tests::kustomize::rendered(&deploy(path))?))
}

#[test]
fn kustomize_makes_one_whole_of_it() {
    let Some(objects) = kustomize("daemonset") else { return };
    let kinds: Vec<&str> = objects.iter().filter_map(|object| object["kind"].as_str()).collect();
    let mut sorted = kinds.clone();
    sorted.sort_unstable();
    let expected = [
        "CSIDriver",
        "ConfigMap",
        "DaemonSet",
        "Namespace",
        "NetworkPolicy",
        "Role",
        "RoleBinding",
        "Service",
        "ServiceAccount",
    ];
    assert_eq!(sorted, expected);
    for object in &objects {
        let namespaced = !["CSIDriver", "Namespace"].contains(&object["kind"].as_str().unwrap());
        let expected = if namespaced { json!("carport-system") } else { Value::Null };
        assert_eq!(object["metadata"]["namespace"], expected, "{}", object["kind"]);
    }
    let find = |kind: &str| objects.iter().find(|object| object["kind"] == kind).unwrap();
    let set = &find("DaemonSet")["spec"];
    let pod = &set["template"]["spec"];
    let selector = set["selector"]["matchLabels"].as_object().unwrap();
    for (key, value) in selector {
        assert_eq!(&set["template"]["metadata"]["labels"][key], value);
    }
    let image = agent(pod)["image"].as_str().unwrap();
    assert!(image.ends_with(concat!(":", env!("CARGO_PKG_VERSION"))), "{image}");
    // The names of ConfigMaps, hash and all, are those that the pod mounts.
    for map in objects.iter().filter(|object| object["kind"] == "ConfigMap") {
        let mounted = array(&pod["volumes"])
            .iter()
            .any(|volume| volume["configMap"]["name"] == map["metadata"]["name"]);
        assert!(mounted, "{}", map["metadata"]["name"]);
    }
}

#[test]
fn the_nvidia_overlay_adds_a_runtime_class_and_nothing_else() {
    let (Some(plain), Some(mut nvidia)) =
        (kustomize("daemonset"), kustomize("daemonset/overlays/nvidia"))
    else {
        return;
    };
    let set = nvidia.iter_mut().find(|object| object["kind"] == "DaemonSet").unwrap();
    let pod = set["spec"]["template"]["spec"].as_object_mut().unwrap();
    assert_eq!(pod.remove("runtimeClassName").unwrap(), "nvidia");
    let selector = pod["nodeSelector"].as_object_mut().unwrap();
    assert_eq!(selector.remove("nvidia.com/gpu.present").unwrap(), "true");
    assert_eq!(nvidia, plain);
}

#[test]
fn without_streaming_the_agent_is_alone_and_sees_no_other_processes() {
    let (Some(mut plain), Some(without)) =
        (kustomize("daemonset"), kustomize("daemonset/overlays/without-streaming"))
    else {
        return;
    };
    let set = plain.iter_mut().find(|object| object["kind"] == "DaemonSet").unwrap();
    let pod = set["spec"]["template"]["spec"].as_object_mut().unwrap();
    assert_eq!(pod.remove("hostPID").unwrap(), true);
    let containers = pod["containers"].as_array_mut().unwrap();
    containers.retain(|container| container["name"] == "agent");
    assert_eq!(without, plain);
}

/// containerd names its files by the host's path; its socket and settings are where the agent looks.
#[test]
fn the_k3s_overlay_mounts_what_k3s_has() {
    let Some(objects) = kustomize("daemonset/overlays/k3s") else { return };
    let set = objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let pod = &set["spec"]["template"]["spec"];
    let root = "/var/lib/rancher/k3s/agent";
    let expected = [
        ("containerd-run", "/run/containerd", "/run/k3s/containerd".to_owned()),
        ("registry-hosts", "/etc/containerd/certs.d", format!("{root}/etc/containerd/certs.d")),
        ("containerd", "/var/lib/rancher/k3s/agent/containerd", format!("{root}/containerd")),
    ];
    for container in array(&pod["containers"]) {
        for (name, inside, host) in &expected {
            let mounts = array(&container["volumeMounts"]).iter();
            let at: Vec<_> = mounts.filter(|mount| mount["name"] == *name).collect();
            assert_eq!(at.len(), 1, "{name}");
            assert_eq!(at[0]["mountPath"], *inside);
            assert_eq!(named(&pod["volumes"], name)["hostPath"]["path"], *host);
        }
    }
}

/// Hard links do not cross mounts.
#[test]
fn what_is_shared_with_containerd_is_on_one_mount() {
    let Some(objects) = kustomize("daemonset/overlays/shared-with-containerd") else { return };
    let set = objects.iter().find(|object| object["kind"] == "DaemonSet").unwrap();
    let pod = &set["spec"]["template"]["spec"];
    for container in array(&pod["containers"]) {
        let over = |path: &str| {
            let mounts = array(&container["volumeMounts"]).iter();
            let above = mounts
                .filter(|mount| Path::new(path).starts_with(mount["mountPath"].as_str().unwrap()));
            let longest = |mount: &&Value| mount["mountPath"].as_str().unwrap().len();
            above.max_by_key(longest).unwrap_or_else(|| panic!("{path}"))
        };
        let (store, containerd) = (over("/var/lib/carport"), over("/var/lib/containerd"));
        assert_eq!(store, containerd);
        assert_eq!(store["mountPropagation"], "HostToContainer");
        assert_ne!(store["readOnly"], true);
    }
    let common = named(&pod["volumes"], "common");
    assert_eq!(common["hostPath"], json!({"path": "/var/lib", "type": "Directory"}));
}

#[test]
fn the_kserve_overlay_is_that_of_nvidia_with_a_list_of_its_own() {
    let (Some(nvidia), Some(mut kserve)) =
        (kustomize("daemonset/overlays/nvidia"), kustomize("daemonset/overlays/kserve"))
    else {
        return;
    };
    let name = "carport-prepull";
    let at = kserve.iter().position(|o| o["metadata"]["name"] == name).unwrap();
    let new = kserve.remove(at);
    assert_eq!(kserve, nvidia);
    let text = new["data"]["list.yaml"].as_str().unwrap();
    assert_eq!(without_comments(text).images.len(), 4);
}
