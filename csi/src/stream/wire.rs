//! What the agent and the process with the sessions say to each other: a JSON object a line.
//!
//! ```text
//! agent ──► {"open": …}              one connection each; closed once the volume is recorded
//!       ◄── {"arriving": …} | {"complete": …} | {"failed": …}
//! agent ──► "watch"                  ◄── a Report a line, whenever something changed
//! agent ──► {"end": <number>}        ◄── "ended"
//! ```
//!
//! The two may be of different versions, after an update of the one: fields are only ever added,
//! and those that are not known are ignored.

use std::path::PathBuf;
use std::time::SystemTime;

use carport_image::pull::{
    AccessCheck, Holder, Priority, PullError, PullPolicy, PullProgress, PullRequest, PullState,
};
use carport_image::source::{PullSecret, SourceError};
use carport_image::{Digest, Reference};
use serde::{Deserialize, Serialize};

use crate::mount::Device;

/// A pull secret is at most 1 MiB, and its text in JSON hardly twice that.
pub(super) const MAX_LINE_BYTES: u64 = 4 * 1024 * 1024;

/// What the agent asks for.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    /// Show an image that is to arrive. Closing the connection before the answer lets the pull go on for
    /// the grace period.
    Open(Open),
    /// Behind an [`Ask::Open`]: nobody wants it any more.
    GiveUp,
    /// Tell how everything is, from now on.
    Watch,
    /// End the session of this number.
    End(u64),
}

/// An image to show while it arrives. Not `Debug`: it has credentials.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Open {
    pub(crate) image: Reference,
    pub(crate) policy: PullPolicy,
    pub(crate) access: Option<AccessCheck>,
    /// See [`PullSecret::hand_over`].
    secret: String,
}

impl Open {
    pub(crate) fn new(
        image: Reference,
        policy: PullPolicy,
        access: Option<AccessCheck>,
        secret: &PullSecret,
    ) -> Self {
        Self { image, policy, access, secret: secret.hand_over() }
    }

    pub(super) fn request(self) -> Result<PullRequest, SourceError> {
        Ok(PullRequest {
            secret: PullSecret::taken_over(&self.secret)?,
            policy: self.policy,
            access: self.access,
            stream: true,
            holder: Holder::Pod,
            ..PullRequest::new(self.image)
        })
    }
}

/// What becomes of an [`Open`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    /// It can be read.
    Arriving(Shown),
    /// All of it is in the store.
    Complete,
    /// It cannot be pulled.
    Failed(Failure),
    /// It cannot be shown; it can be waited for.
    Unshown(String),
}

/// An image that can be read while it arrives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shown {
    pub(crate) number: u64,
    pub(crate) digest: Digest,
    /// Where it is mounted.
    pub(crate) mount: PathBuf,
    /// The number of this mount's file system.
    pub(crate) device: Device,
    /// Sum of its files' sizes.
    pub(crate) bytes: u64,
    pub(crate) files: u64,
    /// Layers that had to be complete before.
    pub(crate) waited_for: usize,
}

/// Why a pull ended without success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// See [`PullError::reason`].
    pub(crate) reason: String,
    pub(crate) message: String,
}

impl From<PullError> for Failure {
    fn from(error: PullError) -> Self {
        Self { reason: error.reason().to_owned(), message: error.to_string() }
    }
}

/// How everything is.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) pid: u32,
    pub(super) sessions: Vec<Session>,
    pub(super) pulls: Vec<Pull>,
}

/// A session that serves a mount.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Session {
    pub(crate) shown: Shown,
    pub(crate) image: Reference,
    pub(crate) state: State,
    /// Volumes can be made of it: it has not been told to end.
    pub(crate) open: bool,
}

/// How far the image of a session is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    Arriving,
    Complete,
    Failed(Failure),
}

/// A pull under way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Pull {
    image: Reference,
    digest: Option<Digest>,
    stage: Stage,
    done_bytes: u64,
    fetched_bytes: u64,
    total_bytes: u64,
    started_at: SystemTime,
    bytes_per_second: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Stage {
    Resolving,
    Pulling,
    Finishing,
}

impl Pull {
    /// `None` for one that is over.
    pub(super) fn of(pull: PullProgress) -> Option<Self> {
        let stage = match pull.state {
            PullState::Resolving => Stage::Resolving,
            PullState::Pulling => Stage::Pulling,
            PullState::Finishing => Stage::Finishing,
            PullState::Done | PullState::Failed { .. } => return None,
        };
        Some(Self {
            image: pull.reference,
            digest: pull.digest,
            stage,
            done_bytes: pull.done_bytes,
            fetched_bytes: pull.fetched_bytes,
            total_bytes: pull.total_bytes,
            started_at: pull.started_at,
            bytes_per_second: pull.bytes_per_second,
        })
    }

    pub(super) fn progress(self) -> PullProgress {
        PullProgress {
            reference: self.image,
            digest: self.digest,
            state: match self.stage {
                Stage::Resolving => PullState::Resolving,
                Stage::Pulling => PullState::Pulling,
                Stage::Finishing => PullState::Finishing,
            },
            // A pod waits for each.
            priority: Priority::Demand,
            done_bytes: self.done_bytes,
            fetched_bytes: self.fetched_bytes,
            total_bytes: self.total_bytes,
            started_at: self.started_at,
            bytes_per_second: self.bytes_per_second,
        }
    }
}
