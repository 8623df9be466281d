//! The Pod Security Standard *restricted*, field by field, for a pod's `spec`.
//!
//! Written after <https://kubernetes.io/docs/concepts/security/pod-security-standards/>, with the defaults that the
//! API server would fill in: what a container does not say, it has from its pod.

use serde_json::{Map, Value, json};

/// What the standard allows of volumes.
const VOLUMES: [&str; 8] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
];
const SELINUX_TYPES: [&str; 5] =
    ["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"];
/// Those that belong to the pod alone.
const SYSCTLS: [&str; 10] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
];

/// What KServe has beside the fields of a pod.
const OF_KSERVE: [&str; 4] = ["minReplicas", "maxReplicas", "model", "timeout"];
/// And beside those of a container.
const OF_MODEL: [&str; 4] = ["modelFormat", "runtime", "storageUri", "protocolVersion"];

/// The `spec` of the pod that an object is or makes; nothing where it makes none.
pub fn pod_of(object: &Value) -> Option<Value> {
    match object["kind"].as_str()? {
        "Pod" => Some(object["spec"].clone()),
        "Deployment" | "DaemonSet" => Some(object["spec"]["template"]["spec"].clone()),
        "InferenceService" => Some(predictor(&object["spec"]["predictor"])),
        _ => None,
    }
}

/// KServe takes a pod's fields as they are. Where a runtime brings the container, the model's settings are laid
/// over it.
fn predictor(predictor: &Value) -> Value {
    let mut pod = predictor.clone();
    if let (Some(fields), Some(model)) = (pod.as_object_mut(), predictor["model"].as_object()) {
        let mut container = model.clone();
        container.retain(|name, _| !OF_MODEL.contains(&name.as_str()));
        container.insert("name".into(), json!("kserve-container"));
        fields.insert("containers".into(), json!([container]));
    }
    if let Some(fields) = pod.as_object_mut() {
        fields.retain(|name, _| !OF_KSERVE.contains(&name.as_str()));
    }
    pod
}

/// What a namespace that enforces `restricted` would refuse in this pod; nothing where it is admitted.
pub fn violations(pod: &Value) -> Vec<String> {
    let mut found = Vec::new();
    for field in ["hostNetwork", "hostPID", "hostIPC"] {
        if pod[field] == true {
            found.push(format!("{field}: true"));
        }
    }
    for volume in list(&pod["volumes"]) {
        let kinds = volume.as_object().into_iter().flat_map(Map::keys);
        for kind in kinds.filter(|key| *key != "name" && !VOLUMES.contains(&key.as_str())) {
            found.push(format!("volume {}: {kind}", volume["name"]));
        }
    }
    let of_pod = &pod["securityContext"];
    for sysctl in list(&of_pod["sysctls"]) {
        if !sysctl["name"].as_str().is_some_and(|name| SYSCTLS.contains(&name)) {
            found.push(format!("sysctl {}", sysctl["name"]));
        }
    }
    found.extend(shared("pod", of_pod));
    let mut containers = 0;
    for kind in ["initContainers", "containers", "ephemeralContainers"] {
        for container in list(&pod[kind]) {
            containers += 1;
            let name = container["name"].as_str().unwrap_or("?");
            found.extend(of_container(name, container, of_pod));
        }
    }
    if containers == 0 {
        found.push("no container".into());
    }
    found
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// What is forbidden in a pod's context as well as in a container's.
fn shared(who: &str, context: &Value) -> Vec<String> {
    let mut found = Vec::new();
    if context["runAsUser"] == 0 {
        found.push(format!("{who}: runAsUser: 0"));
    }
    if context["windowsOptions"]["hostProcess"] == true {
        found.push(format!("{who}: hostProcess: true"));
    }
    let selinux = &context["seLinuxOptions"];
    let kind = selinux["type"].as_str().unwrap_or_default();
    if !SELINUX_TYPES.contains(&kind) || !selinux["user"].is_null() || !selinux["role"].is_null() {
        found.push(format!("{who}: seLinuxOptions"));
    }
    let armour = context["appArmorProfile"]["type"].as_str().unwrap_or("RuntimeDefault");
    if !["RuntimeDefault", "Localhost"].contains(&armour) {
        found.push(format!("{who}: appArmorProfile {armour}"));
    }
    found
}

fn of_container(name: &str, container: &Value, of_pod: &Value) -> Vec<String> {
    let context = &container["securityContext"];
    let mut found = shared(name, context);
    let inherited = |field: &str| match &context[field] {
        Value::Null => of_pod[field].clone(),
        own => own.clone(),
    };
    if inherited("runAsNonRoot") != true {
        found.push(format!("{name}: runAsNonRoot is not true"));
    }
    let seccomp = inherited("seccompProfile");
    if !["RuntimeDefault", "Localhost"].iter().any(|kind| seccomp["type"] == *kind) {
        found.push(format!("{name}: seccompProfile"));
    }
    if context["privileged"] == true {
        found.push(format!("{name}: privileged: true"));
    }
    if context["allowPrivilegeEscalation"] != false {
        found.push(format!("{name}: allowPrivilegeEscalation is not false"));
    }
    if !list(&context["capabilities"]["drop"]).iter().any(|capability| capability == "ALL") {
        found.push(format!("{name}: capabilities.drop without ALL"));
    }
    for capability in list(&context["capabilities"]["add"]) {
        if capability != "NET_BIND_SERVICE" {
            found.push(format!("{name}: capabilities.add {capability}"));
        }
    }
    if !["", "Default"].contains(&context["procMount"].as_str().unwrap_or_default()) {
        found.push(format!("{name}: procMount"));
    }
    for port in list(&container["ports"]) {
        if port["hostPort"].as_u64().unwrap_or_default() != 0 {
            found.push(format!("{name}: hostPort"));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Value {
        json!({
            "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{
                "name": "main",
                "ports": [{"containerPort": 80}],
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
                },
            }],
            "volumes": [{"name": "model", "csi": {}}, {"name": "tmp", "emptyDir": {}}],
        })
    }

    #[test]
    fn each_field_that_the_standard_names_is_looked_at() {
        assert_eq!(violations(&good()), Vec::<String>::new());
        for (pointer, value) in [
            ("/hostNetwork", json!(true)),
            ("/hostPID", json!(true)),
            ("/hostIPC", json!(true)),
            ("/volumes/0", json!({"name": "host", "hostPath": {"path": "/"}})),
            ("/volumes/0", json!({"name": "image", "image": {}})),
            ("/securityContext/runAsNonRoot", json!(false)),
            ("/securityContext/runAsUser", json!(0)),
            ("/securityContext/sysctls", json!([{"name": "kernel.msgmax", "value": "1"}])),
            ("/securityContext/seccompProfile/type", json!("Unconfined")),
            ("/securityContext/seccompProfile", json!(null)),
            ("/securityContext/seLinuxOptions", json!({"type": "spc_t"})),
            ("/securityContext/seLinuxOptions", json!({"user": "root"})),
            ("/securityContext/appArmorProfile", json!({"type": "Unconfined"})),
            ("/securityContext/windowsOptions", json!({"hostProcess": true})),
            ("/containers/0/securityContext/privileged", json!(true)),
            ("/containers/0/securityContext/allowPrivilegeEscalation", json!(true)),
            ("/containers/0/securityContext/allowPrivilegeEscalation", json!(null)),
            ("/containers/0/securityContext/capabilities/drop", json!(["NET_RAW"])),
            ("/containers/0/securityContext/capabilities/add", json!(["SYS_ADMIN"])),
            ("/containers/0/securityContext/runAsNonRoot", json!(false)),
            ("/containers/0/securityContext/runAsUser", json!(0)),
            ("/containers/0/securityContext/procMount", json!("Unmasked")),
            ("/containers/0/securityContext/seccompProfile", json!({"type": "Unconfined"})),
            ("/containers/0/ports/0/hostPort", json!(80)),
            ("/initContainers", json!([{"name": "root"}])),
            ("/containers", json!([])),
        ] {
            let mut pod = good();
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            match pod.pointer_mut(parent).unwrap() {
                Value::Object(map) => drop(map.insert(key.into(), value.clone())),
                Value::Array(items) => items[key.parse::<usize>().unwrap()] = value.clone(),
                other => panic!("{other}"),
            }
            assert!(!violations(&pod).is_empty(), "{pointer}: {value}");
        }
    }
}
