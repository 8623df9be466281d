//! Flags that lay over the configuration file: the agent's, and those of registries.

use std::ffi::{OsStr, OsString};
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Args;

use super::set;
use crate::config::{Config, text};

/// Flags of `carport agent`.
#[derive(Debug, Default, Args)]
pub struct AgentArgs {
    /// This node's name [default: the host's].
    #[arg(long, env = "CARPORT_NODE_NAME", value_name = "NAME", value_parser = text::parse_node_name)]
    pub node_name: Option<String>,
    /// Where metrics and health are served [default: 127.0.0.1:9760].
    #[arg(long, env = "CARPORT_HTTP_LISTEN", value_name = "IP:PORT", value_parser = text::parse_socket_addr)]
    pub http_listen: Option<SocketAddr>,
    /// Whether volumes are served to the kubelet [default: true for root].
    #[arg(long, env = "CARPORT_CSI", value_name = "BOOL")]
    pub csi: Option<bool>,
    /// The CSI driver's name [default: csi.carport.dev].
    #[arg(long, env = "CARPORT_CSI_DRIVER_NAME", value_name = "NAME", value_parser = text::parse_driver_name)]
    pub csi_driver_name: Option<String>,
    /// The kubelet's directory [default: /var/lib/kubelet].
    #[arg(long, env = "CARPORT_KUBELET_DIR", value_name = "DIR", value_parser = text::parse_absolute)]
    pub kubelet_dir: Option<PathBuf>,
    /// Folders in which a volume's image may be an OCI layout [default: none].
    #[arg(long, env = "CARPORT_CSI_LAYOUT_FOLDERS", value_name = "DIR", value_delimiter = ',', value_parser = text::parse_absolute)]
    pub csi_layout_folders: Vec<PathBuf>,
    /// The list of images to have on this node.
    #[arg(long, env = "CARPORT_PREPULL_LIST", value_name = "FILE", value_parser = text::parse_absolute)]
    pub prepull_list: Option<PathBuf>,
    /// Labels of this node, for entries of the list that ask for some; added to the file's.
    #[arg(long = "node-label", env = "CARPORT_NODE_LABELS", value_name = "KEY=VALUE", value_delimiter = ',', value_parser = text::parse_label)]
    pub node_labels: Vec<(String, String)>,
    /// A file with more labels, as the downward API writes it.
    #[arg(long, env = "CARPORT_NODE_LABELS_FILE", value_name = "FILE", value_parser = text::parse_absolute)]
    pub node_labels_file: Option<PathBuf>,
    /// Whether GPUs are looked at [default: true].
    #[arg(long, env = "CARPORT_GPU", value_name = "BOOL")]
    pub gpu: Option<bool>,
    /// The NVML library [default: as the dynamic loader finds it].
    #[arg(long, env = "CARPORT_GPU_LIBRARY", value_name = "FILE", value_parser = text::parse_absolute)]
    pub gpu_library: Option<PathBuf>,
    /// How registries are spoken to.
    #[command(flatten)]
    pub registry: RegistryArgs,
    /// Print the configuration that would be used, and exit.
    #[arg(long)]
    pub print_config: bool,
}

impl AgentArgs {
    /// Lays the flags over `config`.
    pub fn apply(&self, config: &mut Config) {
        set(&mut config.node_name, &self.node_name);
        set(&mut config.http.listen, &self.http_listen);
        set(&mut config.csi.enabled, &self.csi);
        set(&mut config.csi.driver_name, &self.csi_driver_name);
        set(&mut config.csi.kubelet_dir, &self.kubelet_dir);
        if !self.csi_layout_folders.is_empty() {
            config.csi.layout_folders.clone_from(&self.csi_layout_folders);
        }
        set(&mut config.gpu.enabled, &self.gpu);
        if self.gpu_library.is_some() {
            config.gpu.library.clone_from(&self.gpu_library);
        }
        if self.prepull_list.is_some() {
            config.prepull.list.clone_from(&self.prepull_list);
        }
        config.prepull.node_labels.extend(self.node_labels.iter().cloned());
        if self.node_labels_file.is_some() {
            config.prepull.node_labels_file.clone_from(&self.node_labels_file);
        }
        self.registry.apply(config);
    }
}

/// How registries are spoken to.
#[derive(Debug, Default, Clone, Args)]
pub struct RegistryArgs {
    /// Speak to these registries without TLS.
    #[arg(long, env = "CARPORT_PLAIN_HTTP", value_name = "HOST[:PORT]", value_delimiter = ',', value_parser = text::parse_host)]
    pub plain_http: Vec<String>,
    /// A docker config.json with credentials [default: $DOCKER_CONFIG or ~/.docker].
    #[arg(long, env = "CARPORT_DOCKER_CONFIG", value_name = "FILE", value_parser = text::parse_absolute)]
    pub docker_config: Option<PathBuf>,
    /// containerd's certs.d, with a hosts.toml a registry: mirrors, certificates, plain HTTP [default: /etc/containerd/certs.d].
    #[arg(long, env = "CARPORT_HOSTS_DIR", value_name = "DIR", value_parser = text::parse_absolute)]
    pub hosts_dir: Option<PathBuf>,
}

impl RegistryArgs {
    /// As they stand on a command line.
    pub fn flags(&self) -> Vec<OsString> {
        let hosts = self.plain_http.iter().map(|host| ("--plain-http", OsStr::new(host)));
        let paths = [("--docker-config", &self.docker_config), ("--hosts-dir", &self.hosts_dir)];
        let paths =
            paths.into_iter().filter_map(|(flag, path)| Some((flag, path.as_ref()?.as_os_str())));
        hosts.chain(paths).flat_map(|(flag, value)| [OsString::from(flag), value.into()]).collect()
    }

    /// Lays the flags over `config`.
    pub fn apply(&self, config: &mut Config) {
        if !self.plain_http.is_empty() {
            config.registries.plain_http.clone_from(&self.plain_http);
        }
        if self.docker_config.is_some() {
            config.registries.docker_config.clone_from(&self.docker_config);
        }
        if self.hosts_dir.is_some() {
            config.registries.hosts_dir.clone_from(&self.hosts_dir);
        }
    }
}
