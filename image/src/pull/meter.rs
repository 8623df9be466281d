//! How much has come, and how fast.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The rate's memory: long enough to be calm, short enough to notice a stall.
const TAU: Duration = Duration::from_secs(10);

/// Counts bytes and keeps their exponentially weighted rate.
#[derive(Debug)]
pub(super) struct Meter {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    start: Instant,
    last: Instant,
    fetched_bytes: u64,
    skipped_bytes: u64,
    /// Of what was fetched, bytes that came for nothing.
    lost_bytes: u64,
    rate: f64,
}

/// What a meter shows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Reading {
    pub(super) fetched_bytes: u64,
    /// Bytes that arrived and count, and those that did not have to be fetched.
    pub(super) done_bytes: u64,
    /// Of these, bytes that did not have to be fetched.
    pub(super) skipped_bytes: u64,
    /// Of what was fetched.
    pub(super) bytes_per_second: f64,
}

impl Meter {
    pub(super) fn new(now: Instant) -> Self {
        let state = State {
            start: now,
            last: now,
            fetched_bytes: 0,
            skipped_bytes: 0,
            lost_bytes: 0,
            rate: 0.0,
        };
        Self { state: Mutex::new(state) }
    }

    /// Counts bytes that arrived.
    pub(super) fn add(&self, bytes: u64, now: Instant) {
        let mut state = self.lock();
        state.decay(now);
        state.fetched_bytes += bytes;
        state.rate += bytes as f64 / TAU.as_secs_f64();
    }

    /// Counts bytes that need not be fetched: they are done and say nothing of the rate.
    pub(super) fn skip(&self, bytes: u64) {
        self.lock().skipped_bytes += bytes;
    }

    /// So many bytes are done: what of them did not come need not be fetched, and what came beyond
    /// them comes again.
    pub(super) fn stand_at(&self, bytes: u64) {
        let mut state = self.lock();
        let done = state.fetched_bytes - state.lost_bytes + state.skipped_bytes;
        state.skipped_bytes += bytes.saturating_sub(done);
        state.lost_bytes += done.saturating_sub(bytes).min(state.fetched_bytes - state.lost_bytes);
    }

    /// Everything begins again: what came so far was fetched, and is not done.
    pub(super) fn begin_again(&self) {
        let mut state = self.lock();
        state.lost_bytes = state.fetched_bytes;
        state.skipped_bytes = 0;
    }

    /// What it shows at `now`.
    pub(super) fn read(&self, now: Instant) -> Reading {
        let mut state = self.lock();
        state.decay(now);
        // The average starts at zero; without this the first seconds would look slow.
        let age = now.saturating_duration_since(state.start).as_secs_f64().max(0.05);
        let weight = 1.0 - (-age / TAU.as_secs_f64()).exp();
        Reading {
            fetched_bytes: state.fetched_bytes,
            done_bytes: state.fetched_bytes - state.lost_bytes + state.skipped_bytes,
            skipped_bytes: state.skipped_bytes,
            bytes_per_second: state.rate / weight,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn decay(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.last).as_secs_f64();
        self.rate *= (-passed / TAU.as_secs_f64()).exp();
        self.last = now.max(self.last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_stream_has_its_rate_from_the_start_and_a_stall_shows() {
        let start = Instant::now();
        let meter = Meter::new(start);
        let mut now = start;
        for second in 1..=60 {
            for _ in 0..10 {
                now += Duration::from_millis(100);
                meter.add(10_000_000, now);
            }
            let Reading { fetched_bytes, bytes_per_second, .. } = meter.read(now);
            assert_eq!(fetched_bytes, second * 100_000_000);
            assert!(
                (0.94e8..1.06e8).contains(&bytes_per_second),
                "after {second} s: {bytes_per_second}"
            );
        }
        let rate = meter.read(now + Duration::from_secs(30)).bytes_per_second;
        assert!(rate < 0.06e8, "after a stall of 30 s: {rate}");
    }

    #[test]
    fn skipped_bytes_are_done_but_not_fast() {
        let start = Instant::now();
        let meter = Meter::new(start);
        meter.skip(1 << 30);
        let reading = meter.read(start + Duration::from_secs(1));
        let expected = Reading {
            fetched_bytes: 0,
            done_bytes: 1 << 30,
            skipped_bytes: 1 << 30,
            bytes_per_second: 0.0,
        };
        assert_eq!(reading, expected);
    }

    #[test]
    fn what_comes_for_nothing_was_fetched_and_is_not_done() {
        let start = Instant::now();
        let meter = Meter::new(start);
        meter.add(100, start);
        meter.skip(1000);
        meter.begin_again();
        meter.add(30, start);
        meter.skip(7);
        let Reading { fetched_bytes, done_bytes, .. } = meter.read(start);
        assert_eq!((fetched_bytes, done_bytes), (130, 37));
    }
}
