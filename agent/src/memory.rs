//! What was freed goes back to the node.
//!
//! glibc keeps freed memory between what is still in use, for ever if need be: after 200 watchers of 1,000 models had
//! gone, two thirds of the agent's heap were free and still its own. A node's memory is the pods', so each process
//! that lives long hands that back once a minute.

#![allow(unsafe_code, reason = "a call into libc that no crate wraps")]

use std::convert::Infallible;
use std::time::Duration;

use tokio::time::MissedTickBehavior;

/// Giving back takes milliseconds, in which the allocator's arenas are locked one after the other.
const PERIOD: Duration = Duration::from_secs(60);

/// Gives freed memory back, now and once a minute, until it is dropped.
pub(crate) async fn give_back() -> Infallible {
    let mut turns = tokio::time::interval(PERIOD);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        let _ = tokio::task::spawn_blocking(trim).await;
    }
}

/// Another allocator than glibc's is left to itself.
fn trim() {
    // SAFETY: it takes no pointer, touches only memory that is free, and takes the locks that `malloc` takes.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
#[cfg(target_env = "gnu")]
mod tests {
    use super::*;

    /// In bytes.
    fn resident() -> usize {
        let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: usize = pages.split(' ').nth(1).unwrap().parse().unwrap();
        pages * rustix::param::page_size()
    }

    #[test]
    fn freed_memory_between_what_is_in_use_goes_back() {
        const BLOCK: usize = 16 << 10;
        const BLOCKS: usize = 8_192;
        // What stays lies between what goes.
        let (kept, freed): (Vec<_>, Vec<_>) =
            (0..BLOCKS).map(|_| (vec![1_u8; 64], vec![1_u8; BLOCK])).unzip();
        drop(freed);
        let before = resident();
        trim();
        let gone = before.saturating_sub(resident());
        assert!(gone > BLOCK * BLOCKS / 2, "{gone} bytes went back");
        drop(kept);
    }
}
