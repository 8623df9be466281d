//! One pull, from its reference to its tree.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio_util::sync::CancellationToken;

use super::board::Entry;
use super::fetch::retry;
use super::layers::{LayerDone, LayerFlight};
use super::skip::chains;
use super::{Inner, PullError, PullPolicy, PullRequest, PullState, Pulled};
use crate::digest::Digest;
use crate::manifest::{Blob, ImageManifest, Manifest, PlacedLayer};
use crate::reference::Reference;
use crate::source::{Audience, ManifestName, RawManifest, Source, SourceError};
use crate::store::{Admission, Lease, NewTree, RefRecord, Store, StoreError, StoredLayer};
use crate::tree::Tree;

/// How often a tree that another process makes is looked at.
const OTHER_PROCESS_POLL: Duration = Duration::from_millis(100);

/// Layers up to here are first where somebody reads meanwhile.
const SMALL_BYTES: u64 = 1024 * 1024;

/// What a reference means: the digest the source gave, and the image chosen from it.
pub(super) struct Resolved {
    pub(super) resolved: Digest,
    pub(super) image: ImageManifest,
    pub(super) manifest: RawManifest,
}

impl Inner {
    /// Runs the pull; ends early when `stop` is cancelled.
    pub(super) async fn pull(
        self: &Arc<Self>,
        request: &PullRequest,
        entry: &Entry,
        stop: &CancellationToken,
    ) -> Result<Pulled, PullError> {
        let reference = &request.reference;
        let stopped =
            || PullError::Cancelled(format!("pull {reference}: stopped, will go on where it was"));
        if self.stop.is_cancelled() {
            return Err(stopped());
        }
        let outcome = tokio::select! {
            () = stop.cancelled() => Err(stopped()),
            outcome = self.run(request, entry) => outcome,
        };
        match &outcome {
            Ok(pulled) => tracing::info!(
                %reference,
                digest = %pulled.digest,
                fetched_bytes = pulled.fetched_bytes,
                written_bytes = pulled.written_bytes,
                "image is here"
            ),
            Err(PullError::Cancelled(_)) => {
                if stop.is_cancelled() && !self.stop.is_cancelled() {
                    self.cancelled.fetch_add(1, Ordering::Relaxed);
                }
                tracing::info!(%reference, "pull stopped");
            }
            Err(error) => tracing::warn!(%reference, %error, "pull failed"),
        }
        outcome
    }

    async fn run(
        self: &Arc<Self>,
        request: &PullRequest,
        entry: &Entry,
    ) -> Result<Pulled, PullError> {
        let reference = &request.reference;
        let (here, known) = self.known(request).await?;
        match (request.policy, here) {
            (PullPolicy::IfNotPresent | PullPolicy::Never, Some(digest)) => {
                self.entitled(request, digest).await?;
                return self.present(request, digest).await;
            }
            (PullPolicy::Never, None) => {
                return Err(PullError::NotStored(format!(
                    "image {reference} is not on this node, and the pull policy Never forbids to fetch it"
                )));
            }
            _ => {}
        }

        let source = self.sources.open(reference, &request.secret)?;
        let mut name = reference.name();
        if let (ManifestName::Tag(_), Some(digest), Some(known)) = (&name, here, &known) {
            let now = retry(self.attempts, "resolve", || source.resolve(&name)).await?;
            if now == known.resolved {
                if source.audience() == Audience::Nobody {
                    self.entitled(request, digest).await?;
                }
                self.granted(&*source, request, digest).await?;
                return self.present(request, digest).await;
            }
            name = ManifestName::Digest(now);
        }
        let found = self.resolve(&*source, &name, request).await?;
        let digest = found.image.digest;
        if source.audience() == Audience::Nobody {
            self.entitled(request, digest).await?;
        }
        let record = RefRecord {
            reference: reference.to_string(),
            resolved: found.resolved,
            platform: request.platform.clone(),
            image: digest,
            resolved_at: SystemTime::now(),
        };
        entry.set(|stage| {
            stage.digest = Some(digest);
            stage.total_bytes = found.image.download_bytes();
            stage.state = PullState::Pulling;
        });
        let mut cost = None;
        // Kept to the end: until then nobody evicts the image.
        let mut _lease = None;
        if self.disk(move |store| store.image_unnamed(&digest)).await?.is_none() {
            let (brought, lease) = self.bring_image(&source, &found, request, entry).await?;
            (cost, _lease) = (Some(brought), Some(lease));
        }
        self.disk(move |store| store.put_reference(&record)).await?;
        self.granted(&*source, request, digest).await?;
        let mut pulled = self.present(request, digest).await?;
        if let Some(cost) = cost {
            pulled.fetched_bytes = cost.fetched_bytes;
            pulled.written_bytes = cost.written_bytes;
            pulled.already_present = false;
        }
        Ok(pulled)
    }

    /// The stored image that the request means without asking anybody, and what its reference
    /// was resolved to.
    pub(super) async fn known(
        &self,
        request: &PullRequest,
    ) -> Result<(Option<Digest>, Option<RefRecord>), PullError> {
        let asked = request.reference.clone();
        let (here, known) =
            self.disk(move |store| Ok((store.lookup(&asked)?, store.reference(&asked)?))).await?;
        // A record for another platform says nothing of this one.
        let here =
            here.filter(|_| known.as_ref().is_none_or(|known| known.platform == request.platform));
        Ok((here, known))
    }

    pub(super) async fn present(
        &self,
        request: &PullRequest,
        digest: Digest,
    ) -> Result<Pulled, PullError> {
        let (reference, pin) = (request.reference.clone(), request.pin.clone());
        let here = self.disk(move |store| {
            // First of all: who evicts looks at both once more before the image goes.
            store.touch(&digest);
            if let Some(pin) = pin {
                store.pin(&digest, Some(&reference), &pin)?;
            }
            store.image_unnamed(&digest)
        });
        let image = here.await?.ok_or_else(|| {
            PullError::Cancelled(format!(
                "image {digest} was removed at this moment: pull it again"
            ))
        })?;
        Ok(Pulled { digest, image, fetched_bytes: 0, written_bytes: 0, already_present: true })
    }

    pub(super) async fn resolve(
        &self,
        source: &dyn Source,
        name: &ManifestName,
        request: &PullRequest,
    ) -> Result<Resolved, PullError> {
        let top = self.manifest(source, name).await?;
        let resolved = top.digest();
        let (manifest, parsed) = match Manifest::parse(&top)? {
            Manifest::Index(index) => {
                let chosen = index.choose(&request.platform)?;
                let manifest = self.manifest(source, &ManifestName::Digest(chosen)).await?;
                let parsed = Manifest::parse(&manifest)?;
                (manifest, parsed)
            }
            image @ Manifest::Image(_) => (top, image),
        };
        match parsed {
            Manifest::Image(image) => Ok(Resolved { resolved, image, manifest }),
            Manifest::Index(_) => {
                Err(SourceError::Invalid(format!("index {resolved}: names another index")).into())
            }
        }
    }

    pub(super) async fn manifest(
        &self,
        source: &dyn Source,
        name: &ManifestName,
    ) -> Result<RawManifest, PullError> {
        let raw = retry(self.attempts, "fetch manifest", || source.manifest(name)).await?;
        match name {
            ManifestName::Digest(digest) if raw.digest() != *digest => {
                Err(PullError::Mismatch(format!(
                    "manifest {digest}: {} served bytes that hash to {}",
                    source.name(),
                    raw.digest()
                )))
            }
            _ => Ok(raw),
        }
    }

    /// A blob that is small enough to hold.
    pub(super) async fn config(
        &self,
        source: &dyn Source,
        blob: Blob,
    ) -> Result<Vec<u8>, PullError> {
        let fetch = || async {
            let mut bytes = Vec::new();
            if blob.size > 0 {
                let mut body = source.blob(&blob.digest, blob.size, 0..blob.size).await?;
                while let Some(chunk) = body.stream.next().await {
                    bytes.extend_from_slice(&chunk?);
                    if bytes.len() as u64 > blob.size {
                        break;
                    }
                }
            }
            // What is chunked may end early without a word.
            if (bytes.len() as u64) < blob.size {
                let (have, size) = (bytes.len(), blob.size);
                return Err(SourceError::Unavailable(format!(
                    "config {}: {} ended it at byte {have} of {size}",
                    blob.digest,
                    source.name()
                )));
            }
            Ok::<_, SourceError>(bytes)
        };
        let mut bytes = retry(self.attempts, "fetch config", fetch).await?;
        // A mirror that lied is not asked again.
        while Digest::of(&bytes) != blob.digest && source.distrust(&blob.digest) {
            bytes = retry(self.attempts, "fetch config", fetch).await?;
        }
        if Digest::of(&bytes) != blob.digest {
            return Err(PullError::Mismatch(format!(
                "config {}: {} served {} bytes that hash to {}",
                blob.digest,
                source.name(),
                bytes.len(),
                Digest::of(&bytes)
            )));
        }
        Ok(bytes)
    }

    pub(super) async fn bring_image(
        self: &Arc<Self>,
        source: &Arc<dyn Source>,
        found: &Resolved,
        request: &PullRequest,
        entry: &Entry,
    ) -> Result<(LayerDone, Lease), PullError> {
        let image = &found.image;
        let config = self.config(&**source, image.config).await?;
        let layers = image.layers_with(&config)?;

        // Nothing that is gathered from here on is collected before the tree stands.
        let (digest, reference) = (image.digest, request.reference.clone());
        let lease = self.admit(source, digest, &reference, &layers).await?;
        let started = Instant::now();
        let stream = request.stream.then_some(digest);
        let cost = self.bring_layers(source, &layers, entry, stream).await?;
        let took = started.elapsed();

        entry.set(|stage| stage.state = PullState::Finishing);
        let (image, manifest) = (image.clone(), found.manifest.clone());
        loop {
            let (image, manifest) = (image.clone(), manifest.clone());
            let (layers, config) = (layers.clone(), config.clone());
            let made = self
                .disk(move |store| make_tree(store, &image, &layers, &manifest.bytes, &config))
                .await??;
            if made {
                break;
            }
            tokio::time::sleep(OTHER_PROCESS_POLL).await;
        }
        let noted = self.disk(move |store| {
            store.use_up_reservations(&reference)?;
            store.note_rate(reference.registry().unwrap_or_default(), cost.fetched_bytes, took)
        });
        // The image is here; a reservation that stays has an end of its own.
        if let Err(error) = noted.await {
            tracing::warn!(image = %digest, %error, "cannot note what the pull took");
        }
        Ok((cost, lease))
    }

    /// Lets the pull in, as soon as there is room for it.
    async fn admit(
        self: &Arc<Self>,
        source: &Arc<dyn Source>,
        image: Digest,
        reference: &Reference,
        layers: &[PlacedLayer],
    ) -> Result<Lease, PullError> {
        let distinct: BTreeSet<_> = layers.iter().map(PlacedLayer::key).collect();
        let mut pull = Admission {
            image,
            reference: reference.clone(),
            layers: distinct.iter().map(|(layer, _)| layer.blob.digest).collect(),
            coming: BTreeMap::new(),
        };
        let (asked, lease) = self
            .disk(move |store| {
                pull.coming = store.missing(&distinct)?;
                let lease = store.admit(&pull, false)?;
                Ok((pull, lease))
            })
            .await?;
        if let Some(lease) = lease {
            return Ok(lease);
        }
        // It is tight: worth a look at how much of the layers would come at all.
        let mut pull = asked;
        self.lower(source, layers, &mut pull.coming).await;
        let lease = self.disk(move |store| store.admit(&pull, true)).await?;
        lease.ok_or_else(|| PullError::Cancelled(format!("pull {reference}: was not let in")))
    }

    async fn bring_layers(
        self: &Arc<Self>,
        source: &Arc<dyn Source>,
        layers: &[PlacedLayer],
        entry: &Entry,
        stream: Option<Digest>,
    ) -> Result<LayerDone, PullError> {
        let distinct: BTreeSet<_> = layers.iter().map(PlacedLayer::key).collect();
        let here = self
            .disk(move |store| {
                let mut here = BTreeSet::new();
                for (layer, diff_id) in distinct {
                    if store.layer_as(&layer, diff_id.as_ref())?.is_some() {
                        here.insert((layer, diff_id));
                    }
                }
                Ok(here)
            })
            .await?;
        // In the manifest's order, so that flights start lowest layer first.
        let mut started = BTreeSet::new();
        let mut missing: Vec<_> = layers
            .iter()
            .zip(chains(layers))
            .filter(|(placed, _)| !here.contains(&placed.key()) && started.insert(placed.key()))
            .collect();
        if stream.is_some() {
            // Who reads meanwhile wants the small ones first.
            missing.sort_by_key(|(placed, _)| placed.layer.blob.size > SMALL_BYTES);
        }
        let start = |(placed, chain): (&PlacedLayer, Option<Digest>)| {
            self.start_layer(source, placed.key(), chain, &entry.urgency, stream.is_some())
        };
        let flights: Vec<_> = missing.into_iter().map(start).collect();
        let present_bytes = here.iter().map(|(layer, _)| layer.blob.size).sum();
        self.skipped.fetch_add(present_bytes, Ordering::Relaxed);
        entry.set(|stage| {
            stage.present_bytes = present_bytes;
            stage.layers = flights.iter().map(|flight| flight.state.clone()).collect();
            // It may have become more urgent since, and others' layers less urgent than it.
            let priority = entry.urgency.get();
            stage.layers.iter().for_each(|layer| layer.urgency.raise(priority));
        });
        self.slots.dispatch();
        let bringing = async {
            let mut cost = LayerDone::default();
            let mut waits: FuturesUnordered<_> = flights.iter().map(LayerFlight::wait).collect();
            while let Some(done) = waits.next().await {
                // The first failure drops the other flights, which stop where they can go on.
                let done = done.ok_or_else(|| {
                    let why = "a layer's fetch ended unexpectedly, see the log";
                    PullError::Cancelled(why.to_owned())
                })??;
                cost.fetched_bytes += done.fetched_bytes;
                cost.written_bytes += done.written_bytes;
            }
            Ok::<_, PullError>(cost)
        };
        let looking = async {
            if let Some(digest) = stream {
                let arriving = self.look_ahead(digest, layers, &flights).await?;
                entry.arriving.send_replace(Some(Arc::new(arriving)));
            }
            Ok(())
        };
        // A layer that failed is to say why, before the look ahead misses it.
        let (cost, ()) = tokio::try_join!(biased; bringing, looking)?;
        Ok(cost)
    }

    /// Runs something that blocks on the disk.
    pub(super) async fn disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, PullError> {
        let store = self.store.clone();
        match self.tasks.spawn_blocking(move || work(&store)).await {
            Ok(result) => result.map_err(PullError::from),
            Err(panic) => {
                Err(StoreError::Corrupt(format!("work on the store died: {panic}")).into())
            }
        }
    }
}

/// Lays the layers over each other and commits what they add up to. `false`: another process is at it.
fn make_tree(
    store: &Store,
    image: &ImageManifest,
    layers: &[PlacedLayer],
    manifest: &[u8],
    config: &[u8],
) -> Result<Result<bool, PullError>, StoreError> {
    let mut tree = Tree::default();
    let mut stored = Vec::new();
    for PlacedLayer { layer, place, diff_id, .. } in layers {
        let digest = layer.blob.digest;
        let Some(record) = store.layer_as(layer, diff_id.as_ref())? else {
            return Err(StoreError::Corrupt(format!(
                "layer {digest} is gone again: pull the image again"
            )));
        };
        if let Some(diff_id) = diff_id
            && record.diff_id != *diff_id
        {
            return Ok(Err(PullError::Mismatch(format!(
                "layer {digest} unpacks to {}, but the config of image {} says diff_id {diff_id}",
                record.diff_id, image.digest
            ))));
        }
        if let Err(why) = place.lay(&mut tree, &record.entries) {
            return Ok(Err(PullError::Unpack(format!("layer {digest}: {why}"))));
        }
        stored.push(StoredLayer { digest, size_bytes: layer.blob.size, diff_id: record.diff_id });
    }
    let new = NewTree {
        digest: image.digest,
        packaging: image.packaging,
        layers: stored,
        tree: &tree,
        manifest,
        config,
    };
    store.commit_tree(&new).map(Ok)
}
