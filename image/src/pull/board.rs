//! The board: where every pull stands, for whoever looks from outside.
//!
//! A pull writes its own [`Entry`]; readers take a [`PullProgress`] of it at any time. What succeeded
//! leaves the board, since the store tells it from then on; failures stay for a while.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::watch;

use super::holders::Holders;
use super::layers::LayerState;
use super::slots::{Priority, Urgency};
use super::stream::Arriving;
use super::{PullError, PullProgress, PullState, Pulled};
use crate::digest::Digest;
use crate::reference::Reference;

/// Failed pulls that are remembered, so that somebody can ask why.
const REMEMBERED_FAILURES: usize = 64;

/// All pulls that can be seen from outside.
pub(super) struct Board {
    entries: Mutex<Vec<Arc<Entry>>>,
    /// Pulls that another process does, as it told last.
    elsewhere: Mutex<Vec<PullProgress>>,
    pub(super) changes: watch::Sender<u64>,
}

/// What is known of one pull.
pub(super) struct Entry {
    pub(super) reference: Reference,
    pub(super) urgency: Arc<Urgency>,
    /// Who keeps it going.
    pub(super) holders: Holders,
    /// The image as it can be seen before it is complete, where the pull is to show it.
    pub(super) arriving: watch::Sender<Option<Arc<Arriving>>>,
    started_at: SystemTime,
    stage: Mutex<Stage>,
    changes: watch::Sender<u64>,
}

pub(super) struct Stage {
    pub(super) state: PullState,
    pub(super) digest: Option<Digest>,
    pub(super) total_bytes: u64,
    /// Bytes of layers that were here before.
    pub(super) present_bytes: u64,
    /// The layers on their way; another pull may be watching the same ones.
    pub(super) layers: Vec<LayerState>,
}

impl Default for Board {
    fn default() -> Self {
        Self {
            entries: Mutex::default(),
            elsewhere: Mutex::default(),
            changes: watch::Sender::new(0),
        }
    }
}

impl Board {
    /// A new entry, in place of earlier failures of the same reference.
    pub(super) fn enter(&self, reference: &Reference, priority: Priority) -> Arc<Entry> {
        let entry = Arc::new(Entry {
            reference: reference.clone(),
            urgency: Arc::new(Urgency::new(priority)),
            holders: Holders::default(),
            arriving: watch::Sender::new(None),
            started_at: SystemTime::now(),
            stage: Mutex::new(Stage {
                state: PullState::Resolving,
                digest: None,
                total_bytes: 0,
                present_bytes: 0,
                layers: Vec::new(),
            }),
            changes: self.changes.clone(),
        });
        {
            let mut entries = lock(&self.entries);
            entries.retain(|e| e.reference != *reference || !e.is_over());
            entries.push(Arc::clone(&entry));
        }
        self.changes.send_modify(|n| *n += 1);
        entry
    }

    pub(super) fn leave(&self, entry: &Arc<Entry>, outcome: &Result<Pulled, PullError>) {
        let state = match outcome {
            Ok(_) => PullState::Done,
            Err(error) => PullState::Failed { reason: error.reason(), message: error.to_string() },
        };
        {
            let mut entries = lock(&self.entries);
            // What is done the store tells; what nobody waited for has not failed.
            if matches!(outcome, Ok(_) | Err(PullError::Cancelled(_))) {
                entries.retain(|e| !Arc::ptr_eq(e, entry));
            }
            while entries.iter().filter(|e| e.is_over()).count() >= REMEMBERED_FAILURES {
                let Some(oldest) = entries.iter().position(|e| e.is_over()) else { break };
                entries.remove(oldest);
            }
        }
        entry.set(|stage| stage.state = state);
    }

    pub(super) fn list(&self) -> Vec<PullProgress> {
        let mut list: Vec<_> = lock(&self.entries).iter().map(|entry| entry.progress()).collect();
        list.extend(lock(&self.elsewhere).iter().cloned());
        list
    }

    /// Whether another process pulls this image.
    pub(super) fn is_elsewhere(&self, reference: &Reference) -> bool {
        lock(&self.elsewhere).iter().any(|pull| pull.reference == *reference)
    }

    pub(super) fn set_elsewhere(&self, pulls: Vec<PullProgress>) {
        let before = std::mem::replace(&mut *lock(&self.elsewhere), pulls.clone());
        let stage = |pull: &PullProgress| (pull.started_at, pull.digest, pull.state.clone());
        if !before.iter().map(stage).eq(pulls.iter().map(stage)) {
            self.changes.send_modify(|n| *n += 1);
        }
    }
}

impl Entry {
    pub(super) fn set(&self, change: impl FnOnce(&mut Stage)) {
        change(&mut lock(&self.stage));
        self.changes.send_modify(|n| *n += 1);
    }

    /// Makes the pull and its layers at least as urgent as `priority`; true when that is news.
    pub(super) fn raise(&self, priority: Priority) -> bool {
        if self.urgency.get() >= priority {
            return false;
        }
        self.urgency.raise(priority);
        self.set(|stage| stage.layers.iter().for_each(|layer| layer.urgency.raise(priority)));
        true
    }

    fn is_over(&self) -> bool {
        let stage = lock(&self.stage);
        matches!(stage.state, PullState::Done | PullState::Failed { .. })
    }

    pub(super) fn progress(&self) -> PullProgress {
        let stage = lock(&self.stage);
        let now = Instant::now();
        let (mut done_bytes, mut fetched_bytes) = (stage.present_bytes, 0);
        let mut bytes_per_second = 0.0;
        for reading in stage.layers.iter().map(|layer| layer.meter.read(now)) {
            done_bytes += reading.done_bytes;
            fetched_bytes += reading.fetched_bytes;
            bytes_per_second += reading.bytes_per_second;
        }
        PullProgress {
            reference: self.reference.clone(),
            digest: stage.digest,
            state: stage.state.clone(),
            priority: self.urgency.get(),
            // A source that stops to serve ranges sends more than is wanted.
            done_bytes: done_bytes.min(stage.total_bytes),
            fetched_bytes,
            total_bytes: stage.total_bytes,
            started_at: self.started_at,
            bytes_per_second,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole after each statement; a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
