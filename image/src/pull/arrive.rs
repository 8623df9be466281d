//! A layer that is read while it arrives: listed first, then fetched in the order in which it is wanted.
//!
//! ```text
//! list: a few reads ─► Landing ─┬─ asked for: fetched at once, whatever else is under way ─┐
//!                               ├─ the rest, in a slot like any other layer ───────────────┼─► its place
//!                               ├─ verifier: reads along, in the blob's order ◄────────────┘   on the disk
//!                               └─ save: what is synced, every 16 MiB
//! ```
//!
//! Which bytes are where is [`crate::layer::Landing`]'s to know; compressed layers with a table of contents
//! are [`packed`]. Files of other layers are used where their SHA-256 says that they are the same
//! ([`known`]), and not by samples: such a guess is proved by the whole layer's digest only, and a reader must
//! not be handed a guess.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use tokio::sync::watch;

use super::layers::{LayerDone, LayerState};
use super::slots::Slot;
use super::{Inner, PullError};
use crate::crash;
use crate::digest::{Digest, ObjectId};
use crate::layer::{End, Landed, Landing, LayerError, Lister, Listing, Piece, Ranges, Verifier};
use crate::manifest::{Compression, Content, Layer};
use crate::source::Source;
use crate::store::{Ingest, LayerRecord, StoreError};

mod known;
mod packed;
mod rounds;

/// Bytes that are hashed before anybody looks whether to stop.
const VERIFY_BYTES: u64 = 64 * 1024 * 1024;

/// A layer's list and bytes.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) listing: Listing,
    pub(super) landing: Landing,
    /// What all of it must hash to: the diff_id, which of an uncompressed layer is its digest.
    proof: Digest,
    /// Stored objects that are files of it.
    linked: HashSet<ObjectId>,
}

/// Where a layer shows what can be seen of it before it is complete; nothing, where it must be waited
/// for.
pub(super) type Shown = Arc<watch::Sender<Option<Arc<Arrival>>>>;

/// Where a layer comes from.
#[derive(Clone, Copy)]
pub(super) struct Origin<'a> {
    pub(super) source: &'a Arc<dyn Source>,
    pub(super) layer: Layer,
    pub(super) state: &'a LayerState,
}

/// Tells readers of the end also where the work is dropped.
struct Ending<'a>(&'a Arrival, Digest);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.landing.end(End::Stopped(format!("layer {}: stopped", self.1)));
    }
}

impl Inner {
    /// Lists a layer; `None` where it cannot be read before it is complete. What came stays in the
    /// ingest folder, but for what a full disk could not take.
    pub(super) async fn list(
        &self,
        ingest: &Arc<Ingest>,
        from: Origin<'_>,
        diff_id: Option<Digest>,
    ) -> Result<Option<Arc<Arrival>>, PullError> {
        let mut listed = self.try_list(ingest, from, diff_id).await;
        if let Ok(Some(arrival)) = &listed {
            let more = arrival.landing.size().saturating_sub(from.layer.blob.size);
            let folder = Arc::clone(ingest);
            if more > 0
                && let Err(error) = self.disk(move |_| folder.make_room(more)).await
            {
                listed = Err(error);
            }
        }
        if let Err(PullError::Store(_)) = &listed {
            let ingest = Arc::clone(ingest);
            self.disk(move |_| ingest.clear()).await?;
        }
        listed
    }

    async fn try_list(
        &self,
        ingest: &Arc<Ingest>,
        from: Origin<'_>,
        diff_id: Option<Digest>,
    ) -> Result<Option<Arc<Arrival>>, PullError> {
        let Origin { source, layer, state } = from;
        let digest = layer.blob.digest;
        match (layer.compression, diff_id) {
            _ if layer.blob.size == 0 => return Ok(None),
            (Compression::None, Some(diff_id)) if diff_id != digest => return Ok(None),
            (Compression::None, _) => {}
            // Not all bytes of the blob will be seen, so something else is to prove it.
            (_, Some(diff_id)) if layer.content == Content::Tar => {
                return self.list_packed(ingest, from, diff_id).await;
            }
            _ => return Ok(None),
        }
        let folder = Arc::clone(ingest);
        let here = self.disk(move |_| left(&folder, None)).await?;
        let known = match layer.content {
            Content::File => self.known_raw(source, layer, ingest.folder(), state).await,
            Content::Tar => None,
        };
        let linked = known.iter().map(|(_, object)| *object).collect();
        let (folder, link) = (Arc::clone(ingest), known.map(|(name, _)| name));
        let lister = self.disk(move |_| Lister::new(folder.folder(), layer, here, link));
        let mut lister = lister.await?;
        while let Some(range) = lister.next_read() {
            let at = range.start;
            let Some(bytes) = self.read_listed(from, range).await? else { return Ok(None) };
            let taken = self.disk(move |_| Ok(lister.take(at, &bytes).map(|()| lister)));
            lister = match taken.await? {
                Ok(lister) => lister,
                Err(error) => return unlisted(digest, error),
            };
        }
        arrives(digest, lister.finish(), digest, linked)
    }

    /// Reads a part of the layer that its list needs; nothing, and a word about it, where no ranges are served.
    async fn read_listed(
        &self,
        Origin { source, layer, state }: Origin<'_>,
        range: Range<u64>,
    ) -> Result<Option<Bytes>, PullError> {
        let read = self.fetcher.read(Arc::clone(source), layer.blob, range, state.clone()).await?;
        if read.is_none() {
            let digest = layer.blob.digest;
            tracing::warn!(layer = %digest, source = source.name(), "no ranges are served");
        }
        Ok(read)
    }

    /// Fetches, verifies and commits a layer that has been listed. Where somebody streams it, a source that
    /// is away and a full disk are waited out ([`rounds`]). `slot` is waited for where absent;
    /// what is asked for does not wait for it.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future ends the readers' waits; what was not saved is lost.
    pub(super) async fn bring_listed(
        &self,
        ingest: Arc<Ingest>,
        arrival: &Arc<Arrival>,
        from: Origin<'_>,
        slot: Option<Slot>,
        stopped: impl Future<Output = PullError>,
    ) -> Result<LayerDone, PullError> {
        let Origin { layer, state, .. } = from;
        let digest = layer.blob.digest;
        let _ending = Ending(arrival, digest);
        // Part of it has come, and was counted, while it was listed.
        state.meter.stand_at(match layer.compression {
            Compression::None => arrival.landing.here_bytes(),
            _ => layer.blob.size.saturating_sub(arrival.landing.missing_frames_bytes()),
        });
        let outcome = {
            let rest = self.bring_rest(&ingest, arrival, from, slot);
            let verified = async { tokio::try_join!(rest, self.read_along(arrival, layer)) };
            tokio::select! {
                verified = verified => verified.map(|((), verifier)| verifier),
                why = stopped => Err(why),
            }
        };
        let verifier = match outcome {
            Ok(verifier) => verifier,
            Err(PullError::Mismatch(why)) => {
                return Err(self.is_wrong(ingest, arrival, digest, why).await?);
            }
            Err(error) => {
                arrival.landing.end(End::Stopped(error.to_string()));
                let (arrival, why) = (Arc::clone(arrival), error.to_string());
                let saved = self.disk(move |_| {
                    // Nothing is written any more when the next pull begins.
                    arrival.landing.give_back(&why);
                    arrival.landing.save(&ingest)
                });
                let saved = saved.await;
                if let Err(error) = saved {
                    tracing::warn!(layer = %digest, %error, "cannot keep what came");
                }
                return Err(error);
            }
        };
        let (found, proof) = (verifier.digest(), arrival.proof);
        if found != proof {
            let why = match layer.compression {
                Compression::None => format!(
                    "layer {digest}: its {} bytes hash to {found}: the source altered them",
                    layer.blob.size
                ),
                _ => format!(
                    "layer {digest}: unpacks to {found}, but the image's config says diff_id {proof}: \
                     the source altered it, or the image is broken"
                ),
            };
            return Err(self.is_wrong(ingest, arrival, digest, why).await?);
        }
        let ready = Arc::clone(arrival);
        let written_bytes = self
            .disk(move |store| {
                let staged = verifier.finish(&ready.landing, store.root())?;
                crash::point("a layer that came out of order is verified");
                let mut objects = staged.iter().map(|staged| staged.object);
                let entries = ready
                    .listing
                    .entries(|file| objects.next().unwrap_or(ready.listing.stand_in(file)));
                let record = LayerRecord {
                    digest,
                    size_bytes: layer.blob.size,
                    diff_id: proof,
                    entries,
                    attributes: ready.listing.attributes(),
                };
                let name = match layer.compression {
                    Compression::None => layer.record_name(),
                    _ => layer.record_name_as(&proof),
                };
                let written = staged.iter().filter(|staged| !ready.linked.contains(&staged.object));
                let written_bytes = written.map(|staged| staged.size).sum();
                only(ingest)?.commit(name, record, staged)?;
                ready.landing.end(End::Verified);
                Ok(written_bytes)
            })
            .await?;
        let fetched_bytes = state.meter.read(Instant::now()).fetched_bytes;
        Ok(LayerDone { fetched_bytes, written_bytes })
    }

    /// Takes a layer back that readers have seen.
    async fn is_wrong(
        &self,
        ingest: Arc<Ingest>,
        arrival: &Arc<Arrival>,
        layer: Digest,
        why: String,
    ) -> Result<PullError, PullError> {
        tracing::error!(%layer, why, "what readers were given is wrong: nothing of this layer is \
            readable any more, start again what has read it");
        arrival.landing.end(End::Wrong(why.clone()));
        let (shared, told) = (Arc::clone(arrival), why.clone());
        let discarded = self.disk(move |_| {
            // Nothing is written any more when the next pull begins.
            shared.landing.give_back(&told);
            only(ingest)?.discard()
        });
        discarded.await?;
        self.suspect(arrival.linked.clone()).await;
        Ok(PullError::Mismatch(why))
    }

    async fn bring_piece(
        &self,
        arrival: &Arc<Arrival>,
        from: Origin<'_>,
        piece: Piece,
    ) -> Result<(), PullError> {
        let Origin { source, layer, state } = from;
        let digest = layer.blob.digest;
        if layer.compression != Compression::None {
            return self.bring_frames(arrival, from, piece).await;
        }
        let (memory, round) = (piece.range.end - piece.range.start, piece.round);
        let land = |at, chunks: Vec<_>| {
            let arrival = Arc::clone(arrival);
            self.disk(move |_| {
                let landed = arrival.landing.land(round, at, &chunks);
                landed.map_err(|e| StoreError::io(format!("write layer {digest}"), e))
            })
        };
        self.fetcher.piece(source, layer.blob, piece, memory, state, land).await
    }

    /// Reads the layer from its start as it comes.
    async fn read_along(
        &self,
        arrival: &Arc<Arrival>,
        layer: Layer,
    ) -> Result<Verifier, PullError> {
        let mut verifier = Verifier::new();
        while verifier.at() < arrival.landing.size() {
            let here = arrival.landing.run_from(verifier.at()).await;
            let end = here.min(verifier.at() + VERIFY_BYTES);
            let arrival = Arc::clone(arrival);
            let read = self.disk(move |_| {
                let read = verifier.read(&arrival.landing, end);
                read.map_err(|e| StoreError::io(format!("read layer {}", layer.blob.digest), e))?;
                Ok(verifier)
            });
            verifier = read.await?;
        }
        Ok(verifier)
    }
}

/// What an earlier pull left of a layer that came out of order, by the same table of contents if it is
/// compressed; and nothing else.
fn left(ingest: &Ingest, table: Option<Digest>) -> Result<Ranges, StoreError> {
    match ingest.landed::<Landed>().filter(|landed| landed.table == table) {
        Some(landed) => Ok(landed.here),
        None => ingest.clear().map(|()| Ranges::default()),
    }
}

/// A layer whose list is complete, or cannot be.
fn arrives(
    layer: Digest,
    listed: Result<(Listing, Landing), LayerError>,
    proof: Digest,
    linked: HashSet<ObjectId>,
) -> Result<Option<Arc<Arrival>>, PullError> {
    match listed {
        Ok((listing, landing)) => Ok(Some(Arc::new(Arrival { listing, landing, proof, linked }))),
        Err(error) => unlisted(layer, error),
    }
}

/// Something is wrong with the list; what, the layer's digest tells, so it comes in whole.
fn unlisted<T>(layer: Digest, error: LayerError) -> Result<Option<T>, PullError> {
    match error {
        LayerError::Store(error) => Err(error.into()),
        error => {
            tracing::warn!(%layer, %error, "cannot be listed before it is here");
            Ok(None)
        }
    }
}

/// A save that was given up may still hold it for a moment.
pub(super) fn only(mut ingest: Arc<Ingest>) -> Result<Ingest, StoreError> {
    loop {
        match Arc::try_unwrap(ingest) {
            Ok(ingest) => return Ok(ingest),
            Err(shared) => ingest = shared,
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
