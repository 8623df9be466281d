//! Prefetches that callers asked for: each a pull, then perhaps a pin and a warm page cache.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use carport_image::pull::{Holder, Priority, PullRequest};
use carport_image::store::{PinRequest, StoreError};
use carport_image::{Puller, Reference, Store};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::convert::{self, invalid};
use crate::placement::Wanted;
use crate::warm::Warmer;

/// Prefetches at a time; a caller that asks for more should ask again later.
const MAX_PREFETCHES: usize = 256;
/// Whose pins they are.
const OWNER: &str = "prefetch";
/// When there may be room for another one.
const AGAIN: Duration = Duration::from_secs(30);

/// What somebody asked for.
#[derive(Debug)]
pub(super) struct Prefetch {
    pub(super) reference: Reference,
    pub(super) priority: u32,
    /// For how long it is kept once it is here.
    pub(super) pin: Option<Duration>,
    pub(super) warm: bool,
}

/// By image, each with a number and what ends it.
type Running = HashMap<Reference, Vec<(u64, CancellationToken)>>;

/// Those under way. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Prefetches {
    running: Arc<Mutex<Running>>,
    tasks: TaskTracker,
}

impl Prefetches {
    /// Starts one. Its pull is one with others of the same image.
    pub(super) fn start(
        &self,
        prefetch: Prefetch,
        puller: &Puller,
        warmer: &Warmer,
    ) -> Result<(), Status> {
        let stop = CancellationToken::new();
        let number = {
            let mut running = self.running();
            let count: usize = running.values().map(Vec::len).sum();
            if count >= MAX_PREFETCHES {
                let why = format!("{MAX_PREFETCHES} prefetches are under way; ask again later");
                let mut details =
                    ErrorDetails::with_error_info("TOO_MANY_PREFETCHES", convert::DOMAIN, []);
                details.set_retry_info(Some(AGAIN));
                return Err(Status::with_error_details(Code::ResourceExhausted, why, details));
            }
            let same = running.entry(prefetch.reference.clone()).or_default();
            let number = same.last().map_or(0, |(last, _)| last + 1);
            same.push((number, stop.clone()));
            number
        };
        let priority = i32::try_from(prefetch.priority).unwrap_or(i32::MAX);
        let request = PullRequest {
            priority: Priority::Prefetch(priority),
            holder: Holder::Prefetch,
            ..PullRequest::new(prefetch.reference.clone())
        };
        // Here, so that the answer shows it already.
        let pull = puller.start(request);
        let (own, store, warmer) = (self.clone(), puller.store().clone(), warmer.clone());
        self.tasks.spawn(async move {
            // How it ended, the puller has told.
            if let Some(Ok(pulled)) = stop.run_until_cancelled(pull.wait()).await {
                if let Some(ttl) = prefetch.pin {
                    let reference = prefetch.reference.clone();
                    let work = move || pin(&store, &pulled.digest, &reference, ttl);
                    match tokio::task::spawn_blocking(work).await {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => {
                            tracing::error!(reference = %prefetch.reference, %error, "pin a prefetch");
                        }
                        Err(error) => tracing::error!(%error, "pin a prefetch"),
                    }
                }
                if prefetch.warm {
                    warmer.warm(pulled.digest);
                }
            }
            drop(pull);
            own.forget(&prefetch.reference, number);
        });
        Ok(())
    }

    /// Takes those of `reference` back; false when there are none.
    pub(super) fn cancel(&self, reference: &Reference) -> bool {
        let same = self.running().remove(reference);
        same.iter().flatten().for_each(|(_, stop)| stop.cancel());
        same.is_some()
    }

    /// Waits for all to end; the puller's end has ended their pulls.
    pub(super) async fn finish(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn forget(&self, reference: &Reference, number: u64) {
        let mut running = self.running();
        if let Some(same) = running.get_mut(reference) {
            same.retain(|(other, _)| *other != number);
            if same.is_empty() {
                running.remove(reference);
            }
        }
    }

    fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pin(
    store: &Store,
    digest: &carport_image::Digest,
    reference: &Reference,
    ttl: Duration,
) -> Result<(), StoreError> {
    // A constant that is an owner; the test below reads it.
    if let Ok(owner) = OWNER.parse() {
        let request = PinRequest { owner, expires_at: Some(SystemTime::now() + ttl) };
        store.pin(digest, Some(reference), &request)?;
    }
    Ok(())
}

/// The reference to pull, held to the digest where one is given.
pub(super) fn exact(wanted: &Wanted) -> Result<Reference, Status> {
    let Some(reference) = &wanted.reference else {
        return Err(invalid("model.reference", "a digest alone does not say where to pull from"));
    };
    match (wanted.digest, reference.digest()) {
        (Some(digest), None) => {
            format!("{reference}@{digest}").parse().map_err(|why| invalid("model.digest", why))
        }
        (Some(digest), Some(own)) if digest != own => {
            Err(invalid("model.digest", format!("the reference says {own}")))
        }
        _ => Ok(reference.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use carport_image::Digest;
    use carport_image::store::Owner;

    #[test]
    fn a_digest_beside_a_tag_decides() {
        let digest = Digest::of(b"x");
        let reference: Reference = "r:5000/a:1".parse().unwrap();
        let wanted = Wanted { reference: Some(reference), digest: Some(digest) };
        assert_eq!(exact(&wanted).unwrap().digest(), Some(digest));
        let other =
            Wanted { digest: Some(Digest::of(b"y")), reference: Some(exact(&wanted).unwrap()) };
        assert_eq!(exact(&other).unwrap_err().code(), tonic::Code::InvalidArgument);
        let nowhere = Wanted { reference: None, digest: Some(digest) };
        assert!(exact(&nowhere).unwrap_err().message().starts_with("model.reference: "));
    }

    #[test]
    fn the_owner_of_prefetches_is_one() {
        assert_eq!(OWNER.parse::<Owner>().unwrap().as_str(), OWNER);
    }
}
