//! Pulling: from a reference to a complete tree, each byte once.
//!
//! ```text
//! PullRequest ─► resolve ─► manifest ─► config ─► layers, each in single flight ─► tree ─► reference
//!      └─ joins the pull of                        │
//!         the same image in flight                 ├─ here already: nothing to do
//!                                                  └─ skip what is here ─► fetch ─► verify, unpack ─► commit
//! ```
//!
//! # What always holds
//!
//! - **One fetch per digest.** Two images that share a layer wait for the same
//!   download, whoever asked first; across processes a lock file sees to it.
//! - **An image is there or it is not.** Its tree gets its name after every layer
//!   is verified and committed; a failed pull leaves no tree and no reference.
//! - **Verified layers stay** after a failed pull, for the next try.
//!
//! Where bytes come from is [`crate::source`]; what a layer becomes, `layer`.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

use crate::digest::Digest;
use crate::manifest::ManifestError;
pub use crate::manifest::Platform;
use crate::reference::Reference;
use crate::runtime::Runtime;
use crate::source::{PullSecret, SourceError, Sources};
use crate::store::{PinRequest, Sizes, Store, StoreError, StoredImage};

mod access;
mod arrive;
mod board;
mod fetch;
mod flight;
mod holders;
mod layers;
mod meter;
mod pace;
mod plan;
mod run;
mod skip;
mod slots;
mod stream;
mod toc;
mod verify;

pub use access::{AccessCheck, RegistryAway};
use board::{Board, Entry};
use fetch::Fetcher;
use flight::{Flight, Flights};
pub use holders::{Cancel, Holder, NeededBy};
pub use pace::Bandwidth;
pub use plan::{Plan, PlannedImage};
pub use slots::Priority;
use slots::Slots;
pub use stream::{Arriving, ArrivingFile, NotComing};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use toc::read_table;
pub use verify::{Damage, Outcome, VerifyOptions, VerifyReport};

/// Layers that are listed at the same time: each is a request after the other.
const LOOKS: usize = 8;

/// Limits of a [`Puller`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PullOptions {
    /// Layers on their way at the same time, over all pulls; as many again where some are waited for
    /// and some are prefetched.
    pub concurrent_layers: usize,
    /// Ranged requests at the same time within one layer.
    pub connections_per_layer: usize,
    /// Bytes fetched and not yet unpacked, over all pulls; at least 16 MiB.
    pub window_bytes: u64,
    /// Attempts for each request while nothing comes, the first included.
    pub attempts: u32,
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            concurrent_layers: 2,
            connections_per_layer: 4,
            window_bytes: 48 * 1024 * 1024,
            attempts: 5,
        }
    }
}

/// What to pull.
#[derive(Clone)]
pub struct PullRequest {
    /// The image.
    pub reference: Reference,
    /// Credentials that go before docker's own configuration.
    pub secret: PullSecret,
    /// When to ask the source.
    pub policy: PullPolicy,
    /// Which image of an index.
    pub platform: Platform,
    /// Whether an image that is here is given only to who may have it of its registry.
    /// Absent: to everybody.
    pub access: Option<AccessCheck>,
    /// Who goes first. A pull in flight that a more urgent request joins becomes as urgent.
    pub priority: Priority,
    /// Pins the image before anything could evict it.
    pub pin: Option<PinRequest>,
    /// Whether the image is to be read while it arrives: see [`PullHandle::arriving`].
    pub stream: bool,
    /// Who asks. Pulls that differ in nothing else are one.
    pub holder: Holder,
}

impl PullRequest {
    /// The image for this machine, when it is not here yet, without credentials of its own,
    /// asked for by somebody who may have any image, and waits for it.
    pub fn new(reference: Reference) -> Self {
        Self {
            reference,
            secret: PullSecret::none(),
            policy: PullPolicy::default(),
            platform: Platform::default(),
            access: None,
            priority: Priority::Demand,
            pin: None,
            stream: false,
            holder: Holder::Command,
        }
    }
}

/// When the source is asked, in Kubernetes' words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum PullPolicy {
    /// Only when the reference is not known here.
    #[default]
    IfNotPresent,
    /// Each time; what the tag points to now counts. Bytes are fetched only when they are new.
    Always,
    /// Not at all: what is here, or an error.
    Never,
}

/// Where a pull stands.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PullProgress {
    /// As it was asked for.
    pub reference: Reference,
    /// The image manifest, once it is known.
    pub digest: Option<Digest>,
    /// The stage.
    pub state: PullState,
    /// Of the most urgent who asked for it.
    pub priority: Priority,
    /// Bytes of layers that arrived or were here already, as they travel.
    pub done_bytes: u64,
    /// Of these, bytes that came from the source since the pull began.
    pub fetched_bytes: u64,
    /// Bytes of all layers as they travel; 0 while unknown.
    pub total_bytes: u64,
    /// When it was asked for.
    pub started_at: SystemTime,
    /// Average of the last ten seconds or so.
    pub bytes_per_second: f64,
}

impl PullProgress {
    /// Time until the last byte is here at the present rate; `None` while that cannot be told.
    pub fn eta(&self) -> Option<Duration> {
        let left = self.total_bytes.checked_sub(self.done_bytes)?;
        match &self.state {
            PullState::Done => Some(Duration::ZERO),
            PullState::Pulling | PullState::Finishing if self.total_bytes > 0 => {
                if left == 0 {
                    return Some(Duration::ZERO);
                }
                (self.bytes_per_second >= 1.0)
                    .then(|| left as f64 / self.bytes_per_second)
                    .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            }
            _ => None,
        }
    }
}

/// The stages of a pull.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PullState {
    /// Asking the source what the reference means.
    Resolving,
    /// Layers are on their way.
    Pulling,
    /// All layers are here; the tree is being made.
    Finishing,
    /// Complete.
    Done,
    /// Over without success.
    Failed {
        /// See [`PullError::reason`].
        reason: &'static str,
        /// What went wrong, and what to do.
        message: String,
    },
}

/// A pull that succeeded.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// The image manifest.
    pub digest: Digest,
    /// What the store has of it, its `references` left empty.
    pub image: StoredImage,
    /// Bytes of layers that came from the source for this pull.
    pub fetched_bytes: u64,
    /// Bytes of content written to the disk for it.
    pub written_bytes: u64,
    /// Nothing had to be fetched.
    pub already_present: bool,
}

/// Why a pull failed. The variants are what a caller does next.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PullError {
    /// The source did not serve; see [`SourceError`].
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It served other bytes than the digest names. The same source will not do better.
    #[error("{0}")]
    Mismatch(String),
    /// An image that cannot be made into files here: its media type or platform.
    #[error(transparent)]
    Unsupported(#[from] ManifestError),
    /// A layer that must not or cannot be unpacked.
    #[error("{0}")]
    Unpack(String),
    /// The store's disk.
    #[error(transparent)]
    Store(Arc<StoreError>),
    /// [`PullPolicy::Never`], and it is not here.
    #[error("{0}")]
    NotStored(String),
    /// The puller was shut down, or nobody waited any more.
    #[error("{0}")]
    Cancelled(String),
}

impl PullError {
    /// One word for metrics and for programs: a small, fixed set.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Source(SourceError::NotFound(_)) => "not_found",
            Self::Source(SourceError::Denied(_)) => "denied",
            Self::Source(SourceError::Throttled { .. }) => "throttled",
            Self::Source(SourceError::Unavailable(_)) => "unavailable",
            Self::Source(SourceError::Invalid(_)) => "invalid",
            Self::Mismatch(_) => "mismatch",
            Self::Unsupported(_) => "unsupported",
            Self::Unpack(_) => "refused",
            Self::Store(error) => match **error {
                StoreError::NoSpace { .. } => "no_space",
                _ => "store",
            },
            Self::NotStored(_) => "not_stored",
            Self::Cancelled(_) => "cancelled",
        }
    }
}

impl From<StoreError> for PullError {
    fn from(error: StoreError) -> Self {
        Self::Store(Arc::new(error))
    }
}

/// What a [`Puller`] has brought since it was made, whatever became of it: these figures only grow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes of blobs that came from sources, as they travel; also those that came again, were only looked at,
    /// or repaired something.
    pub fetched_bytes: u64,
    /// Bytes of layers that did not have to come, since the store had the layer, its files, or a part
    /// that an earlier pull had left. Counted when the layer is here.
    pub skipped_bytes: u64,
    /// Pulls that were cancelled, or that nobody waited for any more.
    pub cancelled_pulls: u64,
}

/// Pulls images into a store. Clones share all state.
#[derive(Clone)]
pub struct Puller {
    inner: Arc<Inner>,
}

struct Inner {
    store: Store,
    sources: Sources,
    fetcher: Fetcher,
    attempts: u32,
    images: Flights<ImageKey, Result<Pulled, PullError>, Arc<Entry>>,
    layers: layers::LayerFlights,
    slots: Arc<Slots>,
    /// Layers that are being listed before they are fetched.
    looks: Semaphore,
    /// What the store has by size; held on blocking threads only.
    sizes: Arc<Mutex<Sizes>>,
    board: Board,
    /// Bytes of layers that did not have to be fetched.
    skipped: AtomicU64,
    /// Pulls that ended since nobody wanted them any more.
    cancelled: AtomicU64,
    /// One grant is noted at a time: each adds to what the record says.
    grants: tokio::sync::Mutex<()>,
    /// Joins what runs on blocking threads at shutdown.
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// Pulls are the same when they would do the same with the same rights.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ImageKey {
    reference: Reference,
    platform: Platform,
    policy: PullPolicy,
    secret: PullSecret,
    access: Option<AccessCheck>,
    pin: Option<PinRequest>,
    stream: bool,
}

impl Puller {
    /// A puller with its own limits. Starts nothing yet.
    pub fn new(store: Store, sources: Sources, options: PullOptions) -> Self {
        let fetcher =
            Fetcher::new(options.window_bytes, options.connections_per_layer, options.attempts);
        Self {
            inner: Arc::new(Inner {
                store,
                sources,
                fetcher,
                attempts: options.attempts,
                images: Flights::default(),
                layers: Flights::default(),
                slots: Arc::new(Slots::new(options.concurrent_layers)),
                looks: Semaphore::new(LOOKS),
                sizes: Arc::default(),
                board: Board::default(),
                skipped: AtomicU64::new(0),
                cancelled: AtomicU64::new(0),
                grants: tokio::sync::Mutex::default(),
                tasks: TaskTracker::new(),
                stop: CancellationToken::new(),
            }),
        }
    }

    /// The store that images go to.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// The container runtime that layers are taken from, where there is one.
    pub fn runtime(&self) -> Option<&Runtime> {
        self.inner.sources.runtime()
    }

    /// Joins the same pull in flight, or starts one. Needs a Tokio runtime.
    pub fn start(&self, request: PullRequest) -> PullHandle {
        let key = ImageKey {
            reference: request.reference.clone(),
            platform: request.platform.clone(),
            policy: request.policy,
            secret: request.secret.clone(),
            access: request.access,
            pin: request.pin.clone(),
            stream: request.stream,
        };
        let (inner, priority, holder) = (Arc::clone(&self.inner), request.priority, request.holder);
        let flight = self.inner.images.join(&key, |stop| {
            let entry = inner.board.enter(&request.reference, request.priority);
            // What is logged on its way says which pull it was.
            let span = tracing::info_span!("pull", reference = %request.reference);
            let (inner, shown) = (Arc::clone(&inner), Arc::clone(&entry));
            let work = async move {
                let _tracked = inner.tasks.token();
                let outcome = inner.pull(&request, &shown, &stop).await;
                inner.board.leave(&shown, &outcome);
                outcome
            };
            (entry, work.instrument(span))
        });
        if flight.state.raise(priority) {
            self.inner.slots.dispatch();
        }
        flight.state.holders.enter(holder);
        PullHandle { flight, holder }
    }

    /// Sets what pulling may take of the network, from now on, for pulls in flight, too.
    pub fn set_bandwidth(&self, caps: Bandwidth) {
        self.inner.fetcher.pace.set(caps);
    }

    /// What pulling may take of the network.
    pub fn bandwidth(&self) -> Bandwidth {
        self.inner.fetcher.pace.caps()
    }

    /// Pulls in flight, and recent failures, in the order in which they were asked for.
    pub fn pulls(&self) -> Vec<PullProgress> {
        self.inner.board.list()
    }

    /// Shows among [`Puller::pulls`], from now on, what another process pulls into this store.
    pub fn show_elsewhere(&self, pulls: Vec<PullProgress>) {
        self.inner.board.set_elsewhere(pulls);
    }

    /// What came, and what did not have to, since the start.
    pub fn traffic(&self) -> Traffic {
        Traffic {
            fetched_bytes: self.inner.fetcher.came(),
            skipped_bytes: self.inner.skipped.load(Ordering::Relaxed),
            cancelled_pulls: self.inner.cancelled.load(Ordering::Relaxed),
        }
    }

    /// Changes its value when a pull starts, passes a stage, or ends; not with each byte.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.board.changes.subscribe()
    }

    /// Stops all pulls where they can be gone on from, and waits until the disk is quiet.
    /// Pulls that are started afterwards fail at once.
    pub async fn shutdown(&self) {
        self.inner.stop.cancel();
        self.inner.images.stop_all();
        self.inner.layers.stop_all();
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }
}

/// One caller's hold on a pull. When the last handle is dropped the pull stops; what came so far
/// stays for the next one.
pub struct PullHandle {
    flight: Flight<ImageKey, Result<Pulled, PullError>, Arc<Entry>>,
    holder: Holder,
}

impl PullHandle {
    /// Where the pull stands now.
    pub fn progress(&self) -> PullProgress {
        self.flight.state.progress()
    }

    /// Waits for the end of the pull.
    ///
    /// # Errors
    ///
    /// See [`PullError`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up this wait only; the pull goes on while the handle lives.
    pub async fn wait(&self) -> Result<Pulled, PullError> {
        match self.flight.wait().await {
            Some(result) => result,
            None => Err(PullError::Cancelled(format!(
                "pull {}: ended unexpectedly, see the log",
                self.flight.state.reference
            ))),
        }
    }

    /// Waits until the image can be looked at while it arrives: all names and sizes are known. `None`
    /// where the pull has ended before, since the image was here or the pull failed, and where it was
    /// not asked to [`PullRequest::stream`].
    ///
    /// # Cancel safety
    ///
    /// As [`PullHandle::wait`].
    pub async fn arriving(&self) -> Option<Arc<Arriving>> {
        let mut arriving = self.flight.state.arriving.subscribe();
        tokio::select! {
            biased;
            shown = arriving.wait_for(Option::is_some) => shown.ok()?.clone(),
            _ = self.flight.wait() => None,
        }
    }

    /// Says that somebody else holds it from now on.
    pub fn hand_to(&mut self, holder: Holder) {
        self.flight.state.holders.enter(holder);
        self.flight.state.holders.leave(self.holder);
        self.holder = holder;
    }
}

impl Drop for PullHandle {
    fn drop(&mut self) {
        self.flight.state.holders.leave(self.holder);
    }
}

#[cfg(test)]
#[path = "pull/stream_tests.rs"]
mod stream_tests;
#[cfg(test)]
#[path = "pull/tests.rs"]
mod tests;
