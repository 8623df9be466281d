//! Who goes first: layers wait here for their turn.
//!
//! ```text
//!            ┌ demanded: up to `limit`, whatever else is under way
//! waiting ─► ┤
//!            └ prefetched: while fewer than `limit` are under way, the highest first
//! ```
//!
//! A pod that waits must not queue behind a night's worth of prefetching, so a demanded layer
//! takes no prefetched one's place: it gets one beside it. While its bytes move, prefetches
//! stand still (see `pace`), so that there are never more than `limit` layers on the wire for long.
//!
//! Within one priority, who asked first goes first.

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::Notify;

/// How urgent a pull is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// Nobody waits for it yet. Higher numbers first.
    Prefetch(i32),
    /// Somebody waits: a pod that starts, a person at a terminal.
    Demand,
}

/// The priority of work in flight, which only ever rises: that of the most urgent who ever joined.
#[derive(Debug)]
pub(super) struct Urgency(AtomicI64);

impl Urgency {
    pub(super) fn new(priority: Priority) -> Self {
        Self(AtomicI64::new(Self::number(priority)))
    }

    pub(super) fn raise(&self, priority: Priority) {
        self.0.fetch_max(Self::number(priority), Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Priority {
        let number = self.0.load(Ordering::Relaxed);
        i32::try_from(number).map_or(Priority::Demand, Priority::Prefetch)
    }

    pub(super) fn is_demand(&self) -> bool {
        self.get() == Priority::Demand
    }

    fn number(priority: Priority) -> i64 {
        match priority {
            Priority::Prefetch(number) => i64::from(number),
            Priority::Demand => i64::MAX,
        }
    }
}

/// Places for layers under way.
#[derive(Debug)]
pub(super) struct Slots {
    limit: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next_ticket: u64,
    waiting: Vec<Waiter>,
    under_way: Vec<(u64, Arc<Urgency>)>,
}

#[derive(Debug)]
struct Waiter {
    ticket: u64,
    urgency: Arc<Urgency>,
    turn: Arc<Notify>,
}

/// A place, or a place in the queue; given back on drop.
#[derive(Debug)]
pub(super) struct Slot {
    slots: Arc<Slots>,
    ticket: u64,
}

impl Slots {
    /// Room for `limit` layers, at least one.
    pub(super) fn new(limit: usize) -> Self {
        Self { limit: limit.max(1), state: Mutex::default() }
    }

    /// Waits for a place.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up the place in the queue.
    pub(super) async fn take(self: &Arc<Self>, urgency: &Arc<Urgency>) -> Slot {
        let turn = Arc::new(Notify::new());
        let slot = {
            let mut state = self.lock();
            let ticket = state.next_ticket;
            state.next_ticket += 1;
            let (urgency, turn) = (Arc::clone(urgency), Arc::clone(&turn));
            state.waiting.push(Waiter { ticket, urgency, turn });
            state.dispatch(self.limit);
            Slot { slots: Arc::clone(self), ticket }
        };
        turn.notified().await;
        slot
    }

    /// Looks again who may go; to be called when an urgency has risen.
    pub(super) fn dispatch(&self) {
        self.lock().dispatch(self.limit);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Whole after each statement; a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn dispatch(&mut self, limit: usize) {
        loop {
            let key = |waiter: &Waiter| (waiter.urgency.get(), std::cmp::Reverse(waiter.ticket));
            let first = self.waiting.iter().enumerate().max_by_key(|(_, waiter)| key(waiter));
            let Some((at, first)) = first else { return };
            let taken = match first.urgency.get() {
                Priority::Demand => self.under_way.iter().filter(|(_, u)| u.is_demand()).count(),
                Priority::Prefetch(_) => self.under_way.len(),
            };
            if taken >= limit {
                return;
            }
            let Waiter { ticket, urgency, turn } = self.waiting.swap_remove(at);
            self.under_way.push((ticket, urgency));
            turn.notify_one();
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        state.waiting.retain(|waiter| waiter.ticket != self.ticket);
        state.under_way.retain(|(ticket, _)| *ticket != self.ticket);
        state.dispatch(self.slots.limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt as _;

    type Waiting = std::pin::Pin<Box<dyn Future<Output = Slot>>>;

    /// Asks for a place, as far as the queue.
    fn ask(slots: &Arc<Slots>, urgency: &Arc<Urgency>) -> Waiting {
        let (slots, urgency) = (Arc::clone(slots), Arc::clone(urgency));
        let mut waiting: Waiting = Box::pin(async move { slots.take(&urgency).await });
        if let Some(slot) = waiting.as_mut().now_or_never() {
            return Box::pin(std::future::ready(slot));
        }
        waiting
    }

    fn urgency(priority: Priority) -> Arc<Urgency> {
        Arc::new(Urgency::new(priority))
    }

    fn now(waiting: &mut Waiting) -> Option<Slot> {
        waiting.as_mut().now_or_never()
    }

    #[test]
    fn a_demanded_layer_waits_for_no_prefetch() {
        let slots = Arc::new(Slots::new(2));
        let prefetch = urgency(Priority::Prefetch(9));
        let mut held: Vec<_> = (0..3).map(|_| ask(&slots, &prefetch)).collect();
        let _first = now(&mut held[0]).unwrap();
        let _second = now(&mut held[1]).unwrap();
        assert!(now(&mut held[2]).is_none());

        let demand = urgency(Priority::Demand);
        let mut asked: Vec<_> = (0..3).map(|_| ask(&slots, &demand)).collect();
        let one = now(&mut asked[0]).unwrap();
        let _two = now(&mut asked[1]).unwrap();
        assert!(now(&mut asked[2]).is_none(), "no more demanded ones than the limit");
        drop(one);
        assert!(now(&mut held[2]).is_none(), "the prefetch is not next");
        assert!(now(&mut asked[2]).is_some());
    }

    #[test]
    fn higher_numbers_go_first_and_then_who_asked_first() {
        let slots = Arc::new(Slots::new(1));
        let mut running = ask(&slots, &urgency(Priority::Prefetch(0)));
        let mut running = now(&mut running);
        let mut low = ask(&slots, &urgency(Priority::Prefetch(-1)));
        let mut early = ask(&slots, &urgency(Priority::Prefetch(5)));
        let mut late = ask(&slots, &urgency(Priority::Prefetch(5)));
        for (name, next) in [("early", &mut early), ("late", &mut late), ("low", &mut low)] {
            drop(running.take());
            running = now(next);
            assert!(running.is_some(), "{name} should be next");
        }
    }

    #[test]
    fn work_that_became_urgent_goes_at_once_and_counts_as_demanded() {
        let slots = Arc::new(Slots::new(1));
        let mut first = ask(&slots, &urgency(Priority::Prefetch(0)));
        let _first = now(&mut first).unwrap();
        let rising = urgency(Priority::Prefetch(0));
        let mut second = ask(&slots, &rising);
        assert!(now(&mut second).is_none());
        rising.raise(Priority::Demand);
        rising.raise(Priority::Prefetch(3));
        assert_eq!(rising.get(), Priority::Demand, "it never sinks");
        slots.dispatch();
        let _second = now(&mut second).unwrap();
        assert!(now(&mut ask(&slots, &urgency(Priority::Demand))).is_none());
    }

    #[test]
    fn who_gives_up_leaves_no_gap() {
        let slots = Arc::new(Slots::new(1));
        let demand = urgency(Priority::Demand);
        let mut first = ask(&slots, &demand);
        let first = now(&mut first).unwrap();
        let (second, mut third) = (ask(&slots, &demand), ask(&slots, &demand));
        drop(first);
        // Its turn had come, and nobody took it.
        drop(second);
        assert!(now(&mut third).is_some());
    }
}
