//! Metrics, health and a status page over plain HTTP.
//!
//! - `/`: the status page;
//! - `/metrics`: OpenMetrics text;
//! - `/healthz`: 200 while the process answers and keeps its state; else restart it;
//! - `/readyz`: 200 once the store is open, all sockets are served and the kubelet has registered the driver, until the
//!   drain; else why not.
//!
//! Whoever reaches the port is served, so connections are bounded in number ([`listen`]), and each in time.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use carport_image::Puller;

use crate::kubelet::Kubelet;
use crate::listen::{self, LimitedListener, Limits};
use crate::metrics::{CONTENT_TYPE, Metrics};
use crate::run::Phase;
use crate::state::NodeState;

mod page;

/// A scraper or two, probes, and people.
const MAX_CONNECTIONS: usize = 256;
/// For a request's headers, also where a connection is kept for the next one: scrapers connect again.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// After this a connection ends with the answer under way.
const MAX_AGE: Duration = Duration::from_secs(60);
/// How long that may take to be read.
const LAST_ANSWER: Duration = Duration::from_secs(2);

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
    /// What is known of the kubelet; absent where no volumes are served.
    pub kubelet: Option<Kubelet>,
    /// What it measured.
    pub metrics: Arc<Metrics>,
}

/// Listens on `address`; see [`listen::bind`].
///
/// # Errors
///
/// When the address is taken or not this machine's.
pub fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    listen::bind(address).with_context(|| {
        format!(
            "listen on {address} for metrics and health (choose another one with --http-listen)"
        )
    })
}

/// Serves until `stop`.
pub async fn serve(listener: TcpListener, pages: Pages, stop: CancellationToken) {
    let connections = pages.metrics.connections.clone();
    let router = Router::new()
        .route("/", get(status))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(pages);
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    let limits = Limits::within(MAX_CONNECTIONS, 8);
    let mut listener = LimitedListener::new("http", listener, limits, connections);
    let tasks = TaskTracker::new();
    while let Some((stream, _, slot)) = stop.run_until_cancelled(listener.accept()).await {
        let service = TowerToHyperService::new(router.clone());
        let connection = builder.serve_connection(TokioIo::new(stream), service).into_owned();
        let stop = stop.clone();
        tasks.spawn(async move {
            let _slot = slot;
            let mut connection = pin!(connection);
            tokio::select! {
                _ = &mut connection => return,
                () = tokio::time::sleep(MAX_AGE) => {}
                () = stop.cancelled() => {}
            }
            // The answer under way is the last one.
            connection.as_mut().graceful_shutdown();
            let _ = tokio::time::timeout(LAST_ANSWER, connection).await;
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn metrics(State(pages): State<Pages>) -> Response {
    let state = pages.state.borrow().clone();
    if let Some(kubelet) = &pages.kubelet {
        pages.metrics.connections.kubelet(&kubelet.report().status);
    }
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
    let why = match phase {
        Phase::Starting => "starting".to_owned(),
        Phase::Draining => "stopping".to_owned(),
        Phase::Serving => {
            let now = SystemTime::now();
            let findings = pages.kubelet.as_ref().map(|kubelet| kubelet.findings(now));
            match findings.filter(|findings| !findings.is_empty()) {
                None => return "ok\n".into_response(),
                Some(findings) => {
                    let lines = findings.into_iter().map(|finding| finding.message);
                    lines.collect::<Vec<_>>().join("\n")
                }
            }
        }
    };
    (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response()
}
