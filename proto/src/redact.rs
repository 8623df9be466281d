//! `Debug` for messages that carry what must not be printed.
//!
//! Their derive is switched off in `build.rs`, so that neither a log line nor a
//! failed assertion can print a secret, a pod's token or a mount option.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use crate::cri::v1::AuthConfig;
use crate::csi::v1::NodePublishVolumeRequest;
use crate::csi::v1::volume_capability::MountVolume;

/// Prints the keys of a map, and nothing of its values.
struct Keys<'a>(&'a HashMap<String, String>);

impl fmt::Debug for Keys<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sorted: BTreeSet<&String> = self.0.keys().collect();
        f.debug_set().entries(sorted).finish()
    }
}

impl fmt::Debug for NodePublishVolumeRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NodePublishVolumeRequest")
            .field("volume_id", &self.volume_id)
            .field("publish_context", &Keys(&self.publish_context))
            .field("staging_target_path", &self.staging_target_path)
            .field("target_path", &self.target_path)
            .field("volume_capability", &self.volume_capability)
            .field("readonly", &self.readonly)
            .field("secrets", &Keys(&self.secrets))
            .field("volume_context", &Keys(&self.volume_context))
            .finish()
    }
}

impl fmt::Debug for MountVolume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MountVolume")
            .field("fs_type", &self.fs_type)
            .field("mount_flags", &format_args!("[{} not shown]", self.mount_flags.len()))
            .field("volume_mount_group", &self.volume_mount_group)
            .finish()
    }
}

impl fmt::Debug for AuthConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self { registry_token, .. } if !registry_token.is_empty() => "a registry token",
            Self { identity_token, .. } if !identity_token.is_empty() => "an identity token",
            Self { username, .. } if !username.is_empty() => "a password",
            _ => "nothing",
        };
        write!(f, "AuthConfig({kind})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csi::v1::{VolumeCapability, volume_capability};

    #[test]
    fn printing_a_login_shows_its_kind_alone() {
        let secret = || "hunter2".to_owned();
        let password =
            AuthConfig { username: secret(), password: secret(), ..AuthConfig::default() };
        let identity = AuthConfig { identity_token: secret(), ..AuthConfig::default() };
        let token = AuthConfig { registry_token: secret(), ..AuthConfig::default() };
        let shown = [password, identity, token].map(|login| format!("{login:?}"));
        let kinds = ["a password", "an identity token", "a registry token"];
        assert_eq!(shown, kinds.map(|kind| format!("AuthConfig({kind})")));
    }

    #[test]
    fn printing_a_publish_request_shows_keys_and_no_value() {
        let map = |key: &str| HashMap::from([(key.to_owned(), "hunter2".to_owned())]);
        let request = NodePublishVolumeRequest {
            volume_id: "csi-1".to_owned(),
            target_path: "/target".to_owned(),
            publish_context: map("context-key"),
            secrets: map("secret-key"),
            volume_context: map("csi.storage.k8s.io/serviceAccount.tokens"),
            volume_capability: Some(VolumeCapability {
                access_type: Some(volume_capability::AccessType::Mount(MountVolume {
                    mount_flags: vec!["password=hunter2".to_owned()],
                    ..MountVolume::default()
                })),
                access_mode: None,
            }),
            ..NodePublishVolumeRequest::default()
        };
        for text in [format!("{request:?}"), format!("{request:#?}")] {
            assert!(!text.contains("hunter2"), "{text}");
            for shown in ["csi-1", "/target", "context-key", "secret-key", "serviceAccount.tokens"]
            {
                assert!(text.contains(shown), "{shown} is not in {text}");
            }
        }
    }
}
