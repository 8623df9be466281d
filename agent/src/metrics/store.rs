//! What the store was asked to keep, and what went to make room.

use carport_image::store::{Reason, Store, StoreError};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{raise, signed};

/// Pins, reservations and evictions, as the watermark's task last saw them.
#[derive(Debug)]
pub struct StoreMetrics {
    quota: Gauge,
    pins: Gauge,
    reserved: Gauge,
    evictions: Family<ReasonLabel, Counter>,
    evicted: Family<ReasonLabel, Counter>,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

impl StoreMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            quota: Gauge::default(),
            pins: Gauge::default(),
            reserved: Gauge::default(),
            evictions: Family::default(),
            evicted: Family::default(),
        };
        for reason in Reason::ALL.map(Reason::as_str) {
            let _ = metrics.evictions.get_or_create(&ReasonLabel { reason });
            let _ = metrics.evicted.get_or_create(&ReasonLabel { reason });
        }
        registry.register(
            "store_quota_bytes",
            "What the store may take; 0 where only its file system limits it",
            metrics.quota.clone(),
        );
        registry.register("pins", "Pins whose time is not over", metrics.pins.clone());
        registry.register(
            "store_reserved_bytes",
            "Room that reservations keep free",
            metrics.reserved.clone(),
        );
        registry.register(
            "evictions",
            "Images evicted by this agent, by reason",
            metrics.evictions.clone(),
        );
        registry.register(
            "evicted_bytes",
            "Bytes that went with images evicted by this agent, by reason",
            metrics.evicted.clone(),
        );
        metrics
    }

    /// Takes the figures of `store`. Reads small files.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn observe(&self, store: &Store) -> Result<(), StoreError> {
        self.quota.set(signed(store.limits().quota_bytes.unwrap_or(0)));
        for reason in Reason::ALL {
            let (count, label) = (store.evictions(reason), ReasonLabel { reason: reason.as_str() });
            raise(&self.evictions.get_or_create(&label), count.images);
            raise(&self.evicted.get_or_create(&label), count.bytes);
        }
        self.pins.set(signed(store.pins()?.len() as u64));
        let reserved =
            store.reservations()?.iter().fold(0, |sum: u64, one| sum.saturating_add(one.bytes));
        self.reserved.set(signed(reserved));
        Ok(())
    }
}
