//! carport in the cluster, as docs/install.md has it, and models for it.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use carport_image::source::PullSecret;

use super::kube::Kube;
use super::{Cluster, NODE, registries};
use crate::carport::workspace;
use crate::models::Model;

/// The driver's name, as the manifests have it.
pub const DRIVER: &str = "csi.carport.dev";
/// The namespace of the manifests.
pub const SYSTEM: &str = "carport-system";

/// How long carport may take until its pods are ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);

impl Cluster {
    /// `kubectl apply -k deploy/daemonset`, whose image has been imported; waits until the node lists the driver and the
    /// DaemonSet is ready. Returns the time until the driver was listed.
    ///
    /// # Errors
    ///
    /// When it does not become ready.
    pub async fn deploy(&self) -> anyhow::Result<Duration> {
        let start = Instant::now();
        let folder = workspace().join("deploy/daemonset").display().to_string();
        self.kube.run(&["apply", "-k", &folder]).await?;
        self.registered().await?;
        let took = start.elapsed();
        self.rolled_out().await?;
        Ok(took)
    }

    /// Waits until the kubelet has registered the driver.
    ///
    /// # Errors
    ///
    /// When it does not, with what the node lists.
    pub async fn registered(&self) -> anyhow::Result<()> {
        let listed = async |kube: &Kube| {
            let drivers = drivers(kube).await?;
            Ok(if drivers == [DRIVER] { Ok(()) } else { Err(format!("{drivers:?}")) })
        };
        self.kube.until("CSINode lists csi.carport.dev", READY_TIMEOUT, listed).await
    }

    /// Waits until the DaemonSet's pods are ready.
    ///
    /// # Errors
    ///
    /// When they do not become ready.
    pub async fn rolled_out(&self) -> anyhow::Result<()> {
        let arguments = ["rollout", "status", "-n", SYSTEM, "daemonset/carport", "--timeout=60s"];
        self.kube
            .run_within(&arguments, "", READY_TIMEOUT + Duration::from_secs(10))
            .await
            .map(drop)
    }

    /// Packs a model into one of the cluster's registries.
    ///
    /// # Errors
    ///
    /// When the registry refuses.
    pub async fn push(&self, model: &Model, reference: &str) -> anyhow::Result<()> {
        let private = reference.starts_with(registries::Served::Private.name());
        let secret = if private { registries::login() } else { PullSecret::none() };
        let packed = model.pack(reference, &secret, &registries::sources(self.state())?).await;
        packed.with_context(|| format!("pack into {reference}"))?;
        Ok(())
    }
}

/// The CSI drivers that the node lists.
///
/// # Errors
///
/// As [`Kube::run`].
pub async fn drivers(kube: &Kube) -> anyhow::Result<Vec<String>> {
    let node = kube.get(&["csinode", NODE]).await?;
    let drivers = node["spec"]["drivers"].as_array().into_iter().flatten();
    Ok(drivers.filter_map(|driver| driver["name"].as_str()).map(str::to_owned).collect())
}
