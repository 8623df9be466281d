//! How fast bytes may come, and when those that nobody waits for stand back.
//!
//! ```text
//! range about to start ─► turn: a prefetch waits while demanded bytes move
//! bytes that came      ─► took: counted against the caps; the reader waits until they are paid for
//! ```
//!
//! A reader that waits does not read, so the connection's own flow control slows the sender.
//!
//! "While demanded bytes move" and not "while a pod waits": a pod that asks for an image of
//! a registry that does not answer must not stop a node's prefetching from all the others.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::slots::Urgency;

/// So long after the last demanded byte, prefetches go on.
const LINGER: Duration = Duration::from_millis(500);

/// Unused time that may be made up for: evens out the timer's steps and the network's bursts.
const BURST: Duration = Duration::from_millis(50);

/// Waits shorter than this are put off: timers are no finer. Much more would let one reader run
/// away from the others.
const SLACK: Duration = Duration::from_millis(4);

/// No chunk costs more, so that no cap, however small, makes a wait that overflows.
const DEAREST_SECONDS: f64 = 3600.0;

/// What a node gives to pulling, in bytes a second of what travels; `None` is no cap. What is read
/// from a folder or an archive does not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// For all pulls together.
    pub total_bytes_per_second: Option<NonZeroU64>,
    /// For prefetches, within the total.
    pub prefetch_bytes_per_second: Option<NonZeroU64>,
}

/// What all transfers of a puller share.
#[derive(Debug)]
pub(super) struct Pace {
    caps: watch::Sender<Bandwidth>,
    total: Bucket,
    prefetch: Bucket,
    start: Instant,
    /// When a demanded byte came last, in milliseconds since `start`, and one; 0 for never.
    demand_moved: AtomicU64,
}

impl Pace {
    pub(super) fn new() -> Self {
        let start = Instant::now();
        Self {
            caps: watch::Sender::new(Bandwidth::default()),
            total: Bucket::new(start),
            prefetch: Bucket::new(start),
            start,
            demand_moved: AtomicU64::new(0),
        }
    }

    /// Counts from this moment on, for transfers under way, too.
    pub(super) fn set(&self, caps: Bandwidth) {
        let now = Instant::now();
        // What was promised at the old rate is forgotten; a low one may have promised hours.
        self.total.reset(now);
        self.prefetch.reset(now);
        self.caps.send_replace(caps);
    }

    pub(super) fn caps(&self) -> Bandwidth {
        *self.caps.borrow()
    }

    /// Whether more may be asked for: not by a prefetch while demanded bytes are on the move.
    pub(super) fn is_turn(&self, urgency: &Urgency) -> bool {
        urgency.is_demand() || self.stand_back_until().is_none()
    }

    /// Waits until it may.
    pub(super) async fn turn(&self, urgency: &Urgency) {
        while !urgency.is_demand()
            && let Some(until) = self.stand_back_until()
        {
            tokio::time::sleep_until(until).await;
        }
    }

    fn stand_back_until(&self) -> Option<Instant> {
        let moved = self.demand_moved.load(Ordering::Relaxed).checked_sub(1)?;
        let until = self.start + Duration::from_millis(moved) + LINGER;
        (until > Instant::now()).then_some(until)
    }

    /// Counts bytes that came, and waits until the caps allow for them.
    ///
    /// # Cancel safety
    ///
    /// The bytes stay counted.
    pub(super) async fn took(&self, bytes: u64, urgency: &Urgency) {
        let now = Instant::now();
        let demand = urgency.is_demand();
        if demand {
            let moved = now.saturating_duration_since(self.start).as_millis();
            let moved = u64::try_from(moved).unwrap_or(u64::MAX - 1) + 1;
            self.demand_moved.store(moved, Ordering::Relaxed);
        }
        let mut caps = self.caps.subscribe();
        let Bandwidth { total_bytes_per_second, prefetch_bytes_per_second } =
            *caps.borrow_and_update();
        let total = total_bytes_per_second.map(|rate| self.total.pay(bytes, rate, now));
        let own = prefetch_bytes_per_second
            .filter(|_| !demand)
            .map(|rate| self.prefetch.pay(bytes, rate, now));
        let Some(until) = total.max(own).filter(|until| *until > now + SLACK) else { return };
        tokio::select! {
            () = tokio::time::sleep_until(until) => {}
            _ = caps.changed() => {}
        }
    }
}

/// Pays for bytes with time.
#[derive(Debug)]
struct Bucket {
    /// All bytes so far are paid for at this moment.
    paid_at: Mutex<Instant>,
}

impl Bucket {
    fn new(now: Instant) -> Self {
        Self { paid_at: Mutex::new(now) }
    }

    fn reset(&self, now: Instant) {
        *self.paid_at.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    /// When `bytes` more will be paid for.
    fn pay(&self, bytes: u64, rate: NonZeroU64, now: Instant) -> Instant {
        let mut paid_at = self.paid_at.lock().unwrap_or_else(PoisonError::into_inner);
        let seconds = (bytes as f64 / rate.get() as f64).min(DEAREST_SECONDS);
        let price = Duration::from_secs_f64(seconds);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        *paid_at = (*paid_at).max(earliest) + price;
        *paid_at
    }
}

#[cfg(test)]
mod tests {
    use super::super::slots::Priority;
    use super::*;
    use std::sync::Arc;

    const MB: u64 = 1_000_000;

    fn caps(total: u64, prefetch: u64) -> Bandwidth {
        Bandwidth {
            total_bytes_per_second: NonZeroU64::new(total),
            prefetch_bytes_per_second: NonZeroU64::new(prefetch),
        }
    }

    async fn take(pace: Arc<Pace>, priority: Priority, bytes: u64) -> Duration {
        let (urgency, start) = (Urgency::new(priority), Instant::now());
        for _ in 0..bytes / 50_000 {
            pace.took(50_000, &urgency).await;
        }
        start.elapsed()
    }

    fn about(time: Duration, seconds: f64) {
        let off = (time.as_secs_f64() - seconds).abs();
        assert!(off < 0.15, "took {time:?}, not {seconds} s");
    }

    #[tokio::test(start_paused = true)]
    async fn all_transfers_together_keep_to_the_total_and_prefetches_to_their_own() {
        let pace = Arc::new(Pace::new());
        about(take(Arc::clone(&pace), Priority::Demand, 500 * MB).await, 0.0);
        pace.set(caps(10 * MB, 0));
        let shared = [Priority::Demand, Priority::Prefetch(0)]
            .map(|priority| take(Arc::clone(&pace), priority, 10 * MB));
        for time in futures_util::future::join_all(shared).await {
            about(time, 2.0);
        }
        pace.set(caps(10 * MB, 2 * MB));
        about(take(Arc::clone(&pace), Priority::Prefetch(7), 4 * MB).await, 2.0);
        about(take(Arc::clone(&pace), Priority::Demand, 20 * MB).await, 2.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_no_credit_for_later() {
        let pace = Arc::new(Pace::new());
        pace.set(caps(10 * MB, 0));
        tokio::time::sleep(Duration::from_secs(3600)).await;
        about(take(Arc::clone(&pace), Priority::Demand, 10 * MB).await, 1.0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_cap_counts_for_who_waits_already() {
        let pace = Arc::new(Pace::new());
        pace.set(caps(1, 0));
        let waiting = tokio::spawn(take(Arc::clone(&pace), Priority::Demand, 50_000));
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(!waiting.is_finished());
        pace.set(caps(10 * MB, 0));
        about(waiting.await.unwrap(), 1.0);
        about(take(Arc::clone(&pace), Priority::Demand, 10 * MB).await, 1.0);
    }

    #[tokio::test(start_paused = true)]
    async fn prefetches_stand_back_only_while_demanded_bytes_move() {
        let pace = Arc::new(Pace::new());
        let (demand, prefetch) =
            (Urgency::new(Priority::Demand), Urgency::new(Priority::Prefetch(9)));
        pace.turn(&prefetch).await;
        pace.took(1, &demand).await;
        let start = Instant::now();
        pace.turn(&demand).await;
        assert_eq!(start.elapsed(), Duration::ZERO);
        pace.turn(&prefetch).await;
        about(start.elapsed(), LINGER.as_secs_f64());

        // And one that becomes urgent meanwhile waits no longer than that.
        pace.took(1, &prefetch).await;
        let start = Instant::now();
        pace.turn(&prefetch).await;
        assert_eq!(start.elapsed(), Duration::ZERO, "prefetched bytes hold nobody up");
    }
}
