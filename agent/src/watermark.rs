//! Keeps the store below its watermark: after pulls, and twice a minute.
//!
//! ```text
//! a pull ends ─┬─► above the high watermark? ─► what nobody uses, then idle images ─► metrics, log
//! a tick ──────┘
//! ```
//!
//! What goes, and in which order, is decided in `carport-image`; pulls make room for themselves
//! there. Here is only the time at which somebody looks.

use std::sync::Arc;
use std::time::Duration;

use carport_image::Puller;
use carport_image::store::{Evicted, Store, StoreError};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;

/// Other processes pull into the store, too, and others fill its file system.
const TICK: Duration = Duration::from_secs(30);
/// Pulls that end together are one look.
const SPACING: Duration = Duration::from_secs(1);

/// Looks until `stop`.
pub async fn run(puller: Puller, metrics: Arc<Metrics>, stop: CancellationToken) {
    let mut changes = puller.changes();
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut in_vain = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = tick.tick() => {}
            // Where nothing was left to evict, a pull's stages are no reason to walk the store.
            changed = changes.changed(), if !in_vain => {
                if changed.is_err() {
                    return;
                }
            }
        }
        let (store, measured) = (puller.store().clone(), Arc::clone(&metrics));
        let looked = tokio::task::spawn_blocking(move || look(&store, &measured));
        match looked.await {
            Ok(Ok(above)) => {
                if above && !in_vain {
                    tracing::warn!(
                        "the store is above its high watermark and has nothing left to evict: unpin \
                         or remove images, or raise store.quota"
                    );
                }
                in_vain = above;
            }
            Ok(Err(error)) => tracing::error!(%error, "keep the store below its watermark"),
            Err(panic) => tracing::error!(%panic, "keep the store below its watermark"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(SPACING) => {}
        }
    }
}

/// Makes room where that is needed; true when the store is above its high watermark all the same.
fn look(store: &Store, metrics: &Metrics) -> Result<bool, StoreError> {
    let Evicted { images, collected } = store.keep_below_watermark()?;
    if collected.bytes > 0 {
        let (images, bytes) = (images.len(), collected.bytes);
        tracing::info!(images, bytes, objects = collected.objects, "made room in the store");
    }
    metrics.store.observe(store)?;
    let space = store.space()?;
    let part = space.used_bytes as f64 / space.limit_bytes.max(1) as f64;
    Ok(part > store.limits().high)
}
