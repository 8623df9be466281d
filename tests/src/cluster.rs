//! A one-node Kubernetes cluster made of real parts: etcd, kube-apiserver, kube-controller-manager, kube-scheduler,
//! kubelet, containerd, runc, CNI's bridge, all unmodified and built by Go from the modules in `tests/cluster`.
//!
//! ```text
//! outside   Machine: namespaces, cgroups, the folder target/cluster/NAME        machine.rs, cgroups.rs, node.sh
//!             └─ nsenter ─► this program again, inside:
//! inside    Cluster: the components, images, registries, carport                components.rs, images.rs, …
//! ```
//!
//! Every process of a cluster is in the cluster's own cgroups, every mount is in its mount namespace. Killing the processes
//! and removing one folder therefore removes all of it. Every wait has a timeout.

use std::path::{Path, PathBuf};
use std::process::Command;

mod cgroups;
mod components;
mod config;
pub mod deploy;
pub mod images;
pub mod kube;
pub mod machine;
pub mod registries;
pub mod session;

pub use components::Cluster;
pub use machine::Machine;

/// The node's name.
pub const NODE: &str = "node-1";
/// Its address, where the API server and the registries listen.
pub const ADDRESS: &str = "10.88.0.1";
/// The image of the tests' pods, imported into containerd under the name that deploy/examples uses.
pub const BUSYBOX: &str = "docker.io/library/busybox:1.37";
/// The image of the pods' sandboxes.
const PAUSE: &str = "test.local/pause:1";

/// Builds the cluster's programs if they are missing or outdated.
///
/// # Errors
///
/// When they cannot be built although Go is installed. Without Go or root it prints SKIPPED and returns `false`.
pub fn build() -> anyhow::Result<bool> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a cluster needs root");
        return Ok(false);
    }
    let script = crate::carport::workspace().join("tests/cluster/build.sh");
    let status = Command::new(script).arg(bin()).status()?;
    if status.code() == Some(77) {
        eprintln!("SKIPPED: a cluster needs Go");
        return Ok(false);
    }
    anyhow::ensure!(status.success(), "tests/cluster/build.sh: {status}");
    Ok(true)
}

/// The carport that is deployed: the unoptimised one, or with `CARPORT_TEST_RELEASE` that of `make build`.
///
/// # Errors
///
/// When the optimised one cannot be built.
pub fn deployed(unoptimised: fn() -> &'static Path) -> anyhow::Result<PathBuf> {
    if std::env::var_os("CARPORT_TEST_RELEASE").is_none_or(|value| value.is_empty()) {
        return Ok(unoptimised().to_owned());
    }
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["build", "--release", "--package", "carport-agent"]);
    let status = cargo.current_dir(crate::carport::workspace()).status()?;
    anyhow::ensure!(status.success(), "cargo build --release: {status}");
    Ok(machine::target().join("release/carport"))
}

/// Where the programs are.
pub fn bin() -> PathBuf {
    machine::folder().join("bin")
}

/// Sets the environment of a program that runs inside.
fn environment(command: &mut Command, state: &Path) {
    let path = std::env::var("PATH").unwrap_or_default();
    command
        .env("PATH", format!("{}:{path}", bin().display()))
        .env("KUBECONFIG", state.join("admin.kubeconfig"))
        .env("CONTAINERD_NAMESPACE", "k8s.io")
        .env("TMPDIR", "/tmp");
}
