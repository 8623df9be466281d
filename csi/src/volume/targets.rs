//! One call at a time for each target, and a way for unpublish to be heard.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;
use tokio_util::sync::CancellationToken;

use super::TargetPath;

/// The targets that calls are at work on. Clones share them.
#[derive(Debug, Clone, Default)]
pub(super) struct Targets {
    slots: Arc<Mutex<HashMap<TargetPath, Slot>>>,
}

#[derive(Debug, Default)]
struct Slot {
    /// Held by the call at work.
    lock: Arc<tokio::sync::Mutex<()>>,
    /// Cancelled by an unpublish; a new one follows for the publishes after it.
    withdrawn: CancellationToken,
    /// Calls that hold or wait.
    users: usize,
}

impl Targets {
    /// A place in the queue of `target`. Takes no lock yet.
    pub(super) fn enter(&self, target: &TargetPath) -> Place {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.entry(target.clone()).or_default();
        slot.users += 1;
        Place {
            targets: self.clone(),
            target: target.clone(),
            lock: Arc::clone(&slot.lock),
            withdrawn: slot.withdrawn.clone(),
        }
    }

    /// Tells the publishes of `target` that hold or wait now to give up.
    pub(super) fn withdraw(&self, target: &TargetPath) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(target) {
            std::mem::take(&mut slot.withdrawn).cancel();
        }
    }
}

/// A call's stay at a target. Dropping it leaves.
#[derive(Debug)]
pub(super) struct Place {
    targets: Targets,
    target: TargetPath,
    lock: Arc<tokio::sync::Mutex<()>>,
    withdrawn: CancellationToken,
}

impl Place {
    /// Waits for its turn. While the turn is held, no other call touches the target.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue.
    pub(super) async fn turn(self) -> Turn {
        Turn { _guard: Arc::clone(&self.lock).lock_owned().await, _place: self }
    }

    /// Ends when an unpublish came after this call.
    pub(super) fn withdrawn(&self) -> CancellationToken {
        self.withdrawn.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut slots = self.targets.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(&self.target) {
            slot.users -= 1;
            if slot.users == 0 {
                slots.remove(&self.target);
            }
        }
    }
}

/// The right to change a target. Movable into the blocking work, so that a caller who
/// goes away meanwhile does not let the next one in too early.
#[derive(Debug)]
pub(super) struct Turn {
    // Released before the place is left: fields drop in this order.
    _guard: OwnedMutexGuard<()>,
    _place: Place,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> TargetPath {
        TargetPath::parse(text).unwrap()
    }

    #[tokio::test]
    async fn one_at_a_time_for_a_target_and_others_go_on() {
        let targets = Targets::default();
        let first = targets.enter(&target("/a")).turn().await;
        let other = targets.enter(&target("/b")).turn().await;
        let mut second = Box::pin(targets.enter(&target("/a")).turn());
        tokio::select! {
            biased;
            _ = &mut second => panic!("two at once"),
            () = tokio::task::yield_now() => {}
        }
        drop(first);
        drop(second.await);
        drop(other);
        assert!(targets.slots.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_withdrawal_reaches_those_before_it_and_no_later_one() {
        let targets = Targets::default();
        let before = targets.enter(&target("/a"));
        targets.withdraw(&target("/a"));
        let after = targets.enter(&target("/a"));
        assert!(before.withdrawn().is_cancelled());
        assert!(!after.withdrawn().is_cancelled());
        drop((before, after));
        targets.withdraw(&target("/a"));
        assert!(targets.slots.lock().unwrap().is_empty());
    }
}
