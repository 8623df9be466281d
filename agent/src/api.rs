//! The node's gRPC API on a unix socket, and over TCP where that is configured.
//!
//! ```text
//! socket ─► LocalityService ─┐                       ┌─ NodeState (watch)
//!        ─► GpuService ──────┼─► placement, list ◄────┤
//!        ─► CacheService ────┤                       └─ Puller::pulls (live bytes)
//!        ─► health, reflection
//! ```
//!
//! # What always holds
//!
//! - **Answers come from memory.** No call that reads waits for disk, registry or NVML; `Prefetch`
//!   starts a pull and does not wait for it. Other calls that change the node wait for its disk.
//! - **Wrong requests are told which field is wrong**: `INVALID_ARGUMENT` with a
//!   `google.rpc.BadRequest`. Fields that this version does not serve are refused, not ignored.
//! - **A slow watcher costs nothing**: it loses its place, and is told so.
//! - **One agent a socket.** A stale socket is replaced, a live one is left alone, and one whose file is
//!   removed is created again.
//!
//! Who may call is who may open the socket (mode 0660): the wire itself asks nobody. Over TCP it does:
//! see [`tcp`] and [`access`].

use std::path::Path;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use carport_csi::socket::{Modes, Serving, Socket, Sockets};
use carport_image::Puller;
use carport_proto::authority::AnyAuthority;
use carport_proto::carport::v1::cache_service_server::CacheServiceServer;
use carport_proto::carport::v1::gpu_service_server::GpuServiceServer;
use carport_proto::carport::v1::locality_service_server::LocalityServiceServer;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _, stream};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::server::Connected;
use tonic::{Code, Status};
use tonic_health::server::HealthReporter;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::kubelet::Kubelet;
use crate::metrics::ConnectionMetrics;
use crate::run::Phase;
use crate::state::NodeState;
use crate::warm::Warmer;

pub mod access;
mod cache;
pub mod convert;
mod feed;
pub mod gpu;
mod list;
mod locality;
mod mask;
mod prefetch;
mod requests;
pub mod tcp;
mod watching;

use access::Guard;
use feed::Feed;
use prefetch::Prefetches;
use requests::Requests;
use tcp::Tcp;
use watching::MAX_WATCHERS;

/// A request of 32 models, or of a few thousand node names, is far smaller.
const MAX_REQUEST_BYTES: usize = 1 << 20;
/// Calls of one connection at a time.
const MAX_CALLS: usize = 64;

/// A watcher whose machine has gone is found out within two of these.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Puts the API's socket in place, to be served: for root and its group. Everybody may look into its folder.
///
/// # Errors
///
/// When another agent serves there, or it cannot be made.
pub fn bind(path: &Path) -> anyhow::Result<Socket> {
    let bound = Socket::bind(path, Modes { socket: 0o660, folder: 0o755 });
    let mut socket = bound.context("api.socket (--socket)")?;
    socket.show()?;
    Ok(socket)
}

/// What the services answer from.
#[derive(Clone)]
pub struct Api {
    node_name: String,
    state: watch::Receiver<Arc<NodeState>>,
    phase: watch::Receiver<Phase>,
    puller: Puller,
    warmer: Warmer,
    kubelet: Option<Kubelet>,
    prefetches: Prefetches,
    requests: Arc<Requests>,
    feed: Feed,
    watchers: Arc<Semaphore>,
    /// Ends watches: they would go on for ever.
    stop: CancellationToken,
}

impl Api {
    /// Services that answer for `node_name` from `state`.
    pub fn new(
        node_name: String,
        state: watch::Receiver<Arc<NodeState>>,
        phase: watch::Receiver<Phase>,
        puller: Puller,
        warmer: Warmer,
        kubelet: Option<Kubelet>,
    ) -> Self {
        let feed = Feed::new(&state.borrow().revision);
        let (watchers, stop) = (Arc::new(Semaphore::new(MAX_WATCHERS)), CancellationToken::new());
        let (prefetches, requests) = (Prefetches::default(), Arc::default());
        let api = Self {
            node_name,
            state,
            phase,
            puller,
            warmer,
            kubelet,
            prefetches,
            requests,
            feed,
            watchers,
            stop,
        };
        api.feed.begin(&api);
        api
    }

    /// Tells watchers what changes, until `stop`.
    pub async fn follow(&self, stop: CancellationToken) {
        self.feed.run(self.clone(), stop).await;
    }

    /// Serves on `socket` until `stop`, then lets calls under way end.
    ///
    /// # Errors
    ///
    /// When the transport fails.
    pub async fn serve(
        &self,
        socket: Socket,
        sockets: Sockets,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let path = socket.path().to_owned();
        let incoming = socket
            .serve(Serving::new("api", sockets), stop.clone())
            .with_context(|| format!("listen at {}", path.display()))?
            .map_ok(AnyAuthority::new);
        let result = self.serve_on(incoming, &Guard::Open, stop).await;
        result.with_context(|| format!("serve {}", path.display()))
    }

    /// As [`Api::serve`], for those who may call over TCP.
    ///
    /// # Errors
    ///
    /// When the transport fails.
    pub async fn serve_tcp(
        &self,
        tcp: Tcp,
        metrics: ConnectionMetrics,
        stop: CancellationToken,
    ) -> anyhow::Result<()> {
        let guard = tcp.guard();
        let result = self.serve_on(tcp.incoming(metrics, stop.clone()), &guard, stop).await;
        result.context("serve the API over TCP")
    }

    async fn serve_on<C>(
        &self,
        incoming: impl Stream<Item = std::io::Result<C>>,
        guard: &Guard,
        stop: CancellationToken,
    ) -> anyhow::Result<()>
    where
        C: AsyncRead + AsyncWrite + Connected + Unpin + Send + 'static,
    {
        let (health, health_service) = tonic_health::server::health_reporter();
        set_serving(&health).await;
        let descriptors = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(carport_proto::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let reflection = descriptors().build_v1().context("build the reflection service")?;
        // What grpcurl before 1.9 asks.
        let older = descriptors().build_v1alpha().context("build the reflection service")?;
        let locality = LocalityServiceServer::new(self.clone());
        let gpu = GpuServiceServer::new(self.clone());
        let cache = CacheServiceServer::new(self.clone());
        let (locality, gpu, cache) = (
            locality.max_decoding_message_size(MAX_REQUEST_BYTES),
            gpu.max_decoding_message_size(MAX_REQUEST_BYTES),
            cache.max_decoding_message_size(MAX_REQUEST_BYTES),
        );
        // Listeners end at the same signal as the server, which must hear it all the same: a server without
        // connections to come ends without it, and watches would go on until they are cut off.
        let ending = stop.clone();
        let incoming = incoming.chain(stream::poll_fn(move |_| match ending.is_cancelled() {
            true => Poll::Pending,
            false => Poll::Ready(None),
        }));
        let watches = self.stop.clone();
        let mut server = tonic::transport::Server::builder()
            // What a call causes to be logged says which call it was.
            .trace_fn(|request| tracing::info_span!("rpc", method = request.uri().path()))
            .concurrency_limit_per_connection(MAX_CALLS)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .timeout(Duration::from_secs(60));
        // Health is told to all who come as far as this: it says nothing of the node.
        server
            .add_service(InterceptedService::new(locality, guard.reads()))
            .add_service(InterceptedService::new(gpu, guard.reads()))
            .add_service(InterceptedService::new(cache, guard.writes()))
            .add_service(health_service)
            .add_service(InterceptedService::new(reflection, guard.reads()))
            .add_service(InterceptedService::new(older, guard.reads()))
            .serve_with_incoming_shutdown(incoming, async move {
                stop.cancelled().await;
                watches.cancel();
                set_not_serving(&health).await;
            })
            .await?;
        Ok(())
    }

    /// Waits for what calls have started, once the puller is shut down.
    pub async fn finish(&self) {
        self.prefetches.finish().await;
    }

    fn state(&self) -> Arc<NodeState> {
        self.state.borrow().clone()
    }

    fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// How old the state is: nothing while it is kept, for it changes when the node does.
    fn state_age(&self) -> Duration {
        let kept = self.state.has_changed().is_ok();
        if kept {
            return Duration::ZERO;
        }
        SystemTime::now().duration_since(self.state.borrow().observed_at).unwrap_or_default()
    }

    fn is_this_node(&self, name: &str) -> Result<(), Status> {
        if name.is_empty() || name == self.node_name {
            return Ok(());
        }
        let name: String = name.chars().take(253).collect();
        let why = format!("node {name}: this agent answers for {} only", self.node_name);
        let details = ErrorDetails::with_resource_info("node", name, "", &why);
        Err(Status::with_error_details(Code::NotFound, why, details))
    }
}

async fn set_serving(health: &HealthReporter) {
    health.set_serving::<LocalityServiceServer<Api>>().await;
    health.set_serving::<GpuServiceServer<Api>>().await;
    health.set_serving::<CacheServiceServer<Api>>().await;
}

async fn set_not_serving(health: &HealthReporter) {
    health.set_not_serving::<LocalityServiceServer<Api>>().await;
    health.set_not_serving::<GpuServiceServer<Api>>().await;
    health.set_not_serving::<CacheServiceServer<Api>>().await;
}
