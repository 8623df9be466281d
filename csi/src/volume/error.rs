//! Why a volume could not be published or looked at.

use std::sync::Arc;
use std::time::Duration;

use carport_image::PullError;
use carport_image::pull::PullProgress;
use carport_image::store::StoreError;

use super::progress;
use crate::mount::MountError;

/// Why [`Volumes::publish`](super::Volumes::publish) did not.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// Something that is not ours is at the target.
    #[error("target {target}: {what} is there already; remove it, or publish elsewhere")]
    Occupied {
        /// The path.
        target: String,
        /// What it is.
        what: &'static str,
    },
    /// This volume is at the target already, and shows something else.
    #[error(
        "target {target}: volume {volume} is published there with image {image} and other \
         attributes; unpublish it first"
    )]
    Incompatible {
        /// The path.
        target: String,
        /// The volume.
        volume: String,
        /// What it shows now.
        image: String,
    },
    /// The image is an OCI layout in a folder that volumes may not take images from.
    #[error("volume attribute image: the folder {folder} {why}")]
    LayoutRefused {
        /// The layout's folder.
        folder: String,
        /// What is wrong with it, and what to do.
        why: &'static str,
    },
    /// It asks for a pin that volumes may not have on this node.
    #[error("volume attribute pin: {0}")]
    PinRefused(String),
    /// The mount would stay in the agent's mount namespace.
    #[error(
        "target {target}: the pod would find an empty folder, since mounts that the agent makes below \
         {mount} stay in its own mount namespace; in Kubernetes set mountPropagation: Bidirectional at \
         the agent's volume mount of the kubelet's folder pods, on the host run mount --make-rshared {mount}"
    )]
    NotSeen {
        /// The path.
        target: String,
        /// The mount that it is on, which is not shared.
        mount: String,
    },
    /// This node cannot mount images at all.
    #[error("this node cannot mount images: {0}")]
    CannotMount(Arc<str>),
    /// Neither `include` nor `exclude` leaves a file.
    #[error("volume attributes include and exclude: they leave no file of image {0}")]
    NothingShown(String),
    /// The image did not come.
    #[error(transparent)]
    Pull(PullError),
    /// The image did not come to where it is read while it arrives.
    #[error("{message}")]
    NotArriving {
        /// As [`PullError::reason`].
        reason: String,
        /// What went wrong, and what to do.
        message: String,
    },
    /// The deadline came before the image's last byte; the pull goes on.
    #[error("{}; the pull goes on, publish again to wait for it", progress::sentence(.0))]
    StillPulling(Box<PullProgress>),
    /// The deadline came while another call was at work on the target.
    #[error("target {0}: another call is at work on it; try again")]
    Busy(String),
    /// The volume was unpublished while this call waited.
    #[error("target {0}: unpublished while the publish was waiting")]
    Withdrawn(String),
    /// The agent stops.
    #[error("the agent is stopping; publish again when it is back")]
    Stopping,
    /// The tree cannot be mounted at the target.
    #[error(transparent)]
    Mount(MountError),
    /// The record of the volume could not be read or written.
    #[error(transparent)]
    Store(Arc<StoreError>),
    /// It failed, and what was done so far could not be undone: an unpublish must follow.
    #[error("{error}; and undoing it: {undo}")]
    Unclean {
        /// Why it failed.
        error: Box<PublishError>,
        /// Why it could not be undone.
        undo: String,
    },
}

impl From<StoreError> for PublishError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

impl From<MountError> for PublishError {
    fn from(error: MountError) -> Self {
        Self::Mount(error)
    }
}

impl From<PullError> for PublishError {
    fn from(error: PullError) -> Self {
        Self::Pull(error)
    }
}

/// Why [`Volumes::unpublish`](super::Volumes::unpublish) did not.
#[derive(Debug, thiserror::Error)]
pub enum UnpublishError {
    /// The deadline came while another call was at work on the target.
    #[error("target {0}: another call is at work on it; try again")]
    Busy(String),
    /// The kernel would not take the mount away.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The record could not be removed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Why [`Volumes::stats`](super::Volumes::stats) has no answer.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// No such volume is published there.
    #[error("volume {volume}: not published at {target}")]
    NotFound {
        /// The volume.
        volume: String,
        /// The path asked about.
        target: String,
    },
    /// The record could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The disk with the records says nothing.
    #[error("the volumes' records: the store's disk did not answer for {} s", .0.as_secs())]
    Hung(Duration),
}
