//! What came from the container runtime.

use carport_image::runtime::RuntimeUse;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;

/// Blobs and bytes that need not be fetched because the container runtime had them.
#[derive(Debug, Clone, Default)]
pub struct RuntimeMetrics {
    blobs: Counter,
    bytes: Counter,
}

impl RuntimeMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        registry.register(
            "runtime_blobs",
            "Manifests, configs and layers that the container runtime had",
            metrics.blobs.clone(),
        );
        registry.register(
            "runtime_bytes",
            "Bytes that were read there instead of being fetched",
            metrics.bytes.clone(),
        );
        metrics
    }

    /// Takes what was used so far.
    pub fn observe(&self, used: RuntimeUse) {
        let raise = |counter: &Counter, to: u64| {
            counter.inc_by(to.saturating_sub(counter.get()));
        };
        raise(&self.blobs, used.blobs);
        raise(&self.bytes, used.bytes);
    }
}
