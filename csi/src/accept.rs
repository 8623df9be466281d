//! Connections that cannot be accepted, mostly for want of file descriptors.
//!
//! A listener stays readable while nobody accepts, so a loop that tries again at once would keep a core
//! busy. It waits, longer each time, and the log has one line for each time it begins.

use std::io;
use std::time::Duration;

/// Between two tries. Somebody who waits for a volume is not kept waiting for long.
const FIRST: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(1);

/// What an accept loop knows of its failures.
#[derive(Debug)]
pub struct AcceptErrors {
    listener: &'static str,
    wait: Option<Duration>,
}

impl AcceptErrors {
    /// For the loop of this listener.
    pub fn new(listener: &'static str) -> Self {
        Self { listener, wait: None }
    }

    /// Waits before the next try.
    pub async fn wait(&mut self, error: &io::Error) {
        // The peer has gone; nothing is wrong here.
        let gone = [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset];
        if gone.contains(&error.kind()) {
            return;
        }
        let wait = self.next(error);
        tokio::time::sleep(wait).await;
    }

    fn next(&mut self, error: &io::Error) -> Duration {
        if self.wait.is_none() {
            tracing::error!(
                listener = self.listener, %error,
                "cannot accept connections; trying again. Where there are too many open files, raise \
                 the agent's limit of open files (LimitNOFILE, ulimit -n)"
            );
        }
        let wait = self.wait.map_or(FIRST, |wait| (2 * wait).min(LONGEST));
        self.wait = Some(wait);
        wait
    }

    /// A connection was accepted.
    pub fn over(&mut self) {
        if self.wait.take().is_some() {
            tracing::info!(listener = self.listener, "accepting connections again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_a_second_and_start_again_after_a_success() {
        let error = io::Error::from_raw_os_error(24);
        let mut errors = AcceptErrors::new("csi");
        let waits: Vec<u64> =
            (0..7).map(|_| u64::try_from(errors.next(&error).as_millis()).unwrap()).collect();
        assert_eq!(waits, [50, 100, 200, 400, 800, 1000, 1000]);
        errors.over();
        assert_eq!(errors.next(&error), FIRST);
    }
}
