//! Which entry is next: what is known of each, and when it may be tried again.
//!
//! ```text
//!             not for this node          window shut          too many at a time
//!                 Excluded                  Waiting ◄──────────────┐
//!                                             │ its turn           │
//!              ┌── again later ── Failed ◄── Pulling ──► NoRoom ── again later
//!              └─────────────────────────────►│
//!                                             ▼   tag: asked again at an interval
//!                                           Ready ◄─────────────────────────────┐
//!                                             └─────────────────────────────────┘
//! ```
//!
//! Plain values in and out; pulls, files and clocks are the caller's.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use carport_image::{Digest, Reference};
use jiff::Timestamp;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::into_runtime::{self, Arrived};
use super::list::{Entry, List, Target};
use super::schedule;
use super::when::Labels;
use super::{EntryReport, EntryState};
use crate::gpu::GpuInventory;
use crate::output::size;

/// Pulls of the list at a time. A few more than the puller works on at once, so that one
/// whose registry does not answer holds up nothing.
const MAX_RUNNING: usize = 8;
/// Of these, pulls by the container runtime: no cap holds for them, and the kubelet's pulls come in between.
const MAX_RUNNING_RUNTIME: usize = 2;
/// The first retry of an entry that failed; doubled each time up to [`MAX_RETRY`].
const FIRST_RETRY: Duration = Duration::from_secs(10);
/// An image that is pushed to a registry later is then found within so long.
const MAX_RETRY: Duration = Duration::from_secs(300);
/// What is said of an image that is to be in both places.
const STORE_FIRST: &str = "the store has it first";
/// What is said of an image until it is brought back.
const REMOVED: &str = "was removed from the container runtime";
/// A list of the runtime that is so much newer than a pull shows its image.
const SETTLED: Duration = Duration::from_secs(10);

/// The node, as far as conditions ask.
#[derive(Debug, Clone, Copy)]
pub(super) struct Node<'a> {
    pub(super) labels: &'a Labels,
    pub(super) gpus: &'a GpuInventory,
    pub(super) wall: Timestamp,
    pub(super) now: Instant,
}

/// All entries of the list in force.
#[derive(Debug, Default)]
pub(super) struct Plan {
    items: BTreeMap<(Reference, Target), Item>,
    refresh: Duration,
    /// Tries so far; numbers them.
    runs: u64,
}

#[derive(Debug)]
struct Item {
    entry: Entry,
    order: usize,
    state: EntryState,
    /// What to say beside the state.
    message: String,
    /// Not before.
    due: Instant,
    retry: Duration,
    /// What it meant when it was last brought here, and when that was.
    digest: Option<Digest>,
    here_since: SystemTime,
    running: Option<Run>,
}

/// A try under way.
#[derive(Debug)]
struct Run {
    number: u64,
    stop: CancellationToken,
    arrived: Arc<Arrived>,
}

/// What to do now for one entry.
#[derive(Debug)]
pub(super) struct Start {
    pub(super) entry: Entry,
    /// Which try this is.
    pub(super) run: u64,
    /// Ask what the tag means, also where it is known.
    pub(super) again: bool,
    /// What it meant before.
    pub(super) was: Option<Digest>,
    /// Cancelled when the entry leaves the list, or may not be pulled any more.
    pub(super) stop: CancellationToken,
    /// Where a pull by the container runtime tells how far it is.
    pub(super) arrived: Arc<Arrived>,
}

/// How a try ended.
#[derive(Debug)]
pub(super) enum Ended {
    Here(Digest),
    /// In the container runtime; the digest as far as it tells, and what is to be said beside it.
    There {
        digest: Option<Digest>,
        note: String,
    },
    NoRoom(String),
    Failed(String),
    /// Given up: the entry left, or its window shut.
    Stopped,
}

impl Plan {
    /// Makes the entries those of `list`; none of them is tried before `due`.
    pub(super) fn adopt(&mut self, list: &List, due: Instant) {
        self.refresh = list.refresh;
        let mut before = std::mem::take(&mut self.items);
        for (order, entry) in list.images.iter().enumerate() {
            let key = (entry.image.clone(), entry.target);
            let item = match before.remove(&key) {
                Some(mut item) => {
                    let other = (item.entry.pin, item.entry.warm_page_cache)
                        != (entry.pin, entry.warm_page_cache);
                    if other && item.state == EntryState::Ready {
                        item.due = due;
                    }
                    Item { entry: entry.clone(), order, ..item }
                }
                None => Item {
                    entry: entry.clone(),
                    order,
                    state: EntryState::Waiting,
                    message: String::new(),
                    due,
                    retry: FIRST_RETRY,
                    digest: None,
                    here_since: SystemTime::UNIX_EPOCH,
                    running: None,
                },
            };
            self.items.insert(key, item);
        }
        before.values().filter_map(|gone| gone.running.as_ref()).for_each(|run| run.stop.cancel());
    }

    /// What is to be started now, the most urgent first; stops what may not go on.
    pub(super) fn turn(&mut self, node: Node<'_>) -> Vec<Start> {
        let mut ready: Vec<&mut Item> = Vec::new();
        let (mut running, mut by_runtime) = (0, 0);
        let for_store = self.for_store(node);
        for item in self.items.values_mut() {
            let waits = item.entry.target == Target::Runtime
                && item.running.is_none()
                && item.state != EntryState::Ready
                && for_store.contains(&item.entry.image);
            if let Some((state, why)) = item.barred(node) {
                // What is here stays, and is not asked about until it may be.
                if item.state != EntryState::Ready {
                    (item.state, item.message) = (state, why);
                }
                if let Some(run) = &item.running {
                    run.stop.cancel();
                }
                continue;
            }
            match item.running {
                Some(_) => {
                    running += 1;
                    by_runtime += usize::from(item.entry.target == Target::Runtime);
                }
                None if waits => {
                    (item.state, item.message) = (EntryState::Waiting, STORE_FIRST.into());
                }
                None if item.due <= node.now => ready.push(item),
                None if item.message == REMOVED => {}
                None if matches!(item.state, EntryState::Excluded | EntryState::Waiting) => {
                    (item.state, item.message) = (EntryState::Waiting, String::new());
                }
                None => {}
            }
        }
        ready.sort_by_key(|item| (std::cmp::Reverse(item.entry.priority), item.order));
        let mut starts = Vec::new();
        for item in ready {
            let is_by_runtime = item.entry.target == Target::Runtime;
            if running >= MAX_RUNNING || (is_by_runtime && by_runtime >= MAX_RUNNING_RUNTIME) {
                if matches!(item.state, EntryState::Excluded | EntryState::Waiting) {
                    (item.state, item.message) = (EntryState::Waiting, "others go first".into());
                }
                continue;
            }
            running += 1;
            by_runtime += usize::from(is_by_runtime);
            let ready = item.state == EntryState::Ready;
            let again = ready && item.entry.image.digest().is_none();
            if !ready {
                (item.state, item.message) = (EntryState::Pulling, String::new());
            }
            self.runs += 1;
            let run =
                Run { number: self.runs, stop: CancellationToken::new(), arrived: Arc::default() };
            let Run { stop, arrived, .. } = &run;
            starts.push(Start {
                entry: item.entry.clone(),
                run: run.number,
                again,
                was: item.digest,
                stop: stop.clone(),
                arrived: Arc::clone(arrived),
            });
            item.running = Some(run);
        }
        starts
    }

    /// Images on their way into the store, or soon: from there they are given to the runtime without a copy.
    fn for_store(&self, node: Node<'_>) -> HashSet<Reference> {
        let items = self.items.values().filter(|item| {
            item.entry.target == Target::Store
                && !matches!(
                    item.state,
                    EntryState::Ready | EntryState::Failed | EntryState::NoRoom
                )
                && item.barred(node).is_none()
        });
        items.map(|item| item.entry.image.clone()).collect()
    }

    /// Takes note of how a try ended; `spread` is a number from 0 to 1 that differs between nodes.
    /// True when the entry is still on the list and this was its try: one that left and came back
    /// has a new one.
    pub(super) fn ended(
        &mut self,
        entry: &Entry,
        run: u64,
        ended: Ended,
        now: Instant,
        spread: f64,
    ) -> bool {
        let refresh = self.refresh;
        let own = |item: &&mut Item| item.running.as_ref().is_some_and(|own| own.number == run);
        let key = (entry.image.clone(), entry.target);
        let Some(item) = self.items.get_mut(&key).filter(own) else { return false };
        item.running = None;
        let refreshed = now + refresh.mul_f64(0.75 + spread / 2.0);
        match ended {
            Ended::Here(digest) => {
                item.state = EntryState::Ready;
                item.message.clear();
                item.digest = Some(digest);
                item.retry = FIRST_RETRY;
                // Of a digest there is nothing more to ask.
                item.due = match entry.image.digest() {
                    Some(_) => far(now),
                    None => refreshed,
                };
            }
            Ended::There { digest, note } => {
                item.state = EntryState::Ready;
                item.message = note;
                item.digest = digest;
                item.here_since = SystemTime::now();
                item.retry = FIRST_RETRY;
                // Others may remove it there, whatever its name.
                item.due = refreshed;
            }
            Ended::Stopped => {
                if item.state == EntryState::Pulling {
                    item.state = EntryState::Waiting;
                }
                item.due = now;
            }
            Ended::NoRoom(why) => item.failed(EntryState::NoRoom, why, now),
            Ended::Failed(why) => item.failed(EntryState::Failed, why, now),
        }
        true
    }

    /// The images that are to be pinned; `known` tells what references mean that were not asked about yet.
    pub(super) fn pinned(&self, known: impl Fn(&Reference) -> Option<Digest>) -> HashSet<Digest> {
        let pinned = self
            .items
            .values()
            .filter(|item| item.entry.pin.is_some() && item.entry.target == Target::Store);
        pinned.filter_map(|item| item.digest.or_else(|| known(&item.entry.image))).collect()
    }

    /// The images that are to be pinned in the container runtime, as it calls them.
    pub(super) fn pinned_in_runtime(&self) -> BTreeSet<String> {
        let pinned = self
            .items
            .values()
            .filter(|item| item.entry.pin.is_some() && item.entry.target == Target::Runtime);
        pinned.filter_map(|item| into_runtime::name(&item.entry.image)).collect()
    }

    /// Takes note of what the container runtime had at `listed_at`: what was there and is not any more has
    /// been removed by somebody, who may have had to make room. So it is not brought back at once.
    pub(super) fn look_at_runtime(
        &mut self,
        listed_at: SystemTime,
        now: Instant,
        has: impl Fn(&Reference) -> bool,
    ) {
        for item in self.items.values_mut() {
            let was_there = item.entry.target == Target::Runtime
                && item.state == EntryState::Ready
                && item.running.is_none()
                && listed_at.duration_since(item.here_since).is_ok_and(|age| age > SETTLED);
            if was_there && !has(&item.entry.image) {
                item.state = EntryState::Waiting;
                item.message = REMOVED.into();
                item.due = now + MAX_RETRY;
            }
        }
    }

    /// Whether the container runtime is pulling something, whose progress is told.
    pub(super) fn is_arriving(&self) -> bool {
        let mut items = self.items.values();
        items.any(|item| item.running.is_some() && item.entry.target == Target::Runtime)
    }

    /// When the next entry is due; nothing where none is.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        let due = self.items.values().filter(|item| item.running.is_none()).map(|item| item.due);
        due.filter(|due| *due > now).min()
    }

    /// Whether the wall clock has a say.
    pub(super) fn has_windows(&self) -> bool {
        self.items.values().any(|item| !item.entry.schedule.is_empty())
    }

    /// Where each entry is, in the order of the list.
    pub(super) fn report(&self) -> Vec<EntryReport> {
        let mut items: Vec<&Item> = self.items.values().collect();
        items.sort_by_key(|item| item.order);
        items.into_iter().map(Item::report).collect()
    }

    /// Stops all that runs.
    pub(super) fn stop(&self) {
        self.items
            .values()
            .filter_map(|item| item.running.as_ref())
            .for_each(|run| run.stop.cancel());
    }
}

impl Item {
    /// Why it may not be pulled now, if so.
    fn barred(&self, node: Node<'_>) -> Option<(EntryState, String)> {
        if let Some(why) = self.entry.when.unmet(node.labels, node.gpus) {
            return Some((EntryState::Excluded, why));
        }
        if schedule::is_open(&self.entry.schedule, node.wall) {
            return None;
        }
        let opens = schedule::next_open(&self.entry.schedule, node.wall);
        let why = opens.map_or_else(
            || "outside of its schedule".to_string(),
            |at| format!("outside of its schedule; opens at {at:.0}"),
        );
        Some((EntryState::Waiting, why))
    }

    fn failed(&mut self, state: EntryState, why: String, now: Instant) {
        // One that is here stays so; what its tag means now is not known.
        if self.state != EntryState::Ready {
            self.state = state;
        }
        self.message = why;
        self.due = now + self.retry;
        self.retry = (self.retry * 2).min(MAX_RETRY);
    }

    fn report(&self) -> EntryReport {
        let arrived = || self.running.as_ref()?.arrived.get();
        let message = match (self.state, arrived()) {
            (EntryState::Pulling, Some((bytes, of))) => format!("{} of {}", size(bytes), size(of)),
            _ => self.message.clone(),
        };
        EntryReport {
            name: self.entry.shown(),
            reference: self.entry.image.clone(),
            target: self.entry.target,
            digest: self.digest,
            state: self.state,
            message,
        }
    }
}

/// Never, in practice; an [`Instant`] has no such value.
fn far(now: Instant) -> Instant {
    now + Duration::from_secs(10 * 365 * 86_400)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixtures::no_gpus;
    use std::path::Path;

    struct Bench {
        plan: Plan,
        labels: Labels,
        gpus: std::sync::Arc<GpuInventory>,
        wall: Timestamp,
        now: Instant,
    }

    impl Bench {
        fn new(text: &str) -> Self {
            let now = Instant::now();
            let wall = "2026-03-02T12:00:00Z".parse().unwrap();
            let (labels, gpus) = (Labels::new(), no_gpus());
            let mut bench = Self { plan: Plan::default(), labels, gpus, wall, now };
            bench.adopt(text);
            bench
        }

        fn adopt(&mut self, text: &str) {
            self.plan.adopt(&List::parse(Path::new("/l"), text).unwrap(), self.now);
        }

        fn turn(&mut self) -> Vec<Start> {
            let Self { plan, labels, gpus, wall, now } = self;
            plan.turn(Node { labels, gpus, wall: *wall, now: *now })
        }

        fn names(&mut self) -> Vec<String> {
            self.turn().iter().map(|start| start.entry.image.to_string()).collect()
        }

        fn end(&mut self, start: &Start, ended: Ended) {
            let now = self.now;
            assert!(self.plan.ended(&start.entry, start.run, ended, now, 0.5));
        }

        fn states(&self) -> Vec<EntryState> {
            self.plan.report().iter().map(|entry| entry.state).collect()
        }

        fn pass(&mut self, seconds: u64) {
            self.now += Duration::from_secs(seconds);
        }
    }

    #[test]
    fn higher_priority_goes_first_then_the_order_of_the_list() {
        let mut bench = Bench::new(
            "images: [{image: 'r/a:1'}, {image: 'r/c:1', priority: 9}, {image: 'r/b:1'}]",
        );
        assert_eq!(bench.names(), ["r/c:1", "r/a:1", "r/b:1"].map(full));
        assert!(bench.turn().is_empty(), "each is started once");
    }

    fn full(text: &str) -> String {
        text.parse::<Reference>().unwrap().to_string()
    }

    #[test]
    fn so_many_at_a_time_and_the_next_when_one_ends() {
        let entries: String = (0..20).map(|n| format!("- image: r/a:{n}\n")).collect();
        let mut bench = Bench::new(&format!("images:\n{entries}"));
        let first = bench.turn();
        assert_eq!(first.len(), MAX_RUNNING);
        assert_eq!(bench.plan.report()[10].message, "others go first");
        bench.end(&first[3], Ended::NoRoom("full".into()));
        assert_eq!(bench.names(), [full("r/a:8")], "a smaller one may fit");
        assert_eq!(bench.states()[3], EntryState::NoRoom);
    }

    #[test]
    fn what_failed_is_tried_later_and_later() {
        let mut bench = Bench::new("images: [{image: 'r/a:1'}]");
        for wait in [10, 20, 40, 80, 160, 300, 300] {
            let starts = bench.turn();
            bench.end(&starts[0], Ended::Failed("no route".into()));
            assert_eq!(bench.states(), [EntryState::Failed]);
            assert_eq!(bench.plan.next_due(bench.now), Some(bench.now + Duration::from_secs(wait)));
            bench.pass(wait - 1);
            assert!(bench.turn().is_empty());
            bench.pass(1);
        }
    }

    #[test]
    fn a_tag_is_asked_about_again_and_a_digest_is_not() {
        let digest = Digest::of(b"x");
        let mut bench = Bench::new(&format!(
            "refresh: 100s\nimages: [{{image: 'r/a:1'}}, {{image: 'r/b@{digest}'}}]"
        ));
        for start in bench.turn() {
            assert!(!start.again);
            bench.end(&start, Ended::Here(digest));
        }
        bench.pass(99);
        assert!(bench.turn().is_empty());
        bench.pass(1);
        let again = bench.turn();
        assert_eq!((again.len(), again[0].again), (1, true));
        assert_eq!(bench.states(), [EntryState::Ready; 2], "it is here all the while");
        bench.end(&again[0], Ended::Failed("registry away".into()));
        assert_eq!(bench.states(), [EntryState::Ready; 2]);
        assert_eq!(bench.plan.report()[0].message, "registry away");
    }

    #[test]
    fn a_window_that_shuts_stops_a_pull_and_opens_for_it_again() {
        let text = "images: [{image: 'r/a:1', schedule: [{from: '08:00', to: '13:00'}]}]";
        let mut bench = Bench::new(text);
        let start = bench.turn().remove(0);
        bench.wall = "2026-03-02T13:00:00Z".parse().unwrap();
        assert!(bench.turn().is_empty() && start.stop.is_cancelled());
        bench.end(&start, Ended::Stopped);
        bench.turn();
        let report = bench.plan.report().remove(0);
        assert_eq!(report.state, EntryState::Waiting);
        assert_eq!(report.message, "outside of its schedule; opens at 2026-03-03T08:00:00Z");
        // A clock that is set back is believed.
        bench.wall = "2026-03-02T09:00:00Z".parse().unwrap();
        assert_eq!(bench.turn().len(), 1);
    }

    #[test]
    fn an_entry_for_other_nodes_is_left_alone_until_the_node_is_such() {
        let mut bench = Bench::new("images: [{image: 'r/a:1', when: {labels: {pool: a}}}]");
        assert!(bench.turn().is_empty());
        assert_eq!(bench.states(), [EntryState::Excluded]);
        bench.labels.insert("pool".into(), "a".into());
        assert_eq!(bench.turn().len(), 1);
    }

    #[test]
    fn what_leaves_the_list_is_stopped_and_what_stays_goes_on() {
        let mut bench = Bench::new("images: [{image: 'r/a:1'}, {image: 'r/b:1'}]");
        let starts = bench.turn();
        bench.adopt("images: [{image: 'r/b:1', priority: 3}, {image: 'r/c:1'}]");
        assert!(starts[0].stop.is_cancelled() && !starts[1].stop.is_cancelled());
        assert_eq!(bench.names(), [full("r/c:1")]);
        let (gone, now) = (&starts[0], bench.now);
        assert!(!bench.plan.ended(&gone.entry, gone.run, Ended::Stopped, now, 0.0));
        // It comes back, and the end of the earlier try is not taken for its own.
        bench.adopt("images: [{image: 'r/a:1'}]");
        assert_eq!(bench.names(), [full("r/a:1")]);
        assert!(!bench.plan.ended(&gone.entry, gone.run, Ended::Stopped, now, 0.0));
        assert_eq!(bench.states(), [EntryState::Pulling]);
    }

    #[test]
    fn the_runtime_pulls_two_at_a_time_and_the_store_goes_on_beside_it() {
        let of = |target: &str| {
            (0..6)
                .map(|n| format!("- {{image: 'r/{target}:{n}', target: {target}}}\n"))
                .collect::<String>()
        };
        let mut bench = Bench::new(&format!("images:\n{}{}", of("runtime"), of("store")));
        let first = bench.turn();
        let by_runtime = |starts: &[Start]| {
            starts.iter().filter(|start| start.entry.target == Target::Runtime).count()
        };
        assert_eq!((first.len(), by_runtime(&first)), (8, MAX_RUNNING_RUNTIME));
        assert!(bench.plan.is_arriving());
        let there = |note: &str| Ended::There { digest: None, note: note.into() };
        bench.end(&first[0], there("unpinned"));
        let states = bench.states();
        assert_eq!((states[0], states[6]), (EntryState::Ready, EntryState::Pulling));
        assert_eq!(bench.plan.report()[0].message, "unpinned");
        assert_eq!(by_runtime(&bench.turn()), 1);
    }

    #[test]
    fn an_image_for_both_places_comes_into_the_store_first() {
        let mut bench = Bench::new("images: [{image: 'r/a:1', target: runtime}, {image: 'r/a:1'}]");
        let first = bench.turn();
        assert_eq!((first.len(), first[0].entry.target), (1, Target::Store));
        assert_eq!(bench.plan.report()[0].message, STORE_FIRST);
        assert!(bench.turn().is_empty());
        // Where it does not come, the runtime does not wait for ever.
        bench.end(&first[0], Ended::NoRoom("full".into()));
        let then = bench.turn();
        assert_eq!((then.len(), then[0].entry.target), (1, Target::Runtime));
    }

    #[test]
    fn what_is_removed_from_the_runtime_is_brought_back_after_a_while() {
        let digest = Digest::of(b"x");
        let mut bench = Bench::new(&format!(
            "refresh: 2000s\nimages: [{{image: 'r/a@{digest}', target: runtime, pin: forever}}]"
        ));
        let name = full(&format!("r/a@{digest}"));
        assert_eq!(bench.plan.pinned_in_runtime().into_iter().collect::<Vec<_>>(), [name]);
        assert!(bench.plan.pinned(|_| Some(digest)).is_empty(), "the store has no pin of it");
        let start = bench.turn().remove(0);
        bench.end(&start, Ended::There { digest: Some(digest), note: String::new() });
        let now = SystemTime::now();
        let look = |bench: &mut Bench, seconds: u64, has: bool| {
            let at = now + Duration::from_secs(seconds);
            bench.plan.look_at_runtime(at, bench.now, |_| has);
            bench.states()[0]
        };
        assert_eq!(look(&mut bench, 3, false), EntryState::Ready, "a list that is too old to tell");
        assert_eq!(look(&mut bench, 30, true), EntryState::Ready);
        assert_eq!(look(&mut bench, 60, false), EntryState::Waiting);
        assert!(bench.turn().is_empty(), "somebody may have had to make room");
        assert_eq!(bench.plan.report()[0].message, REMOVED);
        bench.pass(300);
        assert!(!bench.turn()[0].again);
    }
}
