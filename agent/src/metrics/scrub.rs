//! What the scrub read and found.

use std::time::{SystemTime, UNIX_EPOCH};

use carport_image::store::VerifyProgress;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::signed;

/// The scrub.
#[derive(Debug, Clone, Default)]
pub struct ScrubMetrics {
    bytes: Counter,
    damaged: Counter,
    repaired: Counter,
    finished: Gauge,
}

impl ScrubMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register("scrub_bytes", "Bytes that the scrub read", metrics.bytes.clone());
        registry.register(
            "scrub_damaged",
            "Damaged files and records that the scrub found",
            metrics.damaged.clone(),
        );
        registry.register(
            "scrub_repaired",
            "Of these, those that it repaired",
            metrics.repaired.clone(),
        );
        registry.register(
            "scrub_finished_timestamp_seconds",
            "When the last round of the scrub ended; before the first, when the store was made",
            metrics.finished.clone(),
        );
        metrics
    }

    /// Counts what happened between two looks at a round.
    pub fn observe(&self, before: &VerifyProgress, now: &VerifyProgress) {
        self.bytes.inc_by(now.bytes.saturating_sub(before.bytes));
        self.damaged.inc_by(now.damaged.saturating_sub(before.damaged));
        self.repaired.inc_by(now.repaired.saturating_sub(before.repaired));
    }

    /// When the last round ended.
    pub fn finished(&self, at: SystemTime) {
        let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.finished.set(signed(since.as_secs()));
    }
}
