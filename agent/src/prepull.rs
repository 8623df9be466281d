//! Pre-pull by declaration: what a list names is brought to the node.
//!
//! ```text
//! list, labels ─► List ─► Plan ─► tries, a few at a time ─┬─► Puller ─► pin, warm
//!   ▲ directory watch,     ▲                              └─► IntoRuntime: CRI ─► pin
//!     a look a minute      └── how each ended, clocks, GPUs ◄─┘ ─► Report ─► node's state, metrics
//! ```
//!
//! The list is a YAML file, mostly a mounted ConfigMap; `docs/prepull.md` describes it. How it is
//! read is in [`list`]; when an entry may be pulled in [`schedule`] and [`when`]; what comes next in
//! `plan`; how an image comes into the container runtime in `into_runtime`.
//!
//! # What always holds
//!
//! - **A bad list changes nothing.** The last good one stays in force; log, metrics and the
//!   node's reasons say so.
//! - **The directory is watched, not the file**: a ConfigMap changes by the swap of a `..data` link,
//!   in which the file itself is never written. Contents are compared; a list that
//!   reads the same is no event.
//! - **What leaves the list stops being pulled** and loses its pin. What a volume shows stays.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carport_image::pull::{Bandwidth, Holder, Priority, PullPolicy, PullRequest, Pulled};
use carport_image::{Digest, Puller, Reference, Runtime, Store};
use jiff::Timestamp;
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::load::read;
use crate::config::{ConfigError, Rate};
use crate::gpu::GpuInventory;
use crate::metrics::Metrics;
use crate::state::NodeState;
use crate::warm::Warmer;

mod into_runtime;
pub mod list;
mod pins;
mod plan;
pub mod schedule;
pub mod when;

pub use into_runtime::IntoRuntime;
pub use list::{Entry, List, Target};
use plan::{Ended, Node, Plan, Start};
use when::Labels;

/// The file is looked at after so long, whatever the watch says.
const SAFETY_NET: Duration = Duration::from_secs(60);
/// The same where the directory cannot be watched: the kernel gives out a limited number of watches.
const UNWATCHED: Duration = Duration::from_secs(5);
/// A swap is several events; they are answered by one look.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// Windows open and shut by the wall clock, which may jump: it is looked at so often.
const WALL_CLOCK: Duration = Duration::from_secs(15);
/// How often the progress of the container runtime's pulls is told.
const PROGRESS: Duration = Duration::from_secs(5);

/// Where an entry of the list is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryState {
    /// Its turn has not come, or its window is shut.
    Waiting,
    /// It is for other nodes.
    Excluded,
    /// On its way.
    Pulling,
    /// Here.
    Ready,
    /// The disk has no room for it; tried again.
    NoRoom,
    /// It could not be pulled; tried again.
    Failed,
}

impl EntryState {
    /// One word, as metrics and pages show it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Excluded => "excluded",
            Self::Pulling => "pulling",
            Self::Ready => "ready",
            Self::NoRoom => "no_room",
            Self::Failed => "failed",
        }
    }
}

/// One entry of the list in force.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryReport {
    /// Its name, else its reference.
    pub name: String,
    /// The image.
    pub reference: Reference,
    /// Where it is to be.
    pub target: Target,
    /// What that meant when it was last brought here.
    pub digest: Option<Digest>,
    /// Where it is.
    pub state: EntryState,
    /// Why it is there; may be empty.
    pub message: String,
}

/// What became of the list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// Why the list as it stands is not in force; an older one is, where there was one.
    pub error: Option<String>,
    /// The entries of the list in force, in its order.
    pub entries: Vec<EntryReport>,
}

/// What is followed, and with what.
pub struct Prepull {
    /// The list.
    pub list: PathBuf,
    /// Labels of this node that are given.
    pub labels: Labels,
    /// A file with more of them, as the downward API writes it.
    pub labels_file: Option<PathBuf>,
    /// The first pull waits for a random part of this, so that a fleet that starts at once does not
    /// ask a registry at once.
    pub start_jitter: Duration,
    /// What pulls.
    pub puller: Puller,
    /// What has the container runtime pull. Absent: it is not to be asked.
    pub runtime: Option<IntoRuntime>,
    /// What reads into the page cache.
    pub warmer: Warmer,
    /// The node, for its GPUs.
    pub state: watch::Receiver<Arc<NodeState>>,
    /// Where it is counted.
    pub metrics: Arc<Metrics>,
    /// Where it is told.
    pub report: watch::Sender<Arc<Report>>,
}

impl Prepull {
    /// Follows the list until `stop`, then ends all waits; the puller's own shutdown ends the
    /// pulls.
    pub async fn run(self, stop: CancellationToken) {
        let changed = Arc::new(Notify::new());
        let watched: Option<Vec<_>> = std::iter::once(&self.list)
            .chain(&self.labels_file)
            .map(|path| watch(path, &changed))
            .collect();
        let safety_net = if watched.is_some() { SAFETY_NET } else { UNWATCHED };
        let gpus = Arc::clone(&self.state.borrow().gpus);
        let mut engine = Engine {
            not_before: Instant::now() + self.start_jitter.mul_f64(random()),
            gpus,
            state: self.state.clone(),
            labels: self.labels.clone(),
            bandwidth: self.puller.bandwidth(),
            prepull: self,
            plan: Plan::default(),
            in_force: false,
            error: None,
            tries: JoinSet::new(),
            unpinned: true,
        };
        let mut last_seen = None;
        let mut look = true;
        let mut looked = Instant::now();
        loop {
            if look {
                let content = engine.content().await;
                if last_seen.as_ref() != Some(&content) {
                    if engine.adopt(&content) {
                        engine.unpin_the_rest().await;
                        engine.unpinned = false;
                    }
                    last_seen = Some(content);
                }
                engine.unpin_in_runtime().await;
                looked = Instant::now();
            }
            engine.drive();
            let wake = engine.wake(looked + safety_net);
            look = tokio::select! {
                () = stop.cancelled() => break,
                () = changed.notified() => {
                    tokio::time::sleep(DEBOUNCE).await;
                    true
                }
                () = other_gpus(&mut engine.state, &engine.gpus) => false,
                Some(ended) = engine.tries.join_next() => {
                    if engine.ended(ended.ok()) {
                        engine.unpin_the_rest().await;
                    }
                    false
                }
                () = tokio::time::sleep_until(wake) => wake >= looked + safety_net,
            };
        }
        engine.plan.stop();
        while engine.tries.join_next().await.is_some() {}
    }
}

/// The texts of the list and of the labels' file; nothing where there is no list.
type Content = Result<Option<(String, Option<String>)>, String>;

/// A try that is over.
struct Tried {
    start: Start,
    ended: Ended,
}

struct Engine {
    prepull: Prepull,
    plan: Plan,
    /// Of the last good look.
    labels: Labels,
    /// A list has been read since the start.
    in_force: bool,
    error: Option<String>,
    /// As configured; the list may say otherwise.
    bandwidth: Bandwidth,
    not_before: Instant,
    state: watch::Receiver<Arc<NodeState>>,
    /// As last looked at.
    gpus: Arc<GpuInventory>,
    tries: JoinSet<Tried>,
    /// Whether the container runtime keeps nothing any more that has left the list.
    unpinned: bool,
}

impl Engine {
    /// The texts of the list and of the labels' file, or why they cannot be read. Nothing where there is no
    /// list: its ConfigMap is optional.
    async fn content(&self) -> Content {
        let (list, labels) = (self.prepull.list.clone(), self.prepull.labels_file.clone());
        let texts = tokio::task::spawn_blocking(move || {
            let list = match read(&list) {
                Err(ConfigError::Unreadable { source, .. })
                    if source.kind() == std::io::ErrorKind::NotFound =>
                {
                    return Ok(None);
                }
                list => list?,
            };
            Ok(Some((list, labels.as_deref().map(read).transpose()?)))
        });
        match texts.await {
            Ok(texts) => texts.map_err(|error: ConfigError| error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Puts a new list in force. False: it is none, and nothing has changed.
    fn adopt(&mut self, content: &Content) -> bool {
        let path = &self.prepull.list;
        let gone =
            || format!("{}: the list is gone; to pull nothing, write `images: []`", path.display());
        let texts = match content {
            Ok(None) if !self.in_force => {
                tracing::info!(list = %path.display(), "no pre-pull list yet");
                self.error = None;
                return false;
            }
            Ok(None) => Err(gone()),
            Ok(Some(texts)) => Ok(texts),
            Err(error) => Err(error.clone()),
        };
        let parsed = texts.and_then(|(list, labels)| {
            let mut own = self.prepull.labels.clone();
            if let (Some(text), Some(file)) = (labels, &self.prepull.labels_file) {
                let read = when::read_labels(text);
                own.extend(read.map_err(|why| format!("{}: {why}", file.display()))?);
            }
            let list = List::parse(path, list).map_err(|error| error.to_string())?;
            Ok((list, own))
        });
        match parsed {
            Ok((list, labels)) => {
                tracing::info!(list = %path.display(), entries = list.images.len(), "pre-pull list");
                self.prepull.metrics.prepull.list_read(true);
                self.labels = labels;
                let own = list.bandwidth.map(Rate::bytes_per_second);
                let usual = self.bandwidth;
                self.prepull.puller.set_bandwidth(Bandwidth {
                    prefetch_bytes_per_second: own.or(usual.prefetch_bytes_per_second),
                    ..usual
                });
                self.error = None;
                self.in_force = true;
                self.plan.adopt(&list, self.not_before.max(Instant::now()));
                true
            }
            Err(error) => {
                tracing::error!(%error, "pre-pull list; the last good one stays in force");
                self.prepull.metrics.prepull.list_read(false);
                self.error = Some(error);
                false
            }
        }
    }

    /// Takes away pins that the list in force does not wish; what a tag means that was not asked about
    /// yet, the node's state tells.
    async fn unpin_the_rest(&self) {
        let state = Arc::clone(&self.state.borrow());
        let wanted = self.plan.pinned(|reference| state.resolve(reference));
        let store = self.prepull.puller.store().clone();
        let work = tokio::task::spawn_blocking(move || pins::keep_only(&store, &wanted));
        match work.await {
            Ok(Ok(())) => {}
            // The pins stay, and with them the images: the next list tries again.
            Ok(Err(error)) => tracing::error!(%error, "unpin what left the pre-pull list"),
            Err(error) => tracing::error!(%error, "unpin what left the pre-pull list"),
        }
    }

    /// The same in the container runtime, which may be away: tried again with each look.
    async fn unpin_in_runtime(&mut self) {
        if let (Some(runtime), false) = (&self.prepull.runtime, self.unpinned) {
            self.unpinned = runtime.unpin_all_but(&self.plan.pinned_in_runtime()).await;
        }
    }

    /// Starts what is due, and tells where everything is.
    fn drive(&mut self) {
        let state = Arc::clone(&self.state.borrow());
        self.gpus = Arc::clone(&state.gpus);
        let inventory = &state.runtime;
        if let (true, true, Some(listed_at)) =
            (inventory.connected, self.sees_runtime(), inventory.listed_at)
        {
            let has = |image: &Reference| inventory.find(None, Some(image)).is_some();
            self.plan.look_at_runtime(listed_at, Instant::now(), has);
        }
        let node = Node {
            labels: &self.labels,
            gpus: &self.gpus,
            wall: Timestamp::now(),
            now: Instant::now(),
        };
        for start in self.plan.turn(node) {
            let runtime = self.prepull.runtime.clone();
            self.tries.spawn(bring(start, self.prepull.puller.clone(), runtime));
        }
        let report = Report { error: self.error.clone(), entries: self.plan.report() };
        self.prepull.report.send_if_modified(|told| {
            let news = **told != report;
            if news {
                self.prepull.metrics.prepull.entries(&report.entries);
                *told = Arc::new(report);
            }
            news
        });
    }

    /// Takes note of a try's end. True when its tag means another image than before.
    fn ended(&mut self, tried: Option<Tried>) -> bool {
        let Some(Tried { start, ended }) = tried else { return false };
        let image = &start.entry.image;
        let here = match &ended {
            Ended::Here(digest) => Some(*digest),
            Ended::NoRoom(why) | Ended::Failed(why) if start.entry.target == Target::Runtime => {
                tracing::warn!(%image, why, "pull into the container runtime; again later");
                None
            }
            Ended::NoRoom(_) | Ended::Failed(_) => {
                // Why, the puller has told.
                tracing::info!(%image, "pre-pull again later");
                None
            }
            Ended::There { .. } | Ended::Stopped => None,
        };
        let listed = self.plan.ended(&start.entry, start.run, ended, Instant::now(), random());
        if let (true, Some(digest), true) = (listed, here, start.entry.warm_page_cache) {
            self.prepull.warmer.warm(digest);
        }
        listed && start.was.is_some() && here.is_some() && here != start.was
    }

    /// Whether the images that pods run are in the inventory.
    fn sees_runtime(&self) -> bool {
        self.prepull.puller.runtime().is_none_or(Runtime::sees_pods)
    }

    fn wake(&self, look: Instant) -> Instant {
        let now = Instant::now();
        let clock = self.plan.has_windows().then(|| now + WALL_CLOCK);
        let progress = self.plan.is_arriving().then(|| now + PROGRESS);
        [self.plan.next_due(now), clock, progress].into_iter().flatten().fold(look, Instant::min)
    }
}

/// Waits for another look at the GPUs than `seen`; what else changes on the node is no matter here.
async fn other_gpus(state: &mut watch::Receiver<Arc<NodeState>>, seen: &Arc<GpuInventory>) {
    if state.wait_for(|state| !Arc::ptr_eq(&state.gpus, seen)).await.is_err() {
        // The keeper has gone: the agent ends.
        std::future::pending::<()>().await;
    }
}

/// Brings one image to where it is to be, or gives up when told to.
async fn bring(start: Start, puller: Puller, runtime: Option<IntoRuntime>) -> Tried {
    if start.entry.target == Target::Runtime {
        let ended = match runtime {
            Some(runtime) => runtime.bring(&start).await,
            None => Ended::Failed("no container runtime is asked: see runtime.cri".into()),
        };
        return Tried { start, ended };
    }
    let policy = if start.again { PullPolicy::Always } else { PullPolicy::IfNotPresent };
    let request = PullRequest {
        policy,
        priority: Priority::Prefetch(start.entry.priority),
        holder: Holder::List,
        ..PullRequest::new(start.entry.image.clone())
    };
    let pull = puller.start(request);
    // Dropping the pull gives up this wait; others may still want the image.
    let ended = match start.stop.run_until_cancelled(pull.wait()).await {
        None => Ended::Stopped,
        Some(Ok(pulled)) => pinned(&start.entry, pulled, puller.store().clone()).await,
        Some(Err(error)) if error.reason() == NO_SPACE => Ended::NoRoom(error.to_string()),
        Some(Err(error)) => Ended::Failed(error.to_string()),
    };
    drop(pull);
    Tried { start, ended }
}

/// Pins what was brought here, where the list wishes that.
async fn pinned(entry: &Entry, pulled: Pulled, store: Store) -> Ended {
    let digest = pulled.digest;
    let Some(pin) = entry.pin else { return Ended::Here(digest) };
    let image = entry.image.clone();
    let work = move || pins::pin(&store, &image, &pulled, pin);
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(true)) => Ended::Here(digest),
        Ok(Ok(false)) => Ended::Failed("removed before it could be pinned".into()),
        Ok(Err(error)) => Ended::Failed(error.to_string()),
        Err(error) => Ended::Failed(error.to_string()),
    }
}

/// What [`PullError::reason`] says of a full disk.
const NO_SPACE: &str = "no_space";

/// A number from 0 to 1 that nobody can foresee.
fn random() -> f64 {
    let number = RandomState::new().build_hasher().finish();
    #[allow(clippy::cast_precision_loss)]
    {
        number as f64 / u64::MAX as f64
    }
}

/// Calls `changed` when anything happens in the directory of `path`.
fn watch(path: &Path, changed: &Arc<Notify>) -> Option<notify::RecommendedWatcher> {
    let notified = Arc::clone(changed);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading opens and closes the file; that is no news.
        if !event.is_ok_and(|event| event.kind.is_access()) {
            notified.notify_one();
        }
    });
    let directory = path.parent().unwrap_or(Path::new("/"));
    let watched = watcher.and_then(|mut watcher| {
        watcher.watch(directory, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    watched
        .inspect_err(|error| {
            tracing::warn!(
                directory = %directory.display(), %error,
                "cannot watch the pre-pull list; it is read every few seconds"
            );
        })
        .ok()
}
