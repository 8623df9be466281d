//! What the kubelet has done so far: whether it has called, when, and what it said.
//!
//! ```text
//! NotCalled ─► NotUnderstood ─► Asked ─► Registered ◄─► Refused
//!     ▲                                        │
//!     └── the registration socket was removed ─┘
//! ```
//!
//! All of it was seen from this side of the sockets: that a socket is served says nothing about whether
//! the kubelet reaches it.

use std::time::SystemTime;

use tokio::sync::watch;

use crate::mount::Viewer;
use crate::socket::Caller;

/// How far the registration with the kubelet is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegistrationState {
    /// Nobody has called on the registration socket, which is in place since.
    NotCalled {
        /// When it was put there.
        since: SystemTime,
    },
    /// Connections ended without a call that was understood.
    NotUnderstood {
        /// When the socket was put there.
        since: SystemTime,
        /// When the last of them ended.
        at: SystemTime,
        /// How many there were.
        connections: u64,
        /// Whose the last one was.
        caller: String,
    },
    /// GetInfo was answered; what comes of it was not reported yet.
    Asked {
        /// When.
        at: SystemTime,
    },
    /// The kubelet has registered the driver.
    Registered {
        /// When it said so last.
        at: SystemTime,
    },
    /// It has not.
    Refused {
        /// When it said so.
        at: SystemTime,
        /// Its words.
        why: String,
    },
}

impl RegistrationState {
    /// Since when the kubelet could have called, or when it did.
    pub fn since(&self) -> SystemTime {
        match self {
            Self::NotCalled { since } | Self::NotUnderstood { since, .. } => *since,
            Self::Asked { at } | Self::Registered { at } | Self::Refused { at, .. } => *at,
        }
    }
}

/// What is known of the kubelet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeletStatus {
    /// How far the registration is.
    pub registration: RegistrationState,
    /// When NodeGetInfo was called last, which the kubelet does before it registers a driver.
    pub node_info: Option<SystemTime>,
    /// When anything was called last on the CSI socket.
    pub last_call: Option<SystemTime>,
    /// The mount namespace from which NodeGetInfo or NodePublishVolume was called last.
    pub viewer: Option<Viewer>,
}

/// Keeps what is known of the kubelet. Clones share all state.
#[derive(Debug, Clone)]
pub(crate) struct Kubelet(watch::Sender<KubeletStatus>);

impl Kubelet {
    pub(crate) fn new() -> Self {
        let registration = RegistrationState::NotCalled { since: SystemTime::now() };
        let status = KubeletStatus { registration, node_info: None, last_call: None, viewer: None };
        Self(watch::Sender::new(status))
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<KubeletStatus> {
        self.0.subscribe()
    }

    /// The registration socket is put in place: what was said of an earlier one is over.
    pub(crate) fn socket_shown(&self) {
        let since = SystemTime::now();
        self.0.send_modify(|s| s.registration = RegistrationState::NotCalled { since });
    }

    /// A connection to the registration socket has ended without a call. One line in the log for each
    /// socket that is put in place: the kubelet tries again for ever.
    pub(crate) fn not_understood(&self, caller: &Caller) {
        let at = SystemTime::now();
        self.0.send_if_modified(|status| {
            let (since, before) = match &status.registration {
                RegistrationState::NotCalled { since } => (*since, 0),
                RegistrationState::NotUnderstood { since, connections, .. } => {
                    (*since, *connections)
                }
                // Somebody else, or a kubelet that has been understood before.
                _ => return false,
            };
            let caller = caller.name();
            if before == 0 {
                tracing::warn!(
                    caller,
                    "a connection to the registration socket ended without a call that was \
                     understood; unless that was not the kubelet, see the kubelet's log"
                );
            }
            let connections = before + 1;
            status.registration =
                RegistrationState::NotUnderstood { since, at, connections, caller };
            true
        });
    }

    /// GetInfo was called.
    pub(crate) fn asked(&self) {
        let at = SystemTime::now();
        self.0.send_if_modified(|status| match status.registration {
            // A kubelet that restarts asks again; until it says otherwise nothing has changed.
            RegistrationState::Registered { .. } => false,
            _ => {
                status.registration = RegistrationState::Asked { at };
                true
            }
        });
    }

    /// What the kubelet reported.
    pub(crate) fn told(&self, refused: Option<String>) {
        let at = SystemTime::now();
        self.0.send_modify(|status| {
            status.registration = match refused {
                None => RegistrationState::Registered { at },
                Some(why) => RegistrationState::Refused { at, why },
            };
        });
    }

    /// Something was called on the CSI socket. Wakes nobody.
    pub(crate) fn called(&self) {
        let now = SystemTime::now();
        self.0.send_if_modified(|status| {
            status.last_call = Some(now);
            false
        });
    }

    /// NodeGetInfo was called.
    pub(crate) fn node_info(&self, viewer: Viewer) {
        let now = SystemTime::now();
        self.0.send_modify(|status| {
            (status.node_info, status.viewer) = (Some(now), Some(viewer));
        });
    }

    /// A volume is wanted by this process.
    pub(crate) fn seen_by(&self, viewer: Viewer) {
        self.0.send_if_modified(|status| status.viewer.replace(viewer) != Some(viewer));
    }
}
