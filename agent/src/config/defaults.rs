//! What holds where nothing is said, and whose places are used: the machine's for root, their own
//! for an ordinary user.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use carport_csi::volume::PULL_GRACE;

use super::*;

impl Default for Config {
    fn default() -> Self {
        let home = Home::of_this_user();
        Self {
            node_name: host_name(),
            root: home.root(),
            store: Capacity::default(),
            api: Api { socket: home.socket(), tcp: Tcp::default() },
            http: Http::default(),
            csi: Csi { enabled: home == Home::System, ..Csi::default() },
            stream: Stream::default(),
            registries: Registries::default(),
            runtime: ContainerRuntime::default(),
            pull: Pull::default(),
            prepull: Prepull::default(),
            gpu: Gpu::default(),
            log: Log::default(),
        }
    }
}

impl Default for Api {
    fn default() -> Self {
        Self { socket: Home::of_this_user().socket(), tcp: Tcp::default() }
    }
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            quota: None,
            // About where the kubelet makes room for its own images; beyond that it evicts pods.
            high_watermark: 0.85,
            low_watermark: 0.8,
            // A pull may end while the kubelet waits to ask for it again.
            keep_for: Limits::default().keep_for,
            scrub: Scrub::default(),
        }
    }
}

impl Default for Http {
    fn default() -> Self {
        // Only this machine; the DaemonSet says [::], where a scraper must reach it.
        Self { listen: SocketAddr::from(([127, 0, 0, 1], 9760)) }
    }
}

impl Default for Csi {
    fn default() -> Self {
        Self {
            enabled: Home::of_this_user() == Home::System,
            driver_name: "csi.carport.dev".into(),
            kubelet_dir: "/var/lib/kubelet".into(),
            layout_folders: Vec::new(),
            image_access: ImageAccess::default(),
            service_account_tokens: Vec::new(),
            max_pin: Some(Duration::from_secs(7 * 24 * 3600)),
        }
    }
}

impl Default for ImageAccess {
    fn default() -> Self {
        Self {
            verify: true,
            // A right that is taken back is then felt within the hour; a registry is asked once an hour.
            remember_for: Duration::from_secs(3600),
            registry_away: RegistryAway::AllowKnown,
        }
    }
}

impl Default for Stream {
    fn default() -> Self {
        // Readers must end before those who watch them lose patience.
        Self { read_timeout: Duration::from_secs(60), start: true }
    }
}

impl Default for Registries {
    fn default() -> Self {
        Self {
            plain_http: Vec::new(),
            docker_config: None,
            hosts_dir: Some("/etc/containerd/certs.d".into()),
            connect_timeout: Duration::from_secs(10),
            read_timeout: Duration::from_secs(60),
            // Two layers at four connections, and as much again for a second pull.
            connections: 16,
        }
    }
}

impl Default for Containerd {
    fn default() -> Self {
        Self {
            // Its socket is root's.
            enabled: Home::of_this_user() == Home::System,
            socket: "/run/containerd/containerd.sock".into(),
            // The kubelet's.
            namespaces: Namespace::parse("k8s.io").into_iter().collect(),
        }
    }
}

impl Default for CriEndpoint {
    fn default() -> Self {
        // Its socket is root's.
        Self { enabled: Home::of_this_user() == Home::System, socket: None }
    }
}

impl Default for Pull {
    fn default() -> Self {
        let options = PullOptions::default();
        Self {
            concurrent_layers: options.concurrent_layers,
            connections_per_layer: options.connections_per_layer,
            window_bytes: ByteSize(options.window_bytes),
            attempts: options.attempts as usize,
            bandwidth: None,
            prefetch_bandwidth: None,
            grace_period: PULL_GRACE,
        }
    }
}

impl Default for Scrub {
    fn default() -> Self {
        // A terabyte in five hours, on disks that read many times as fast.
        Self { interval: Some(Duration::from_secs(7 * 86_400)), rate: Rate::SCRUB }
    }
}

impl Default for Prepull {
    fn default() -> Self {
        Self {
            list: None,
            // Spreads a fleet that starts at once, and is nothing beside a model's pull.
            start_jitter: Duration::from_secs(5),
            node_labels: BTreeMap::new(),
            node_labels_file: None,
        }
    }
}

impl Default for Gpu {
    fn default() -> Self {
        Self {
            enabled: true,
            library: None,
            interval: Duration::from_secs(10),
            pod_resources: None,
            fatal_xids: crate::gpu::xid::FATAL.to_vec(),
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

/// Whose places are the defaults.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Home {
    /// root: the machine's places.
    System,
    /// An ordinary user: their own.
    User { data: PathBuf, runtime: PathBuf, config: PathBuf },
}

impl Home {
    fn of_this_user() -> Self {
        Self::of(rustix::process::geteuid().is_root(), |name| {
            std::env::var_os(name).map(Into::into)
        })
    }

    fn of(root: bool, env: impl Fn(&str) -> Option<PathBuf>) -> Self {
        if root {
            return Self::System;
        }
        let absolute = |name: &str| env(name).filter(|path| path.is_absolute());
        let home = absolute("HOME").unwrap_or_else(|| PathBuf::from("/tmp"));
        let data = absolute("XDG_DATA_HOME").unwrap_or_else(|| home.join(".local/share"));
        let data = data.join("carport");
        Self::User {
            runtime: absolute("XDG_RUNTIME_DIR")
                .map_or_else(|| data.clone(), |d| d.join("carport")),
            config: absolute("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config")),
            data,
        }
    }

    fn root(&self) -> PathBuf {
        match self {
            Self::System => "/var/lib/carport".into(),
            Self::User { data, .. } => data.clone(),
        }
    }

    fn socket(&self) -> PathBuf {
        match self {
            Self::System => "/run/carport/carport.sock".into(),
            Self::User { runtime, .. } => runtime.join("carport.sock"),
        }
    }

    fn config_file(&self) -> PathBuf {
        match self {
            Self::System => "/etc/carport/config.yaml".into(),
            Self::User { config, .. } => config.join("carport/config.yaml"),
        }
    }
}

/// The file that is read when none is named, where it exists.
pub fn default_file() -> PathBuf {
    Home::of_this_user().config_file()
}

fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().to_lowercase();
    // A machine without a usable name still gets an agent; in a cluster the name is given.
    text::parse_node_name(&name).unwrap_or_else(|_| "localhost".into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn an_ordinary_user_gets_places_of_their_own() {
        let env = |name: &str| match name {
            "HOME" => Some(PathBuf::from("/home/ada")),
            "XDG_RUNTIME_DIR" => Some(PathBuf::from("/run/user/1000")),
            _ => None,
        };
        let home = Home::of(false, env);
        assert_eq!(home.root(), Path::new("/home/ada/.local/share/carport"));
        assert_eq!(home.socket(), Path::new("/run/user/1000/carport/carport.sock"));
        assert_eq!(home.config_file(), Path::new("/home/ada/.config/carport/config.yaml"));
        assert_eq!(Home::of(true, env), Home::System);
        assert_eq!(Home::System.root(), Path::new("/var/lib/carport"));
    }
}
