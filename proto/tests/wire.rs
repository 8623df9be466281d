//! Numbers on the wire, against bytes written by hand from the published specifications.

use carport_proto::cri::v1 as cri;
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

#[test]
fn what_a_container_runtime_says_is_read() {
    let mut bytes = b"\x0a\x02id\x12\x01t\x1a\x01d\x20\x07".to_vec(); // 1: id, 2: tag, 3: digest, 4: size
    bytes.extend(b"\x2a\x02\x08\x05\x32\x01u"); // 5: uid, 6: username
    bytes.extend(b"\x3a\x03\x0a\x01s\x40\x01"); // 7: spec, 8: pinned
    let image = cri::Image::decode(&*bytes).unwrap();
    assert_eq!((&*image.id, image.size, image.pinned), ("id", 7, true));
    assert_eq!((image.repo_tags, image.repo_digests), (vec!["t".to_owned()], vec!["d".to_owned()]));
    let version = b"\x0a\x010\x12\x01n\x1a\x01v\x22\x01a";
    let version = cri::VersionResponse::decode(&version[..]).unwrap();
    assert_eq!((&*version.runtime_name, &*version.runtime_version), ("n", "v"));
    let disk = b"\x0a\x0b\x08\x01\x12\x03\x0a\x01/\x1a\x02\x08\x09\x12\x00";
    let disk = cri::ImageFsInfoResponse::decode(&disk[..]).unwrap().image_filesystems.remove(0);
    assert_eq!((disk.fs_id.unwrap().mountpoint, disk.used_bytes.unwrap().value), ("/".into(), 9));
}

#[test]
fn what_a_container_runtime_is_asked_is_as_it_reads_it() {
    let image = || Some(cri::ImageSpec { image: "i".into() });
    let auth = cri::AuthConfig {
        username: "u".into(),
        password: "p".into(),
        identity_token: "t".into(),
        registry_token: "r".into(),
    };
    let pull = cri::PullImageRequest { image: image(), auth: Some(auth) };
    let expected = b"\x0a\x03\x0a\x01i\x12\x0c\x0a\x01u\x12\x01p\x2a\x01t\x32\x01r";
    assert_eq!(pull.encode_to_vec(), expected);
    let list = cri::ListImagesRequest { filter: Some(cri::ImageFilter { image: image() }) };
    assert_eq!(list.encode_to_vec(), b"\x0a\x05\x0a\x03\x0a\x01i");
}
