//! What watchers are told, made once for all of them.
//!
//! ```text
//! NodeState ─► messages ─► differ from before? ─► Batch ─┬─► history (bounded) ─► who resumes
//! pulls' bytes, twice a second ──────────────────────────┴─► broadcast (bounded) ─► who watches
//! ```
//!
//! # What always holds
//!
//! - **One computation, however many watch.** A batch is made once and shared; a watcher
//!   clones what it sends.
//! - **A snapshot and what follows meet exactly.** Both are taken under the lock under which batches
//!   are published.
//! - **Nothing grows**: the history has so many messages, the broadcast so many batches. Who is
//!   slower than that is told so.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use carport_proto::carport::v1;
use carport_proto::carport::v1::watch_response::Event;
use tokio::sync::broadcast;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::{Api, convert, gpu, list};
use crate::placement::Model;
use crate::state::{NodeState, Revision, in_flight};

/// Messages that can be resumed over: a minute of the busiest node, hours of a usual one.
const MAX_HISTORY: usize = 8_192;
/// Batches that a watcher may be behind. At the keeper's ten a second, with progress and heartbeats,
/// more than half a minute.
const MAX_BEHIND: usize = 512;
/// How often the progress of pulls is told.
const PROGRESS: Duration = Duration::from_millis(500);
/// How often a watcher hears something, whatever happens.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Messages that belong together; those of a change end in the one that has the revision.
pub(super) type Batch = Arc<Vec<v1::WatchResponse>>;

/// What is told to watchers. Clones share it.
#[derive(Clone)]
pub(super) struct Feed {
    told: Arc<Mutex<Told>>,
    batches: broadcast::Sender<Batch>,
}

/// What a new watcher begins with.
pub(super) enum Start {
    /// All that is, then `synced`.
    Snapshot(Vec<Batch>),
    /// What happened since, then `synced`.
    Changes(Vec<Batch>),
}

/// The changes since a revision are not known here.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OutOfRange;

/// As it was last told.
struct Told {
    revision: Revision,
    node: Batch,
    gpus: Batch,
    models: BTreeMap<(String, String), (Key, Batch)>,
    history: VecDeque<(u64, Batch)>,
    history_messages: usize,
    /// Changes after this one are in the history.
    history_from: u64,
}

/// A model without what moves with every byte: another one is a change.
type Key = v1::ModelLocality;

impl Feed {
    /// A feed that has told nothing yet; see [`Feed::begin`].
    pub(super) fn new(revision: &Revision) -> Self {
        let told = Told {
            revision: revision.clone(),
            node: Batch::default(),
            gpus: Batch::default(),
            models: BTreeMap::new(),
            history: VecDeque::new(),
            history_messages: 0,
            history_from: revision.sequence,
        };
        Self { told: Arc::new(Mutex::new(told)), batches: broadcast::Sender::new(MAX_BEHIND) }
    }

    /// Takes what is there as told: the start is no change.
    pub(super) fn begin(&self, api: &Api) {
        let state = api.state();
        let mut told = self.told();
        told.changes(api, &state);
        told.revision = state.revision.clone();
        told.history_from = told.revision.sequence;
    }

    /// Follows the node's state until `stop`.
    pub(super) async fn run(&self, api: Api, stop: CancellationToken) {
        let mut state = api.state.clone();
        // Whatever happened since the snapshot.
        state.mark_changed();
        let mut progress = tokio::time::interval(PROGRESS);
        progress.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heartbeat = tokio::time::interval(HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        heartbeat.tick().await;
        loop {
            let heard = self.batches.receiver_count() > 0;
            tokio::select! {
                () = stop.cancelled() => return,
                changed = state.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let state = state.borrow_and_update().clone();
                    self.tell_changes(&api, &state);
                }
                _ = progress.tick(), if heard => self.tell_progress(&api),
                _ = heartbeat.tick() => self.tell_heartbeat(&api),
            }
        }
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_changes(&self, api: &Api, state: &NodeState) {
        let mut told = self.told();
        let mut messages = told.changes(api, state);
        told.revision = state.revision.clone();
        let Some(last) = messages.last_mut() else { return };
        last.revision = Some(convert::revision(&state.revision));
        let batch = Arc::new(messages);
        told.remember(state.revision.sequence, Arc::clone(&batch));
        // Nobody listens: nothing is lost, the next one starts from what is told.
        let _ = self.batches.send(batch);
    }

    fn tell_progress(&self, api: &Api) {
        let state = api.state();
        let pulls = state.pulls(api.puller.pulls());
        let messages: Vec<_> = pulls
            .iter()
            .filter(|pull| in_flight(pull) && pull.total_bytes > 0)
            .map(|pull| {
                let progress = v1::PullProgress {
                    model: Some(v1::ModelRef {
                        reference: pull.reference.to_string(),
                        digest: pull.digest.map(|digest| digest.to_string()).unwrap_or_default(),
                        platform: String::new(),
                    }),
                    pull: Some(convert::pull_message(pull, &pulls, &state.rates)),
                };
                api.message(Event::Progress(progress), SystemTime::now())
            })
            .collect();
        if !messages.is_empty() {
            let _ = self.batches.send(Arc::new(messages));
        }
    }

    fn tell_heartbeat(&self, api: &Api) {
        let told = self.told();
        let mut message = api.message(Event::Heartbeat(v1::Heartbeat {}), SystemTime::now());
        message.revision = Some(convert::revision(&told.revision));
        // Under the lock, so that no change comes between the revision and its being told.
        let _ = self.batches.send(Arc::new(vec![message]));
    }

    /// Begins a watch, with all that is to be told first and what comes after it.
    pub(super) fn start(
        &self,
        api: &Api,
        resume_from: Option<&v1::Revision>,
    ) -> Result<(Start, broadcast::Receiver<Batch>), OutOfRange> {
        let told = self.told();
        let mut synced = api.message(Event::Synced(v1::Synced {}), SystemTime::now());
        synced.revision = Some(convert::revision(&told.revision));
        let synced = Arc::new(vec![synced]);
        let start = match resume_from {
            None => {
                let models = told.models.values().map(|(_, batch)| batch);
                let all = [&told.node, &told.gpus].into_iter().chain(models).chain([&synced]);
                Start::Snapshot(all.cloned().collect())
            }
            Some(from) => {
                let known = from.epoch == *told.revision.epoch
                    && (told.history_from..=told.revision.sequence).contains(&from.sequence);
                if !known {
                    return Err(OutOfRange);
                }
                let since = told.history.iter().filter(|(at, _)| *at > from.sequence);
                Start::Changes(since.map(|(_, batch)| batch).chain([&synced]).cloned().collect())
            }
        };
        Ok((start, self.batches.subscribe()))
    }
}

impl Told {
    /// What is different in `state`, and takes it as told.
    fn changes(&mut self, api: &Api, state: &NodeState) -> Vec<v1::WatchResponse> {
        let mut messages = Vec::new();
        let mut put = |slot: &mut Batch, event: Event| {
            if slot.first().and_then(|message| message.event.as_ref()) != Some(&event) {
                let message = api.message(event, state.observed_at);
                *slot = Arc::new(vec![message.clone()]);
                messages.push(message);
            }
        };
        let pulls = state.pulls(api.puller.pulls());
        put(&mut self.node, Event::Node(still_node(api.node(state, &pulls))));
        put(
            &mut self.gpus,
            Event::Gpus(still_gpus(gpu::inventory(&state.gpus.as_of(Instant::now())))),
        );

        let mut now = BTreeMap::new();
        for entry in list::entries(state, &pulls, None) {
            let model = Model::find(&entry.wanted, state, &pulls);
            now.insert(entry.key.clone(), convert::model(&model, state, &pulls, false));
        }
        let gone: Vec<_> =
            self.models.keys().filter(|key| !now.contains_key(*key)).cloned().collect();
        for key in gone {
            self.models.remove(&key);
            let (digest, reference) = key;
            let model = v1::ModelRef { reference, digest, platform: String::new() };
            messages.push(api.message(Event::Delete(model), state.observed_at));
        }
        for (name, model) in now {
            let key = still(&model);
            if self.models.get(&name).is_some_and(|(told, _)| *told == key) {
                continue;
            }
            let message = api.message(Event::Upsert(model), state.observed_at);
            self.models.insert(name, (key, Arc::new(vec![message.clone()])));
            messages.push(message);
        }
        messages
    }

    fn remember(&mut self, sequence: u64, batch: Batch) {
        self.history_messages += batch.len();
        self.history.push_back((sequence, batch));
        while self.history_messages > MAX_HISTORY {
            let Some((oldest, gone)) = self.history.pop_front() else { return };
            self.history_messages -= gone.len();
            self.history_from = oldest;
        }
    }
}

impl Api {
    /// A message about this node, without a revision.
    fn message(&self, event: Event, observed_at: SystemTime) -> v1::WatchResponse {
        v1::WatchResponse {
            node_name: self.node_name.clone(),
            revision: None,
            observe_time: Some(convert::timestamp(observed_at)),
            event: Some(event),
        }
    }
}

/// The model, its pull held still.
fn still(model: &v1::ModelLocality) -> Key {
    let mut key = model.clone();
    key.download_bytes = None;
    key.page_cache_bytes = None;
    key.sample_time = None;
    if let Some(pull) = &mut key.pull {
        pull.done_bytes = 0;
        pull.rate_bytes_per_second = 0.0;
        pull.eta = None;
    }
    key
}

/// The node without what changes all the time, and what is told by itself.
fn still_node(mut node: v1::Node) -> v1::Node {
    node.revision = None;
    node.observe_time = None;
    node.bandwidth = None;
    node.gpus = None;
    if let Some(runtime) = &mut node.runtime {
        // Listed once a minute, whatever has changed.
        runtime.list_time = None;
    }
    if let Some(store) = &mut node.store {
        // What pulls under way will take moves with their bytes.
        store.reserved_bytes = 0;
    }
    node
}

/// The GPUs without readings.
fn still_gpus(mut gpus: v1::GpuInventory) -> v1::GpuInventory {
    gpus.sample_time = None;
    for gpu in &mut gpus.gpus {
        gpu.telemetry = None;
        gpu.memory = None;
        gpu.processes.clear();
    }
    gpus
}

#[cfg(test)]
#[path = "feed_tests.rs"]
mod tests;
