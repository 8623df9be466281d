//! What the kubelet sends.

use std::collections::HashMap;

use carport_proto::csi::v1 as csi;

use super::Pod;

/// The request that the kubelet sends for an inline volume with these attributes.
pub fn publish_request(pod: &Pod, attributes: &[(&str, &str)]) -> csi::NodePublishVolumeRequest {
    use csi::volume_capability::{AccessMode, AccessType, MountVolume, access_mode};
    let pod_info = [
        ("csi.storage.k8s.io/ephemeral", "true"),
        ("csi.storage.k8s.io/pod.name", pod.volume_id.as_str()),
        ("csi.storage.k8s.io/pod.namespace", "default"),
        ("csi.storage.k8s.io/pod.uid", pod.volume_id.as_str()),
        ("csi.storage.k8s.io/serviceAccount.name", "default"),
    ];
    let volume_context: HashMap<_, _> = attributes
        .iter()
        .chain(&pod_info)
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect();
    csi::NodePublishVolumeRequest {
        volume_id: pod.volume_id.clone(),
        target_path: pod.target.display().to_string(),
        volume_capability: Some(csi::VolumeCapability {
            access_mode: Some(AccessMode { mode: access_mode::Mode::SingleNodeWriter.into() }),
            access_type: Some(AccessType::Mount(MountVolume::default())),
        }),
        readonly: false,
        volume_context,
        ..Default::default()
    }
}
