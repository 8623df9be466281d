//! Keeps the [`NodeState`] true.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use carport_csi::Volumes;
use carport_image::pull::{PullProgress, PullState};
use carport_image::runtime::Inventory;
use carport_image::store::{Promised, Space, Store, StoreError, Survey, Usage};
use carport_image::{Digest, Puller, Reference};
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::{Notify, watch};
use tokio::task::{JoinError, JoinHandle};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::{Contents, Known, NodeState, Rates, Trouble, in_flight, same_pull};
use crate::gpu::{Gpu, GpuInventory, GpuReader};
use crate::kubelet;
use crate::metrics::Metrics;
use crate::page_cache::{self, Sampler};
use crate::placement::gpus::is_free;
use crate::prepull::{self, EntryState};

/// From one reading of the store to the next, at least; events within this time share one.
const SPACING: Duration = Duration::from_millis(20);
/// And at most, however long one takes.
const MAX_SPACING: Duration = Duration::from_secs(2);
/// The store is read again after so long, whatever the watches say.
const SAFETY_NET: Duration = Duration::from_secs(60);
/// Walking all objects and trees of a full store costs some tenths of a second: not more often than this,
const WALK_SPACING: Duration = Duration::from_secs(2);
/// at most so small a part of the time while something happens,
const WALK_PART: u32 = 10;
/// and of the time in which nothing does but that time passes: what was just used may be evicted some minutes later.
const IDLE_WALK_PART: u32 = 500;
/// A smaller change than this part of all room is told with the next walk: every file that anybody writes is one.
const ROOM_PARTS: u64 = 1000;
/// How often pulls under way are looked at for rates and counters.
const SAMPLE: Duration = Duration::from_secs(1);
/// Below this part of the room a scheduler should look elsewhere.
const DISK_PRESSURE_RATIO: f64 = 0.05;

/// What is wrong with the store.
const STORE_CODES: [&str; 2] = ["STORE_UNREADABLE", "DISK_PRESSURE"];

/// Keeps the node's state true, until it is told to stop.
pub struct Keeper {
    puller: Puller,
    volumes: Volumes,
    gpus: GpuReader,
    prepull: watch::Receiver<Arc<prepull::Report>>,
    inventory: watch::Receiver<Arc<Inventory>>,
    kubelet: watch::Receiver<Arc<Vec<Trouble>>>,
    metrics: Arc<Metrics>,
    state: watch::Sender<Arc<NodeState>>,
    rates: Rates,
    sampler: Sampler,
    known: Option<Known>,
    // Pulls as last looked at, to count what they brought since.
    seen: Vec<PullProgress>,
    // Pulls that have left the puller's list; whether they succeeded the next reading tells.
    gone: Vec<PullProgress>,
    // Kept: dropping it ends the watch.
    _watcher: Option<notify::RecommendedWatcher>,
    dirty: Arc<Notify>,
}

impl Keeper {
    /// Reads the store once, so that the first answer is a true one.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub async fn new(
        puller: Puller,
        volumes: Volumes,
        gpus: GpuReader,
        prepull: watch::Receiver<Arc<prepull::Report>>,
        inventory: watch::Receiver<Arc<Inventory>>,
        kubelet: watch::Receiver<Arc<Vec<Trouble>>>,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, watch::Receiver<Arc<NodeState>>), StoreError> {
        let dirty = Arc::new(Notify::new());
        // Before the first reading, so that no change falls between the two.
        let watcher = watch_store(puller.store().root(), &dirty);
        let mut state = NodeState::empty(gpus.current());
        state.limits = puller.store().limits();
        let mut walk = Some(start_walk(puller.store()));
        state.adopt_walk(end(&mut walk).await?);
        let (contents, known, standing) = read(&puller, None).await?;
        state.adopt_standing(standing);
        state.adopt(contents);
        state.judge(None);
        let (state, receiver) = watch::channel(Arc::new(state));
        let keeper = Self {
            puller,
            volumes,
            gpus,
            prepull,
            inventory,
            kubelet,
            metrics,
            state,
            rates: Rates::default(),
            sampler: Sampler::default(),
            known: Some(known),
            seen: Vec::new(),
            gone: Vec::new(),
            _watcher: watcher,
            dirty,
        };
        Ok((keeper, receiver))
    }

    /// Follows all changes until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut changes = self.puller.changes();
        // Whatever was started before this line.
        changes.mark_changed();
        let mut volumes = self.volumes.changes();
        let mut sample = tokio::time::interval(SAMPLE);
        sample.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut safety_net = tokio::time::interval(SAFETY_NET);
        safety_net.tick().await;
        let mut page_cache = tokio::time::interval(page_cache::TURN);
        page_cache.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut walked, mut walk_took) = (Instant::now(), Duration::ZERO);
        let (mut walk_due, mut walk): (bool, Option<Walk>) = (false, None);
        let (mut read, mut spacing) = (walked, SPACING);
        loop {
            let busy = self.seen.iter().any(in_flight);
            let mut contents_due = false;
            tokio::select! {
                () = stop.cancelled() => return,
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.look_at_pulls().await;
                    contents_due = true;
                    walk_due = true;
                }
                changed = volumes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    contents_due = true;
                }
                () = self.dirty.notified() => {
                    contents_due = true;
                    walk_due = true;
                }
                _ = safety_net.tick() => {
                    // Of pulls that failed the puller forgets without a word.
                    self.look_at_pulls().await;
                    contents_due = true;
                    walk_due |= walked.elapsed() >= IDLE_WALK_PART * walk_took;
                }
                // Nobody tells: no runtime is asked, or no list is followed.
                Ok(()) = self.inventory.changed() => {
                    let now = Arc::clone(&self.inventory.borrow_and_update());
                    self.publish(|state| state.runtime = now);
                }
                Ok(()) = self.prepull.changed() => {
                    let report = Arc::clone(&self.prepull.borrow_and_update());
                    self.publish(|state| state.adopt_report(report));
                }
                // No volumes are served.
                Ok(()) = self.kubelet.changed() => {
                    let troubles = Arc::clone(&self.kubelet.borrow_and_update());
                    self.publish(|state| state.adopt_kubelet(&troubles));
                }
                gpus = self.gpus.changed() => self.publish(|state| state.gpus = gpus),
                _ = page_cache.tick() => self.look_at_page_cache().await,
                _ = sample.tick(), if busy => self.look_at_pulls().await,
                () = tokio::time::sleep_until(walked + walk_spacing(walk_took)),
                    if walk_due && walk.is_none() =>
                {
                    walk = Some(start_walk(self.puller.store()));
                    (walk_due, walked) = (false, Instant::now());
                }
                found = end(&mut walk) => {
                    walk = None;
                    walk_took = walked.elapsed();
                    walked = Instant::now();
                    self.adopt_walk(found);
                }
            }
            if contents_due {
                tokio::time::sleep_until(read + spacing).await;
                let begun = Instant::now();
                self.read_store().await;
                read = Instant::now();
                // A quarter of the time, and the rest for others.
                spacing = (3 * begun.elapsed()).clamp(SPACING, MAX_SPACING);
            }
        }
    }

    /// Takes rates and what is free, and counts what pulls brought since the last look.
    async fn look_at_pulls(&mut self) {
        let pulls = self.puller.pulls();
        self.metrics.pulls.observe(&self.seen, &pulls);
        if let Some(runtime) = self.puller.runtime() {
            self.metrics.runtime.observe(runtime.used());
        }
        self.rates.sample(&pulls, SystemTime::now());
        let left = |pull: &PullProgress| {
            in_flight(pull) && !pulls.iter().any(|other| same_pull(other, pull))
        };
        self.gone.extend(self.seen.iter().filter(|pull| left(pull)).cloned());
        let news = stages(&self.seen) != stages(&pulls);
        self.seen = pulls;
        let on_their_way = self.on_their_way();
        let rates = Arc::new(self.rates.clone());
        let standing = standing(self.puller.store()).await;
        self.state.send_if_modified(|state| {
            let state = Arc::make_mut(state);
            state.rates = rates;
            state.pulls = on_their_way;
            if let Some((space, taken, free_bytes)) = standing {
                (state.room.space, state.room.taken) = (space, taken);
                state.usage.free_bytes = free_bytes;
            }
            if news {
                state.revision.sequence += 1;
                state.observed_at = SystemTime::now();
            }
            // Readings alone wake nobody.
            news
        });
    }

    /// Looks at some images' part of the page cache.
    async fn look_at_page_cache(&mut self) {
        let images: Vec<Digest> = self.state.borrow().images.keys().copied().collect();
        let (store, mut sampler) = (self.puller.store().clone(), std::mem::take(&mut self.sampler));
        let turn = tokio::task::spawn_blocking(move || {
            let samples = Arc::new(sampler.turn(&store, &images).clone());
            (sampler, samples)
        });
        // Only a panic gets here: it then begins anew.
        let Ok((sampler, samples)) = turn.await else { return };
        self.sampler = sampler;
        self.state.send_if_modified(|state| {
            Arc::make_mut(state).page_cache = samples;
            false
        });
    }

    /// Pulls that are in flight, and those whose end no reading of the store has shown yet.
    fn on_their_way(&self) -> Vec<PullProgress> {
        let running = self.seen.iter().filter(|pull| in_flight(pull));
        running.chain(&self.gone).cloned().collect()
    }

    fn adopt_walk(&self, found: Result<Walked, StoreError>) {
        match found {
            Ok(walked) => self.publish(|state| {
                state.adopt_walk(walked);
                state.judge(None);
            }),
            Err(error) => {
                tracing::error!(%error, "walk the store");
                self.publish(|state| state.judge(Some(&error)));
            }
        }
    }

    async fn read_store(&mut self) {
        match read(&self.puller, self.known.take()).await {
            Ok((contents, known, standing)) => {
                self.known = Some(known);
                let gone = std::mem::take(&mut self.gone);
                let on_their_way = self.on_their_way();
                self.publish(|state| {
                    state.adopt_standing(standing);
                    state.adopt(contents);
                    state.pulls = on_their_way;
                    state.judge(None);
                });
                self.count_ended(&gone);
            }
            Err(error) => {
                tracing::error!(%error, "read the store");
                self.publish(|state| state.judge(Some(&error)));
            }
        }
    }

    /// Counts the pulls that are over: those that succeeded are in the store now, and of those
    /// that nobody waited for any more nothing is to be told.
    fn count_ended(&self, gone: &[PullProgress]) {
        let state = self.state.borrow();
        for pull in gone {
            let digest = pull.digest.or_else(|| state.resolve(&pull.reference));
            if digest.is_some_and(|digest| state.images.contains_key(&digest)) {
                self.metrics.pulls.done(pull);
            }
        }
    }

    /// Changes the state; the revision moves only if something is different now.
    fn publish(&self, change: impl FnOnce(&mut NodeState)) {
        self.state.send_if_modified(|state| {
            let before = Arc::clone(state);
            let now = Arc::make_mut(state);
            change(now);
            now.observed_at = SystemTime::now();
            let changed = !before.same(now);
            if changed {
                now.revision.sequence += 1;
            }
            changed
        });
    }
}

impl NodeState {
    fn adopt_standing(&mut self, (space, taken): (Space, Promised)) {
        self.room.taken = taken;
        let before = self.room.space;
        let moved = before.free_bytes.abs_diff(space.free_bytes);
        if moved.max(before.used_bytes.abs_diff(space.used_bytes)) > space.limit_bytes / ROOM_PARTS
        {
            self.room.space = space;
        }
    }

    fn adopt_walk(&mut self, (usage, survey, space): Walked) {
        self.usage = usage;
        self.room.space = space;
        (self.room.held, self.room.unused_bytes) = (survey.held, survey.unused_bytes);
        self.evictable = Arc::new(survey.evictable);
        self.reckon();
    }

    fn adopt(&mut self, contents: Contents) {
        self.images = contents.images;
        self.references = contents.references;
        self.volumes = contents.volumes;
        self.pins = contents.pins;
        self.reservations = contents.reservations;
        self.reckon();
    }

    /// Takes what became of the pre-pull list, and of that what is wrong.
    fn adopt_report(&mut self, report: Arc<prepull::Report>) {
        self.troubles.retain(|trouble| !trouble.code.starts_with("PREPULL_"));
        if let Some(error) = &report.error {
            let message = format!("the pre-pull list is not in force: {error}");
            self.troubles.push(Trouble { code: "PREPULL_LIST_INVALID", message });
        }
        let homeless = || report.entries.iter().filter(|e| e.state == EntryState::NoRoom);
        if let Some(first) = homeless().next() {
            let message = match homeless().count() - 1 {
                0 => format!("pre-pull: {} does not fit on the disk", first.name),
                n => format!("pre-pull: {} and {n} more do not fit on the disk", first.name),
            };
            self.troubles.push(Trouble { code: "PREPULL_NO_ROOM", message });
        }
        self.prepull = report;
    }

    /// Takes what keeps the kubelet from using this node's volumes.
    fn adopt_kubelet(&mut self, troubles: &[Trouble]) {
        self.troubles.retain(|trouble| !kubelet::CODES.contains(&trouble.code));
        self.troubles.extend_from_slice(troubles);
    }

    fn judge(&mut self, error: Option<&StoreError>) {
        self.troubles.retain(|trouble| !STORE_CODES.contains(&trouble.code));
        if let Some(error) = error {
            self.troubles
                .push(Trouble { code: "STORE_UNREADABLE", message: format!("the store: {error}") });
        }
        // A cache is full in the end: what can go at once is as good as free.
        let free_bytes = self.room.space.free_bytes.saturating_add(self.reclaimable_bytes());
        let limit_bytes = self.room.space.limit_bytes;
        #[allow(clippy::cast_precision_loss)]
        let ratio = free_bytes as f64 / limit_bytes.max(1) as f64;
        if limit_bytes > 0 && ratio < DISK_PRESSURE_RATIO {
            // Whole numbers only: a message that changes with every byte would be news for ever.
            self.troubles.push(Trouble {
                code: "DISK_PRESSURE",
                message: format!(
                    "less than {:.0} % of the store's room is free or could be made free; unpin or remove \
                     images (`carport unpin`, `carport rm`), raise store.quota, or enlarge the disk",
                    DISK_PRESSURE_RATIO * 100.0
                ),
            });
        }
    }

    /// Equal in all that the revision speaks of.
    fn same(&self, other: &Self) -> bool {
        self.images == other.images
            && self.references == other.references
            && self.volumes == other.volumes
            && self.pins == other.pins
            && self.reservations == other.reservations
            && self.evictable_bytes == other.evictable_bytes
            && self.room.space == other.room.space
            && self.room.unused_bytes == other.room.unused_bytes
            && self.usage == other.usage
            && self.runtime.same(&other.runtime)
            && self.troubles == other.troubles
            && same_gpus(&self.gpus, &other.gpus)
    }
}

/// What of pulls is news, and not only progress.
fn stages<'a>(
    pulls: &'a [PullProgress],
) -> Vec<(&'a Reference, SystemTime, &'a PullState, Option<Digest>, u64)> {
    let stage = |pull: &'a PullProgress| {
        let PullProgress { reference, started_at, state, digest, total_bytes, .. } = pull;
        (reference, *started_at, state, *digest, *total_bytes)
    };
    pulls.iter().map(stage).collect()
}

/// Equal but for readings: temperatures are no news.
fn same_gpus(a: &GpuInventory, b: &GpuInventory) -> bool {
    let news = |inventory: &GpuInventory| {
        let of = |gpu: &Gpu| {
            let parts = gpu.mig.iter().flat_map(|mig| &mig.devices);
            let held: Vec<_> = parts.map(|part| part.allocations.clone()).collect();
            (gpu.health.clone(), is_free(gpu), gpu.allocations.clone(), held)
        };
        inventory.gpus.iter().map(of).collect::<Vec<_>>()
    };
    a.generation == b.generation
        && a.provider == b.provider
        && a.allocation == b.allocation
        && news(a) == news(b)
}

type Walked = (Usage, Survey, Space);
type Walk = JoinHandle<Result<Walked, StoreError>>;

/// Looks at all objects and trees, while the keeper goes on.
fn start_walk(store: &Store) -> Walk {
    let store = store.clone();
    tokio::task::spawn_blocking(move || Ok((store.usage()?, store.survey()?, store.space()?)))
}

/// The end of a walk; of none it never comes.
async fn end(walk: &mut Option<Walk>) -> Result<Walked, StoreError> {
    match walk {
        Some(walk) => walk.await.unwrap_or_else(|panic| Err(unreadable(&panic))),
        None => std::future::pending().await,
    }
}

async fn read(
    puller: &Puller,
    before: Option<Known>,
) -> Result<(Contents, Known, (Space, Promised)), StoreError> {
    let store = puller.store().clone();
    let read = move || {
        let (contents, known) = Contents::read(&store, before.as_ref())?;
        Ok((contents, known, store.standing()?))
    };
    tokio::task::spawn_blocking(read).await.unwrap_or_else(|panic| Err(unreadable(&panic)))
}

/// Only a panic in the store gets here; the store is then as unreadable as any.
fn unreadable(panic: &JoinError) -> StoreError {
    StoreError::Corrupt(format!("reading the store: {panic}"))
}

/// What room there is and what is promised, and what this user can still write on the file system, as
/// [`Usage`] has it.
async fn standing(store: &Store) -> Option<(Space, Promised, u64)> {
    let store = store.clone();
    let look = move || {
        let (space, promised) = store.standing().ok()?;
        let disk = rustix::fs::statvfs(store.root()).ok()?;
        Some((space, promised, disk.f_bavail.saturating_mul(disk.f_frsize)))
    };
    tokio::task::spawn_blocking(look).await.ok()?
}

/// From one walk that took so long to the next, while something happens.
fn walk_spacing(took: Duration) -> Duration {
    WALK_SPACING.max(WALK_PART * took)
}

/// Calls `dirty` when another process changes what the store holds.
///
/// Without watches (their number is limited) the safety net serves alone.
fn watch_store(root: &Path, dirty: &Arc<Notify>) -> Option<notify::RecommendedWatcher> {
    let notified = Arc::clone(dirty);
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own readings open and close files in there; that is no news.
        if event.is_ok_and(|event| event.kind.is_access()) {
            return;
        }
        notified.notify_one();
    });
    let watched = watcher.and_then(|mut watcher| {
        for name in ["trees", "refs", "volumes", "pins", "reservations"] {
            let directory = root.join(name);
            if directory.is_dir() {
                watcher.watch(&directory, RecursiveMode::NonRecursive)?;
            }
        }
        Ok(watcher)
    });
    watched
        .inspect_err(|error| {
            tracing::warn!(
                root = %root.display(), %error,
                "cannot watch the store; changes by other processes are seen within a minute"
            );
        })
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixtures::{image, node};

    #[test]
    fn readings_are_no_news_and_contents_are() {
        let before = node(vec![image("r/a:1", 1)]);
        let mut after = before.clone();
        after.rates = Arc::new(Rates::default());
        after.observed_at = SystemTime::now();
        after.gpus = crate::state::fixtures::no_gpus();
        assert!(before.same(&after));
        after.usage.free_bytes += 1;
        assert!(!before.same(&after));
        after = before.clone();
        after.evictable_bytes += 1;
        assert!(!before.same(&after));
        assert!(!before.same(&node(vec![])));
    }

    #[test]
    fn who_holds_a_gpu_or_a_part_of_one_is_news_and_how_warm_it_is_is_not() {
        use crate::gpu::{Allocation, Mig, MigDevice, ProviderState};
        let mut before = GpuInventory::none(ProviderState::Ok, "");
        let part = MigDevice {
            uuid: Some("MIG-a".into()),
            slot: 0,
            profile: None,
            gpu_instance_id: None,
            compute_instance_id: None,
            memory: None,
            multiprocessor_count: None,
            allocations: Vec::new(),
        };
        let mig = Mig { enabled: true, devices: vec![part], ..Mig::default() };
        before.gpus.push(Gpu { mig: Some(mig), ..Gpu::unknown(0) });
        let mut after = before.clone();
        after.gpus[0].telemetry.temperature_celsius = Some(40.0);
        assert!(same_gpus(&before, &after));
        after.gpus[0].mig.as_mut().unwrap().devices[0].allocations.push(Allocation {
            pod_namespace: "team".into(),
            pod_name: "a".into(),
            container: "main".into(),
            resource_name: None,
            claim_name: None,
            shared: false,
        });
        assert!(!same_gpus(&before, &after));
    }

    #[test]
    fn what_others_write_is_no_news_until_it_is_much() {
        let mut state = node(vec![]);
        let before = state.clone();
        let space = |used_bytes| Space { limit_bytes: 1_000_000, used_bytes, free_bytes: 0 };
        state.room.space = space(0);
        let taken = Promised { pulls_bytes: 7, reserved_bytes: 0 };
        state.adopt_standing((space(1_000), taken));
        assert_eq!((state.room.space, state.room.taken), (space(0), taken));
        state.adopt_standing((space(1_001), taken));
        assert_eq!(state.room.space, space(1_001));
        state.room.space = before.room.space;
        assert!(before.same(&state), "promises of pulls move with their bytes");
    }

    #[test]
    fn a_bad_list_and_entries_without_room_are_troubles_beside_others() {
        let entry = |name: &str, state| prepull::EntryReport {
            name: name.into(),
            reference: "r/a:1".parse().unwrap(),
            target: prepull::Target::Store,
            digest: None,
            state,
            message: String::new(),
        };
        let entries =
            [EntryState::Ready, EntryState::NoRoom, EntryState::NoRoom].map(|s| entry("llama", s));
        let report = prepull::Report { error: Some("line 3".into()), entries: entries.into() };
        let mut state = node(vec![]);
        state.room.space.free_bytes = 49;
        state.judge(None);
        state.adopt_report(Arc::new(report));
        state.judge(None);
        let told: Vec<_> = state.troubles.iter().map(|t| (t.code, t.message.as_str())).collect();
        assert_eq!(told[0].1, "the pre-pull list is not in force: line 3");
        assert_eq!(told[1].1, "pre-pull: llama and 1 more do not fit on the disk");
        assert_eq!(told[2].0, "DISK_PRESSURE");
        state.adopt_report(Arc::default());
        assert_eq!(state.troubles.len(), 1);
    }

    #[test]
    fn a_full_disk_and_an_unreadable_store_are_troubles_until_they_are_over() {
        let codes = |state: &NodeState| {
            state.troubles.iter().map(|trouble| trouble.code).collect::<Vec<_>>()
        };
        let mut state = node(vec![]);
        state.judge(None);
        assert_eq!(codes(&state), [""; 0]);
        state.room.space.free_bytes = 49;
        state.judge(Some(&StoreError::Corrupt("refs: damaged".into())));
        assert_eq!(codes(&state), ["STORE_UNREADABLE", "DISK_PRESSURE"]);
        state.room.space.free_bytes = 50;
        state.judge(None);
        assert_eq!(codes(&state), [""; 0]);
        // Full of what could go.
        (state.room.space.free_bytes, state.evictable_bytes) = (0, 50);
        state.judge(None);
        assert_eq!(codes(&state), [""; 0]);
    }
}
