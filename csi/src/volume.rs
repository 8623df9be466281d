//! Volumes: images of the store, shown at paths by name.
//!
//! In come a volume's id, a target path and attributes; out goes a read-only mount
//! there, with a record of it in the store, or an error and nothing left behind.
//!
//! ```text
//! publish ──► wait for the turn ──► wait for the pull ──► record ─► mount     one turn a target
//!                  ▲                     ▲
//!    unpublish ────┴──── is heard by ────┘     then: unmount ─► remove target ─► drop record
//! ```
//!
//! # What always holds
//!
//! - **Idempotent.** Publish and unpublish may come in any order, any number of times, over
//!   an absent, an empty, a mounted or a dead target. Mounts are never stacked, and a path
//!   with something else on it is never touched.
//! - **Records first.** A volume's record is on disk before its mount is made and until it is
//!   gone; while it is there the store keeps the image.
//! - **Unpublish needs a name only**: no image, no registry, no pull.
//! - **A secret's image is a secret.** With an [`AccessCheck`], what was pulled with one pod's
//!   credentials is mounted for another only after the registry has accepted that pod's own.
//! - **A caller who goes away breaks nothing**: what was begun on a target is ended, and a
//!   pull that was waited for goes on until the kubelet has had time to ask again, or the volume is
//!   unpublished.
//! - **A slow pull says so early**: the first publish of a target is answered after [`FIRST_ANSWER`] with how
//!   far the pull is, which the kubelet shows as an event of the pod. Later ones wait until their deadline.
//!
//! The gRPC side of it is [`crate::driver`]; mounts are [`crate::mount`].

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carport_image::pull::{AccessCheck, PullRequest};
use carport_image::source::PullSecret;
use carport_image::store::StoreError;
use carport_image::{Digest, Puller};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

mod attributes;
#[cfg(test)]
mod crash_tests;
mod disk;
mod error;
mod filter;
mod kept;
mod layouts;
mod progress;
mod record;
mod streaming;
mod targets;
mod tend;
#[cfg(test)]
mod tests;

pub use attributes::{InvalidRequest, Mode, PodInfo, TargetPath, VolumeAttributes, VolumeId};
pub use error::{PublishError, StatsError, UnpublishError};
pub use filter::Filter;
pub use layouts::LayoutFolders;
pub use record::VolumeRecord;

use crate::mount::{Mounter, Viewer};
use crate::stream::Streams;
use disk::{Disk, Standing, Wanted};
use kept::KeptPulls;
use streaming::Streamed;
use targets::Targets;

/// A mount, or the disk of the records, that does not answer for so long counts as broken: the kubelet asks
/// once a minute for each volume and must never hang on one.
const STATS_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a pull goes on after a publish that waited for it has been answered, where nothing else is
/// configured. The kubelet calls again after 2 min 2 s at most, and a call takes up to 2 min.
pub const PULL_GRACE: Duration = Duration::from_secs(300);

/// When the first publish of a volume is answered at the latest. Most pulls that a person would wonder about
/// take longer; the kubelet calls again after half a second, so that no time is lost.
pub const FIRST_ANSWER: Duration = Duration::from_secs(10);

/// Publishes images as volumes. Clones share all state.
#[derive(Clone)]
pub struct Volumes {
    inner: Arc<Inner>,
    access: Option<AccessCheck>,
    max_pin: Duration,
    pull_grace: Duration,
    first_answer: Duration,
    streams: Option<Streams>,
    cannot_mount: Option<Arc<str>>,
}

struct Inner {
    puller: Puller,
    disk: Disk,
    layouts: LayoutFolders,
    targets: Targets,
    kept: KeptPulls,
    stop: CancellationToken,
    changes: watch::Sender<u64>,
    /// Held shared while a session's volume is made, and alone while sessions without volumes end.
    making: Arc<tokio::sync::RwLock<()>>,
    /// Moves into the reading of a record for statistics: a disk that hangs holds one thread, however often
    /// the kubelet asks.
    stats_turn: Arc<tokio::sync::Mutex<()>>,
}

/// A volume to publish.
#[derive(Debug, Clone)]
pub struct PublishRequest {
    /// Which volume.
    pub volume_id: VolumeId,
    /// Where. Its parent folder must exist.
    pub target: TargetPath,
    /// What it shows.
    pub attributes: VolumeAttributes,
    /// The pod's own credentials for the registry.
    pub secret: PullSecret,
    /// The process that must see the mount.
    pub viewer: Viewer,
    /// When to answer at the latest, complete or not.
    pub deadline: Instant,
}

/// A volume that is in place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// The image that it shows.
    pub digest: Digest,
    /// It was in place before the call.
    pub already: bool,
}

/// How large a published volume is, and whether it is well.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeStats {
    /// Sum of the image's file sizes.
    pub bytes: u64,
    /// Number of its files.
    pub files: u64,
    /// Whether the mount is there.
    pub condition: Condition,
}

/// Whether a volume can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// It is mounted.
    Normal,
    /// It is not; the text says what to do.
    Abnormal(String),
}

/// What [`Volumes::reconcile`] found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Volumes in place.
    pub mounted: usize,
    /// Volumes without a mount whose pod is still there: the kubelet decides.
    pub waiting: usize,
    /// Volumes with a dead mount.
    pub dead: usize,
    /// Records dropped, since neither mount nor pod is there.
    pub dropped: usize,
    /// Mounts of images that have no record. Left alone.
    pub unknown: usize,
}

/// Why a wait ended early.
enum Interrupted {
    Stopping,
    Withdrawn,
    Deadline,
}

impl Interrupted {
    /// What the caller is told; `late` after the deadline.
    fn error(self, target: &TargetPath, late: PublishError) -> PublishError {
        match self {
            Self::Stopping => PublishError::Stopping,
            Self::Withdrawn => PublishError::Withdrawn(target.to_string()),
            Self::Deadline => late,
        }
    }
}

impl Volumes {
    /// Volumes of the puller's store, of images from registries and from layouts in
    /// `layouts`, each for everybody. Changes nothing; see [`Volumes::reconcile`].
    pub fn new(puller: Puller, mounter: Arc<dyn Mounter>, layouts: LayoutFolders) -> Self {
        let disk = Disk::new(puller.store().clone(), mounter);
        Self {
            inner: Arc::new(Inner {
                puller,
                disk,
                layouts,
                targets: Targets::default(),
                kept: KeptPulls::default(),
                stop: CancellationToken::new(),
                changes: watch::Sender::new(0),
                making: Arc::default(),
                stats_turn: Arc::default(),
            }),
            access: None,
            max_pin: Duration::ZERO,
            pull_grace: PULL_GRACE,
            first_answer: FIRST_ANSWER,
            streams: None,
            cannot_mount: None,
        }
    }

    /// Refuses every publish at once with this reason, before anything is pulled.
    #[must_use]
    pub fn refusing(self, why: &str) -> Self {
        Self { cannot_mount: Some(why.into()), ..self }
    }

    /// Mounts an image that is here already only for who may have it of its registry.
    #[must_use]
    pub fn with_access_check(self, check: AccessCheck) -> Self {
        Self { access: Some(check), ..self }
    }

    /// Lets volumes ask that their image stays for so long after them (`pin`); not at all where
    /// this is never called.
    #[must_use]
    pub fn with_max_pin(self, max_pin: Duration) -> Self {
        Self { max_pin, ..self }
    }

    /// How long a pull goes on that a publish has waited for and no longer does, unless the kubelet asks
    /// again or unpublishes the volume; [`PULL_GRACE`] where this is never called.
    #[must_use]
    pub fn with_pull_grace(self, pull_grace: Duration) -> Self {
        Self { pull_grace, ..self }
    }

    /// When the first publish of a volume is answered at the latest; [`FIRST_ANSWER`] where this is never
    /// called.
    #[must_use]
    pub fn with_first_answer(self, first_answer: Duration) -> Self {
        Self { first_answer, ..self }
    }

    /// Lets volumes stream. Without this, and without [`Volumes::keep_streams`] running, they wait for
    /// all of their image.
    #[must_use]
    pub fn with_streams(self, streams: Streams) -> Self {
        Self { streams: Some(streams), ..self }
    }

    /// Brings the image and mounts it at the target.
    ///
    /// Returns at once when the volume is in place already; joins a pull in flight.
    ///
    /// # Errors
    ///
    /// See [`PublishError`]. After [`PublishError::StillPulling`] the pull goes on.
    /// Nothing of the volume is left at the target or in the records, except after
    /// [`PublishError::Unclean`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the wait; the pull goes on, and a mount that is being
    /// made is made: call again, or unpublish.
    pub async fn publish(&self, request: PublishRequest) -> Result<Published, PublishError> {
        let PublishRequest { volume_id, target, attributes, secret, viewer, deadline } = request;
        let arrived = Instant::now();
        let interrupted = |why: Interrupted, late| why.error(&target, late);

        let place = self.inner.targets.enter(&target);
        let withdrawn = place.withdrawn();
        let turn = self
            .until(deadline, &withdrawn, place.turn())
            .await
            .map_err(|why| interrupted(why, PublishError::Busy(target.to_string())))?;
        let wanted = Wanted { volume_id: volume_id.clone(), target: target.clone(), attributes };

        let (disk, asked) = (self.inner.disk.clone(), wanted.clone());
        // The turn goes along: should the target not answer, it stays taken.
        let check = blocking(move || (disk.check(&asked), turn));
        let (standing, turn) = self
            .until(deadline, &withdrawn, check)
            .await
            .map_err(|why| interrupted(why, PublishError::Busy(target.to_string())))?;
        if let Standing::Published(record) = standing? {
            if let (true, Some(streams)) = (record.stream, &self.streams) {
                // Newer than those that it began with.
                streams.remember(record.digest, secret);
            }
            return Ok(Published { digest: record.digest, already: true });
        }

        if let Err(error) = self.check_request(&wanted, viewer) {
            let disk = self.inner.disk.clone();
            // What another configuration allowed goes, too, unless it is mounted.
            let refuse = move || (disk.after_failure(&wanted, error), turn);
            return Err(blocking(refuse).await.0);
        }

        let mut keeper = self.inner.kept.keeper(&target, withdrawn.clone(), self.pull_grace);
        // The first answer says how far it is; from then on each one spares the kubelet a longer pause.
        let deadline = match keeper.is_first {
            true => deadline.min(arrived + self.first_answer),
            false => deadline,
        };
        let streamed = self.stream(&wanted, &secret, turn, deadline, &withdrawn).await;
        let turn = match streamed {
            Err(error @ PublishError::StillPulling(_)) => return Err(error),
            Err(error) => {
                keeper.finish();
                return Err(error);
            }
            Ok(Streamed::Published(digest)) => {
                keeper.finish();
                self.changed();
                return Ok(Published { digest, already: false });
            }
            Ok(Streamed::Wait(turn)) => turn,
        };

        let asked = self.pull_request(&wanted.attributes, secret);
        let pull = keeper.start(&self.inner.puller, asked);
        let result = match self.until(deadline, &withdrawn, pull.wait()).await {
            Ok(result) => result.map_err(PublishError::Pull),
            Err(why) => {
                let late = PublishError::StillPulling(Box::new(pull.progress()));
                return Err(interrupted(why, late));
            }
        };
        keeper.finish();

        let disk = self.inner.disk.clone();
        let digest = blocking(move || {
            // Held to the end, also when the caller is gone.
            let _turn = turn;
            let pulled = result.map_err(|error| disk.after_failure(&wanted, error))?;
            disk.commit(&wanted, &pulled).map(|()| pulled.digest)
        })
        .await?;
        self.changed();
        Ok(Published { digest, already: false })
    }

    /// Takes a volume away, and says what it was; a publish of the same target that waits
    /// gives up.
    ///
    /// An unknown volume and an absent target are fine. A target with another volume on it,
    /// or with content of somebody else, is left alone.
    ///
    /// # Errors
    ///
    /// See [`UnpublishError`]; call again.
    ///
    /// # Cancel safety
    ///
    /// What was begun is ended.
    pub async fn unpublish(
        &self,
        volume_id: &VolumeId,
        target: &TargetPath,
        deadline: Instant,
    ) -> Result<Option<VolumeRecord>, UnpublishError> {
        self.inner.targets.withdraw(target);
        self.inner.kept.forget(target);
        let turn = self.inner.targets.enter(target).turn();
        let (disk, id, path) = (self.inner.disk.clone(), volume_id.clone(), target.clone());
        let work = async {
            let turn = turn.await;
            blocking(move || {
                let _turn = turn;
                disk.take_away(&id, &path)
            })
            .await
        };
        let record = tokio::time::timeout_at(deadline, work)
            .await
            .map_err(|_| UnpublishError::Busy(target.to_string()))??;
        self.changed();
        Ok(record)
    }

    /// How large a published volume is, and whether it is well. Never waits for long.
    ///
    /// # Errors
    ///
    /// [`StatsError::NotFound`] when this volume is not published at this target;
    /// [`StatsError::Hung`] when the store's disk does not answer.
    pub async fn stats(
        &self,
        volume_id: &VolumeId,
        target: &TargetPath,
    ) -> Result<VolumeStats, StatsError> {
        let (disk, id, path) = (self.inner.disk.clone(), volume_id.clone(), target.clone());
        let looked = async {
            let turn = Arc::clone(&self.inner.stats_turn).lock_owned().await;
            blocking(move || {
                let _turn = turn;
                disk.published(&id, &path)
            })
            .await
        };
        let record = tokio::time::timeout(STATS_TIMEOUT, looked)
            .await
            .unwrap_or_else(|_| Err(StatsError::Hung(STATS_TIMEOUT)))?;
        let (disk, path, stream) = (self.inner.disk.clone(), target.clone(), record.stream);
        if stream && let Some(condition) = self.session_condition(&record.digest) {
            return Ok(VolumeStats { bytes: record.bytes, files: record.files, condition });
        }
        let condition = blocking(move || match stream {
            true => disk.streaming_condition(&path),
            false => disk.condition(&path),
        });
        let condition = tokio::time::timeout(STATS_TIMEOUT, condition).await.unwrap_or_else(|_| {
            let seconds = STATS_TIMEOUT.as_secs();
            Condition::Abnormal(format!("the mount at {target} did not answer for {seconds} s"))
        });
        Ok(VolumeStats { bytes: record.bytes, files: record.files, condition })
    }

    /// The published volumes. Reads the disk.
    ///
    /// # Errors
    ///
    /// When the records cannot be read.
    pub async fn list(&self) -> Result<Vec<VolumeRecord>, StoreError> {
        let disk = self.inner.disk.clone();
        blocking(move || disk.list()).await
    }

    /// Changes its value whenever a volume may have been published or taken away.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// Compares the records with the mounts, as a start must: the agent may have been
    /// killed, the node rebooted. `pods` is where the kubelet keeps the folders of pods.
    ///
    /// # Errors
    ///
    /// When the records cannot be read.
    pub async fn reconcile(&self, pods: &Path) -> Result<Reconciled, StoreError> {
        let (disk, pods): (Disk, PathBuf) = (self.inner.disk.clone(), pods.to_owned());
        let outcome = blocking(move || disk.reconcile(&pods)).await?;
        self.changed();
        Ok(outcome)
    }

    /// Ends every wait with [`PublishError::Stopping`], now and from now on. Mounts stay.
    pub fn stop(&self) {
        self.inner.stop.cancel();
    }

    /// What can be refused before anything is pulled.
    fn check_request(&self, wanted: &Wanted, viewer: Viewer) -> Result<(), PublishError> {
        if let Some(why) = &self.cannot_mount {
            return Err(PublishError::CannotMount(Arc::clone(why)));
        }
        self.inner.disk.check_reach(&wanted.target, viewer)?;
        self.inner.layouts.check(&wanted.attributes.image)?;
        self.check_pin(&wanted.attributes)
    }

    fn check_pin(&self, attributes: &VolumeAttributes) -> Result<(), PublishError> {
        match attributes.pin {
            Some(_) if self.max_pin.is_zero() => Err(PublishError::PinRefused(
                "volumes may not pin images on this node (csi.maxPin); leave it out".to_owned(),
            )),
            Some(time) if time > self.max_pin => Err(PublishError::PinRefused(format!(
                "{} is more than the {} that volumes may pin an image for on this node \
                 (csi.maxPin)",
                humantime::format_duration(time),
                humantime::format_duration(self.max_pin),
            ))),
            _ => Ok(()),
        }
    }

    fn pull_request(&self, attributes: &VolumeAttributes, secret: PullSecret) -> PullRequest {
        PullRequest {
            policy: attributes.pull_policy,
            secret,
            access: self.access,
            ..PullRequest::new(attributes.image.clone())
        }
    }

    async fn until<T>(
        &self,
        deadline: Instant,
        withdrawn: &CancellationToken,
        work: impl Future<Output = T>,
    ) -> Result<T, Interrupted> {
        tokio::select! {
            // What is ready counts, even at the last moment.
            biased;
            done = work => Ok(done),
            () = withdrawn.cancelled() => Err(Interrupted::Withdrawn),
            () = self.inner.stop.cancelled() => Err(Interrupted::Stopping),
            () = tokio::time::sleep_until(deadline) => Err(Interrupted::Deadline),
        }
    }

    fn changed(&self) {
        self.inner.changes.send_modify(|count| *count = count.wrapping_add(1));
    }
}

/// Runs `work` where it may block. A panic of it goes on here.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is being taken down, and this future with it.
            Err(_) => std::future::pending().await,
        },
    }
}
