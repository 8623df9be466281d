//! What is remembered of a published volume, so that it can be taken away by name alone.

use std::time::SystemTime;

use carport_image::{Digest, Reference};
use serde::{Deserialize, Serialize};

use super::{Filter, PodInfo, TargetPath, VolumeId};
use crate::mount::{ImagePath, MountOptions};

/// A published volume. One file in the store's `volumes/` each; while it is there,
/// the store keeps the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// The volume. Several pods may share a PV, and so its id.
    pub volume_id: VolumeId,
    /// Where it is shown.
    pub target: TargetPath,
    /// The image, as the volume names it.
    pub image: Reference,
    /// The image that this meant when the volume was published. The store looks for
    /// this field.
    pub digest: Digest,
    /// The folder inside the image; absent for all of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<ImagePath>,
    /// Which of its files are shown; absent for all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<Filter>,
    /// The view of the image that has these files. The store looks for this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub view: Option<Digest>,
    /// How it is mounted.
    #[serde(default, flatten)]
    pub options: MountOptions,
    /// It shows a streaming session's mount, since the image was not complete when it was published.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stream: bool,
    /// Sum of the sizes of the image's files, of those that are shown where there is a filter.
    pub bytes: u64,
    /// Number of these files.
    pub files: u64,
    /// For how long, in seconds, the image is pinned when the volume goes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pin_seconds: Option<u64>,
    /// The pod, where the kubelet told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodInfo>,
    /// When it was first published.
    pub published_at: SystemTime,
}

/// The name of the record: of fixed length and safe, whatever the kubelet sends.
pub(super) fn record_name(volume_id: &VolumeId, target: &TargetPath) -> String {
    // No NUL is in a path, so two pairs never run together into one text.
    let mut text = volume_id.to_string().into_bytes();
    text.push(0);
    text.extend_from_slice(target.as_path().as_os_str().as_encoded_bytes());
    Digest::of(&text).hex()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_pair_of_volume_and_target_has_a_name() {
        let name = |id, target| {
            record_name(&VolumeId::parse(id).unwrap(), &TargetPath::parse(target).unwrap())
        };
        assert_eq!(name("pv", "/pods/1"), name("pv", "/pods//1"));
        assert_ne!(name("pv", "/pods/1"), name("pv", "/pods/2"));
        assert_ne!(name("pv", "/pods/1"), name("pv2", "/pods/1"));
        assert_eq!(name("../..", "/a").len(), 64);
    }

    #[test]
    fn the_form_on_disk_stays() {
        let text = r#"{
            "volume_id": "csi-1", "target": "/pods/1/mount", "image": "registry.example/m:v1",
            "digest": "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "path": "models", "noexec": true, "bytes": 7, "files": 1,
            "pod": {"namespace": "n", "name": "p", "uid": "u"},
            "published_at": {"secs_since_epoch": 1, "nanos_since_epoch": 0}
        }"#;
        let record: VolumeRecord = serde_json::from_str(text).unwrap();
        assert_eq!(record.digest, Digest::of(b""));
        assert_eq!(record.path.as_ref().unwrap().to_string(), "/models");
        let again = serde_json::to_string(&record).unwrap();
        assert_eq!(serde_json::from_str::<VolumeRecord>(&again).unwrap(), record);
        let text: String = text.split_whitespace().collect();
        assert_eq!(again, text);

        // As versions without them wrote it.
        let old = text.replace(r#""noexec":true,"#, "");
        let old: VolumeRecord = serde_json::from_str(&old).unwrap();
        assert_eq!((old.filter, old.view, old.pin_seconds), (None, None, None));
        assert!(!old.options.noexec && !old.stream);
    }
}
