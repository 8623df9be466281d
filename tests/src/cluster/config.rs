//! The files that the parts of a cluster are started with. All are in the cluster's folder; paths in them are the same
//! inside and outside.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::ensure;

use super::registries::Served;
use super::{ADDRESS, NODE, PAUSE};

/// Writes all of them.
///
/// # Errors
///
/// When a file cannot be written, or openssl cannot make a key.
pub(super) fn write(state: &Path) -> anyhow::Result<()> {
    let file = |name: &str, content: String| fs::write(state.join(name), content);
    let names = Served::ALL.map(Served::name).join(" ");
    file("hosts", format!("127.0.0.1 localhost\n{ADDRESS} {NODE} {names}\n"))?;
    file("resolv.conf", String::new())?;
    file("cni.conflist", CNI.to_owned())?;
    let bin = super::machine::folder().join("bin");
    file(
        "containerd.toml",
        CONTAINERD.replace("BIN", &bin.display().to_string()).replace("PAUSE", PAUSE),
    )?;
    file("kubelet.yaml", KUBELET.replace("STATE", &state.display().to_string()))?;

    // The tokens need not be secret: nothing outside the cluster's network namespace reaches the API server.
    let node = format!("system:node:{NODE}");
    file(
        "tokens.csv",
        format!("admin,admin,admin,system:masters\nnode,{node},node,system:nodes\n"),
    )?;
    for user in ["admin", "node"] {
        file(&format!("{user}.kubeconfig"), kubeconfig(state, user))?;
    }
    let mut openssl = Command::new("openssl");
    let key = openssl
        .args(["genrsa", "-out"])
        .arg(state.join("service-accounts.key"))
        .arg("2048")
        .output()?;
    ensure!(key.status.success(), "openssl genrsa: {}", String::from_utf8_lossy(&key.stderr));
    super::registries::write(state)
}

fn kubeconfig(state: &Path, user: &str) -> String {
    // The API server creates this self-signed certificate when it starts.
    let authority = state.join("pki/apiserver.crt");
    format!(
        "apiVersion: v1
kind: Config
current-context: cluster
clusters:
- name: cluster
  cluster: {{server: 'https://{ADDRESS}:443', certificate-authority: '{}'}}
users:
- name: {user}
  user: {{token: {user}}}
contexts:
- name: cluster
  context: {{cluster: cluster, user: {user}}}
",
        authority.display()
    )
}

const CNI: &str = r#"{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"bridge","bridge":"cni0","isGateway":true,"ipam":
 {"type":"host-local","dataDir":"/run/cni","ranges":[[{"subnet":"10.244.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}
"#;

// restrict_oom_score_adj: a container without CAP_SYS_RESOURCE, as in CI, may not lower it.
const CONTAINERD: &str = "version = 4
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'PAUSE'
[plugins.'io.containerd.cri.v1.images'.registry]
  config_path = '/etc/containerd/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = 'BIN/runc'
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['BIN']
  use_internal_loopback = true
";

// imagePullCredentialsVerificationPolicy: with the default an imported image is pulled again once the same content
// was pulled under another name. oomScoreAdj: as above. syncFrequency: how long a changed ConfigMap takes to reach a pod.
const KUBELET: &str = "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
oomScoreAdj: 0
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
failSwapOn: false
syncFrequency: 10s
resolvConf: STATE/resolv.conf
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
imagePullCredentialsVerificationPolicy: NeverVerify
";
