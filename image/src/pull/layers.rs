//! One layer: waited for in turn, planned, fetched, unpacked.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::flight::{Flight, Flights};
use super::meter::Meter;
use super::skip::Subject;
use super::slots::Urgency;
use super::{Inner, PullError};
use crate::digest::Digest;
use crate::layer::{LayerError, Plan, Resumed};
use crate::manifest::Layer;
use crate::source::Source;

/// Chunks between network and layer; their memory counts in the window.
const QUEUE: usize = 64;

/// How often a layer that another process brings in is looked at.
const OTHER_PROCESS_POLL: Duration = Duration::from_millis(200);

/// What a layer cost.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct LayerDone {
    pub(super) fetched_bytes: u64,
    pub(super) written_bytes: u64,
}

/// What others see of a layer on its way, and how they hurry it.
#[derive(Debug, Clone)]
pub(super) struct LayerState {
    pub(super) meter: Arc<Meter>,
    pub(super) urgency: Arc<Urgency>,
}

/// Two images may disagree on how a layer is read and what it unpacks to; of the latter one is wrong.
type Key = (Layer, Option<Digest>);
pub(super) type LayerFlights = Flights<Key, Result<LayerDone, PullError>, LayerState>;
pub(super) type LayerFlight = Flight<Key, Result<LayerDone, PullError>, LayerState>;

impl Inner {
    /// Joins the layer's fetch in flight, or starts it from `source`.
    pub(super) fn start_layer(
        self: &Arc<Self>,
        source: &Arc<dyn Source>,
        layer: Layer,
        diff_id: Option<Digest>,
        urgency: &Urgency,
    ) -> LayerFlight {
        self.layers.join(&(layer, diff_id), |stop| {
            let state = LayerState {
                meter: Arc::new(Meter::new(Instant::now())),
                // Its own: another pull's hurry is not this one's.
                urgency: Arc::new(Urgency::new(urgency.get())),
            };
            let (inner, source, shown) = (Arc::clone(self), Arc::clone(source), state.clone());
            let work = async move {
                let _tracked = inner.tasks.token();
                let mut skip = true;
                loop {
                    let bringing =
                        inner.bring_layer(&source, layer, diff_id, &shown, &mut skip, &stop);
                    let done = bringing.await;
                    match &done {
                        Err(error @ (PullError::Mismatch(_) | PullError::Unpack(_))) if skip => {
                            tracing::warn!(
                                layer = %layer.blob.digest, %error,
                                "what is here is something else: fetching the layer whole"
                            );
                            skip = false;
                        }
                        // A mirror that lied is not asked again.
                        Err(error @ PullError::Mismatch(_))
                            if source.distrust(&layer.blob.digest) =>
                        {
                            tracing::warn!(layer = %layer.blob.digest, %error, "asking elsewhere");
                        }
                        Ok(_) => {
                            let skipped = shown.meter.read(Instant::now()).skipped_bytes;
                            inner.skipped.fetch_add(skipped, Ordering::Relaxed);
                            return done;
                        }
                        _ => return done,
                    }
                    shown.meter.begin_again();
                }
            };
            // Of several pulls that wait for it the log names the first.
            (state, work.in_current_span())
        })
    }

    /// `skip`: whether what is here may be used; afterwards, whether it was.
    async fn bring_layer(
        &self,
        source: &Arc<dyn Source>,
        layer: Layer,
        diff_id: Option<Digest>,
        state: &LayerState,
        skip: &mut bool,
        stop: &CancellationToken,
    ) -> Result<LayerDone, PullError> {
        let digest = layer.blob.digest;
        let may_skip = std::mem::take(skip);
        let stopped =
            || PullError::Cancelled(format!("layer {digest}: stopped, will go on where it was"));

        let _slot = tokio::select! {
            () = stop.cancelled() => return Err(stopped()),
            slot = self.slots.take(&state.urgency) => slot,
        };
        let ingest = loop {
            if let Some(ingest) = self.disk(move |store| store.ingest(&digest)).await? {
                break ingest;
            }
            // Another process is at it.
            tokio::select! {
                () = stop.cancelled() => return Err(stopped()),
                () = tokio::time::sleep(OTHER_PROCESS_POLL) => {}
            }
        };
        // Somebody may have finished it while this one waited for its turn.
        let present = self.disk(move |store| {
            let there = store.layer_as(&layer, diff_id.as_ref())?.is_some();
            if there {
                ingest.discard()?;
                return Ok(None);
            }
            Resumed::open(ingest, layer, diff_id).map(Some)
        });
        let Some(mut resumed) = present.await? else {
            state.meter.skip(layer.blob.size);
            return Ok(LayerDone::default());
        };

        let offset = resumed.offset();
        if offset > 0 {
            tracing::info!(layer = %digest, offset, "going on with a layer");
        }
        state.meter.skip(offset);
        let outset = resumed.outset();
        let plan = if may_skip {
            let (source, state) = (Arc::clone(source), state.clone());
            self.plan(Subject { source, layer, diff_id, outset, state }, stop).await
        } else {
            Plan::plain(offset..layer.blob.size)
        };
        let ranges = plan.network();
        let objects: HashSet<_> = plan.locals().map(|local| local.object).collect();
        *skip = !objects.is_empty();
        resumed.follow(plan);
        let (sender, mut chunks) = mpsc::channel(QUEUE);
        let unpacking =
            self.tasks.spawn_blocking(move || resumed.unpack(|| chunks.blocking_recv()));
        let source = Arc::clone(source);
        let fetching = self.fetcher.fetch(source, layer.blob, ranges, state.clone(), sender);
        let fetched = tokio::select! {
            () = stop.cancelled() => Err(stopped()),
            fetched = fetching => fetched,
        };
        // The queue is closed now, so the thread ends by itself.
        let unpacked = unpacking.await;
        let name = |why: String| format!("layer {digest}: {why}");
        if matches!(&unpacked, Ok(Err(LayerError::Mismatch(_) | LayerError::Refused(_)))) {
            self.suspect(objects).await;
        }
        match (unpacked, fetched) {
            (Ok(Ok(done)), _) => Ok(LayerDone {
                fetched_bytes: state.meter.read(Instant::now()).fetched_bytes,
                written_bytes: done.written_bytes,
            }),
            (Ok(Err(LayerError::Stopped(_))), Err(why)) => Err(why),
            (Ok(Err(LayerError::Stopped(at))), Ok(())) => {
                Err(PullError::Cancelled(name(format!("ended at byte {at}"))))
            }
            (Ok(Err(LayerError::Mismatch(why))), _) => Err(PullError::Mismatch(name(why))),
            (Ok(Err(LayerError::Refused(why))), _) => Err(PullError::Unpack(name(why))),
            (Ok(Err(LayerError::Store(error))), _) => Err(error.into()),
            (Err(panic), _) => Err(PullError::Unpack(name(format!("unpacking died: {panic}")))),
        }
    }
}
