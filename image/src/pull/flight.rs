//! Single flight: whoever asks for a key that is on its way waits for that one.
//!
//! The work runs in a task of its own. It is stopped when the last of its
//! waiters has gone, or by [`Flights::stop_if`]. A state `S`, made with the work, is what its
//! waiters can see of it meanwhile.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// All work in flight, by key.
pub(super) struct Flights<K, V, S> {
    table: Arc<Mutex<HashMap<K, Entry<V, S>>>>,
}

struct Entry<V, S> {
    state: S,
    result: watch::Receiver<Option<V>>,
    stop: CancellationToken,
    waiters: usize,
    /// Tells this flight from a later one with the same key.
    number: u64,
}

/// One waiter's hold on a flight.
pub(super) struct Flight<K: Eq + Hash, V, S> {
    /// What the work shows of itself.
    pub(super) state: S,
    table: Arc<Mutex<HashMap<K, Entry<V, S>>>>,
    key: K,
    number: u64,
    result: watch::Receiver<Option<V>>,
}

impl<K, V, S> Clone for Flights<K, V, S> {
    fn clone(&self) -> Self {
        Self { table: Arc::clone(&self.table) }
    }
}

impl<K, V, S> Default for Flights<K, V, S> {
    fn default() -> Self {
        Self { table: Arc::default() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The table is whole after each statement; a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<K, V, S> Flights<K, V, S>
where
    K: Eq + Hash + Clone + Send + 'static,
    V: Clone + Send + Sync + 'static,
    S: Clone + Send + 'static,
{
    /// Joins the flight of `key`, or starts one with the state and the future that `start` makes.
    ///
    /// `start` is given a token that is cancelled when nobody waits any more; the future
    /// must then end by itself, with a result that nobody may see. `start` is called under
    /// the table's lock: it must not come back here.
    pub(super) fn join<F>(
        &self,
        key: &K,
        start: impl FnOnce(CancellationToken) -> (S, F),
    ) -> Flight<K, V, S>
    where
        F: Future<Output = V> + Send + 'static,
    {
        static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);

        let mut table = lock(&self.table);
        // A flight that was told to stop is of no use to a newcomer.
        if let Some(entry) = table.get_mut(key)
            && !entry.stop.is_cancelled()
        {
            entry.waiters += 1;
            return Flight::hold(&self.table, key, entry);
        }
        let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (sender, result) = watch::channel(None);
        let stop = CancellationToken::new();
        let (state, work) = start(stop.clone());
        let entry = Entry { state, result, stop, waiters: 1, number };
        let flight = Flight::hold(&self.table, key, &entry);
        table.insert(key.clone(), entry);
        drop(table);

        let (table, key) = (Arc::clone(&self.table), key.clone());
        tokio::spawn(async move {
            let value = work.await;
            {
                let mut table = lock(&table);
                if table.get(&key).is_some_and(|entry| entry.number == number) {
                    table.remove(&key);
                }
            }
            // Nobody may be left to hear it.
            let _ = sender.send(Some(value));
        });
        flight
    }

    /// Stops the flights whose keys fit, if `agreed` says so of all their states together. Returns how
    /// many it stopped. `agreed` is called under the table's lock: it must not come back here.
    pub(super) fn stop_if(
        &self,
        fits: impl Fn(&K) -> bool,
        agreed: impl FnOnce(&[&S]) -> bool,
    ) -> usize {
        let table = lock(&self.table);
        let running = |(key, entry): &(&K, &Entry<V, S>)| fits(key) && !entry.stop.is_cancelled();
        let chosen: Vec<_> = table.iter().filter(running).map(|(_, entry)| entry).collect();
        let states: Vec<&S> = chosen.iter().map(|entry| &entry.state).collect();
        if !agreed(&states) {
            return 0;
        }
        chosen.iter().for_each(|entry| entry.stop.cancel());
        chosen.len()
    }

    /// Tells all flights to stop.
    pub(super) fn stop_all(&self) {
        for entry in lock(&self.table).values() {
            entry.stop.cancel();
        }
    }
}

impl<K: Eq + Hash + Clone, V: Clone, S: Clone> Flight<K, V, S> {
    fn hold(table: &Arc<Mutex<HashMap<K, Entry<V, S>>>>, key: &K, entry: &Entry<V, S>) -> Self {
        Self {
            state: entry.state.clone(),
            table: Arc::clone(table),
            key: key.clone(),
            number: entry.number,
            result: entry.result.clone(),
        }
    }

    /// What it is the flight of.
    pub(super) fn key(&self) -> &K {
        &self.key
    }

    /// Waits for the result; `None` when the work died without one.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future gives up nothing; dropping the flight gives up the hold.
    pub(super) async fn wait(&self) -> Option<V> {
        let mut result = self.result.clone();
        let value = result.wait_for(Option::is_some).await.ok()?;
        value.clone()
    }
}

impl<K: Eq + Hash, V, S> Drop for Flight<K, V, S> {
    fn drop(&mut self) {
        if let Some(entry) = lock(&self.table).get_mut(&self.key)
            && entry.number == self.number
        {
            entry.waiters -= 1;
            if entry.waiters == 0 {
                entry.stop.cancel();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn a_second_caller_gets_the_first_ones_result() {
        let flights = Flights::<u8, u32, ()>::default();
        let (go, gate) = oneshot::channel::<()>();
        let runs = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&runs);
        let first = flights.join(&1, |_| {
            ((), async move {
                counted.fetch_add(1, Ordering::Relaxed);
                let _ = gate.await;
                7
            })
        });
        let second = flights.join(&1, |_| ((), async { panic!("a second flight") }));
        go.send(()).unwrap();
        assert_eq!((first.wait().await, second.wait().await), (Some(7), Some(7)));
        assert_eq!(runs.load(Ordering::Relaxed), 1);
        drop((first, second));
        assert_eq!(
            flights.join(&1, |_| ((), async { 8 })).wait().await,
            Some(8),
            "done flights are forgotten"
        );
    }

    #[tokio::test]
    async fn work_stops_with_its_last_waiter() {
        let flights = Flights::<u8, bool, ()>::default();
        let stopped = |token: CancellationToken| {
            ((), async move {
                token.cancelled().await;
                true
            })
        };
        let (first, second) = (flights.join(&1, stopped), flights.join(&1, stopped));
        let watch = first.result.clone();
        drop(first);
        assert!(!lock(&flights.table)[&1].stop.is_cancelled());
        drop(second);
        let mut watch = watch;
        assert_eq!(*watch.wait_for(Option::is_some).await.unwrap(), Some(true));

        let again = flights.join(&2, stopped);
        flights.stop_all();
        assert_eq!(again.wait().await, Some(true));
    }

    #[tokio::test]
    async fn flights_that_are_chosen_stop_together_or_not_at_all() {
        let flights = Flights::<u8, u8, u8>::default();
        let flight = |key: u8| {
            flights.join(&key, |stop| {
                (key, async move {
                    stop.cancelled().await;
                    key
                })
            })
        };
        let (one, two, three) = (flight(1), flight(2), flight(3));
        let odd = |key: &u8| key % 2 == 1;
        let seen = |states: &[&u8]| {
            let mut states: Vec<u8> = states.iter().map(|state| **state).collect();
            states.sort_unstable();
            assert_eq!(states, [1, 3]);
        };
        let refused = flights.stop_if(odd, |states| {
            seen(states);
            false
        });
        assert_eq!(refused, 0);
        let stopped = flights.stop_if(odd, |states| {
            seen(states);
            true
        });
        assert_eq!(stopped, 2);
        assert_eq!((one.wait().await, three.wait().await), (Some(1), Some(3)));
        assert!(!lock(&flights.table)[&2].stop.is_cancelled());
        assert_eq!(flights.stop_if(odd, |states| states.is_empty()), 0, "none is left to stop");
        drop(two);
    }

    #[tokio::test]
    async fn a_newcomer_does_not_join_a_flight_that_is_stopping() {
        let flights = Flights::<u8, u32, ()>::default();
        let (go, gate) = oneshot::channel::<()>();
        drop(flights.join(&1, |_| {
            ((), async move {
                let _ = gate.await;
                1
            })
        }));
        let second = flights.join(&1, |_| ((), async { 2 }));
        go.send(()).unwrap();
        assert_eq!(second.wait().await, Some(2));
    }

    #[tokio::test]
    async fn work_that_panics_is_an_answer_too() {
        let flights = Flights::<u8, u32, ()>::default();
        let flight = flights.join(&1, |_| ((), async { panic!("on purpose") }));
        assert_eq!(flight.wait().await, None);
    }
}
