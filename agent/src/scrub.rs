//! The scrub: all that is stored is verified, slowly, again and again.
//!
//! ```text
//! the last round's end + interval ─► a round, part by part ─► repaired or told ─► scrub.json
//! ```
//!
//! How far a round is stands in the store, so that a restart goes on and does not begin again.
//! Reading goes past the page cache and keeps to the rate; see [`carport_image::store::VerifyControl`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use carport_image::pull::VerifyOptions;
use carport_image::store::{ScrubRecord, StoreError, VerifyControl, VerifyProgress};
use carport_image::{PullError, Puller, Store};
use tokio_util::sync::CancellationToken;

use crate::metrics::ScrubMetrics;

/// How often figures and the place in the store are brought up to date.
const TICK: Duration = Duration::from_secs(10);

/// The longest sleep: a clock that is set is noticed within it.
const LOOK: Duration = Duration::from_secs(600);

/// Verifies the store every `interval` at `bytes_per_second` until told to stop.
pub async fn run(
    puller: Puller,
    interval: Duration,
    bytes_per_second: u64,
    metrics: ScrubMetrics,
    stop: CancellationToken,
) {
    loop {
        let wait = match on_disk(&puller, Store::scrub).await {
            Ok(record) => {
                metrics.finished(record.finished_at);
                due_in(&record, interval, SystemTime::now())
            }
            Err(error) => {
                tracing::warn!(%error, "scrub: trying again later");
                LOOK
            }
        };
        if !wait.is_zero() {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(wait.min(LOOK)) => continue,
            }
        }
        if let Err(error) = round(&puller, bytes_per_second, &metrics, &stop).await {
            tracing::warn!(%error, "scrub: trying again later");
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK) => {}
            }
        }
        if stop.is_cancelled() {
            return;
        }
    }
}

/// How long until a round begins, or goes on.
fn due_in(record: &ScrubRecord, interval: Duration, now: SystemTime) -> Duration {
    if record.next_part.is_some() {
        return Duration::ZERO;
    }
    // An end in the future was written before the clock was set back.
    let since = now.duration_since(record.finished_at).unwrap_or_default();
    interval.saturating_sub(since)
}

/// One round, from where it stopped.
async fn round(
    puller: &Puller,
    bytes_per_second: u64,
    metrics: &ScrubMetrics,
    stop: &CancellationToken,
) -> Result<(), PullError> {
    let mut record = on_disk(puller, Store::scrub).await?;
    let first_part = record.next_part.unwrap_or(0);
    tracing::info!(first_part, bytes_per_second, "scrub: reading what is stored");
    let control = Arc::new(VerifyControl::new(bytes_per_second));
    let options = VerifyOptions { images: Vec::new(), repair: true, first_part };
    let verifying = puller.verify(options, Arc::clone(&control));
    tokio::pin!(verifying);
    let mut seen = VerifyProgress::default();
    let mut tick = tokio::time::interval(TICK);
    let outcome = loop {
        let ended = tokio::select! {
            outcome = &mut verifying => Some(outcome),
            () = stop.cancelled(), if !control.is_stopped() => {
                control.stop();
                None
            }
            _ = tick.tick() => None,
        };
        let now = control.progress();
        metrics.observe(&seen, &now);
        seen = now;
        if let Some(outcome) = ended {
            break outcome;
        }
        if record.next_part != Some(now.part) && now.part >= first_part {
            record.next_part = Some(now.part);
            on_disk(puller, move |store| store.put_scrub(&record)).await?;
        }
    };
    let report = outcome?;
    if !report.complete {
        record.next_part = Some(seen.part.max(first_part));
        return on_disk(puller, move |store| store.put_scrub(&record)).await;
    }
    tracing::info!(
        objects = report.objects,
        bytes = report.bytes,
        damaged = seen.damaged,
        repaired = seen.repaired,
        "scrub: all that is stored has been read"
    );
    record = ScrubRecord { next_part: None, finished_at: SystemTime::now() };
    metrics.finished(record.finished_at);
    on_disk(puller, move |store| store.put_scrub(&record)).await
}

async fn on_disk<T: Send + 'static>(
    puller: &Puller,
    work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, PullError> {
    let store = puller.store().clone();
    match tokio::task::spawn_blocking(move || work(&store)).await {
        Ok(result) => Ok(result?),
        Err(panic) => Err(StoreError::Corrupt(format!("work on the store died: {panic}")).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use carport_image::pull::PullOptions;
    use carport_image::source::{RegistryOptions, Sources};

    const DAY: Duration = Duration::from_secs(86_400);

    fn puller() -> (tempfile::TempDir, Puller) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path().join("store")).unwrap();
        let sources = Sources::new(RegistryOptions::default()).unwrap();
        (folder, Puller::new(store, sources, PullOptions::default()))
    }

    #[test]
    fn a_round_is_due_an_interval_after_the_last_and_goes_on_at_once() {
        let now = SystemTime::now();
        let ended = |ago| ScrubRecord { next_part: None, finished_at: now - ago };
        assert_eq!(due_in(&ended(DAY), 3 * DAY, now), 2 * DAY);
        assert_eq!(due_in(&ended(4 * DAY), 3 * DAY, now), Duration::ZERO);
        assert_eq!(due_in(&ended(DAY), 3 * DAY, now - 2 * DAY), 3 * DAY, "the clock was set back");
        let under_way = ScrubRecord { next_part: Some(7), ..ended(Duration::ZERO) };
        assert_eq!(due_in(&under_way, DAY, now), Duration::ZERO);
    }

    #[tokio::test]
    async fn a_round_ends_with_its_time_and_a_stopped_one_with_its_place() {
        let (_folder, puller) = puller();
        let store = puller.store();
        assert_eq!(store.scrub().unwrap().next_part, None, "a new store is not due");
        let metrics = ScrubMetrics::default();
        let stop = CancellationToken::new();
        let began = SystemTime::now();
        store.put_scrub(&ScrubRecord { next_part: Some(200), finished_at: began - DAY }).unwrap();
        round(&puller, 0, &metrics, &stop).await.unwrap();
        let ended = store.scrub().unwrap();
        assert!(ended.next_part.is_none() && ended.finished_at >= began);

        stop.cancel();
        let due = ScrubRecord { next_part: None, finished_at: began - DAY };
        store.put_scrub(&due).unwrap();
        // At a byte a second nothing is done before it is told to stop.
        let object = store.root().join("objects/00").join("0".repeat(64));
        std::fs::write(object, vec![0; 1 << 20]).unwrap();
        round(&puller, 1, &metrics, &stop).await.unwrap();
        let stopped = store.scrub().unwrap();
        assert_eq!((stopped.next_part, stopped.finished_at), (Some(0), began - DAY));
    }
}
