//! Connections to the agent: refused ones, and sockets that were removed. And when the kubelet called.

use std::time::SystemTime;

use carport_csi::KubeletStatus;
use carport_csi::RegistrationState;
use carport_csi::socket::SocketEvent;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::{StateLabel, signed};
use crate::listen::Refusal;

/// The agent's unix sockets.
const SOCKETS: [&str; 3] = ["api", "csi", "registration"];

/// How far the registration is; `disabled` where no volumes are served.
const REGISTRATION: [&str; 6] =
    ["registered", "not_called", "not_understood", "asked", "refused", "disabled"];

/// Connections, sockets, and the kubelet's calls.
#[derive(Debug, Clone, Default)]
pub struct ConnectionMetrics {
    refused: Family<RefusedLabels, Counter>,
    recreated: Family<SocketLabel, Counter>,
    registration: Family<StateLabel, Gauge>,
    last_call: Gauge,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RefusedLabels {
    listener: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SocketLabel {
    socket: &'static str,
}

impl ConnectionMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let metrics = Self::default();
        for listener in ["http", "api_tcp"] {
            for reason in Refusal::ALL.map(Refusal::name) {
                let _ = metrics.refused.get_or_create(&RefusedLabels { listener, reason });
            }
        }
        for socket in SOCKETS {
            let reason = Refusal::NotAccepted.name();
            let _ = metrics.refused.get_or_create(&RefusedLabels { listener: socket, reason });
            let _ = metrics.recreated.get_or_create(&SocketLabel { socket });
        }
        registry.register(
            "connections_refused",
            "Connections that were not served, by listener and reason",
            metrics.refused.clone(),
        );
        registry.register(
            "sockets_recreated",
            "How often the file of a unix socket was gone and was created again",
            metrics.recreated.clone(),
        );
        metrics.registration("disabled");
        registry.register(
            "kubelet_registration",
            "How far the kubelet's registration of the CSI driver is: 1 for the state that holds",
            metrics.registration.clone(),
        );
        registry.register(
            "kubelet_last_call_timestamp_seconds",
            "When the CSI socket was called last; 0 before the first call",
            metrics.last_call.clone(),
        );
        metrics
    }

    /// Counts a connection to `listener` that is not served.
    pub fn refused(&self, listener: &'static str, why: Refusal) {
        self.refused.get_or_create(&RefusedLabels { listener, reason: why.name() }).inc();
    }

    /// Counts what happened to a unix socket.
    pub fn observe(&self, event: &SocketEvent) {
        match *event {
            SocketEvent::NotAccepted(socket) => self.refused(socket, Refusal::NotAccepted),
            SocketEvent::Recreated(socket) => {
                self.recreated.get_or_create(&SocketLabel { socket }).inc();
            }
        }
    }

    fn registration(&self, holds: &str) {
        for state in REGISTRATION {
            let label = StateLabel { state: state.into() };
            self.registration.get_or_create(&label).set((state == holds).into());
        }
    }

    /// What the kubelet has done.
    pub fn kubelet(&self, status: &KubeletStatus) {
        self.registration(match status.registration {
            RegistrationState::NotCalled { .. } => "not_called",
            RegistrationState::NotUnderstood { .. } => "not_understood",
            RegistrationState::Asked { .. } => "asked",
            RegistrationState::Registered { .. } => "registered",
            RegistrationState::Refused { .. } => "refused",
        });
        let since = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.last_call.set(status.last_call.map_or(0, |at| signed(since(at).as_secs())));
    }
}
