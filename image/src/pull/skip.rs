//! Skip before download: which parts of a layer the store has already.
//!
//! ```text
//! layer, what the store has by size ─► scout: a few small reads ─► Plan ─► fetch what is missing
//! ```
//!
//! What is looked at ([`scout`]) depends on the layer:
//!
//! - *an uncompressed tar*: its headers one after the other; where a stored object has a file's
//!   size, a few samples of both are compared; and where the container runtime has the layer unpacked,
//!   the file of that path and size is taken for it;
//! - *zstd:chunked and eStargz* ([`super::toc`]): the table of contents, whose digests are compared with
//!   those of stored objects;
//! - *a raw file*: objects of its size, by SHA-256 where that is known or cheap, and by samples;
//! - anything else has no places to look at, and is fetched.
//!
//! # What always holds
//!
//! - **Nothing here is trusted.** A plan is a guess, which the digest over the whole layer proves or
//!   refutes ([`crate::layer::Plan`]). Whatever a source says here costs at most a plain fetch.
//! - **Looking costs less than it can save**: where the store has nothing of a fitting size nothing
//!   is asked, and requests, bytes, and local reads are bounded.
//! - **No byte is fetched twice**: what came while looking becomes part of the plan.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use futures_util::future::join_all;
use tokio_util::sync::CancellationToken;

use super::Inner;
use super::arrive::Shown;
use super::layers::LayerState;
use super::meter::Meter;
use super::slots::{Priority, Urgency};
use crate::digest::{Digest, ObjectId};
use crate::layer::tar::Parser;
use crate::layer::{Outset, Plan, Told, overlaps};
use crate::manifest::{Compression, Content, Layer, PlacedLayer};
use crate::runtime::chain_ids;
use crate::source::Source;
use crate::store::{BySize, MIN_FILE_BYTES, Store};

mod alike;
mod scout;

pub(super) use alike::{HASH_BUDGET_BYTES, HASHED_BYTES, first_linked, is_known, is_like, of_size};
use scout::Scout;

/// Layers that are looked at side by side, before any is begun.
const LOOKS: usize = 4;

/// What a plan is made for.
pub(super) struct Subject {
    pub(super) source: Arc<dyn Source>,
    pub(super) layer: Layer,
    pub(super) diff_id: Option<Digest>,
    /// What the container runtime calls the layer over those below it.
    pub(super) chain: Option<Digest>,
    pub(super) outset: Outset,
    pub(super) state: LayerState,
}

impl Inner {
    /// Where the layer's bytes are to come from: the network alone, if need be.
    ///
    /// # Cancel safety
    ///
    /// Ends at once when `stop` is cancelled, with the plan as it is then.
    pub(super) async fn plan(&self, subject: Subject, stop: &CancellationToken) -> Plan {
        let Subject { source, layer, diff_id, chain, outset, state } = subject;
        let rest = outset.offset..layer.blob.size;
        if rest.end - rest.start < MIN_FILE_BYTES {
            return Plan::plain(rest);
        }
        let snapshot = match (layer.content, layer.compression, chain, self.sources.runtime()) {
            (Content::Tar, Compression::None, Some(chain), Some(runtime)) => {
                runtime.snapshot(&chain, &self.store).await.map(Arc::new)
            }
            _ => None,
        };
        let by_size = match self.by_size(&layer).await {
            Some(by_size) => by_size,
            None if snapshot.is_some() => Arc::default(),
            None => return Plan::plain(rest),
        };
        let mut scout = Scout::new(self, source, layer, outset.folder, by_size, state.clone());
        scout.snapshot = snapshot;
        let looking = async {
            match (layer.content, layer.compression, outset.parser) {
                (Content::Tar, Compression::None, Some(parser)) => {
                    scout.walk(parser, outset.begun).await
                }
                (Content::Tar, Compression::Gzip | Compression::Zstd, _) if diff_id.is_some() => {
                    scout.table(rest.start).await
                }
                (Content::File, Compression::None, _) if rest.start == 0 => scout.raw(false).await,
                _ => Ok(()),
            }
        };
        let looked = tokio::select! {
            () = stop.cancelled() => Ok(()),
            looked = looking => looked,
        };
        if let Err(why) = looked {
            tracing::debug!(layer = %layer.blob.digest, why, "looking no further for what is here");
        }
        let Scout { held, locals, end, snapshot, .. } = scout;
        // A look that was cut off may have it still.
        if let Some(snapshot) = snapshot.and_then(Arc::into_inner) {
            snapshot.end().await;
        }
        // Only with local files can the rest of the blob be left out.
        let end = if locals.is_empty() { rest.end } else { end };
        let known: u64 = overlaps(&(end..rest.end), &held).map(|(part, _)| length(&part)).sum();
        state.meter.skip(rest.end - end - known);
        if !locals.is_empty() {
            let bytes: u64 = locals.iter().map(|local| local.size).sum();
            tracing::info!(layer = %layer.blob.digest, files = locals.len(), bytes, "found here already");
        }
        let stop = stop.clone();
        let told: Told = Arc::new(move |bytes| {
            state.meter.skip(bytes);
            !stop.is_cancelled()
        });
        Plan::of(rest.start..end, locals, &held, told)
    }

    /// What the store has by size; nothing where it has nothing, or cannot tell.
    pub(super) async fn by_size(&self, layer: &Layer) -> Option<Arc<BySize>> {
        let sizes = Arc::clone(&self.sizes);
        let by_size = self.disk(move |store| {
            store.refresh(&mut sizes.lock().unwrap_or_else(PoisonError::into_inner))
        });
        match by_size.await {
            Ok(by_size) => Some(by_size).filter(|by_size| !by_size.is_empty()),
            Err(error) => {
                tracing::warn!(layer = %layer.blob.digest, %error, "not looking for what is here");
                None
            }
        }
    }

    /// The object that a raw layer is, by its SHA-256, linked into `folder`.
    pub(super) async fn known_raw(
        &self,
        source: &Arc<dyn Source>,
        layer: Layer,
        folder: &Path,
        state: &LayerState,
    ) -> Option<(String, ObjectId)> {
        if layer.blob.size < MIN_FILE_BYTES {
            return None;
        }
        let by_size = self.by_size(&layer).await?;
        let (source, folder) = (Arc::clone(source), folder.to_owned());
        let mut scout = Scout::new(self, source, layer, folder, by_size, state.clone());
        if let Err(why) = scout.raw(true).await {
            tracing::debug!(layer = %layer.blob.digest, why, "not looking for what is here");
        }
        scout.locals.pop().and_then(|local| Some((local.name, local.object?)))
    }

    /// Lowers what `coming` says of missing layers to what would be fetched of each, where the store
    /// has the rest. Nothing is kept of it but the figure.
    ///
    /// # Cancel safety
    ///
    /// What has not been looked at keeps its figure.
    pub(super) async fn lower(
        &self,
        source: &Arc<dyn Source>,
        layers: &[PlacedLayer],
        coming: &mut BTreeMap<String, u64>,
    ) {
        let chains = chains(layers);
        let mut missing: Vec<_> = layers.iter().map(PlacedLayer::key).zip(chains).collect();
        missing.sort_unstable();
        missing.dedup_by_key(|(key, _)| *key);
        missing.retain(|((layer, _), _)| coming.contains_key(&layer.record_name()));
        for some in missing.chunks(LOOKS) {
            let mut looks = Vec::new();
            for (key, chain) in some {
                looks.push(self.would_fetch(source, *key, *chain));
            }
            for (((layer, _), _), bytes) in some.iter().zip(join_all(looks).await) {
                if let (Some(figure), Some(bytes)) = (coming.get_mut(&layer.record_name()), bytes) {
                    *figure = bytes.min(*figure);
                }
            }
        }
    }

    /// What of a layer would be fetched, if it were begun now; `None` where that cannot be told.
    async fn would_fetch(
        &self,
        source: &Arc<dyn Source>,
        (layer, diff_id): (Layer, Option<Digest>),
        chain: Option<Digest>,
    ) -> Option<u64> {
        // Candidates are linked, so that they stay while they are looked at.
        let folder = self.disk(Store::scratch).await.ok()?;
        let outset = Outset {
            folder: folder.path().to_owned(),
            offset: 0,
            parser: (layer.content == Content::Tar).then(Parser::new),
            begun: None,
        };
        let state = LayerState {
            meter: Arc::new(Meter::new(Instant::now())),
            urgency: Arc::new(Urgency::new(Priority::Demand)),
            shown: Shown::default(),
        };
        let source = Arc::clone(source);
        let subject = Subject { source, layer, diff_id, chain, outset, state };
        let plan = self.plan(subject, &CancellationToken::new()).await;
        // What is taken over counts towards a quota, though it costs the disk nothing.
        let has_quota = self.store.limits().quota_bytes.is_some();
        let adopted = plan.locals().filter(|local| has_quota && local.object.is_none());
        let adopted_bytes: u64 = adopted.map(|local| local.size).sum();
        let network_bytes: u64 = plan.network().iter().map(length).sum();
        let bytes = network_bytes + plan.held() + adopted_bytes;
        // Removing it is disk work, too; a failure leaves it to the next start.
        let removed = move |_: &Store| {
            drop(folder);
            Ok(())
        };
        let _ = self.disk(removed).await;
        Some(bytes)
    }

    /// After a plan turned out wrong: takes away those of its objects that are damaged, since a
    /// layer that brings them again could not replace them.
    pub(super) async fn suspect(&self, objects: HashSet<ObjectId>) {
        for object in objects {
            match self.disk(move |store| store.drop_if_damaged(&object)).await {
                Ok(true) => tracing::error!(
                    %object,
                    "an object is damaged on the disk and is fetched again; images that were made \
                     of it keep it"
                ),
                Ok(false) => {}
                Err(error) => tracing::warn!(%object, %error, "cannot look at an object"),
            }
        }
    }
}

/// What the container runtime calls each layer over those below it, where the image says what they
/// unpack to.
pub(super) fn chains(layers: &[PlacedLayer]) -> Vec<Option<Digest>> {
    let diff_ids: Option<Vec<Digest>> = layers.iter().map(|placed| placed.diff_id).collect();
    match diff_ids {
        Some(diff_ids) => chain_ids(diff_ids).into_iter().map(Some).collect(),
        None => vec![None; layers.len()],
    }
}

fn length(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

#[cfg(test)]
#[path = "skip/tests.rs"]
mod tests;
