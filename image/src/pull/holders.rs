//! Who keeps a pull going, and how a pull is cancelled.
//!
//! Each [`PullHandle`](super::PullHandle) says who holds it. [`Puller::cancel`] stops a pull whose
//! holders can do without it, and names those that cannot.

use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Puller;
use crate::reference::Reference;

/// Who holds a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Holder {
    /// A volume of a pod, whose publish waits now.
    Pod,
    /// A volume of a pod, whose publish was answered before the pull ended. The kubelet is expected to
    /// call again; so far it has not.
    Retry,
    /// The pre-pull list.
    List,
    /// A prefetch that somebody asked for through the API.
    Prefetch,
    /// The program itself, or a person at a terminal.
    Command,
}

/// All of them, in the order of their numbers.
const HOLDERS: [Holder; 5] =
    [Holder::Pod, Holder::Retry, Holder::List, Holder::Prefetch, Holder::Command];

impl Holder {
    /// Whether the pull must not be cancelled under it without force.
    fn needs_it(self) -> bool {
        match self {
            Self::Pod | Self::List | Self::Command => true,
            Self::Retry | Self::Prefetch => false,
        }
    }
}

/// How many hold a pull, by kind.
#[derive(Debug, Default)]
pub(super) struct Holders([AtomicUsize; HOLDERS.len()]);

impl Holders {
    pub(super) fn enter(&self, holder: Holder) {
        self.0[holder as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn leave(&self, holder: Holder) {
        self.0[holder as usize].fetch_sub(1, Ordering::Relaxed);
    }

    fn needed_by(&self) -> impl Iterator<Item = (Holder, usize)> + '_ {
        HOLDERS
            .into_iter()
            .filter(|holder| holder.needs_it())
            .map(|holder| (holder, self.0[holder as usize].load(Ordering::Relaxed)))
            .filter(|(_, count)| *count > 0)
    }
}

/// What became of [`Puller::cancel`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cancel {
    /// No pull of that reference is in flight in this process.
    NotInFlight,
    /// The pull has been told to stop.
    Stopped,
    /// The pull goes on, since somebody needs it.
    Needed(NeededBy),
    /// The process with the streaming sessions pulls it, for pods that read it meanwhile.
    Streaming,
}

/// Who needs a pull. Shown as a sentence.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NeededBy {
    /// Volumes whose publish waits for it.
    pub pods: usize,
    /// Whether the pre-pull list names the image.
    pub list: bool,
}

impl fmt::Display for NeededBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.pods, self.list) {
            (0, false) => f.write_str("the agent itself needs it"),
            (0, true) => f.write_str("the pre-pull list names it: remove the entry"),
            (pods, list) => {
                let pods = match pods {
                    1 => "a pod waits for it: delete the pod".to_owned(),
                    n => format!("{n} pods wait for it: delete the pods"),
                };
                let list = if list { ", and remove the entry in the pre-pull list" } else { "" };
                write!(f, "{pods}{list}")
            }
        }
    }
}

impl Puller {
    /// Stops the pull of `reference` that is in flight, if nobody needs it or `force` is set. What came so
    /// far stays for the next pull. Whoever waits for it gets
    /// [`PullError::Cancelled`](super::PullError::Cancelled).
    pub fn cancel(&self, reference: &Reference, force: bool) -> Cancel {
        let mut needed = None;
        let stopped = self.inner.images.stop_if(
            |key| key.reference == *reference,
            |pulls| {
                let mut by = NeededBy::default();
                let mut found = false;
                for (holder, count) in pulls.iter().flat_map(|pull| pull.holders.needed_by()) {
                    found = true;
                    match holder {
                        Holder::Pod => by.pods += count,
                        Holder::List => by.list = true,
                        Holder::Retry | Holder::Prefetch | Holder::Command => {}
                    }
                }
                if found && !force {
                    needed = Some(by);
                    return false;
                }
                true
            },
        );
        match needed {
            Some(by) => Cancel::Needed(by),
            None if stopped == 0 && self.inner.board.is_elsewhere(reference) => Cancel::Streaming,
            None if stopped == 0 => Cancel::NotInFlight,
            None => {
                tracing::info!(%reference, force, "cancelled a pull");
                Cancel::Stopped
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_needs_a_pull_is_told_with_what_to_do() {
        let shown = |pods, list| NeededBy { pods, list }.to_string();
        assert_eq!(shown(0, false), "the agent itself needs it");
        assert_eq!(shown(0, true), "the pre-pull list names it: remove the entry");
        assert_eq!(shown(1, false), "a pod waits for it: delete the pod");
        assert_eq!(
            shown(2, true),
            "2 pods wait for it: delete the pods, and remove the entry in the pre-pull list"
        );
    }

    #[test]
    fn holders_are_numbered_in_the_order_of_the_table() {
        for (number, holder) in HOLDERS.into_iter().enumerate() {
            assert_eq!(holder as usize, number);
        }
    }
}
