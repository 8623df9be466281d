//! Metrics, health and a status page over plain HTTP.
//!
//! - `/`: the status page;
//! - `/metrics`: OpenMetrics text;
//! - `/healthz`: 200 while the process answers and keeps its state; else restart it;
//! - `/readyz`: 200 once the store is open, all sockets are served and the kubelet has registered the driver, until the
//!   drain; else why not.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use carport_csi::RegistrationState;
use carport_image::Puller;

use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::run::Phase;
use crate::state::NodeState;

mod page;

/// What the pages are made of.
#[derive(Clone)]
pub struct Pages {
    /// Whose they are.
    pub node_name: String,
    /// Its pulls, as they are now.
    pub puller: Puller,
    /// The node.
    pub state: watch::Receiver<Arc<NodeState>>,
    /// How far the agent is.
    pub phase: watch::Receiver<Phase>,
    /// What the kubelet has made of the CSI driver; absent where none is served.
    pub registration: Option<watch::Receiver<RegistrationState>>,
    /// What it measured.
    pub metrics: Arc<Metrics>,
}

/// Listens on `address`.
///
/// # Errors
///
/// When the address is taken or not this machine's.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| {
        format!(
            "listen on {address} for metrics and health (choose another one with --http-listen)"
        )
    })
}

/// Serves until `stop`.
///
/// # Errors
///
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    pages: Pages,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/", get(status))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(pages);
    axum::serve(listener, router)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
        .context("serve metrics and health")
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let state = pages.state.borrow().clone();
    match pages.metrics.encode(&state, pages.puller.traffic()) {
        Ok(text) => ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

async fn status(State(pages): State<Pages>) -> Response {
    let state = pages.state.borrow().clone();
    let pulls = state.pulls(pages.puller.pulls());
    let html = page::render(&pages.node_name, *pages.phase.borrow(), &state, &pulls);
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CONTENT_SECURITY_POLICY, page::POLICY),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, html).into_response()
}

async fn healthz(State(pages): State<Pages>) -> Response {
    if pages.state.has_changed().is_err() && *pages.phase.borrow() != Phase::Draining {
        let why = "the node's state is no longer kept\n";
        return (StatusCode::SERVICE_UNAVAILABLE, why).into_response();
    }
    "ok\n".into_response()
}

async fn readyz(State(pages): State<Pages>) -> Response {
    let phase = *pages.phase.borrow();
    let registration = pages.registration.as_ref().map(|told| told.borrow().clone());
    let why = match (phase, registration) {
        (Phase::Serving, None | Some(RegistrationState::Registered)) => {
            return "ok\n".into_response();
        }
        (Phase::Starting, _) => "starting".to_owned(),
        (Phase::Draining, _) => "stopping".to_owned(),
        (Phase::Serving, Some(RegistrationState::Waiting)) => {
            "the kubelet has not registered the CSI driver yet; where that does not come, see \
             whether csi.kubeletDir is the kubelet's folder"
                .to_owned()
        }
        (Phase::Serving, Some(RegistrationState::Failed(why))) => format!(
            "the kubelet did not register the CSI driver: {why}; see its log, and whether the \
             driver's name is taken"
        ),
    };
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response()
}
