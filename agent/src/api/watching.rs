//! `LocalityService.Watch`: one watcher.
//!
//! What it is told is made by [`super::feed`], once for all. A watcher has a place in that, and a
//! choice of its own; it is asked for the next message only when the last one went out, so that a
//! slow one holds nothing but its place, and loses it when it falls too far behind.

use std::collections::{HashSet, VecDeque};
use std::pin::Pin;
use std::time::Duration;

use carport_image::{Digest, Reference};
use carport_proto::carport::v1;
use carport_proto::carport::v1::watch_response::Event;
use futures_util::Stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::Api;
use super::convert::{self, invalid};
use super::feed::{Batch, OutOfRange, Start};

/// Watchers at a time. Each holds a connection and a place in the feed.
pub(super) const MAX_WATCHERS: usize = 1_000;
/// Models that one watcher chooses.
const MAX_MODELS: usize = 1_000;
/// When one that is cut off, or finds no place, may come again.
const AGAIN: Duration = Duration::from_secs(1);

/// The stream of answers.
pub(super) type WatchStream = Pin<Box<dyn Stream<Item = Result<v1::WatchResponse, Status>> + Send>>;

/// Which messages somebody wants.
#[derive(Debug)]
struct Choice {
    /// Absent: all.
    models: Option<(HashSet<Reference>, HashSet<Digest>)>,
    gpus: bool,
    min_interval: Duration,
}

struct Watcher {
    choice: Choice,
    first: VecDeque<Batch>,
    batches: Receiver<Batch>,
    /// The batch under way, and how far it is.
    current: Option<(Batch, usize)>,
    progress_at: Option<Instant>,
    stop: CancellationToken,
    _place: OwnedSemaphorePermit,
}

impl Api {
    /// Begins a watch.
    pub(super) fn watch_from(&self, request: &v1::WatchRequest) -> Result<WatchStream, Status> {
        self.is_this_node(&request.node_name)?;
        let choice = Choice::read(request)?;
        let Ok(place) = self.watchers.clone().try_acquire_owned() else {
            let why = format!("{MAX_WATCHERS} watchers are served already");
            return Err(exhausted("TOO_MANY_WATCHERS", &why));
        };
        let (start, batches) =
            self.feed.start(self, request.resume_from.as_ref()).map_err(out_of_range)?;
        let (Start::Snapshot(first) | Start::Changes(first)) = start;
        let watcher = Watcher {
            choice,
            first: first.into(),
            batches,
            current: None,
            progress_at: None,
            stop: self.stop.clone(),
            _place: place,
        };
        // An error is the last thing that is said.
        let stream = futures_util::stream::unfold(Some(watcher), |watcher| async move {
            let mut watcher = watcher?;
            match watcher.next().await {
                Ok(message) => Some((Ok(message), Some(watcher))),
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Box::pin(stream))
    }
}

impl Watcher {
    async fn next(&mut self) -> Result<v1::WatchResponse, Status> {
        loop {
            if let Some((batch, at)) = &mut self.current {
                while let Some(message) = batch.get(*at) {
                    *at += 1;
                    if self.choice.wants(message) {
                        return Ok(message.clone());
                    }
                    // Of a change that is not wanted, its revision is: time passes for all.
                    if message.revision.is_some() {
                        let event = Some(Event::Heartbeat(v1::Heartbeat {}));
                        return Ok(v1::WatchResponse { event, ..message.clone() });
                    }
                }
                self.current = None;
            }
            let batch = match self.first.pop_front() {
                Some(batch) => batch,
                None => self.receive().await?,
            };
            if self.is_due(&batch) {
                self.current = Some((batch, 0));
            }
        }
    }

    async fn receive(&mut self) -> Result<Batch, Status> {
        let stopping = || Status::unavailable("the agent is stopping; watch again when it is back");
        tokio::select! {
            () = self.stop.cancelled() => Err(stopping()),
            batch = self.batches.recv() => match batch {
                Ok(batch) => Ok(batch),
                Err(RecvError::Closed) => Err(stopping()),
                Err(RecvError::Lagged(missed)) => Err(exhausted(
                    "WATCHER_TOO_SLOW",
                    &format!("{missed} changes were not read in time; watch again from the last revision"),
                )),
            },
        }
    }

    /// Progress is left out while it is too early for it; everything else is due.
    fn is_due(&mut self, batch: &Batch) -> bool {
        if !batch.iter().all(|message| matches!(message.event, Some(Event::Progress(_)))) {
            return true;
        }
        let due = self.progress_at.is_none_or(|at| at.elapsed() >= self.choice.min_interval);
        if due {
            self.progress_at = Some(Instant::now());
        }
        due
    }
}

impl Choice {
    fn read(request: &v1::WatchRequest) -> Result<Self, Status> {
        if request.models.len() > MAX_MODELS {
            return Err(invalid("models", format!("name at most {MAX_MODELS}")));
        }
        let (mut references, mut digests) = (HashSet::new(), HashSet::new());
        for (index, model) in request.models.iter().enumerate() {
            let wanted = convert::wanted(model, &format!("models[{index}]"))?;
            match wanted.digest {
                Some(digest) => digests.extend([digest]),
                None => references.extend(wanted.reference),
            }
        }
        let min_interval = request.min_interval.map(Duration::try_from).transpose();
        let min_interval = min_interval
            .map_err(|_| invalid("min_interval", "write a length of time that is not negative"))?;
        let models = (!request.models.is_empty()).then_some((references, digests));
        Ok(Self {
            models,
            gpus: request.include_gpus,
            min_interval: min_interval.unwrap_or_default(),
        })
    }

    fn wants(&self, message: &v1::WatchResponse) -> bool {
        match &message.event {
            Some(Event::Upsert(model)) => self.names(model.model.as_ref()),
            Some(Event::Delete(model)) => self.names(Some(model)),
            Some(Event::Progress(progress)) => self.names(progress.model.as_ref()),
            Some(Event::Gpus(_)) => self.gpus,
            _ => true,
        }
    }

    fn names(&self, model: Option<&v1::ModelRef>) -> bool {
        let Some((references, digests)) = &self.models else { return true };
        let Some(model) = model else { return false };
        let digest = model.digest.parse().is_ok_and(|digest: Digest| digests.contains(&digest));
        digest || model.reference.parse().is_ok_and(|name: Reference| references.contains(&name))
    }
}

fn out_of_range(_: OutOfRange) -> Status {
    let why = "resume_from: the changes since that revision are no longer known; watch again \
               without it";
    let details = ErrorDetails::with_error_info("REVISION_OUT_OF_RANGE", convert::DOMAIN, []);
    Status::with_error_details(Code::OutOfRange, why, details)
}

fn exhausted(reason: &str, why: &str) -> Status {
    let mut details = ErrorDetails::with_error_info(reason, convert::DOMAIN, []);
    details.set_retry_info(Some(AGAIN));
    Status::with_error_details(Code::ResourceExhausted, why, details)
}
