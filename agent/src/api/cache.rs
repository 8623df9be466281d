//! `CacheService`: what the node should hold.
//!
//! These calls change the node, so they may wait for its disk. Each can be repeated: with an id it is
//! answered as before, and without one it does the same again.

use std::time::{Duration, SystemTime};

use carport_image::pull::Cancel;
use carport_image::store::{Fits, Owner, PinRequest, Reservation, StoreError};
use carport_image::{Digest, Reference};
use carport_proto::carport::v1;
use carport_proto::carport::v1::cache_service_server::CacheService;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::Api;
use super::convert::{self, invalid};
use super::prefetch::{self, Prefetch};
use crate::placement::{Model, Wanted};
use crate::run::Phase;

/// A reservation outlives no pull.
const MAX_RESERVATION: Duration = Duration::from_secs(86_400);
/// A pin that lasts longer is one without an end.
const MAX_PIN: Duration = Duration::from_secs(3650 * 86_400);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl CacheService for Api {
    async fn prefetch(
        &self,
        request: Request<v1::PrefetchRequest>,
    ) -> Answer<v1::PrefetchResponse> {
        let request = request.into_inner();
        for name in &request.node_names {
            self.is_this_node(name)?;
        }
        let wanted = model(request.model.as_ref())?;
        let reference = prefetch::exact(&wanted)?;
        let pin = request.pin_ttl.map(|ttl| length("pin_ttl", ttl, MAX_PIN)).transpose()?;
        let id = &request.request_id;
        if let Some(before) = self.requests.answered("Prefetch", id, &request)? {
            return Ok(Response::new(before));
        }
        self.refuse_while_draining()?;
        if !request.validate_only {
            let warm = request.warm_page_cache;
            let prefetch = Prefetch { reference, priority: request.priority, pin, warm };
            self.prefetches.start(prefetch, &self.puller, &self.warmer)?;
        }
        let state = self.state();
        let pulls = state.pulls(self.puller.pulls());
        let model = Model::find(&wanted, &state, &pulls);
        let model = convert::model(&model, &state, &pulls, false);
        let answer = v1::PrefetchResponse { model: Some(model), nodes: Vec::new() };
        self.requests.remember("Prefetch", id, &request, &answer);
        Ok(Response::new(answer))
    }

    async fn cancel_prefetch(
        &self,
        request: Request<v1::CancelPrefetchRequest>,
    ) -> Answer<v1::CancelPrefetchResponse> {
        let request = request.into_inner();
        let wanted = model(request.model.as_ref())?;
        let reference = prefetch::exact(&wanted)?;
        let id = &request.request_id;
        if let Some(before) = self.requests.answered("CancelPrefetch", id, &request)? {
            return Ok(Response::new(before));
        }
        let taken_back = self.prefetches.cancel(&reference);
        let stopped = match self.puller.cancel(&reference, request.force) {
            Cancel::Stopped => true,
            Cancel::NotInFlight => false,
            Cancel::Needed(_) | Cancel::Streaming if taken_back => false,
            Cancel::Needed(by) => {
                return Err(needed(&reference, &by.to_string(), "; to stop it anyway, use force"));
            }
            Cancel::Streaming => {
                return Err(needed(
                    &reference,
                    "pods read it while it arrives (mode: stream): delete them",
                    "",
                ));
            }
        };
        let cancelled = taken_back || stopped;
        let answer = v1::CancelPrefetchResponse { cancelled, stopped };
        self.requests.remember("CancelPrefetch", id, &request, &answer);
        Ok(Response::new(answer))
    }

    async fn pin(&self, request: Request<v1::PinRequest>) -> Answer<v1::PinResponse> {
        let request = request.into_inner();
        let wanted = model(request.model.as_ref())?;
        let owner = owner(&request.owner)?;
        let ttl = request.ttl.map(|ttl| length("ttl", ttl, MAX_PIN)).transpose()?;
        let id = &request.request_id;
        if let Some(before) = self.requests.answered("Pin", id, &request)? {
            return Ok(Response::new(before));
        }
        self.refuse_while_draining()?;
        let digest = self.stored(&wanted).await?;
        let expires_at = ttl.map(|ttl| SystemTime::now() + ttl);
        if !request.validate_only {
            let pin = PinRequest { owner: owner.clone(), expires_at };
            let reference = wanted.reference.clone();
            let pinned =
                self.disk(move |store| store.pin(&digest, reference.as_ref(), &pin)).await?;
            pinned.ok_or_else(|| not_here(&wanted))?;
        }
        let expire_time = expires_at.map(convert::timestamp);
        let answer = v1::PinResponse {
            model: Some(named(&wanted, digest)),
            pin: Some(v1::Pin { owner: owner.to_string(), expire_time }),
        };
        self.requests.remember("Pin", id, &request, &answer);
        Ok(Response::new(answer))
    }

    async fn unpin(&self, request: Request<v1::UnpinRequest>) -> Answer<v1::UnpinResponse> {
        let request = request.into_inner();
        let wanted = model(request.model.as_ref())?;
        let owner = owner(&request.owner)?;
        let id = &request.request_id;
        if let Some(before) = self.requests.answered("Unpin", id, &request)? {
            return Ok(Response::new(before));
        }
        let removed = match self.digest(&wanted).await? {
            Some(digest) => self.disk(move |store| store.unpin(&digest, &owner)).await?,
            None => false,
        };
        let answer = v1::UnpinResponse { removed };
        self.requests.remember("Unpin", id, &request, &answer);
        Ok(Response::new(answer))
    }

    async fn reserve_space(
        &self,
        request: Request<v1::ReserveSpaceRequest>,
    ) -> Answer<v1::ReserveSpaceResponse> {
        let request = request.into_inner();
        if !(1..=200).contains(&request.reservation_id.len()) {
            return Err(invalid("reservation_id", "write 1 to 200 bytes"));
        }
        if request.bytes == 0 {
            return Err(invalid("bytes", "write how many"));
        }
        let ttl = request.ttl.ok_or_else(|| invalid("ttl", "write for how long"))?;
        let expires_at = SystemTime::now() + length("ttl", ttl, MAX_RESERVATION)?;
        let reference = match &request.model {
            None => None,
            Some(asked) => Some(prefetch::exact(&convert::wanted(asked, "model")?)?),
        };
        let reservation = Reservation {
            id: request.reservation_id.clone(),
            owner: owner(&request.owner)?,
            bytes: request.bytes,
            reference,
            expires_at,
        };
        self.refuse_while_draining()?;
        let (bytes, dry) = (request.bytes, request.validate_only);
        let room = self
            .disk(move |store| {
                let room = store.room()?;
                if !dry {
                    store.reserve(&reservation)?;
                }
                Ok(room)
            })
            .await?;
        let reclaimable_bytes = room.held.evictable_bytes.saturating_add(room.unused_bytes);
        let reserved_bytes = room.taken.pulls_bytes.saturating_add(room.taken.reserved_bytes);
        let fits = room.fits(bytes, &self.puller.store().limits());
        let fit = v1::Fit {
            fits: fits != Fits::No,
            fits_without_eviction: fits == Fits::AsItIs,
            free_bytes: room.space.free_bytes,
            reclaimable_bytes,
            reserved_bytes,
        };
        let expire_time = Some(convert::timestamp(expires_at));
        Ok(Response::new(v1::ReserveSpaceResponse { fit: Some(fit), expire_time }))
    }

    async fn release_space(
        &self,
        request: Request<v1::ReleaseSpaceRequest>,
    ) -> Answer<v1::ReleaseSpaceResponse> {
        let id = request.into_inner().reservation_id;
        let released = self.disk(move |store| store.release(&id)).await?;
        Ok(Response::new(v1::ReleaseSpaceResponse { released }))
    }

    async fn evict(&self, request: Request<v1::EvictRequest>) -> Answer<v1::EvictResponse> {
        let request = request.into_inner();
        let wanted = model(request.model.as_ref())?;
        let id = &request.request_id;
        if let Some(before) = self.requests.answered("Evict", id, &request)? {
            return Ok(Response::new(before));
        }
        self.refuse_while_draining()?;
        let answer = match self.digest(&wanted).await? {
            None => v1::EvictResponse::default(),
            Some(digest) if request.validate_only => {
                let usage = self.disk(carport_image::Store::image_usage).await?;
                let of_it = usage.iter().find(|usage| usage.image.digest == digest);
                v1::EvictResponse {
                    removed: of_it.is_some(),
                    freed_bytes: of_it.map_or(0, |usage| usage.unique_bytes),
                }
            }
            Some(digest) => {
                self.disk(move |store| {
                    let removed = store.remove(&digest)?;
                    let freed_bytes = if removed { store.collect()?.bytes } else { 0 };
                    Ok(v1::EvictResponse { removed, freed_bytes })
                })
                .await?
            }
        };
        self.requests.remember("Evict", id, &request, &answer);
        Ok(Response::new(answer))
    }
}

impl Api {
    fn refuse_while_draining(&self) -> Result<(), Status> {
        match self.phase() {
            Phase::Draining => {
                let why = "the agent is stopping; ask again when it is back";
                let details = ErrorDetails::with_retry_info(Some(Duration::from_secs(5)));
                Err(Status::with_error_details(Code::Unavailable, why, details))
            }
            Phase::Starting | Phase::Serving => Ok(()),
        }
    }

    /// Work on the store, on a thread that may wait. It goes on when the caller goes away.
    async fn disk<T: Send + 'static>(
        &self,
        work: impl FnOnce(&carport_image::Store) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let store = self.puller.store().clone();
        match tokio::task::spawn_blocking(move || work(&store)).await {
            Ok(result) => result.map_err(|error| store_failure(&error)),
            Err(error) => Err(Status::internal(format!("work on the store: {error}"))),
        }
    }

    /// The image that is meant, as the store has it now: the state may be a moment behind.
    async fn digest(&self, wanted: &Wanted) -> Result<Option<Digest>, Status> {
        let wanted = wanted.clone();
        self.disk(move |store| match (wanted.digest, &wanted.reference) {
            (Some(digest), _) => Ok(store.image(&digest)?.map(|image| image.digest)),
            (None, Some(reference)) => store.lookup(reference),
            (None, None) => Ok(None),
        })
        .await
    }

    async fn stored(&self, wanted: &Wanted) -> Result<Digest, Status> {
        self.digest(wanted).await?.ok_or_else(|| not_here(wanted))
    }
}

fn model(asked: Option<&v1::ModelRef>) -> Result<Wanted, Status> {
    let asked = asked.ok_or_else(|| invalid("model", "name a model"))?;
    convert::wanted(asked, "model")
}

fn owner(text: &str) -> Result<Owner, Status> {
    text.parse().map_err(|why| invalid("owner", why))
}

fn length(field: &str, ttl: prost_types::Duration, most: Duration) -> Result<Duration, Status> {
    match Duration::try_from(ttl) {
        Ok(length) if !length.is_zero() && length <= most => Ok(length),
        _ => {
            let most = humantime::format_duration(most);
            Err(invalid(field, format!("write a length of time of at most {most}")))
        }
    }
}

fn named(wanted: &Wanted, digest: Digest) -> v1::ModelRef {
    v1::ModelRef {
        reference: wanted.reference.as_ref().map(ToString::to_string).unwrap_or_default(),
        digest: digest.to_string(),
        platform: String::new(),
    }
}

fn not_here(wanted: &Wanted) -> Status {
    let name = match (&wanted.reference, wanted.digest) {
        (Some(reference), _) => reference.to_string(),
        (None, digest) => digest.map(|digest| digest.to_string()).unwrap_or_default(),
    };
    let why = format!("{name}: not on this node; prefetch it first");
    let details = ErrorDetails::with_resource_info("model", name, "", &why);
    Status::with_error_details(Code::NotFound, why, details)
}

/// A pull that is not cancelled: `why`, and what a person can do.
fn needed(reference: &Reference, why: &str, how: &str) -> Status {
    let text = format!("the pull of {reference} goes on: {why}{how}");
    let mut details = ErrorDetails::with_error_info("IN_USE", convert::DOMAIN, []);
    details.add_precondition_failure_violation("IN_USE", reference.to_string(), &text);
    Status::with_error_details(Code::FailedPrecondition, text, details)
}

/// What a caller can do about the store's troubles.
fn store_failure(error: &StoreError) -> Status {
    let why = error.to_string();
    let info = |reason: &str| ErrorDetails::with_error_info(reason, convert::DOMAIN, []);
    match error {
        StoreError::NoSpace { .. } => {
            Status::with_error_details(Code::ResourceExhausted, why, info("NO_SPACE"))
        }
        StoreError::InUse(_) => {
            let mut details = info("IN_USE");
            details.add_precondition_failure_violation("IN_USE", "model", &why);
            Status::with_error_details(Code::FailedPrecondition, why, details)
        }
        StoreError::Io { .. } | StoreError::Format(_) | StoreError::Corrupt(_) => {
            tracing::error!(%error, "work on the store");
            Status::with_error_details(Code::Internal, why, info("STORE"))
        }
    }
}
