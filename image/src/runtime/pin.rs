//! Images that containerd is asked to keep.
//!
//! The kubelet makes room by removing images that no container uses, but for those that CRI calls pinned.
//! containerd calls an image so (since 1.7) when a name of it has a certain label. Beside that one stands
//! a label of ours: what somebody else has pinned is never unpinned here.

use std::collections::{BTreeSet, HashMap};

use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::{
    GetImageRequest, Image, ListImagesRequest, UpdateImageRequest,
};
use prost_types::FieldMask;

use super::{CRI_NAMESPACE, Failed, MAX_ANSWER, Namespace, Runtime, ask, within};

/// What CRI looks for, and its value.
const PINNED: (&str, &str) = ("io.cri-containerd.pinned", "pinned");
/// Whose wish it was.
const OURS: (&str, &str) = ("carport.dev/prepull", "pinned");

/// Why containerd did not do as it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuntimeError {
    /// It has nothing of that name.
    #[error("containerd has no such image")]
    NotFound,
    /// It does not answer, or not as it should.
    #[error("containerd: {0}")]
    Away(String),
}

impl From<Failed> for RuntimeError {
    fn from(failed: Failed) -> Self {
        match failed {
            Failed::NotFound => Self::NotFound,
            Failed::Away(why) => Self::Away(why),
        }
    }
}

impl Runtime {
    /// Asks the kubelet to leave the image of this name alone, in CRI's namespace. One that is pinned
    /// already stays as it is.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::NotFound`] where there is no such name.
    ///
    /// # Cancel safety
    ///
    /// It is pinned, or not.
    pub async fn pin(&self, name: &str) -> Result<(), RuntimeError> {
        let namespace = cri_namespace()?;
        let mut client = ImagesClient::new(self.channel());
        let request = within(&namespace, GetImageRequest { name: name.to_owned() });
        let image = ask(client.get(request)).await?.image;
        let image = image.filter(|image| image.target.is_some()).ok_or(RuntimeError::NotFound)?;
        if image.labels.contains_key(PINNED.0) {
            return Ok(());
        }
        let labels = [PINNED, OURS].map(|(key, value)| (key.to_owned(), value.to_owned()));
        self.label(&namespace, Image { labels: labels.into(), ..image }).await
    }

    /// Takes away the pins that were set here, but for those of the names in `wanted`; how many.
    ///
    /// # Errors
    ///
    /// [`RuntimeError::Away`]; some may be gone.
    ///
    /// # Cancel safety
    ///
    /// Some are gone, or none.
    pub async fn unpin_all_but(&self, wanted: &BTreeSet<String>) -> Result<usize, RuntimeError> {
        let namespace = cri_namespace()?;
        let mut client = ImagesClient::new(self.channel()).max_decoding_message_size(MAX_ANSWER);
        let filters = vec![format!("labels.\"{}\"=={}", OURS.0, OURS.1)];
        let request = within(&namespace, ListImagesRequest { filters });
        let ours = ask(client.list(request)).await?.images;
        let mut unpinned = 0;
        let gone = |image: &Image| !wanted.contains(&image.name) && image.target.is_some();
        for image in ours.into_iter().filter(gone) {
            match self.label(&namespace, Image { labels: HashMap::new(), ..image }).await {
                Ok(()) => unpinned += 1,
                // Removed at this moment.
                Err(RuntimeError::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(unpinned)
    }

    /// Gives the two labels the values that they have in `image`; one that is missing goes. The rest of it
    /// must be as containerd told it: 1.7 and later crash on an image without a target, whatever the mask says.
    async fn label(&self, namespace: &Namespace, image: Image) -> Result<(), RuntimeError> {
        let paths = [PINNED, OURS].map(|(key, _)| format!("labels.{key}")).into();
        let request = UpdateImageRequest {
            image: Some(image),
            update_mask: Some(FieldMask { paths }),
            ..UpdateImageRequest::default()
        };
        let mut client = ImagesClient::new(self.channel());
        ask(client.update(within(namespace, request))).await?;
        Ok(())
    }
}

/// The namespace in which CRI's images are, whichever others are looked into.
pub(super) fn cri_namespace() -> Result<Namespace, Failed> {
    let unnamed = || Failed::Away(format!("{CRI_NAMESPACE} is no namespace"));
    Namespace::parse(CRI_NAMESPACE).ok_or_else(unnamed)
}
