//! `carport agent`: which parts there are, how they start, and how they end.
//!
//! ```text
//! Config ─► build: store, GPU thread, state, all sockets bound; fails early ─► serve ─► drain
//!
//! drain (SIGTERM, SIGINT)
//!   1  phase Draining                   /readyz says so
//!   2  registration socket removed      the kubelet sends nothing new
//!   3  sockets close                    calls under way end, waiting publishes come again
//!   4  pre-pull ends, pulls stop        where they can go on later
//!   5  state, HTTP, GPU thread end      health answers until here
//! ```
//!
//! Mounts stay: pods go on reading without the agent. SIGKILL at any moment costs
//! nothing but time: stale sockets are replaced at the next start, and the store is sound by itself.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use carport_csi::mount::KernelMounter;
use carport_csi::socket::{Socket, Sockets};
use carport_csi::volume::LayoutFolders;
use carport_csi::{BoundDriver, Driver, DriverConfig, Streams, Volumes};
use carport_image::runtime::Inventory;
use carport_image::{Puller, Store};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::api::tcp::Tcp;
use crate::api::{self, Api};
use crate::commands::fuse;
use crate::config::Config;
use crate::cri;
use crate::gpu::{self, GpuHandle};
use crate::http::{self, Pages};
use crate::kubelet::{self, Kubelet};
use crate::listen;
use crate::memory;
use crate::metrics::Metrics;
use crate::prepull::{self, IntoRuntime, Prepull};
use crate::scrub;
use crate::state::{Keeper, NodeState, Trouble};
use crate::warm::Warmer;
use crate::watermark;

/// How long calls under way may take to end; Kubernetes kills after 30 s.
const DRAIN: Duration = Duration::from_secs(10);
/// How long a GPU driver or a scraper's connection may hang at the end.
const PATIENCE: Duration = Duration::from_secs(2);

/// How far the agent is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not all is served yet.
    Starting,
    /// All is served.
    Serving,
    /// The end has begun; no new work is taken.
    Draining,
}

/// Runs the agent until SIGTERM or SIGINT.
///
/// # Errors
///
/// When something cannot be opened or bound, or a part ends that should not.
pub async fn run(config: Config) -> anyhow::Result<()> {
    // Before anything is bound: a signal that comes meanwhile is then not lost.
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    let agent = Agent::build(config).await?;
    agent
        .serve(async move {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            }
        })
        .await
}

/// Everything opened and bound, nothing served yet.
struct Agent {
    config: Config,
    puller: Puller,
    volumes: Volumes,
    driver: Option<BoundDriver>,
    gpus: GpuHandle,
    metrics: Arc<Metrics>,
    keeper: Keeper,
    prepull: watch::Sender<Arc<prepull::Report>>,
    inventory: watch::Sender<Arc<Inventory>>,
    troubles: watch::Sender<Arc<Vec<Trouble>>>,
    state: watch::Receiver<Arc<NodeState>>,
    sockets: Sockets,
    kubelet: Option<Kubelet>,
    socket: Socket,
    tcp: Option<Tcp>,
    http: tokio::net::TcpListener,
}

impl Agent {
    async fn build(config: Config) -> anyhow::Result<Self> {
        anyhow::ensure!(
            !config.csi.enabled || rustix::process::geteuid().is_root(),
            "csi.enabled: mounting volumes needs root; run the agent as root, or write false \
             (--csi false)"
        );
        if let Err(error) = listen::raise_open_files() {
            tracing::warn!(%error, "cannot raise the limit of open files; leaving it as it is");
        }
        // The socket first: where another agent runs, nothing of its store is touched.
        let socket = api::bind(&config.api.socket)?;
        let tcp = Tcp::bind(&config.api.tcp)?;
        let http = http::bind(config.http.listen)?;
        let root = config.root.clone();
        let store = tokio::task::spawn_blocking(move || Store::open(root)).await??;
        let store = store.with_limits(config.limits());
        let sources = config.sources()?;
        let puller = Puller::new(store, sources, config.pull_options());
        puller.set_bandwidth(config.bandwidth());
        let layouts = LayoutFolders::new(&config.csi.layout_folders);
        let metrics = Arc::new(Metrics::default());
        let mut volumes = Volumes::new(puller.clone(), Arc::new(KernelMounter), layouts)
            .with_pull_grace(config.pull.grace_period);
        if let Some(max_pin) = config.csi.max_pin {
            volumes = volumes.with_max_pin(max_pin);
        }
        if let Some(check) = config.access_check() {
            volumes = volumes.with_access_check(check);
        }
        if config.csi.enabled {
            let streams =
                Streams::new(config.stream_folder(), puller.clone(), fuse::starter(&config));
            let events = metrics.streams.clone();
            volumes = volumes.with_streams(streams.observed_by(move |event| events.observe(event)));
        }
        let counted = metrics.connections.clone();
        let sockets = Sockets::new(move |event| counted.observe(event));
        let (mut driver, mut kubelet) = (None, None);
        if config.csi.enabled {
            let cannot_mount = tokio::task::spawn_blocking(kubelet::cannot_mount).await?;
            if let Some(why) = &cannot_mount {
                tracing::error!(%why, "this node cannot mount volumes; every publish is refused");
                volumes = volumes.refusing(why);
            }
            let bound = bind_driver(&config, &volumes, &sockets, &metrics)?;
            kubelet = Some(Kubelet::new(&config, bound.kubelet(), sockets.missing(), cannot_mount));
            driver = Some(bound);
        }
        if driver.is_some() {
            let found = volumes.reconcile(&config.csi.kubelet_dir.join("pods")).await?;
            tracing::info!(?found, "volumes from before");
        }
        let gpus = gpu::start(config.gpu_options()).context("start the GPU thread")?;
        let (prepull, reported) = watch::channel(Arc::default());
        let (inventory, listed) = watch::channel(Arc::default());
        let (troubles, judged) = watch::channel(Arc::default());
        let (keeper, state) = Keeper::new(
            puller.clone(),
            volumes.clone(),
            gpus.reader(),
            reported,
            listed,
            judged,
            Arc::clone(&metrics),
        )
        .await?;
        Ok(Self {
            config,
            puller,
            volumes,
            driver,
            gpus,
            metrics,
            keeper,
            prepull,
            inventory,
            troubles,
            state,
            sockets,
            kubelet,
            socket,
            tcp,
            http,
        })
    }

    async fn serve(self, end: impl Future<Output = &'static str>) -> anyhow::Result<()> {
        let Self {
            config,
            puller,
            volumes,
            driver,
            gpus,
            metrics,
            keeper,
            prepull,
            inventory,
            troubles,
            state,
            sockets,
            kubelet,
            socket,
            tcp,
            http,
        } = self;
        let warmer = Warmer::new(puller.store().clone());
        let (phase, phase_seen) = watch::channel(Phase::Starting);
        let (mut calls, mut work, mut rest) =
            (Group::default(), Group::default(), Group::default());
        let address = http.local_addr().context("ask for the HTTP address")?;

        let node = config.node_name.clone();
        let api = Api::new(
            node,
            state.clone(),
            phase_seen.clone(),
            puller.clone(),
            warmer.clone(),
            kubelet.clone(),
        );
        rest.start({
            let api = api.clone();
            |stop| async move {
                api.follow(stop).await;
                Ok(())
            }
        });
        calls.start({
            let api = api.clone();
            |stop| async move { api.serve(socket, sockets, stop).await }
        });
        let tcp_address = tcp.as_ref().map(|tcp| tcp.address().to_string());
        if let Some(tcp) = tcp {
            let (api, metrics) = (api.clone(), metrics.connections.clone());
            calls.start(|stop| async move { api.serve_tcp(tcp, metrics, stop).await });
        }
        if let Some(kubelet) = kubelet.clone() {
            rest.start(|stop| async move {
                kubelet.follow(troubles, stop).await;
                Ok(())
            });
        }
        if let Some(driver) = driver {
            calls.start(|stop| async move { Ok(driver.serve(stop.cancelled_owned()).await?) });
        }
        work.start(|stop| async move {
            volumes.keep_streams(stop).await;
            Ok(())
        });
        // One for all: it tells the inventory of pulls.
        let cri = config.cri();
        if let Some(list) = config.prepull.list.clone() {
            let runtime = cri.clone().map(|cri| IntoRuntime { cri, puller: puller.clone() });
            let prepull = Prepull {
                list,
                labels: config.prepull.node_labels.clone(),
                labels_file: config.prepull.node_labels_file.clone(),
                start_jitter: config.prepull.start_jitter,
                runtime,
                puller: puller.clone(),
                warmer: warmer.clone(),
                state: state.clone(),
                metrics: Arc::clone(&metrics),
                report: prepull,
            };
            work.start(|stop| async move {
                prepull.run(stop).await;
                Ok(())
            });
        }
        let (kept, measured) = (puller.clone(), Arc::clone(&metrics));
        work.start(|stop| async move {
            watermark::run(kept, measured, stop).await;
            Ok(())
        });
        if let Some(interval) = config.store.scrub.interval {
            let (puller, metrics) = (puller.clone(), metrics.scrub.clone());
            let rate = config.store.scrub.rate.bytes_per_second().get();
            work.start(move |stop| async move {
                scrub::run(puller, interval, rate, metrics, stop).await;
                Ok(())
            });
        }
        let containerd = puller.runtime().cloned();
        if containerd.is_some() || cri.is_some() {
            rest.start(|stop| async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = cri::inventory::follow(containerd, cri, &inventory) => {}
                }
                Ok(())
            });
        }
        rest.start(|stop| async move {
            keeper.run(stop).await;
            Ok(())
        });
        let freeing = puller.clone();
        rest.start(|stop| async move {
            tokio::select! {
                () = stop.cancelled() => Ok(()),
                never = memory::give_back(&freeing) => match never {},
            }
        });
        let pages = Pages {
            node_name: config.node_name.clone(),
            puller: puller.clone(),
            state,
            phase: phase_seen,
            kubelet,
            metrics,
        };
        rest.start(|stop| async move {
            http::serve(http, pages, stop).await;
            Ok(())
        });
        phase.send_replace(Phase::Serving);
        tracing::info!(
            node = %config.node_name,
            root = %config.root.display(),
            socket = %config.api.socket.display(),
            http = %address,
            tcp = tcp_address,
            version = env!("CARGO_PKG_VERSION"),
            "serving"
        );

        // A part that ends by itself takes the agent down: half an agent answers wrongly.
        let outcome = tokio::select! {
            reason = end => {
                tracing::info!(reason, "stopping");
                Ok(())
            }
            error = calls.failure() => Err(error),
            error = work.failure() => Err(error),
            error = rest.failure() => Err(error),
        };

        phase.send_replace(Phase::Draining);
        // Publishes that wait for a pull are answered before the pull is stopped under them.
        calls.end(DRAIN).await;
        work.end(DRAIN).await;
        warmer.shutdown().await;
        puller.shutdown().await;
        api.finish().await;
        rest.end(PATIENCE).await;
        gpus.shutdown(PATIENCE).await;
        tracing::info!("stopped; mounts stay");
        outcome
    }
}

/// Parts of the agent that end together.
#[derive(Default)]
struct Group {
    tasks: JoinSet<anyhow::Result<()>>,
    stop: CancellationToken,
}

impl Group {
    /// Starts a part that ends when its token is cancelled, and not before.
    fn start<F>(&mut self, part: impl FnOnce(CancellationToken) -> F)
    where
        F: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        self.tasks.spawn(part(self.stop.clone()));
    }

    /// Waits for a part to end that should not. A group without parts never fails.
    async fn failure(&mut self) -> anyhow::Error {
        match self.tasks.join_next().await {
            None => std::future::pending().await,
            Some(Ok(Ok(()))) => anyhow::anyhow!("a part of the agent ended by itself; see its log"),
            Some(Ok(Err(error))) => error,
            Some(Err(error)) => anyhow::Error::new(error).context("a part of the agent"),
        }
    }

    /// Ends all parts; what has not ended within `patience` is cut off.
    async fn end(mut self, patience: Duration) {
        self.stop.cancel();
        let all = async {
            while let Some(ended) = self.tasks.join_next().await {
                match ended {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::error!(error = format!("{error:#}"), "stop a part"),
                    Err(error) => tracing::error!(%error, "stop a part"),
                }
            }
        };
        if tokio::time::timeout(patience, all).await.is_err() {
            tracing::warn!(waited_s = patience.as_secs(), "what was under way is cut off");
        }
    }
}

/// Binds the driver's sockets; the kubelet learns of it when it is served.
fn bind_driver(
    config: &Config,
    volumes: &Volumes,
    sockets: &Sockets,
    metrics: &Metrics,
) -> anyhow::Result<BoundDriver> {
    let driver = DriverConfig::in_kubelet_folder(
        &config.csi.driver_name,
        &config.node_name,
        &config.csi.kubelet_dir,
    )?
    .with_logins(config.token_logins());
    let calls = metrics.volumes.clone();
    let driver = Driver::new(driver, volumes.clone())
        .observed_by(move |call| calls.observe(call))
        .with_sockets(sockets.clone());
    Ok(driver.bind()?)
}
