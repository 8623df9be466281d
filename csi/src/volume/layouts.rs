//! Which folders of the node volumes may take images from.
//!
//! Whoever may create a pod names its image, and the agent reads as root: without a list
//! it would show them any OCI layout that lies on the node.

use std::path::{Component, Path, PathBuf};

use carport_image::Reference;

use super::PublishError;

/// Folders below which a volume's image may be an OCI layout. None, where not said otherwise.
///
/// Paths are compared as they are written; links below a folder are followed, so only
/// administrators should be able to write there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LayoutFolders(Vec<PathBuf>);

impl LayoutFolders {
    /// Allows layouts in and below `folders`, which are absolute.
    pub fn new(folders: impl IntoIterator<Item = impl Into<PathBuf>>) -> Self {
        Self(folders.into_iter().map(Into::into).collect())
    }

    /// Refuses an image that is a layout anywhere else. Registries are not looked at.
    pub(super) fn check(&self, image: &Reference) -> Result<(), PublishError> {
        let Reference::Layout(layout) = image else { return Ok(()) };
        let path = layout.path();
        let why = if !is_plain_absolute(path) {
            "must be written from / and without `..`"
        } else if !self.0.iter().any(|folder| path.starts_with(folder)) {
            "lies in none of csi.layoutFolders of the agent's configuration; name an image in a \
             registry, or have an administrator add the folder"
        } else {
            return Ok(());
        };
        Err(PublishError::LayoutRefused { folder: path.display().to_string(), why })
    }
}

/// Written from the root, with nothing that climbs.
fn is_plain_absolute(path: &Path) -> bool {
    path.is_absolute() && !path.components().any(|part| part == Component::ParentDir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(folders: &[&str], image: &str) -> bool {
        LayoutFolders::new(folders).check(&image.parse().unwrap()).is_ok()
    }

    #[test]
    fn registries_are_no_folders() {
        assert!(allows(&[], "registry.example/model:v1"));
        assert!(allows(&[], "oci://registry.example/model:v1"));
    }

    #[test]
    fn a_layout_must_lie_in_an_allowed_folder() {
        let folders = ["/srv/models", "/mnt/usb/"];
        for image in [
            "oci:/srv/models:v1",
            "oci:/srv/models/a/b:v1",
            "oci:/mnt/usb//./a",
            "oci-archive:/srv/models/a.tar:v1",
            "docker-archive:/mnt/usb/a.tar:team/a:v1",
        ] {
            assert!(allows(&folders, image), "{image}");
            assert!(!allows(&[], image), "{image}");
        }
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert!(allows(&folders, &format!("oci:/srv/models/a@{digest}")));
        for image in [
            "oci:/etc:v1",
            "oci:/srv:v1",
            "oci:/srv/models2:v1",
            "oci:/srv/models/../secret:v1",
            "oci:/../srv/models/a:v1",
            "oci:./srv/models/a:v1",
            "oci:srv/models/a:v1",
            "oci-archive:/etc/a.tar:v1",
            "docker-archive:/srv/models/../a.tar:team/a:v1",
            "docker-archive:a.tar",
        ] {
            assert!(!allows(&folders, image), "{image}");
        }
    }

    #[test]
    fn the_refusal_names_the_folder_and_the_setting() {
        let why = |image: &str| {
            let error = LayoutFolders::default().check(&image.parse().unwrap()).unwrap_err();
            error.to_string()
        };
        assert_eq!(
            why("oci:/srv/models/a:v1"),
            "volume attribute image: the folder /srv/models/a lies in none of csi.layoutFolders of \
             the agent's configuration; name an image in a registry, or have an administrator add \
             the folder"
        );
        assert_eq!(
            why("oci:../a:v1"),
            "volume attribute image: the folder ../a must be written from / and without `..`"
        );
    }
}
