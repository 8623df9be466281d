//! The kubelet's PodResources API: which pod was given which device.
//!
//! Asked over again at the pace of the GPUs. Whatever the kubelet does (absent, hanging,
//! restarted, of another version), asking ends within [`PATIENCE`], and the
//! [`Allocations`] say what became of it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carport_proto::client;
use carport_proto::podresources::v1;
use carport_proto::podresources::v1::pod_resources_lister_client::PodResourcesListerClient;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tracing::{info, warn};

use super::allocation::{Allocation, Allocations, Answer, DeviceName, Held};

/// For both questions together; the kubelet answers from memory.
pub(super) const PATIENCE: Duration = Duration::from_secs(3);

/// What the kubelet itself allows for an answer.
const MAX_ANSWER_BYTES: usize = 16 << 20;

/// Devices that an answer may tell of: more than a node's GPUs have copies for sharing. An answer
/// with more is nonsense, and would keep every reader busy.
const MAX_DEVICES: usize = 65_536;

/// A resource of another kind of device may have names that look like a GPU's.
const GPU_RESOURCES: [&str; 2] = ["nvidia.com/gpu", "nvidia.com/mig-"];

/// NVIDIA's DRA driver for GPUs.
const DRA_DRIVER: &str = "gpu.nvidia.com";

/// What holds before the first answer.
pub(super) const NOT_ASKED: &str = "the kubelet has not been asked yet";

/// Asks for ever, at this distance, each time no longer than `patience`. Ends when it is
/// aborted.
pub(super) async fn follow(
    socket: PathBuf,
    interval: Duration,
    patience: Duration,
    allocations: watch::Sender<Arc<Allocations>>,
) {
    let channel = client::dial(&socket);
    loop {
        let asked = tokio::time::timeout(patience, ask(&socket, channel.clone())).await;
        let asked = asked.unwrap_or_else(|_| {
            Err(format!("{}: no answer within {patience:?}", socket.display()))
        });
        note(&allocations, asked);
        tokio::time::sleep(interval).await;
    }
}

/// Publishes what is new, and says so in the log.
fn note(allocations: &watch::Sender<Arc<Allocations>>, asked: Result<Answer, String>) {
    let before = Arc::clone(&allocations.borrow());
    let now = match asked {
        Ok(answer) => Allocations { answer: Some(answer), trouble: String::new() },
        Err(trouble) => Allocations { answer: before.answer.clone(), trouble },
    };
    if now == *before {
        return;
    }
    match (before.trouble.as_str(), now.trouble.as_str()) {
        (before, now) if before == now => {}
        (_, "") => info!("the kubelet tells which pods hold GPUs"),
        // The normal state of a machine without a kubelet.
        (NOT_ASKED, why) => info!(why, "which pods hold GPUs is not known"),
        (_, why) => warn!(why, "the kubelet no longer tells which pods hold GPUs"),
    }
    allocations.send_replace(Arc::new(now));
}

async fn ask(socket: &Path, channel: Channel) -> Result<Answer, String> {
    let mut kubelet =
        PodResourcesListerClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
    let listed = match kubelet.list(v1::ListPodResourcesRequest {}).await {
        Ok(listed) => listed.into_inner(),
        Err(status) => return Err(refused(socket, &status).await),
    };
    // Older kubelets do not have it, or have it switched off by a feature gate; without it, what is
    // allocated is known all the same.
    let allocatable = kubelet.get_allocatable_resources(v1::AllocatableResourcesRequest {}).await;
    let allocatable = match allocatable {
        Ok(answer) => answer.into_inner().devices,
        Err(status)
            if status.code() == Code::Unimplemented || status.message().ends_with(" disabled") =>
        {
            Vec::new()
        }
        Err(status) => return Err(refused(socket, &status).await),
    };
    answer(listed, allocatable).map_err(|why| format!("{}: {why}", socket.display()))
}

/// What a refusal means. The kernel knows best why there is no connection.
async fn refused(socket: &Path, status: &Status) -> String {
    let socket_name = socket.display();
    if let Err(error) = UnixStream::connect(socket).await {
        return format!(
            "connect to {socket_name}: {error}; right where no kubelet runs, otherwise mount its \
             pod-resources folder and name the socket in gpu.podResources"
        );
    }
    format!("{socket_name}: {}: {}", status.code(), status.message())
}

fn answer(
    listed: v1::ListPodResourcesResponse,
    allocatable: Vec<v1::ContainerDevices>,
) -> Result<Answer, String> {
    let mut answer = Answer::default();
    for pod in &listed.pod_resources {
        for container in &pod.containers {
            let given = Allocation {
                pod_namespace: pod.namespace.clone(),
                pod_name: pod.name.clone(),
                container: container.name.clone(),
                resource_name: None,
                claim_name: None,
                shared: false,
            };
            for devices in container.devices.iter().filter(|devices| is_gpu(devices)) {
                answer.add_devices(devices, &given);
            }
            for claim in &container.dynamic_resources {
                answer.add_claim(claim, &given);
            }
            if answer.held.len() > MAX_DEVICES {
                return Err(format!("more than {MAX_DEVICES} devices are given to pods"));
            }
        }
    }
    let allocatable = allocatable.iter().filter(|devices| is_gpu(devices));
    let names = allocatable.flat_map(|devices| &devices.device_ids);
    let names = names.take(MAX_DEVICES).filter_map(|id| DeviceName::of_plugin(id));
    // Each once, however many copies there are for sharing.
    let names: BTreeSet<_> = names.map(|(name, _)| name.plain()).collect();
    answer.allocatable = names.into_iter().collect();
    Ok(answer)
}

fn is_gpu(devices: &v1::ContainerDevices) -> bool {
    GPU_RESOURCES.iter().any(|resource| devices.resource_name.starts_with(resource))
        // Plugins may offer GPUs under other names; a UUID says what it is.
        || devices.device_ids.iter().any(|id| id.starts_with("GPU-") || id.starts_with("MIG-"))
}

impl Answer {
    fn add_devices(&mut self, devices: &v1::ContainerDevices, given: &Allocation) {
        for id in &devices.device_ids {
            let Some((device, shared)) = DeviceName::of_plugin(id) else {
                self.unread.add(&format!("{} {id:?}", devices.resource_name));
                continue;
            };
            let resource_name = Some(devices.resource_name.clone());
            let allocation = Allocation { resource_name, shared, ..given.clone() };
            self.held.push(Held { device, allocation });
        }
    }

    fn add_claim(&mut self, claim: &v1::DynamicResource, given: &Allocation) {
        for resource in &claim.claim_resources {
            let cdi = resource.cdi_devices.iter().map(|device| device.name.as_str());
            // Before Kubernetes 1.32 the CDI names are all there is.
            let of_nvidia = match resource.driver_name.as_str() {
                "" => cdi.clone().any(|name| name.split('=').next().is_some_and(is_nvidia_kind)),
                driver => driver == DRA_DRIVER,
            };
            if !of_nvidia {
                continue;
            }
            let mut names = std::iter::once(resource.device_name.as_str()).chain(cdi);
            let Some(device) = names.find_map(DeviceName::of_claim) else {
                let device = &resource.device_name;
                self.unread.add(&format!("claim {} {device:?}", claim.claim_name));
                continue;
            };
            let claim_name = Some(claim.claim_name.clone());
            let shared = resource.share_id.is_some();
            self.held.push(Held {
                device,
                allocation: Allocation { claim_name, shared, ..given.clone() },
            });
        }
    }
}

/// `nvidia.com/gpu`, `k8s.gpu.nvidia.com/claim`; not the driver's network channels.
fn is_nvidia_kind(kind: &str) -> bool {
    let vendor = kind.split('/').next().unwrap_or_default();
    vendor == "nvidia.com" || vendor == "gpu.nvidia.com" || vendor.ends_with(".gpu.nvidia.com")
}

#[cfg(test)]
mod tests;
