//! The agent's configuration: one YAML file, then `CARPORT_*`, then flags.
//!
//! ```text
//! defaults of this user ─► file ─► environment ─► flags ─► Config::check ─► everything else
//! ```
//!
//! What a [`Config`] holds has been checked: names are valid, numbers are in
//! their range, paths are absolute. The file is read by [`load`]; environment and flags
//! are one thing to [`crate::cli`], which lays them over the file. Nothing is
//! bound or opened before all of it has passed.
//!
//! Keys are camelCase as in Kubernetes, sizes (`64MiB`) and durations (`10s`)
//! are text. `docs/configuration.md` names every field; a test holds it true.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use carport_csi::TokenLogin;
use carport_image::Runtime;
use carport_image::pull::{AccessCheck, Bandwidth, PullOptions, RegistryAway};
use carport_image::runtime::{Namespace, RuntimeOptions};
use carport_image::source::{RegistryOptions, SourceError, Sources};
use carport_image::store::Limits;
use serde::{Deserialize, Serialize};

use crate::cri::Cri;
use crate::gpu::GpuOptions;

mod defaults;
pub mod load;
pub mod text;

pub use defaults::default_file;
pub use load::ConfigError;
pub use text::Rate;

/// Where CRI-O listens.
const CRIO_SOCKET: &str = "/run/crio/crio.sock";

/// All that can be configured. `Default` is what the user who runs the process gets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Config {
    /// This node's name in answers to schedulers; in a cluster the Kubernetes node name.
    #[serde(deserialize_with = "text::node_name")]
    pub node_name: String,
    /// The store's directory.
    #[serde(deserialize_with = "text::absolute")]
    pub root: PathBuf,
    /// How much the store may take.
    pub store: Capacity,
    /// The gRPC API.
    pub api: Api,
    /// Metrics and health.
    pub http: Http,
    /// The CSI driver.
    pub csi: Csi,
    /// Volumes that stream.
    pub stream: Stream,
    /// How registries are spoken to.
    pub registries: Registries,
    /// The node's container runtime, whose images need not be fetched.
    pub runtime: ContainerRuntime,
    /// How images are pulled.
    pub pull: Pull,
    /// What is pulled without being asked.
    pub prepull: Prepull,
    /// The GPU inventory.
    pub gpu: Gpu,
    /// What is logged.
    pub log: Log,
}

/// How much the store may take, when images are evicted, and how often it is verified.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Capacity {
    /// What it may take; absent: what its file system has.
    #[serde(
        serialize_with = "text::write_optional_size",
        deserialize_with = "text::optional_size"
    )]
    pub quota: Option<ByteSize>,
    /// The part of the quota, or of the file system, above which images are evicted.
    #[serde(deserialize_with = "text::part")]
    pub high_watermark: f64,
    /// The part down to which they are.
    #[serde(deserialize_with = "text::part")]
    pub low_watermark: f64,
    /// An image that was used so short ago stays.
    #[serde(serialize_with = "humantime_serde::serialize", deserialize_with = "text::duration")]
    pub keep_for: Duration,
    /// The verification of all that is stored, in the background.
    pub scrub: Scrub,
}

/// The gRPC API of this node.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Api {
    /// The unix socket that is served, mode 0660.
    #[serde(deserialize_with = "text::socket_path")]
    pub socket: PathBuf,
    /// The same over TCP.
    pub tcp: Tcp,
}

/// The gRPC API over TCP, with TLS.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Tcp {
    /// Address and port; absent: not served.
    #[serde(deserialize_with = "text::optional_socket_addr")]
    pub listen: Option<SocketAddr>,
    /// The agent's certificate chain, PEM.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub certificate: Option<PathBuf>,
    /// Its key, PEM.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub key: Option<PathBuf>,
    /// Callers need a certificate of one of these authorities, PEM.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub client_ca: Option<PathBuf>,
    /// Callers need a token of this file.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub tokens: Option<PathBuf>,
    /// Whether calls that change the node are served, to those who may.
    pub writes: bool,
}

/// Metrics, liveness and readiness over plain HTTP.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Http {
    /// Address and port; port 0 lets the system choose one, which is logged.
    #[serde(deserialize_with = "text::socket_addr")]
    pub listen: SocketAddr,
}

/// The CSI driver, which needs root and a kubelet directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Csi {
    /// Whether volumes are served.
    pub enabled: bool,
    /// The driver's name, as in the CSIDriver object and in pods.
    #[serde(deserialize_with = "text::driver_name")]
    pub driver_name: String,
    /// The kubelet's root directory; `plugins/` and `plugins_registry/` below it get the sockets.
    #[serde(deserialize_with = "text::absolute")]
    pub kubelet_dir: PathBuf,
    /// Folders in which a volume's image may be an OCI layout (`oci:/folder:tag`). None: pods
    /// name images in registries only.
    #[serde(deserialize_with = "text::absolutes")]
    pub layout_folders: Vec<PathBuf>,
    /// Who gets an image that is on the node already.
    pub image_access: ImageAccess,
    /// Registries that take a pod's service-account token as a password.
    pub service_account_tokens: Vec<ServiceAccountToken>,
    /// How long volumes may ask that their image stays after them; absent: not at all.
    #[serde(
        serialize_with = "humantime_serde::serialize",
        deserialize_with = "text::optional_long"
    )]
    pub max_pin: Option<Duration>,
}

/// Who gets an image that is on the node already.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ImageAccess {
    /// Whether the registry is asked if it would give the image to this pod, too.
    pub verify: bool,
    /// For how long its answer counts.
    #[serde(serialize_with = "humantime_serde::serialize", deserialize_with = "text::duration")]
    pub remember_for: Duration,
    /// What to do when it gives none.
    pub registry_away: RegistryAway,
}

/// A login with the pod's service-account token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountToken {
    /// The registry: `registry.example`, or `*.registry.example`.
    pub registry: String,
    /// The token's audience, which the CSIDriver's `tokenRequests` must name, too.
    pub audience: String,
    /// The name that goes with it.
    pub username: String,
}

/// Volumes that stream.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Stream {
    /// How long a read waits for bytes that have not come, before it is an error.
    #[serde(serialize_with = "humantime_serde::serialize", deserialize_with = "text::duration")]
    pub read_timeout: Duration,
    /// Whether the agent starts the process that serves them, where none runs.
    pub start: bool,
}

/// How registries are spoken to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Registries {
    /// Hosts (`registry.local:5000`, or `registry.local` for every port) that are spoken to
    /// without TLS.
    #[serde(deserialize_with = "text::hosts")]
    pub plain_http: Vec<String>,
    /// A docker `config.json` with credentials; absent: `$DOCKER_CONFIG` or `~/.docker`.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub docker_config: Option<PathBuf>,
    /// containerd's folder of `<registry>/hosts.toml`, whose mirrors, certificates and plain HTTP
    /// hold for pulls here, too; null for none. It need not exist.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub hosts_dir: Option<PathBuf>,
    /// How long a connection may take to come about.
    #[serde(serialize_with = "humantime_serde::serialize", deserialize_with = "text::duration")]
    pub connect_timeout: Duration,
    /// How long a registry may send nothing before the request is given up and tried again.
    #[serde(serialize_with = "humantime_serde::serialize", deserialize_with = "text::duration")]
    pub read_timeout: Duration,
    /// Connections to one registry at a time.
    #[serde(deserialize_with = "text::count::<_, 1, 256>")]
    pub connections: usize,
}

/// The node's container runtime.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ContainerRuntime {
    /// containerd.
    pub containerd: Containerd,
    /// The same runtime, or another, as the kubelet speaks to it.
    pub cri: CriEndpoint,
}

/// The Container Runtime Interface, through which images are pulled into the runtime.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CriEndpoint {
    /// Whether it is asked at all.
    pub enabled: bool,
    /// Its socket; absent: containerd's, else CRI-O's usual one, whichever is there.
    #[serde(deserialize_with = "text::optional_socket_path")]
    pub socket: Option<PathBuf>,
}

/// containerd, and what of it is used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Containerd {
    /// Whether it is asked at all.
    pub enabled: bool,
    /// Its gRPC socket, which need not exist.
    #[serde(deserialize_with = "text::socket_path")]
    pub socket: PathBuf,
    /// The namespaces whose blobs are used, in the order in which they are asked.
    #[serde(serialize_with = "text::write_namespaces", deserialize_with = "text::namespaces")]
    pub namespaces: Vec<Namespace>,
}

/// How images are pulled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Pull {
    /// Layers on their way at a time, over all pulls.
    #[serde(deserialize_with = "text::count::<_, 1, 64>")]
    pub concurrent_layers: usize,
    /// Connections within one layer.
    #[serde(deserialize_with = "text::count::<_, 1, 64>")]
    pub connections_per_layer: usize,
    /// Bytes that may be fetched and not yet unpacked, over all pulls: the bound on memory.
    #[serde(serialize_with = "text::write_size", deserialize_with = "text::window")]
    pub window_bytes: ByteSize,
    /// Attempts for each request to a registry, the first included.
    #[serde(deserialize_with = "text::count::<_, 1, 100>")]
    pub attempts: usize,
    /// What all pulls together may take of the network; absent: all there is.
    pub bandwidth: Option<Rate>,
    /// What prefetches may take of it.
    pub prefetch_bandwidth: Option<Rate>,
    /// How long a pull goes on that no pod waits for any more, unless the kubelet asks again.
    #[serde(serialize_with = "humantime_serde::serialize", deserialize_with = "text::grace")]
    pub grace_period: Duration,
}

/// The verification of all that is stored, in the background.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Scrub {
    /// How long after a round the next one begins; absent: there is none.
    #[serde(
        serialize_with = "humantime_serde::option::serialize",
        deserialize_with = "text::optional_long_duration"
    )]
    pub interval: Option<Duration>,
    /// How fast it reads.
    pub rate: Rate,
}

/// What is pulled without being asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Prepull {
    /// A YAML file with the images to have on this node, followed when it changes.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub list: Option<PathBuf>,
    /// The first pull waits for a random part of this.
    #[serde(serialize_with = "humantime_serde::serialize", deserialize_with = "text::duration")]
    pub start_jitter: Duration,
    /// Labels of this node, for entries that ask for some.
    pub node_labels: BTreeMap<String, String>,
    /// A file with more of them, `key="value"` a line, as the downward API writes it.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub node_labels_file: Option<PathBuf>,
}

/// The GPU inventory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Gpu {
    /// Whether NVML is asked at all.
    pub enabled: bool,
    /// The NVML library; absent: found as the dynamic loader finds `libnvidia-ml.so.1`.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub library: Option<PathBuf>,
    /// How often the GPUs are looked at.
    #[serde(serialize_with = "humantime_serde::serialize", deserialize_with = "text::duration")]
    pub interval: Duration,
    /// The kubelet's PodResources socket; absent: below `csi.kubeletDir`.
    #[serde(deserialize_with = "text::optional_absolute")]
    pub pod_resources: Option<PathBuf>,
    /// Errors of the driver (XIDs) that make a GPU unhealthy, in place of the usual ones.
    pub fatal_xids: Vec<u32>,
}

/// What is logged, to standard error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Log {
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as
    /// `info,carport_image=debug`.
    #[serde(deserialize_with = "text::log_level")]
    pub level: String,
    /// One line of text, or one JSON object, an event.
    pub format: LogFormat,
}

/// How a log event is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For collectors: one object a line.
    Json,
}

impl Config {
    /// Checks what no field can say alone. Called after the file, the environment and
    /// the flags have spoken.
    ///
    /// # Errors
    ///
    /// Names the field, and what to write.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.csi.enabled {
            let registration = self.csi_registration_socket();
            for socket in [&self.csi_socket(), &registration] {
                text::check_socket_path(socket)
                    .map_err(|why| ConfigError::field("csi.kubeletDir", &why))?;
            }
        }
        let Capacity { high_watermark, low_watermark, .. } = self.store;
        if low_watermark > high_watermark {
            return Err(ConfigError::field(
                "store.lowWatermark",
                &format!(
                    "{low_watermark} is more than store.highWatermark ({high_watermark}); lower the \
                     one or raise the other"
                ),
            ));
        }
        let Tcp { listen, certificate, key, client_ca, tokens, .. } = &self.api.tcp;
        if listen.is_some() {
            if certificate.is_none() || key.is_none() {
                let why = "TLS needs api.tcp.certificate and api.tcp.key; write both, or null";
                return Err(ConfigError::field("api.tcp.listen", why));
            }
            if client_ca.is_none() && tokens.is_none() {
                let why = "nobody would be asked who they are; write api.tcp.clientCa, \
                           api.tcp.tokens or both";
                return Err(ConfigError::field("api.tcp.listen", why));
            }
        }
        let connections = self.registries.connections;
        let too_few = |why: String| {
            ConfigError::field("registries.connections", &format!("{connections} {why}"))
        };
        if connections < self.pull.connections_per_layer {
            return Err(too_few(format!(
                "is less than pull.connectionsPerLayer ({}), which could never be reached; raise \
                 the one or lower the other",
                self.pull.connections_per_layer
            )));
        }
        // Where a registry serves no ranges, a layer holds its connection while it waits for
        // memory; the layer whose turn it is must still get one. There are as many again of
        // those that are waited for.
        if connections <= 2 * self.pull.concurrent_layers {
            return Err(too_few(format!(
                "is not more than twice pull.concurrentLayers ({}): layers from a registry without \
                 ranges hold a connection each, and none would be left; raise the one or lower \
                 the other",
                self.pull.concurrent_layers
            )));
        }
        Ok(())
    }

    /// Where the CSI socket stands, as the kubelet sees it.
    fn csi_socket(&self) -> PathBuf {
        self.csi.kubelet_dir.join("plugins").join(&self.csi.driver_name).join("csi.sock")
    }

    /// Where the kubelet looks for the driver's registration.
    fn csi_registration_socket(&self) -> PathBuf {
        let name = format!("{}-reg.sock", self.csi.driver_name);
        self.csi.kubelet_dir.join("plugins_registry").join(name)
    }

    /// Where the process that serves streaming volumes has its socket and its mounts.
    pub fn stream_folder(&self) -> PathBuf {
        self.api.socket.with_file_name("stream")
    }

    /// The places that pulls come from, the container runtime among them.
    ///
    /// # Errors
    ///
    /// As [`Sources::new`].
    pub fn sources(&self) -> Result<Sources, SourceError> {
        let sources = Sources::new(self.registry_options())?;
        let Containerd { enabled, socket, namespaces } = self.runtime.containerd.clone();
        Ok(match enabled {
            true => sources.with_runtime(Runtime::new(RuntimeOptions { socket, namespaces })),
            false => sources,
        })
    }

    /// The container runtime as the kubelet speaks to it; nothing where it is not to be asked.
    pub fn cri(&self) -> Option<Cri> {
        let CriEndpoint { enabled, socket } = &self.runtime.cri;
        let containerd = &self.runtime.containerd;
        let usual = || {
            let containerd = containerd.enabled.then(|| containerd.socket.clone());
            containerd.into_iter().chain([PathBuf::from(CRIO_SOCKET)]).collect()
        };
        let sockets = socket.clone().map_or_else(usual, |socket| vec![socket]);
        enabled.then(|| Cri::new(sockets))
    }

    /// What `carport-image` wants to know of it.
    pub fn registry_options(&self) -> RegistryOptions {
        RegistryOptions {
            plain_http: self.registries.plain_http.clone(),
            docker_config: self.registries.docker_config.clone(),
            connect_timeout: self.registries.connect_timeout,
            read_timeout: self.registries.read_timeout,
            connections_per_registry: self.registries.connections,
            hosts_dir: self.registries.hosts_dir.clone(),
        }
    }

    /// What the store keeps to.
    pub fn limits(&self) -> Limits {
        Limits {
            quota_bytes: self.store.quota.map(|quota| quota.as_u64()),
            high: self.store.high_watermark,
            low: self.store.low_watermark,
            keep_for: self.store.keep_for,
        }
    }

    /// What `carport-csi` wants to know of it.
    pub fn token_logins(&self) -> Vec<TokenLogin> {
        let logins = self.csi.service_account_tokens.iter().cloned();
        logins
            .map(|ServiceAccountToken { registry, audience, username }| TokenLogin {
                registry,
                audience,
                username,
            })
            .collect()
    }

    /// What `carport-csi` wants to know of it; nothing where images are everybody's.
    pub fn access_check(&self) -> Option<AccessCheck> {
        let ImageAccess { verify, remember_for, registry_away } = self.csi.image_access;
        verify.then_some(AccessCheck { remember_for, registry_away })
    }

    /// What the GPU thread wants to know of it.
    pub fn gpu_options(&self) -> GpuOptions {
        GpuOptions {
            enabled: self.gpu.enabled,
            library: self.gpu.library.clone(),
            interval: self.gpu.interval,
            pod_resources: self
                .gpu
                .pod_resources
                .clone()
                .unwrap_or_else(|| self.csi.kubelet_dir.join("pod-resources").join("kubelet.sock")),
            fatal_xids: self.gpu.fatal_xids.clone(),
            ..GpuOptions::default()
        }
    }

    /// What `carport-image` wants to know of it.
    pub fn pull_options(&self) -> PullOptions {
        PullOptions {
            concurrent_layers: self.pull.concurrent_layers,
            connections_per_layer: self.pull.connections_per_layer,
            window_bytes: self.pull.window_bytes.as_u64(),
            attempts: u32::try_from(self.pull.attempts).unwrap_or(u32::MAX),
        }
    }

    /// What pulling may take of the network.
    pub fn bandwidth(&self) -> Bandwidth {
        Bandwidth {
            total_bytes_per_second: self.pull.bandwidth.map(Rate::bytes_per_second),
            prefetch_bytes_per_second: self.pull.prefetch_bandwidth.map(Rate::bytes_per_second),
        }
    }
}

/// Whether `path` is written from the root, with nothing that climbs.
fn is_plain_absolute(path: &Path) -> bool {
    path.is_absolute() && !path.components().any(|c| c == std::path::Component::ParentDir)
}

#[cfg(test)]
mod tests;
