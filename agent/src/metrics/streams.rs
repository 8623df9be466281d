//! Streaming volumes, as the driver's part for them tells.

use carport_csi::stream::Event;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{FAILURE_REASONS, ReasonLabel, ResultLabel, StateLabel};

/// Sessions, and what became of their mounts.
#[derive(Debug, Clone)]
pub struct StreamMetrics {
    sessions: Family<StateLabel, Gauge>,
    failures: Family<ReasonLabel, Counter>,
    mounts: Family<ResultLabel, Counter>,
}

const TURNED: ResultLabel = ResultLabel { result: "turned" };
const LEFT: ResultLabel = ResultLabel { result: "left" };

impl StreamMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            sessions: Family::default(),
            failures: Family::default(),
            mounts: Family::default(),
        };
        for state in ["arriving", "complete", "failed"] {
            metrics.set(state, 0);
        }
        for reason in FAILURE_REASONS {
            let _ = metrics.failures.get_or_create(&ReasonLabel { reason });
        }
        for result in [TURNED, LEFT] {
            let _ = metrics.mounts.get_or_create(&result);
        }
        registry.register(
            "stream_sessions",
            "Images that are served while they arrive, and complete ones that are still open",
            metrics.sessions.clone(),
        );
        registry.register(
            "stream_failures",
            "Pulls of streamed images that failed, by reason",
            metrics.failures.clone(),
        );
        registry.register(
            "stream_mounts",
            "Mounts of streamed images that were replaced under running pods, and tries that left one",
            metrics.mounts.clone(),
        );
        metrics
    }

    fn set(&self, state: &str, count: usize) {
        let gauge = self.sessions.get_or_create(&StateLabel { state: state.into() });
        gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// Counts what has happened.
    pub fn observe(&self, event: &Event<'_>) {
        match event {
            Event::Sessions { arriving, complete, failed } => {
                self.set("arriving", *arriving);
                self.set("complete", *complete);
                self.set("failed", *failed);
            }
            Event::Failed { reason } => {
                if let Some(reason) = FAILURE_REASONS.into_iter().find(|known| known == reason) {
                    self.failures.get_or_create(&ReasonLabel { reason }).inc();
                }
            }
            Event::Turned { mounts, left } => {
                self.mounts.get_or_create(&TURNED).inc_by(*mounts as u64);
                self.mounts.get_or_create(&LEFT).inc_by(*left as u64);
            }
        }
    }
}
