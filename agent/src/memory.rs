//! What was freed goes back to the node.
//!
//! glibc keeps freed memory between what is still in use, for ever if need be: after 200 watchers of 1,000 models had
//! gone, two thirds of the agent's heap were free and still its own. After a pull of 1 GiB it kept 73 MB, and 32 MB of that also
//! after `malloc_trim`, which leaves the top of each arena alone. A node's memory is the pods', so each process that
//! lives long hands freed memory back once a minute and after its last pull, and takes large buffers from the kernel
//! one by one ([`tune`]).

#![allow(unsafe_code, reason = "a call into libc that no crate wraps")]

use std::convert::Infallible;
use std::time::Duration;

use carport_image::Puller;
use tokio::time::MissedTickBehavior;

use crate::state::in_flight;

/// Giving back takes milliseconds, in which the allocator's arenas are locked one after the other.
const PERIOD: Duration = Duration::from_secs(60);

/// Allocations from here on are mapped and unmapped by themselves: the buffers of pulls, 4 MiB each. Left to itself glibc
/// raises this bound to their size with the first one that is freed.
const MAPPED_BYTES: i32 = 1024 * 1024;

/// Arenas that threads share. glibc makes up to eight for each core, and what is freed in one is of no use to the
/// others.
const ARENAS: i32 = 4;

/// Sets the allocator up. To be called before there are other threads.
pub(crate) fn tune() {
    // SAFETY: sets two numbers of the allocator; what they do not allow for is refused.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}

/// Gives freed memory back now, once a minute, and when the last pull has ended, until it is dropped.
pub(crate) async fn give_back(puller: &Puller) -> Infallible {
    let mut turns = tokio::time::interval(PERIOD);
    turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut changes = puller.changes();
    let mut pulling = false;
    loop {
        tokio::select! {
            _ = turns.tick() => {}
            // The puller is held here, so that its changes do not end.
            Ok(()) = changes.changed() => {
                let before = std::mem::replace(&mut pulling, puller.pulls().iter().any(in_flight));
                if pulling || !before {
                    continue;
                }
            }
        }
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
