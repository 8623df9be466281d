//! Fetching of all that is not here of a layer, in rounds: what goes wrong and may pass ends one, and
//! another begins.
//!
//! A registry that is away or a full disk must not end a mount that somebody reads. So the layer stays
//! as it is, who waits goes on waiting for as long as he likes, and it is tried again after a while; at once,
//! nearly, where somebody asks. Only who streams has this: an ordinary pull ends, and is begun again.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use futures_util::stream::{FuturesUnordered, StreamExt as _};

use super::{Arrival, Origin};
use crate::pull::slots::Slot;
use crate::pull::{Inner, PullError};
use crate::source::SourceError;
use crate::store::{Ingest, StoreError};

/// Bytes that make a save worth its sync of the disk.
const SAVE_BYTES: u64 = 16 * 1024 * 1024;

/// Bytes that a crash costs at most, beside pieces under way: nothing more is begun on a disk that does
/// not come after.
const UNSAVED_BYTES: u64 = 32 * 1024 * 1024;

/// Between two rounds, also where somebody waits.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

impl Inner {
    /// Fetches until all is here. `slot` is waited for where absent; what is asked for does not wait for
    /// it.
    ///
    /// # Errors
    ///
    /// What will not pass; anything, where nobody streams the layer.
    pub(super) async fn bring_rest(
        &self,
        ingest: &Arc<Ingest>,
        arrival: &Arc<Arrival>,
        from: Origin<'_>,
        mut slot: Option<Slot>,
    ) -> Result<(), PullError> {
        let mut failures = 0;
        let mut here = arrival.landing.here_bytes();
        loop {
            let error = match self.round(ingest, arrival, from, slot.take()).await {
                Ok(()) => return Ok(()),
                Err(error) if may_pass(&error) && from.state.shown.borrow().is_some() => error,
                Err(error) => return Err(error),
            };
            // Attempts are counted while nothing comes; a byte is progress.
            let came = arrival.landing.here_bytes();
            failures = if came > here { 1 } else { failures + 1 };
            here = came;
            let (pause, may_hurry) = pause(failures, &error);
            let layer = from.layer.blob.digest;
            tracing::warn!(
                %layer, %error, pause_seconds = pause.as_secs(),
                "nothing more comes at present: trying again"
            );
            let mut questions = arrival.landing.questions();
            let (landing, why) = (Arc::clone(arrival), error.to_string());
            self.disk(move |_| {
                landing.landing.give_back(&why);
                Ok(())
            })
            .await?;
            tokio::time::sleep(SHORTEST_PAUSE).await;
            tokio::select! {
                () = tokio::time::sleep(pause - SHORTEST_PAUSE) => {}
                // The landing, which has the sender, outlives this.
                _ = questions.changed(), if may_hurry => {}
            }
        }
    }

    async fn round(
        &self,
        ingest: &Arc<Ingest>,
        arrival: &Arc<Arrival>,
        from: Origin<'_>,
        slot: Option<Slot>,
    ) -> Result<(), PullError> {
        let rest = async {
            let _slot = match slot {
                Some(slot) => slot,
                None => self.slots.take(&from.state.urgency).await,
            };
            let workers = (0..self.fetcher.connections).map(|_| async {
                loop {
                    arrival.landing.settled(UNSAVED_BYTES).await;
                    let Some(piece) = arrival.landing.next(false) else { break };
                    self.bring_piece(arrival, from, piece).await?;
                }
                Ok::<_, PullError>(())
            });
            try_join_all(workers).await?;
            // The last pieces may be somebody's who asked.
            arrival.landing.whole().await;
            Ok(())
        };
        tokio::select! {
            done = rest => done,
            error = self.bring_asked(arrival, from) => Err(error),
            error = self.keep_saving(ingest, arrival) => Err(error),
        }
    }

    /// Fetches what is asked for, as long as it is polled.
    async fn bring_asked(&self, arrival: &Arc<Arrival>, from: Origin<'_>) -> PullError {
        let mut questions = arrival.landing.questions();
        let mut under_way = FuturesUnordered::new();
        loop {
            questions.borrow_and_update();
            while let Some(piece) = arrival.landing.next(true) {
                under_way.push(self.bring_piece(arrival, from, piece));
            }
            tokio::select! {
                // The landing, which has the sender, outlives this.
                _ = questions.changed() => {}
                done = under_way.next(), if !under_way.is_empty() => if let Some(Err(error)) = done {
                    return error;
                },
            }
        }
    }

    /// Saves what is here now and then, as long as it is polled.
    async fn keep_saving(&self, ingest: &Arc<Ingest>, arrival: &Arc<Arrival>) -> PullError {
        loop {
            arrival.landing.unsaved(SAVE_BYTES).await;
            let (ingest, arrival) = (Arc::clone(ingest), Arc::clone(arrival));
            if let Err(error) = self.disk(move |_| arrival.landing.save(&ingest)).await {
                return error;
            }
        }
    }
}

/// Whether the same may go well later.
fn may_pass(error: &PullError) -> bool {
    match error {
        PullError::Source(error) => error.is_transient(),
        PullError::Store(error) => matches!(**error, StoreError::NoSpace { .. }),
        _ => false,
    }
}

/// A second, doubled each time; or what the registry asked for, which nobody may shorten.
fn pause(failures: u32, error: &PullError) -> (Duration, bool) {
    if let PullError::Source(SourceError::Throttled { retry_after: Some(wait), .. }) = error {
        return ((*wait).clamp(SHORTEST_PAUSE, LONGEST_PAUSE), false);
    }
    let doubled = SHORTEST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(6));
    (doubled.min(LONGEST_PAUSE), true)
}
