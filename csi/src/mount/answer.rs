//! Asking a mounted file system a question that its server may never answer.
//!
//! ```text
//! block device ──► asked in line: the kernel knows the answer
//! others ────────► asked by a thread of its own, which is waited for, but not for ever
//! ```
//!
//! A thread that waits for a server cannot be called back: it stays until the server answers or
//! the connection ends. So while one has waited for long nobody asks that file system again, and
//! the calls of years leave no more threads than those of the first seconds.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::fs::StatVfs;
use rustix::io::Errno;

use super::Device;

/// Below what callers wait for the state of a volume, and long enough for a server on a node that
/// is busy with loading a model.
const PATIENCE: Duration = Duration::from_secs(3);

/// The file systems that somebody waits for, and since when.
static WAITING: LazyLock<Mutex<HashMap<Device, Instant>>> = LazyLock::new(Mutex::default);

/// What `statvfs` says of the mount at `path`, which is of `device`; [`Errno::TIMEDOUT`] when its
/// server says nothing.
pub(super) fn statvfs(path: &Path, device: Device) -> rustix::io::Result<StatVfs> {
    // Only file systems without a block device can have a server.
    if device.major != 0 {
        return rustix::fs::statvfs(path);
    }
    let now = Instant::now();
    let since = *waiting().entry(device).or_insert(now);
    let Some(left) = PATIENCE.checked_sub(since.elapsed()) else { return Err(Errno::TIMEDOUT) };
    let (tell, answer) = mpsc::sync_channel(1);
    let path = path.to_owned();
    let asked = std::thread::Builder::new().name("statvfs".into()).spawn(move || {
        let result = rustix::fs::statvfs(&path);
        waiting().remove(&device);
        // Nobody listens any more to a late answer.
        let _ = tell.send(result);
    });
    if asked.is_err() {
        waiting().remove(&device);
        return Err(Errno::AGAIN);
    }
    answer.recv_timeout(left).unwrap_or(Err(Errno::TIMEDOUT))
}

fn waiting() -> MutexGuard<'static, HashMap<Device, Instant>> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}
