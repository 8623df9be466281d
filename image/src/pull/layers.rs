//! One layer: waited for in turn, planned, fetched, unpacked.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::arrive::{Origin, Shown, only};
use super::flight::{Flight, Flights};
use super::meter::Meter;
use super::skip::Subject;
use super::slots::Urgency;
use super::{Inner, PullError};
use crate::digest::Digest;
use crate::layer::{LayerError, Plan, Resumed};
use crate::manifest::Layer;
use crate::source::Source;
use crate::store::Ingest;

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
    /// What can be read of it already, where it is to be read before it is complete.
    pub(super) shown: Shown,
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
        (layer, diff_id): Key,
        chain: Option<Digest>,
        urgency: &Urgency,
        stream: bool,
    ) -> LayerFlight {
        self.layers.join(&(layer, diff_id), |stop| {
            let state = LayerState {
                meter: Arc::new(Meter::new(Instant::now())),
                // Its own: another pull's hurry is not this one's.
                urgency: Arc::new(Urgency::new(urgency.get())),
                shown: Shown::default(),
            };
            let (inner, source, shown) = (Arc::clone(self), Arc::clone(source), state.clone());
            let work = async move {
                let _tracked = inner.tasks.token();
                let mut skip = true;
                loop {
                    let bringing = async {
                        match stream {
                            true => {
                                inner.stream_layer(&source, layer, diff_id, &shown, &stop).await
                            }
                            false => Ok(None),
                        }
                    };
                    let done = match bringing.await {
                        Ok(Some(done)) => Ok(done),
                        Err(error) => Err(error),
                        Ok(None) => {
                            let (key, skip) = ((layer, diff_id), (&mut skip, chain));
                            inner.bring_layer(&source, key, &shown, skip, &stop).await
                        }
                    };
                    match &done {
                        // Somebody has read of it; a second try would not make that right.
                        Err(error) if shown.shown.borrow().is_some() => {
                            if matches!(error, PullError::Mismatch(_)) {
                                source.distrust(&layer.blob.digest);
                            }
                            return done;
                        }
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

    /// Brings a layer in so that it can be read meanwhile; `None` where it must come in whole.
    async fn stream_layer(
        &self,
        source: &Arc<dyn Source>,
        layer: Layer,
        diff_id: Option<Digest>,
        state: &LayerState,
        stop: &CancellationToken,
    ) -> Result<Option<LayerDone>, PullError> {
        let from = Origin { source, layer, state };
        let digest = layer.blob.digest;
        let stopped =
            || PullError::Cancelled(format!("layer {digest}: stopped, will go on where it was"));
        let listed = async {
            // No slot: it must be seen at once. Not all at the same time, though.
            let _look = self.looks.acquire().await;
            let Some(ingest) = self.disk(move |store| store.ingest(&digest)).await? else {
                return Ok(None);
            };
            let Some(ingest) = self.missing(ingest, layer, diff_id, state).await? else {
                return Ok(Some(Err(LayerDone::default())));
            };
            if ingest.has_checkpoint() {
                // It was begun in order, and goes on so.
                return Ok(None);
            }
            let ingest = Arc::new(ingest);
            let listed = self.list(&ingest, from, diff_id).await?;
            Ok::<_, PullError>(listed.map(|arrival| Ok((ingest, arrival))))
        };
        let listed = tokio::select! {
            () = stop.cancelled() => return Err(stopped()),
            listed = listed => listed?,
        };
        let (ingest, arrival) = match listed {
            None => {
                // What came to find that out comes again.
                state.meter.begin_again();
                return Ok(None);
            }
            Some(Err(done)) => return Ok(Some(done)),
            Some(Ok(listed)) => listed,
        };
        state.shown.send_replace(Some(Arc::clone(&arrival)));
        let stopped = async {
            stop.cancelled().await;
            stopped()
        };
        let bringing = self.bring_listed(ingest, &arrival, from, None, stopped);
        bringing.await.map(Some)
    }

    /// The right to bring a layer in, given back where it is here.
    async fn missing(
        &self,
        ingest: Ingest,
        layer: Layer,
        diff_id: Option<Digest>,
        state: &LayerState,
    ) -> Result<Option<Ingest>, PullError> {
        let missing = self.disk(move |store| {
            if store.layer_as(&layer, diff_id.as_ref())?.is_some() {
                ingest.discard()?;
                return Ok(None);
            }
            Ok(Some(ingest))
        });
        let missing = missing.await?;
        if missing.is_none() {
            state.meter.skip(layer.blob.size);
        }
        Ok(missing)
    }

    /// `skip`: whether what is here may be used; afterwards, whether it was. Beside it the layer's name in
    /// the container runtime.
    async fn bring_layer(
        &self,
        source: &Arc<dyn Source>,
        (layer, diff_id): Key,
        state: &LayerState,
        (skip, chain): (&mut bool, Option<Digest>),
        stop: &CancellationToken,
    ) -> Result<LayerDone, PullError> {
        let digest = layer.blob.digest;
        let may_skip = std::mem::take(skip);
        let stopped =
            || PullError::Cancelled(format!("layer {digest}: stopped, will go on where it was"));

        let (slot, ingest) = loop {
            let slot = tokio::select! {
                () = stop.cancelled() => return Err(stopped()),
                slot = self.slots.take(&state.urgency) => slot,
            };
            if let Some(ingest) = self.disk(move |store| store.ingest(&digest)).await? {
                break (slot, ingest);
            }
            // Another worker is at it, who may need the slot himself.
            drop(slot);
            tokio::select! {
                () = stop.cancelled() => return Err(stopped()),
                () = tokio::time::sleep(OTHER_PROCESS_POLL) => {}
            }
        };
        // Somebody may have finished it while this one waited for its turn.
        let Some(mut ingest) = self.missing(ingest, layer, diff_id, state).await? else {
            return Ok(LayerDone::default());
        };
        // It was begun out of order, and goes on so.
        if ingest.has_landed() {
            let from = Origin { source, layer, state };
            let shared = Arc::new(ingest);
            let listed = tokio::select! {
                () = stop.cancelled() => return Err(stopped()),
                listed = self.list(&shared, from, diff_id) => listed?,
            };
            if let Some(arrival) = listed {
                let stopped = async {
                    stop.cancelled().await;
                    stopped()
                };
                return self.bring_listed(shared, &arrival, from, Some(slot), stopped).await;
            }
            ingest = self.disk(move |_| only(shared)).await?;
        }
        let resumed = self.disk(move |_| Resumed::open(ingest, layer, diff_id));
        let mut resumed = resumed.await?;

        let offset = resumed.offset();
        if offset > 0 {
            tracing::info!(layer = %digest, offset, "going on with a layer");
        }
        state.meter.skip(offset);
        let outset = resumed.outset();
        let plan = if may_skip {
            let (source, state) = (Arc::clone(source), state.clone());
            self.plan(Subject { source, layer, diff_id, chain, outset, state }, stop).await
        } else {
            Plan::plain(offset..layer.blob.size)
        };
        let ranges = plan.network();
        let objects: HashSet<_> = plan.locals().filter_map(|local| local.object).collect();
        *skip = plan.locals().next().is_some();
        let adopted = plan.locals().filter(|local| local.object.is_none());
        let adopted_bytes = adopted.map(|local| local.size).sum();
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
            (Ok(Ok(done)), _) => {
                if let Some(runtime) = self.sources.runtime() {
                    runtime.count(adopted_bytes);
                }
                Ok(LayerDone {
                    fetched_bytes: state.meter.read(Instant::now()).fetched_bytes,
                    written_bytes: done.written_bytes,
                })
            }
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
