//! A registry behind mirrors: each is asked in turn until one serves.
//!
//! A mirror is a convenience and never an authority: what it does not have, or serves wrongly, is
//! asked of the next, and of the registry itself at last. Manifests are checked against their digest
//! here; who finds a blob wrong says so by [`Source::distrust`].

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::StreamExt as _;
use futures_util::stream;

use super::RegistrySource;
use crate::digest::Digest;
use crate::manifest::Manifest;
use crate::source::{Audience, BlobBody, ManifestName, RawManifest, Source, SourceError};

/// A mirror that cannot be reached is left alone for so long: each range would wait for it again.
const REST: Duration = Duration::from_secs(30);

/// A repository to pull from, at its registry's mirrors and at the registry.
pub struct MirroredSource {
    // Mirrors first, the registry last; never empty.
    places: Vec<Arc<Place>>,
}

struct Place {
    source: RegistrySource,
    resolves: bool,
    resting_until: Mutex<Option<Instant>>,
    distrusted: AtomicBool,
    /// Blobs that it has served, of one image; held for a look only.
    served: Mutex<HashSet<Digest>>,
}

impl MirroredSource {
    /// `(place, whether it may resolve tags)`, at least one, in the order in which they are asked.
    pub(super) fn new(places: Vec<(RegistrySource, bool)>) -> Self {
        let places = places.into_iter().map(|(source, resolves)| {
            Arc::new(Place {
                source,
                resolves,
                resting_until: Mutex::default(),
                distrusted: AtomicBool::new(false),
                served: Mutex::default(),
            })
        });
        Self { places: places.collect() }
    }

    /// Asks one place after the other until one answers: mirrors that `suit`, then the registry, whose
    /// error is the one that counts. Where that is away, too, mirrors that rest are better than none.
    async fn ask<T, F>(
        &self,
        suits: impl Fn(&Place) -> bool,
        ask: impl Fn(Arc<Place>) -> F,
    ) -> Result<T, SourceError>
    where
        F: Future<Output = Result<T, SourceError>>,
    {
        let Some((registry, mirrors)) = self.places.split_last() else {
            return Err(SourceError::Invalid("a registry with no place to ask".to_owned()));
        };
        let usable =
            |place: &&Arc<Place>| suits(place) && !place.distrusted.load(Ordering::Relaxed);
        let (resting, awake): (Vec<_>, Vec<_>) =
            mirrors.iter().filter(usable).partition(|place| place.rests());
        for place in awake {
            match ask(Arc::clone(place)).await {
                Ok(answer) => return Ok(answer),
                Err(error) => place.failed(&error),
            }
        }
        let error = match ask(Arc::clone(registry)).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        for place in resting.into_iter().filter(|_| error.is_transient()) {
            match ask(Arc::clone(place)).await {
                Ok(answer) => return Ok(answer),
                Err(error) => place.failed(&error),
            }
        }
        Err(error)
    }
}

impl Place {
    fn is_mirror(&self) -> bool {
        self.source.repository.namespace.is_some()
    }

    fn served(&self) -> std::sync::MutexGuard<'_, HashSet<Digest>> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rests(&self) -> bool {
        let until = self.resting_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Takes note of an error; another place is asked.
    fn failed(&self, error: &SourceError) {
        if error.is_transient() {
            self.rest();
        }
        tracing::debug!(place = %self.source.repository.host, %error, "did not serve");
    }

    async fn manifest(&self, want: &ManifestName) -> Result<RawManifest, SourceError> {
        let raw = self.source.manifest(want).await?;
        match want {
            // The registry's own answer is for the caller to judge.
            ManifestName::Digest(digest) if self.is_mirror() && raw.digest() != *digest => {
                Err(SourceError::Invalid(format!(
                    "manifest {digest}: {} served bytes that hash to {}",
                    self.source.repository.host,
                    raw.digest()
                )))
            }
            // A tag's manifest has no digest to be held against; what is none at all tells by itself.
            ManifestName::Tag(_) if self.is_mirror() => match Manifest::parse(&raw) {
                Ok(_) => Ok(raw),
                Err(why) => Err(SourceError::Invalid(why.to_string())),
            },
            _ => Ok(raw),
        }
    }

    /// A blob, whose end is watched: a mirror that breaks off rests, so that what is left of the blob is
    /// asked for elsewhere.
    async fn blob(
        self: Arc<Self>,
        digest: Digest,
        size: u64,
        range: Range<u64>,
    ) -> Result<BlobBody, SourceError> {
        let body = self.source.blob(&digest, size, range.clone()).await?;
        self.served().insert(digest);
        if !self.is_mirror() {
            return Ok(body);
        }
        let mut left = if body.ranged { range.end - range.start } else { size };
        let chunks = body.stream.map(Some).chain(stream::iter([None]));
        let watched = chunks.filter_map(move |chunk| {
            match &chunk {
                Some(Ok(bytes)) => left = left.saturating_sub(bytes.len() as u64),
                Some(Err(_)) => self.rest(),
                None if left > 0 => self.rest(),
                None => {}
            }
            std::future::ready(chunk)
        });
        Ok(BlobBody { stream: watched.boxed(), ..body })
    }

    fn rest(&self) {
        *self.resting_until.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Instant::now() + REST);
    }
}

#[async_trait]
impl Source for MirroredSource {
    fn name(&self) -> String {
        self.places.last().map(|place| place.source.name()).unwrap_or_default()
    }

    async fn manifest(&self, want: &ManifestName) -> Result<RawManifest, SourceError> {
        let by_digest = matches!(want, ManifestName::Digest(_));
        let ask = |place: Arc<Place>| async move { place.manifest(want).await };
        self.ask(|place| by_digest || place.resolves, ask).await
    }

    async fn resolve(&self, want: &ManifestName) -> Result<Digest, SourceError> {
        let ask = |place: Arc<Place>| async move { place.source.resolve(want).await };
        self.ask(|place| place.resolves, ask).await
    }

    fn audience(&self) -> Audience {
        match &self.places[..] {
            [registry] => registry.source.audience(),
            // Whom a mirror serves is not for it to decide.
            _ => Audience::Nobody,
        }
    }

    async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        range: Range<u64>,
    ) -> Result<BlobBody, SourceError> {
        self.ask(|_| true, |place| place.blob(*digest, size, range.clone())).await
    }

    fn distrust(&self, blob: &Digest) -> bool {
        let Some((_, mirrors)) = self.places.split_last() else { return false };
        let mut news = false;
        for mirror in mirrors {
            // Several layers may be wrong at the same time: each is asked for again.
            if mirror.served().remove(blob) {
                mirror.distrusted.store(true, Ordering::Relaxed);
                news = true;
            }
        }
        news
    }
}
