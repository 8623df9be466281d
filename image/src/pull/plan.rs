//! What pulls would do: bytes to fetch, room, evictions, time. Asks the source, changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use serde::Serialize;

use super::{Inner, PullError, PullPolicy, PullRequest, Puller};
use crate::digest::Digest;
use crate::manifest::{Blob, Compression, Layer, PlacedLayer};
use crate::reference::Reference;
use crate::source::Credential;
use crate::store::{EvictedImage, Room, Wanted};

/// What pulling some images together would do.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// In the order in which they were asked for.
    pub images: Vec<PlannedImage>,
    /// Sum of all layers as they travel, each image for itself.
    pub download_bytes: u64,
    /// Of these, what would be fetched: each layer once, without files that are here already, less
    /// what an interrupted pull has left.
    pub missing_bytes: u64,
    /// What would be written; at least that much where a layer is compressed.
    pub needed_bytes: u64,
    /// Whether `needed_bytes` is a lower bound.
    pub at_least: bool,
    /// How things stand now.
    pub room: Room,
    /// Images that would be evicted to make room.
    pub evict: Vec<EvictedImage>,
    /// Whether there is room, after these evictions.
    pub fits: bool,
    /// How long the download would take; absent where a registry's rate is not known.
    pub eta: Option<Duration>,
}

/// One of the images.
#[derive(Debug, Clone, Serialize)]
pub struct PlannedImage {
    /// As it was asked for.
    pub reference: Reference,
    /// The image manifest.
    pub digest: Digest,
    /// It is complete here.
    pub present: bool,
    /// Sum of its layers as they travel.
    pub download_bytes: u64,
    /// Of these, what would be fetched for it: what neither is here nor comes in a layer of an image
    /// before it.
    pub missing_bytes: u64,
    /// What its registry has given lately.
    pub bytes_per_second: Option<f64>,
}

/// What is known of one image before it is weighed.
struct Found {
    digest: Digest,
    download_bytes: u64,
    /// Its layers, and what would be fetched of those that are missing. Absent: the image is here.
    layers: Option<(BTreeSet<Layer>, BTreeMap<String, u64>)>,
}

impl Puller {
    /// What these pulls would do, if they were started together now.
    ///
    /// # Errors
    ///
    /// As a pull's: the source must tell what each reference means.
    ///
    /// # Cancel safety
    ///
    /// Nothing is changed, whenever the future is dropped.
    pub async fn plan(&self, requests: &[PullRequest]) -> Result<Plan, PullError> {
        let inner = &self.inner;
        let mut found = Vec::new();
        for request in requests {
            found.push(inner.find(request).await?);
        }
        let references: Vec<Reference> =
            requests.iter().map(|request| request.reference.clone()).collect();
        inner.disk(move |store| weigh(store, references, found)).await
    }

    /// The image that `reference` means now, and its layers as they travel: for somebody else's pull.
    ///
    /// # Errors
    ///
    /// As [`Puller::plan`].
    pub async fn layers(&self, reference: &Reference) -> Result<(Digest, Vec<Blob>), PullError> {
        let (inner, request) = (&self.inner, PullRequest::new(reference.clone()));
        let source = inner.sources.open(reference, &request.secret)?;
        let image = inner.resolve(&*source, &reference.name(), &request).await?.image;
        Ok((image.digest, image.layers.iter().map(|placed| placed.layer.blob).collect()))
    }

    /// Who the node is at the registry of `reference`: for somebody else's pull.
    ///
    /// # Errors
    ///
    /// When docker's `config.json` or a helper that it names does not tell.
    pub async fn credential(&self, reference: &Reference) -> Result<Credential, PullError> {
        Ok(self.inner.sources.credential(reference).await?)
    }
}

impl Inner {
    async fn find(&self, request: &PullRequest) -> Result<Found, PullError> {
        let (here, _) = self.known(request).await?;
        let asks = match (request.policy, here) {
            (PullPolicy::Never, None) => {
                return Err(PullError::NotStored(format!(
                    "image {} is not on this node, and the pull policy Never forbids to fetch it",
                    request.reference
                )));
            }
            (PullPolicy::Never | PullPolicy::IfNotPresent, here) => here,
            (PullPolicy::Always, _) => None,
        };
        if let Some(digest) = asks
            && let Some(image) = self.disk(move |store| store.image_unnamed(&digest)).await?
        {
            let mut layers = BTreeMap::new();
            layers.extend(image.layers.iter().map(|layer| (layer.digest, layer.size_bytes)));
            return Ok(Found { digest, download_bytes: layers.values().sum(), layers: None });
        }
        let source = self.sources.open(&request.reference, &request.secret)?;
        let image = self.resolve(&*source, &request.reference.name(), request).await?.image;
        let (digest, download_bytes) = (image.digest, image.download_bytes());
        if self.disk(move |store| store.image_unnamed(&digest)).await?.is_some() {
            return Ok(Found { digest, download_bytes, layers: None });
        }
        let config = self.config(&*source, image.config).await?;
        let placed = image.layers_with(&config)?;
        let keys: BTreeSet<_> = placed.iter().map(PlacedLayer::key).collect();
        let mut missing = self.disk(move |store| store.missing(&keys)).await?;
        self.lower(&source, &placed, &mut missing).await;
        let layers = placed.iter().map(|placed| placed.layer).collect();
        Ok(Found { digest, download_bytes, layers: Some((layers, missing)) })
    }
}

fn weigh(
    store: &crate::Store,
    references: Vec<Reference>,
    found: Vec<Found>,
) -> Result<Plan, crate::store::StoreError> {
    let mut wanted = Wanted::default();
    let mut missing: BTreeMap<String, u64> = BTreeMap::new();
    let mut images = Vec::new();
    let mut by_host: BTreeMap<String, u64> = BTreeMap::new();
    let mut at_least = false;
    let names = references.iter().cloned().collect();
    for (reference, Found { digest, download_bytes, layers }) in references.into_iter().zip(found) {
        wanted.images.insert(digest);
        let present = layers.is_none();
        let (layers, mut own) = layers.unwrap_or_default();
        wanted.layers.extend(layers.iter().map(|layer| layer.blob.digest));
        own.retain(|name, _| !missing.contains_key(name));
        at_least |= layers.iter().any(|layer| {
            layer.compression != Compression::None && own.contains_key(&layer.record_name())
        });
        let missing_bytes = store.to_write(&own)?;
        missing.extend(own);
        let host = reference.registry().unwrap_or_default().to_owned();
        let bytes_per_second = store.rate(&host)?;
        *by_host.entry(host).or_default() += missing_bytes;
        images.push(PlannedImage {
            reference,
            digest,
            present,
            download_bytes,
            missing_bytes,
            bytes_per_second,
        });
    }
    let mut eta = Some(Duration::ZERO);
    for (host, bytes) in by_host.iter().filter(|(_, bytes)| **bytes > 0) {
        // Registries give at the same time; their pulls share each one's rate.
        let seconds = store.rate(host)?.map(|rate| *bytes as f64 / rate);
        let time = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        eta = eta.zip(time).map(|(longest, time)| longest.max(time));
    }
    let outlook = store.outlook(&wanted, &names, &missing)?;
    Ok(Plan {
        download_bytes: images.iter().map(|image| image.download_bytes).sum(),
        missing_bytes: images.iter().map(|image| image.missing_bytes).sum(),
        images,
        needed_bytes: outlook.needed_bytes,
        at_least,
        room: outlook.room,
        evict: outlook.evict,
        fits: outlook.fits,
        eta,
    })
}
