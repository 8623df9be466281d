//! Reading images into the page cache before anybody waits for them.
//!
//! A server that maps its weights then finds them in memory. The kernel is asked to read
//! (`POSIX_FADV_WILLNEED`), step by step, one image at a time; nothing is copied. What is read
//! counts for the agent's own memory cgroup: there a limit bounds what can stay, so no
//! more than a part of it, and of what the machine has left, is read.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use carport_image::{Digest, Store};
use rustix::fs::{Advice, fadvise};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Read at a time; between two steps the end is asked for.
const STEP_BYTES: u64 = 8 << 20;
/// Images that wait for their turn; a caller that wants more than this at once means none.
const MAX_WAITING: usize = 256;

/// Warms the page cache, one image at a time. Clones share the queue.
#[derive(Clone)]
pub struct Warmer {
    store: Store,
    turn: Arc<tokio::sync::Mutex<()>>,
    waiting: Arc<Mutex<HashSet<Digest>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Warmer {
    /// A warmer for the images of `store`.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            turn: Arc::default(),
            waiting: Arc::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    /// Warms `digest` when its turn comes; one that waits already waits once. Needs a Tokio runtime.
    pub fn warm(&self, digest: Digest) {
        {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.len() >= MAX_WAITING {
                tracing::warn!(%digest, "too many images wait to be warmed; this one is left cold");
                return;
            }
            if !waiting.insert(digest) {
                return;
            }
        }
        let own = self.clone();
        self.tasks.spawn(async move {
            let turn = own.stop.run_until_cancelled(Arc::clone(&own.turn).lock_owned()).await;
            own.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(&digest);
            let Some(turn) = turn else { return };
            let (rootfs, stop) = (own.store.rootfs(&digest), own.stop.clone());
            let work = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                read_ahead(&rootfs, room(), &stop)
            });
            let started = Instant::now();
            match work.await {
                Ok(Ok((bytes, whole))) => tracing::info!(
                    %digest, bytes, whole, elapsed_ms = started.elapsed().as_millis(), "warmed"
                ),
                Ok(Err(error)) => tracing::warn!(%digest, %error, "warm the page cache"),
                Err(error) => tracing::error!(%digest, %error, "warm the page cache"),
            }
        });
    }

    /// Ends all work, and waits for it.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// Has the kernel read up to `most` bytes of the files below `root`; how many, and whether that
/// was all. Blocking.
fn read_ahead(root: &Path, most: u64, stop: &CancellationToken) -> std::io::Result<(u64, bool)> {
    let mut done = 0;
    // In the order of names: shards are numbered, and read in that order.
    for entry in walkdir::WalkDir::new(root).sort_by_file_name() {
        let entry = entry?;
        if !entry.file_type().is_file() {
            continue;
        }
        let file = std::fs::File::open(entry.path())?;
        let length = file.metadata()?.len();
        let mut at = 0;
        while at < length {
            if stop.is_cancelled() || done >= most {
                return Ok((done, false));
            }
            let step = STEP_BYTES.min(length - at).min(most - done);
            fadvise(&file, at, std::num::NonZeroU64::new(step), Advice::WillNeed)?;
            at += step;
            done += step;
        }
    }
    Ok((done, true))
}

/// How much may be read: half of what the machine could give, and of the own cgroup's limit.
fn room() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| available(&text));
    let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max");
    let limit = limit.ok().and_then(|text| text.trim().parse::<u64>().ok());
    [machine, limit].into_iter().flatten().min().unwrap_or(0) / 2
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_available_is_read_from_the_kernel_s_text() {
        let text = "MemTotal:       24609264 kB\nMemFree: 1 kB\nMemAvailable:   23155340 kB\n";
        assert_eq!(available(text), Some(23_155_340 * 1024));
        assert_eq!(available("nothing"), None);
    }

    #[test]
    fn no_more_is_read_than_there_is_room_for_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(outside.path(), [0; 100]).unwrap();
        std::fs::write(dir.path().join("a"), vec![0; 3000]).unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        std::fs::write(dir.path().join("b/c"), vec![0; 2000]).unwrap();
        std::os::unix::fs::symlink(outside.path(), dir.path().join("l")).unwrap();
        let stop = CancellationToken::new();
        assert_eq!(read_ahead(dir.path(), 1 << 30, &stop).unwrap(), (5000, true));
        assert_eq!(read_ahead(dir.path(), 4000, &stop).unwrap(), (4000, false));
        stop.cancel();
        assert_eq!(read_ahead(dir.path(), 1 << 30, &stop).unwrap(), (0, false));
    }
}
