//! Numbers on the wire, against bytes written by hand from the published specifications.

use carport_proto::csi::v1::volume_capability::{AccessType, access_mode};
use carport_proto::csi::v1::{
    NodeGetVolumeStatsResponse, NodePublishVolumeRequest, NodeUnpublishVolumeRequest,
    VolumeCondition, VolumeUsage,
};
use carport_proto::pluginregistration::v1::PluginInfo;
use prost::Message as _;

#[test]
fn a_publish_request_of_a_kubelet_is_read() {
    let mut bytes = b"\x0a\x02id\x22\x07/target".to_vec(); // 1: volume_id, 4: target_path
    bytes.extend(b"\x2a\x06\x12\x00\x1a\x02\x08\x01"); // 5: capability { 2: mount, 3: { 1: writer } }
    bytes.extend(b"\x30\x01"); // 6: readonly
    bytes.extend(b"\x3a\x06\x0a\x01s\x12\x01v"); // 7: secrets
    bytes.extend(b"\x42\x06\x0a\x01c\x12\x01v"); // 8: volume_context
    let request = NodePublishVolumeRequest::decode(&*bytes).unwrap();
    assert_eq!((&*request.volume_id, &*request.target_path), ("id", "/target"));
    let capability = request.volume_capability.unwrap();
    assert!(matches!(capability.access_type, Some(AccessType::Mount(_))));
    assert_eq!(capability.access_mode.unwrap().mode(), access_mode::Mode::SingleNodeWriter);
    assert!(request.readonly);
    assert_eq!(request.secrets["s"], "v");
    assert_eq!(request.volume_context["c"], "v");
    let request = NodeUnpublishVolumeRequest::decode(&b"\x0a\x02id\x12\x02/t"[..]).unwrap();
    assert_eq!((&*request.volume_id, &*request.target_path), ("id", "/t"));
}

#[test]
fn answers_are_as_a_kubelet_reads_them() {
    let stats = NodeGetVolumeStatsResponse {
        usage: vec![VolumeUsage { available: 0, total: 3, used: 2, unit: 1 }],
        volume_condition: Some(VolumeCondition { abnormal: true, message: "m".into() }),
    };
    let expected = b"\x0a\x06\x10\x03\x18\x02\x20\x01\x12\x05\x08\x01\x12\x01m";
    assert_eq!(stats.encode_to_vec(), expected);
    let info = PluginInfo {
        r#type: "t".into(),
        name: "n".into(),
        endpoint: "e".into(),
        supported_versions: vec!["1".into()],
    };
    assert_eq!(info.encode_to_vec(), b"\x0a\x01t\x12\x01n\x1a\x01e\x22\x011");
}
