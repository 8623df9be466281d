//! What the agent measures: one table of `carport_*` metrics.
//!
//! Counters and histograms are fed where things happen; gauges are read from the node's state
//! when somebody scrapes. Labels take a few fixed values: no digest, tag or pod; they exist
//! from the start, so that a rate over them does not begin with a gap. Those of single GPUs
//! come and go with them.
//! `docs/metrics.md` describes each; a test holds it true.

use std::sync::{Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use carport_image::pull::{PullProgress, PullState, Traffic};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::Registry;

use crate::gpu::ProviderState;
use crate::placement::gpus::by_health;
use crate::prepull::{EntryReport, EntryState};
use crate::state::{NodeState, in_flight, same_pull};

mod connections;
mod gpus;
mod runtime;
mod scrub;
mod store;
mod streams;
mod volumes;

pub use connections::ConnectionMetrics;
use gpus::GpuMetrics;
#[cfg(test)]
pub(crate) use gpus::tests::one_gpu;
pub use runtime::RuntimeMetrics;
pub use scrub::ScrubMetrics;
pub use store::StoreMetrics;
pub use streams::StreamMetrics;
pub use volumes::VolumeMetrics;

/// What an OpenMetrics scraper expects to be told.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All metrics of the agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    node: NodeMetrics,
    /// Held while gauges are set and written out: what vanished must not be seen missing.
    scrape: Mutex<()>,
    /// Pulls.
    pub pulls: PullMetrics,
    /// The pre-pull list.
    pub prepull: PrepullMetrics,
    /// Publishes and unpublishes.
    pub volumes: VolumeMetrics,
    /// Streaming volumes.
    pub streams: StreamMetrics,
    /// What the store was asked to keep, and what went.
    pub store: StoreMetrics,
    /// The scrub.
    pub scrub: ScrubMetrics,
    /// What came from the container runtime.
    pub runtime: RuntimeMetrics,
    /// Connections, sockets, and the kubelet's calls.
    pub connections: ConnectionMetrics,
}

/// Pulls of this agent, whoever asked for them.
#[derive(Debug, Clone)]
pub struct PullMetrics {
    ended: Family<ResultLabel, Counter>,
    failures: Family<ReasonLabel, Counter>,
    bytes: Counter,
    skipped: Counter,
    seconds: Histogram,
    in_flight: Gauge,
}

/// The pre-pull list.
#[derive(Debug, Clone)]
pub struct PrepullMetrics {
    entries: Family<StateLabel, Gauge>,
    valid: Gauge,
    reads: Family<ResultLabel, Counter>,
}

/// Gauges that are read from the node's state.
#[derive(Debug)]
struct NodeMetrics {
    images: Gauge,
    volumes: Gauge,
    capacity: Gauge,
    free: Gauge,
    used: Gauge,
    unused: Gauge,
    unpacked: Gauge,
    objects: Gauge,
    gpus: Family<StateLabel, Gauge>,
    provider: Family<StateLabel, Gauge>,
    each_gpu: GpuMetrics,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabel {
    state: String,
}

const DONE: ResultLabel = ResultLabel { result: "done" };
const FAILED: ResultLabel = ResultLabel { result: "failed" };
const CANCELLED: ResultLabel = ResultLabel { result: "cancelled" };

/// Why pulls fail: what `PullError::reason` says, but for `cancelled`, which is no failure.
const FAILURE_REASONS: [&str; 11] = [
    "not_found",
    "denied",
    "throttled",
    "unavailable",
    "invalid",
    "mismatch",
    "unsupported",
    "refused",
    "no_space",
    "store",
    "not_stored",
];

/// States of entries of the pre-pull list.
const ENTRY_STATES: [EntryState; 6] = [
    EntryState::Waiting,
    EntryState::Excluded,
    EntryState::Pulling,
    EntryState::Ready,
    EntryState::NoRoom,
    EntryState::Failed,
];

const PROVIDER_STATES: [ProviderState; 9] = [
    ProviderState::Ok,
    ProviderState::NoLibrary,
    ProviderState::NoDriver,
    ProviderState::NoDevices,
    ProviderState::NoPermission,
    ProviderState::VersionMismatch,
    ProviderState::Stale,
    ProviderState::Disabled,
    ProviderState::Error,
];

/// From a small model on loopback to a large one over a slow line.
const PULL_SECONDS: [f64; 10] = [0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 180.0, 600.0, 1800.0, 7200.0];

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("carport");
        let info = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The agent's version", info);
        let pulls = PullMetrics::new(&mut registry);
        let prepull = PrepullMetrics::new(&mut registry);
        let volumes = VolumeMetrics::new(&mut registry);
        let streams = StreamMetrics::new(&mut registry);
        let store = StoreMetrics::new(&mut registry);
        let scrub = ScrubMetrics::new(&mut registry);
        let runtime = RuntimeMetrics::new(&mut registry);
        let connections = ConnectionMetrics::new(&mut registry);
        let node = NodeMetrics::new(&mut registry);
        Self {
            registry,
            node,
            scrape: Mutex::default(),
            pulls,
            prepull,
            volumes,
            streams,
            store,
            scrub,
            runtime,
            connections,
        }
    }
}

impl Metrics {
    /// All metrics as OpenMetrics text: the gauges as `state` has them, and what was pulled as `traffic` does.
    ///
    /// # Errors
    ///
    /// Never in practice: writing to a string does not fail.
    pub fn encode(&self, state: &NodeState, traffic: Traffic) -> Result<String, std::fmt::Error> {
        let _scrape = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        self.node.read(state);
        raise(&self.pulls.bytes, traffic.fetched_bytes);
        raise(&self.pulls.skipped, traffic.skipped_bytes);
        raise(&self.pulls.ended.get_or_create(&CANCELLED), traffic.cancelled_pulls);
        let mut text = String::with_capacity(8 * 1024);
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

impl PullMetrics {
    fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            ended: Family::default(),
            failures: Family::default(),
            bytes: Counter::default(),
            skipped: Counter::default(),
            seconds: Histogram::new(PULL_SECONDS),
            in_flight: Gauge::default(),
        };
        for label in [DONE, FAILED, CANCELLED] {
            let _ = metrics.ended.get_or_create(&label);
        }
        for reason in FAILURE_REASONS {
            let _ = metrics.failures.get_or_create(&ReasonLabel { reason });
        }
        registry.register("pulls", "Pulls that ended, by result", metrics.ended.clone());
        registry.register(
            "pull_failures",
            "Pulls that ended without success, by reason",
            metrics.failures.clone(),
        );
        registry.register(
            "pull_bytes",
            "Bytes of layers that came from registries and folders, as they travel (compressed)",
            metrics.bytes.clone(),
        );
        registry.register(
            "pull_skipped_bytes",
            "Bytes of layers that did not have to come, since the store had them",
            metrics.skipped.clone(),
        );
        registry.register(
            "pull_seconds",
            "Duration of pulls that succeeded",
            metrics.seconds.clone(),
        );
        registry.register("pulls_in_flight", "Pulls under way", metrics.in_flight.clone());
        metrics
    }

    /// Counts what happened between two looks at the puller's pulls. Of pulls that have left
    /// the list since, see [`PullMetrics::done`].
    pub fn observe(&self, before: &[PullProgress], now: &[PullProgress]) {
        for pull in now {
            let earlier = before.iter().find(|earlier| same_pull(earlier, pull));
            let was_in_flight = earlier.is_none_or(in_flight);
            if let (true, PullState::Failed { reason, .. }) = (was_in_flight, &pull.state) {
                self.ended.get_or_create(&FAILED).inc();
                self.failures.get_or_create(&ReasonLabel { reason }).inc();
            }
        }
        let running = now.iter().filter(|pull| in_flight(pull)).count();
        self.in_flight.set(signed(running as u64));
    }

    /// A pull that was last seen as `pull` has succeeded.
    pub fn done(&self, pull: &PullProgress) {
        self.ended.get_or_create(&DONE).inc();
        let elapsed = SystemTime::now().duration_since(pull.started_at).unwrap_or_default();
        self.seconds.observe(elapsed.as_secs_f64());
    }
}

impl PrepullMetrics {
    fn new(registry: &mut Registry) -> Self {
        let metrics =
            Self { entries: Family::default(), valid: Gauge::default(), reads: Family::default() };
        metrics.entries(&[]);
        for label in [DONE, FAILED] {
            let _ = metrics.reads.get_or_create(&label);
        }
        registry.register(
            "prepull_entries",
            "Entries of the pre-pull list, by state",
            metrics.entries.clone(),
        );
        registry.register(
            "prepull_list_valid",
            "1 while the pre-pull list as it stands is in force; 0 while it cannot be read and an \
             older one is, or none is configured",
            metrics.valid.clone(),
        );
        registry.register(
            "prepull_list_reads",
            "How often a new content of the pre-pull list was read, by result",
            metrics.reads.clone(),
        );
        metrics
    }

    /// The list was read, or could not be.
    pub fn list_read(&self, valid: bool) {
        self.valid.set(valid.into());
        self.reads.get_or_create(if valid { &DONE } else { &FAILED }).inc();
    }

    /// How many entries are in each state.
    pub fn entries(&self, entries: &[EntryReport]) {
        for state in ENTRY_STATES {
            let count = entries.iter().filter(|entry| entry.state == state).count();
            let label = StateLabel { state: state.as_str().into() };
            self.entries.get_or_create(&label).set(signed(count as u64));
        }
    }
}

impl NodeMetrics {
    fn new(registry: &mut Registry) -> Self {
        let gpus = Family::default();
        let provider = Family::default();
        registry.register("gpus", "GPUs, by health", gpus.clone());
        registry.register(
            "gpu_provider",
            "What stands between the agent and the GPUs: 1 for the state that holds",
            provider.clone(),
        );
        let each_gpu = GpuMetrics::new(registry);
        let mut gauge = |name: &str, help: &str| {
            let gauge = Gauge::default();
            registry.register(name, help, gauge.clone());
            gauge
        };
        Self {
            images: gauge("images", "Complete images in the store"),
            volumes: gauge("volumes", "Published volumes"),
            capacity: gauge("store_capacity_bytes", "Size of the store's file system"),
            free: gauge("store_free_bytes", "Free on the store's file system"),
            used: gauge("store_used_bytes", "Disk taken by objects"),
            unused: gauge("store_unused_bytes", "Disk taken by objects that no image uses"),
            unpacked: gauge(
                "store_image_bytes",
                "Size of all images, unpacked, each counted in full; less store_used_bytes it is \
                 what sharing saves",
            ),
            objects: gauge("store_objects", "Files of distinct content in the store"),
            gpus,
            provider,
            each_gpu,
        }
    }

    fn read(&self, state: &NodeState) {
        self.images.set(signed(state.images.len() as u64));
        let volumes: usize = state.volumes.values().map(Vec::len).sum();
        self.volumes.set(signed(volumes as u64));
        self.capacity.set(signed(state.usage.capacity_bytes));
        self.free.set(signed(state.usage.free_bytes));
        self.used.set(signed(state.usage.object_bytes));
        self.unused.set(signed(state.usage.unused_bytes));
        self.unpacked.set(signed(state.usage.image_bytes));
        self.objects.set(signed(state.usage.objects));
        let gpus = state.gpus.as_of(Instant::now());
        for (health, count) in by_health(&gpus.gpus) {
            let label = StateLabel { state: health.to_string() };
            self.gpus.get_or_create(&label).set(signed(count as u64));
        }
        for provider in PROVIDER_STATES {
            let label = StateLabel { state: provider.to_string().replace(' ', "_") };
            let holds = provider == gpus.provider.state;
            self.provider.get_or_create(&label).set(holds.into());
        }
        self.each_gpu.read(&gpus);
    }
}

/// Brings a counter to what somebody else has counted.
fn raise(counter: &Counter, to: u64) {
    counter.inc_by(to.saturating_sub(counter.get()));
}

fn signed(n: u64) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::fixtures::{image, node, pull};
    use std::path::Path;

    #[test]
    fn the_document_names_every_metric_and_no_other() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md");
        let document = std::fs::read_to_string(path).unwrap();
        // A family without GPUs is not written.
        let mut state = node(vec![]);
        state.gpus = one_gpu();
        let text = Metrics::default().encode(&state, Traffic::default()).unwrap();
        let mut described: Vec<String> = Vec::new();
        for line in text.lines().filter(|line| line.starts_with("# TYPE ")) {
            let mut words = line.split(' ').skip(2);
            let (name, kind) = (words.next().unwrap(), words.next().unwrap());
            let name = match kind {
                "counter" => format!("{name}_total"),
                "info" => format!("{name}_info"),
                _ => name.to_string(),
            };
            let row = format!("| `{name}` | {kind} | ");
            assert!(document.contains(&row), "docs/metrics.md lacks {row}");
            described.push(name);
        }
        for line in document.lines().filter(|line| line.starts_with("| `carport_")) {
            let name = line.split('`').nth(1).unwrap();
            assert!(described.iter().any(|known| known == name), "there is no metric {name}");
        }
    }

    #[test]
    fn gauges_are_those_of_the_state() {
        let text =
            Metrics::default().encode(&node(vec![image("r/a:1", 7)]), Traffic::default()).unwrap();
        for line in [
            "carport_images 1",
            "carport_store_free_bytes 600",
            "carport_gpu_provider{state=\"disabled\"} 1",
            "carport_gpu_provider{state=\"ok\"} 0",
            "carport_gpus{state=\"lost\"} 0",
            "# EOF",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
    }

    #[test]
    fn a_pull_is_counted_once_and_bytes_as_the_puller_has_them() {
        let metrics = Metrics::default();
        let steps = [
            vec![pull("r/a:1", 10, 100), pull("r/b:1", 0, 0)],
            vec![pull("r/a:1", 60, 100), {
                let mut failed = pull("r/b:1", 5, 50);
                failed.state = PullState::Failed { reason: "denied", message: "denied".into() };
                failed
            }],
        ];
        metrics.pulls.observe(&[], &steps[0]);
        metrics.pulls.observe(&steps[0], &steps[1]);
        // The failed one stays listed for a while, the other one has gone.
        metrics.pulls.observe(&steps[1], &steps[1][1..]);
        metrics.pulls.done(&steps[1][0]);
        let traffic = |fetched_bytes| Traffic {
            fetched_bytes,
            skipped_bytes: 2 * fetched_bytes,
            cancelled_pulls: fetched_bytes,
        };
        metrics.encode(&node(vec![]), traffic(50)).unwrap();
        let text = metrics.encode(&node(vec![]), traffic(105)).unwrap();
        for line in [
            "carport_pull_bytes_total 105",
            "carport_pull_skipped_bytes_total 210",
            "carport_pulls_total{result=\"done\"} 1",
            "carport_pulls_total{result=\"failed\"} 1",
            "carport_pulls_total{result=\"cancelled\"} 105",
            "carport_pull_failures_total{reason=\"denied\"} 1",
            "carport_pull_failures_total{reason=\"no_space\"} 0",
            "carport_pulls_in_flight 0",
            "carport_pull_seconds_count 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
    }

    #[test]
    fn calls_are_counted_by_operation_and_code() {
        use carport_csi::{Call, Operation};
        let metrics = Metrics::default();
        let elapsed = std::time::Duration::from_millis(7);
        for (operation, code) in [
            (Operation::Publish, tonic::Code::Ok),
            (Operation::Publish, tonic::Code::DeadlineExceeded),
            (Operation::Unpublish, tonic::Code::Ok),
        ] {
            metrics.volumes.observe(&Call { operation, code, elapsed });
        }
        let text = metrics.encode(&node(vec![]), Traffic::default()).unwrap();
        for line in [
            "carport_volume_calls_total{operation=\"publish\",code=\"OK\"} 1",
            "carport_volume_calls_total{operation=\"publish\",code=\"DEADLINE_EXCEEDED\"} 1",
            "carport_volume_calls_total{operation=\"unpublish\",code=\"ABORTED\"} 0",
            "carport_volume_call_seconds_count{operation=\"publish\"} 2",
            "carport_volume_call_seconds_bucket{le=\"0.005\",operation=\"unpublish\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in {text}");
        }
    }

    #[test]
    fn the_reasons_of_failures_exist_from_the_start() {
        use carport_image::PullError;
        use carport_image::source::SourceError;
        use carport_image::store::StoreError;
        let why = || "why".to_string();
        let throttled = SourceError::Throttled { message: why(), retry_after: None };
        for error in [
            PullError::Source(SourceError::NotFound(why())),
            PullError::Source(SourceError::Denied(why())),
            PullError::Source(throttled),
            PullError::Source(SourceError::Unavailable(why())),
            PullError::Source(SourceError::Invalid(why())),
            PullError::Mismatch(why()),
            PullError::Unpack(why()),
            PullError::from(StoreError::NoSpace { what: why() }),
            PullError::from(StoreError::Corrupt(why())),
            PullError::NotStored(why()),
        ] {
            assert!(FAILURE_REASONS.contains(&error.reason()), "{error:?}");
        }
    }
}
