//! A registry behind mirrors: each is asked in turn until one serves.
//!
//! A mirror is a convenience and never an authority: what it does not have, or serves wrongly, is
//! asked of the next, and of the registry itself at last. Manifests are checked against their digest
//! here; who finds a blob wrong says so by [`Source::distrust`].

use std::collections::HashSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;

use super::RegistrySource;
use crate::digest::Digest;
use crate::source::{Audience, BlobBody, ManifestName, RawManifest, Source, SourceError};

/// A mirror that cannot be reached is left alone for so long: each range would wait for it again.
const REST: Duration = Duration::from_secs(30);

/// A repository to pull from, at its registry's mirrors and at the registry.
pub struct MirroredSource {
    // Mirrors first, the registry last; never empty.
    places: Vec<Place>,
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
        let places = places.into_iter().map(|(source, resolves)| Place {
            source,
            resolves,
            resting_until: Mutex::default(),
            distrusted: AtomicBool::new(false),
            served: Mutex::default(),
        });
        Self { places: places.collect() }
    }

    /// The places to ask one after the other until one answers. The registry itself is always
    /// among them, and last: its error is the one that counts.
    fn in_turn(&self, suits: impl Fn(&Place) -> bool) -> impl Iterator<Item = &Place> {
        let last = self.places.len() - 1;
        let usable = move |place: &Place| {
            suits(place) && !place.distrusted.load(Ordering::Relaxed) && !place.rests()
        };
        self.places
            .iter()
            .enumerate()
            .filter(move |(n, place)| *n == last || usable(place))
            .map(|(_, place)| place)
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

    /// Takes an error in; the next place is asked.
    fn failed(&self, error: SourceError) -> SourceError {
        if error.is_transient() {
            self.rest();
        }
        tracing::debug!(place = %self.source.repository.host, %error, "did not serve");
        error
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
            _ => Ok(raw),
        }
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
        let mut outcome = Err(no_place());
        for place in self.in_turn(|place| by_digest || place.resolves) {
            outcome = place.manifest(want).await.map_err(|error| place.failed(error));
            if outcome.is_ok() {
                break;
            }
        }
        outcome
    }

    async fn resolve(&self, want: &ManifestName) -> Result<Digest, SourceError> {
        let mut outcome = Err(no_place());
        for place in self.in_turn(|place| place.resolves) {
            outcome = place.source.resolve(want).await.map_err(|error| place.failed(error));
            if outcome.is_ok() {
                break;
            }
        }
        outcome
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
        let mut outcome = Err(no_place());
        for place in self.in_turn(|_| true) {
            let asked = place.source.blob(digest, size, range.clone()).await;
            outcome = asked.map_err(|error| place.failed(error));
            if outcome.is_ok() {
                place.served().insert(*digest);
                break;
            }
        }
        outcome
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

fn no_place() -> SourceError {
    SourceError::Invalid("a registry with no place to ask".to_owned())
}
