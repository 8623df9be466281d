//! Pulls between two calls of the kubelet.
//!
//! The kubelet waits two minutes for a publish, and calls again later. The pull goes on meanwhile: a
//! publish that ends first leaves it here, under its target.
//!
//! ```text
//! publish ─► Keeper ─► the pull ended                  ─► forgotten
//!              │   ─► answered or cancelled before that ─► kept ─► the next publish takes it
//!              │                                              ├─► unpublish: the pod is gone, dropped
//!              │                                              └─► the grace period is over: dropped
//!              └─► the volume was unpublished meanwhile ─► dropped
//! ```
//!
//! A pull that is dropped stops, unless somebody else holds it. What came so far stays in the store.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use carport_image::Puller;
use carport_image::pull::{Holder, PullHandle, PullRequest};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::TargetPath;

/// More volumes than this do not wait at a time on one node: the kubelet's own limit is some hundred pods.
/// A pull beyond it stops with its publish, and resumes with the next one.
const MAX_KEPT: usize = 4096;

/// What publishes left. Clones share it.
#[derive(Clone, Default)]
pub(super) struct KeptPulls {
    table: Arc<Mutex<HashMap<TargetPath, Kept>>>,
}

struct Kept {
    /// None where the process with the streaming sessions has the pull.
    pull: Option<PullHandle>,
    number: u64,
    /// Ends it after the grace period; aborted with the entry.
    _timer: AbortOnDropHandle<()>,
}

impl KeptPulls {
    /// For a publish of `target` that has its turn. `grace` is how long a pull is kept.
    pub(super) fn keeper(
        &self,
        target: &TargetPath,
        withdrawn: CancellationToken,
        grace: Duration,
    ) -> Keeper {
        let earlier = self.lock().remove(target);
        Keeper {
            is_first: earlier.is_none(),
            keep: true,
            // Held until this publish has a pull of its own: a pull without holders stops.
            pull: earlier.and_then(|kept| kept.pull),
            kept: self.clone(),
            target: target.clone(),
            withdrawn,
            grace,
        }
    }

    /// The volume at `target` is unpublished: its pod is gone.
    pub(super) fn forget(&self, target: &TargetPath) {
        let kept = self.lock().remove(target);
        if let Some(pull) = kept.and_then(|kept| kept.pull) {
            tracing::info!(%target, image = %pull.progress().reference,
                "the pod is gone; its pull stops unless somebody else needs it");
        }
    }

    fn keep(&self, target: &TargetPath, mut pull: Option<PullHandle>, grace: Duration) {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        // Without a runtime the process is ending, and its pulls with it.
        let Ok(runtime) = Handle::try_current() else { return };
        if let Some(pull) = &mut pull {
            pull.hand_to(Holder::Retry);
        }
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let (own, place) = (self.clone(), target.clone());
        let timer = runtime.spawn(async move {
            tokio::time::sleep(grace).await;
            own.expire(&place, number, grace);
        });
        let mut table = self.lock();
        if table.len() >= MAX_KEPT && !table.contains_key(target) {
            return;
        }
        table.insert(target.clone(), Kept { pull, number, _timer: AbortOnDropHandle::new(timer) });
    }

    fn expire(&self, target: &TargetPath, number: u64, grace: Duration) {
        let mut table = self.lock();
        if table.get(target).is_none_or(|kept| kept.number != number) {
            return;
        }
        let kept = table.remove(target);
        drop(table);
        if let Some(pull) = kept.and_then(|kept| kept.pull) {
            tracing::info!(%target, image = %pull.progress().reference, grace_s = grace.as_secs(),
                "the kubelet has not asked again; the pull stops unless somebody else needs it");
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<TargetPath, Kept>> {
        // Whole after each statement; a panic elsewhere does not spoil it.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The pull of one publish. Dropping it keeps the pull for the next publish of the target.
pub(super) struct Keeper {
    /// No earlier publish of this target was answered before its pull ended.
    pub(super) is_first: bool,
    keep: bool,
    pull: Option<PullHandle>,
    kept: KeptPulls,
    target: TargetPath,
    withdrawn: CancellationToken,
    grace: Duration,
}

impl Keeper {
    /// Starts the pull, or joins the one that an earlier publish left.
    pub(super) fn start(&mut self, puller: &Puller, request: PullRequest) -> &PullHandle {
        // The earlier one is dropped after this one has joined.
        self.pull.insert(puller.start(PullRequest { holder: Holder::Pod, ..request }))
    }

    /// The volume is published, or refused for good: nothing is kept.
    pub(super) fn finish(mut self) {
        self.keep = false;
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let pull = self.pull.take();
        if self.keep && !self.withdrawn.is_cancelled() {
            self.kept.keep(&self.target, pull, self.grace);
        }
    }
}
